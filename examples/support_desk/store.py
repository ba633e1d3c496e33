"""The desk's store: an SQLite database made afresh for each task, and the fifteen tools that read and change it."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from engrain.errors import ToolFailure

TABLES = {
    "customers": "customer_id, name, tier, pin",
    "orders": "order_id, customer_id, item, sku, category, amount, status, state, fulfilment, address",
    "shipments": "order_id, carrier, parcel, days_in_transit, days_since_delivery",
    "payments": "order_id, method, payment, charges, excess",
    "inventory": "sku, stock",
    "tickets": "ticket_id, topic, ticket",
    "approvals": "order_id, role, approved",
    "refunds": "order_id, amount, api_version",
    "credits": "order_id, amount",
    "replacements": "order_id, api_version",
    "escalations": "category, team",
}

Role = Literal["supervisor", "manager", "finance", "director"]
Version = Literal["v1", "v2", "v3", "v4"]
Team = Literal["risk", "trust", "legal", "care"]
Category = Literal["fraud", "safety", "legal", "press", "privacy"]
Topic = Literal["fraud", "safety", "legal", "press", "privacy", "invoice", "callback", "billing", "handover"]


class Desk:
    """One task's store. `start` maps a table to its rows, each a dict of columns."""

    def __init__(self, start: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        self.db = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
        self.db.row_factory = sqlite3.Row
        self.db.executescript(";".join(f"CREATE TABLE {name} ({columns})" for name, columns in TABLES.items()))
        for table, rows in start.items():
            for row in rows:
                self.insert(table, **row)

    def insert(self, table: str, **row: Any) -> None:
        marks = ", ".join("?" * len(row))
        self.db.execute(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({marks})", tuple(row.values()))

    def one(self, table: str, **key: str) -> dict[str, Any]:
        """The row with this key. Raises `ToolFailure("missing_record")` when there is none."""
        ((column, value),) = key.items()
        row = self.db.execute(f"SELECT * FROM {table} WHERE {column} = ?", (value,)).fetchone()
        if row is None:
            raise ToolFailure("missing_record", f"no {column} {value}")
        return {name: row[name] for name in row.keys() if name != column}  # noqa: SIM118 (sqlite3.Row)

    def dump(self) -> dict[str, list[tuple[Any, ...]]]:
        """Every table's rows in a fixed order: what the goal check compares."""
        return {name: sorted(map(tuple, self.db.execute(f"SELECT * FROM {name}")), key=repr) for name in TABLES}

    def close(self) -> None:
        self.db.close()


def get_customer(desk: Desk, customer_id: str) -> dict[str, Any]:
    """Look up a customer's name and tier.

    Args:
        customer_id: The customer's id, C and four digits.
    """
    row = desk.one("customers", customer_id=customer_id)
    return {"name": row["name"], "tier": row["tier"]}


def verify_identity(desk: Desk, customer_id: str, pin: str) -> dict[str, Any]:
    """Check the PIN that a customer gave.

    Args:
        customer_id: The customer's id, C and four digits.
        pin: The four digits that the customer gave.
    """
    return {"verified": desk.one("customers", customer_id=customer_id)["pin"] == pin}


def get_order(desk: Desk, order_id: str) -> dict[str, Any]:
    """Read an order: item, SKU, category, amount and its three status fields.

    Args:
        order_id: The order's id, A and four digits.
    """
    row = desk.one("orders", order_id=order_id)
    return {name: row[name] for name in ("item", "sku", "category", "amount", "status", "state", "fulfilment")}


def get_shipment(desk: Desk, order_id: str) -> dict[str, Any]:
    """Read where an order's parcel is, its days in transit and the days since it was delivered.

    Args:
        order_id: The order's id, A and four digits.
    """
    return desk.one("shipments", order_id=order_id)


def get_payment(desk: Desk, order_id: str) -> dict[str, Any]:
    """Read how an order was paid: method, payment status, number of charges and excess amount.

    Args:
        order_id: The order's id, A and four digits.
    """
    return desk.one("payments", order_id=order_id)


def check_stock(desk: Desk, sku: str) -> dict[str, Any]:
    """Count the units of an item in stock.

    Args:
        sku: The item's SKU, S and three digits.
    """
    return desk.one("inventory", sku=sku)


def issue_refund(desk: Desk, order_id: str, amount: int, api_version: Version) -> dict[str, Any]:
    """Refund an amount to the payment method of an order.

    Args:
        order_id: The order's id, A and four digits.
        amount: Whole currency units.
        api_version: The version that this tenant's payment system speaks.
    """
    desk.one("orders", order_id=order_id)
    desk.insert("refunds", order_id=order_id, amount=amount, api_version=api_version)
    desk.db.execute("UPDATE payments SET payment = 'refunded' WHERE order_id = ?", (order_id,))
    return {"ok": True}


def issue_credit(desk: Desk, order_id: str, amount: int) -> dict[str, Any]:
    """Give store credit for an order.

    Args:
        order_id: The order's id, A and four digits.
        amount: Whole currency units.
    """
    desk.one("orders", order_id=order_id)
    desk.insert("credits", order_id=order_id, amount=amount)
    desk.db.execute("UPDATE payments SET payment = 'credited' WHERE order_id = ?", (order_id,))
    return {"ok": True}


def send_replacement(desk: Desk, order_id: str, api_version: Version) -> dict[str, Any]:
    """Send the order's item again.

    Args:
        order_id: The order's id, A and four digits.
        api_version: The version that this tenant's warehouse speaks.
    """
    sku = desk.one("orders", order_id=order_id)["sku"]
    desk.insert("replacements", order_id=order_id, api_version=api_version)
    desk.db.execute("UPDATE inventory SET stock = stock - 1 WHERE sku = ?", (sku,))
    desk.db.execute(
        "UPDATE orders SET status = 'replaced', state = 'replaced', fulfilment = 'replaced' WHERE order_id = ?",
        (order_id,),
    )
    return {"ok": True}


def cancel_order(desk: Desk, order_id: str) -> dict[str, Any]:
    """Cancel an order that has not been sent.

    Args:
        order_id: The order's id, A and four digits.
    """
    desk.one("orders", order_id=order_id)
    desk.db.execute(
        "UPDATE orders SET status = 'cancelled', state = 'cancelled', fulfilment = 'cancelled' WHERE order_id = ?",
        (order_id,),
    )
    return {"ok": True}


def update_address(desk: Desk, order_id: str, address: str) -> dict[str, Any]:
    """Change the delivery address of an order.

    Args:
        order_id: The order's id, A and four digits.
        address: The new address: number and street.
    """
    desk.one("orders", order_id=order_id)
    desk.db.execute("UPDATE orders SET address = ? WHERE order_id = ?", (address, order_id))
    return {"ok": True}


def request_approval(desk: Desk, order_id: str, role: Role) -> dict[str, Any]:
    """Ask a person to approve an amount above the limit; the answer comes at once.

    Args:
        order_id: The order's id, A and four digits.
        role: Who is asked.
    """
    row = desk.db.execute(
        "SELECT approved FROM approvals WHERE order_id = ? AND role = 'anyone'", (order_id,)
    ).fetchone()
    approved = row is None or bool(row["approved"])
    desk.insert("approvals", order_id=order_id, role=role, approved=approved)
    return {"approved": approved}


def escalate(desk: Desk, category: Category, team: Team) -> dict[str, Any]:
    """Hand a sensitive matter to a team at once.

    Args:
        category: What the matter is about.
        team: The team that takes this category.
    """
    desk.insert("escalations", category=category, team=team)
    return {"ok": True}


def open_ticket(desk: Desk, topic: Topic) -> dict[str, Any]:
    """Open a ticket for a person to answer.

    Args:
        topic: What the ticket is about; handover when a tool keeps failing.
    """
    desk.insert("tickets", ticket_id="new", topic=topic, ticket="open")
    return {"ok": True}


def set_ticket(desk: Desk, ticket_id: str, ticket: Literal["open", "closed"]) -> dict[str, Any]:
    """Open or close an existing ticket.

    Args:
        ticket_id: The ticket's id, T and four digits.
        ticket: The new status.
    """
    desk.one("tickets", ticket_id=ticket_id)
    desk.db.execute("UPDATE tickets SET ticket = ? WHERE ticket_id = ?", (ticket, ticket_id))
    return {"ok": True}


READS = (get_customer, verify_identity, get_order, get_shipment, get_payment, check_stock)
WRITES = (
    issue_refund,
    issue_credit,
    send_replacement,
    cancel_order,
    update_address,
    request_approval,
    escalate,
    open_ticket,
    set_ticket,
)
