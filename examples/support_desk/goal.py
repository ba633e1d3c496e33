"""What a task should end in, worked out from the start rows and the rules alone, never from what the teacher did.

The check applies the expected writes to a fresh store and compares every table with the one that the agent left: a
missing write and a forbidden side effect both show as a difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engrain.task import Task
from engrain.trajectory import Message, Outcome

from . import store
from .requests import CHANGES, REFUNDS, Item, mark
from .rules import Rules, quoted

Write = tuple[str, dict[str, Any]]


def rules_of(task: Task) -> Rules:
    return Rules(**task.goal["rules"])


def items_of(task: Task) -> list[Item]:
    return [Item(**item) for item in task.goal["items"]]


class Books:
    """The start rows, by key."""

    def __init__(self, task: Task) -> None:
        keys = {"inventory": "sku", "customers": "customer_id", "tickets": "ticket_id"}
        self.rows = {
            table: {row[keys.get(table, "order_id")]: row for row in rows} for table, rows in task.start.items()
        }

    def __call__(self, table: str, key: str) -> dict[str, Any]:
        return self.rows.get(table, {}).get(key, {})


def pay_back(order: str, amount: int, tier: str, rules: Rules, books: Books) -> tuple[list[Write], str]:
    writes: list[Write] = []
    if amount > rules.limits[tier]:
        writes.append(("request_approval", {"order_id": order, "role": rules.role}))
        if books("approvals", order).get("approved", True) is False:
            return writes, "denied by approver"
    if books("payments", order)["method"] == rules.method:
        return [*writes, ("issue_credit", {"order_id": order, "amount": amount})], f"credited {amount}"
    refund = {"order_id": order, "amount": amount, "api_version": rules.version}
    return [*writes, ("issue_refund", refund)], f"refunded {amount}"


def expected_of(item: Item, tier: str, rules: Rules, books: Books) -> tuple[list[Write], str]:
    """The writes and the result that one item should end in, when no fault is fatal."""
    about, kind = item.about, item.kind
    order, shipment, payment = books("orders", about), books("shipments", about), books("payments", about)
    replacement: Write = ("send_replacement", {"order_id": about, "api_version": rules.version})
    if kind in ("fraud", "safety", "legal", "press", "privacy", "invoice", "callback", "billing"):
        if kind in rules.teams:
            team = rules.teams[kind]
            return [("escalate", {"category": kind, "team": team})], f"escalated, {quoted('team', team)}"
        return [("open_ticket", {"topic": kind})], "ticket opened"
    if kind in ("close ticket", "reopen ticket"):
        status = "closed" if kind == "close ticket" else "open"
        return [("set_ticket", {"ticket_id": about, "ticket": status})], quoted("ticket", status)
    if kind in ("cancel", "change address"):
        if order[rules.field] != "open":
            return [], "denied, order not open"
        if kind == "cancel":
            return [("cancel_order", {"order_id": about})], "cancelled"
        return [("update_address", {"order_id": about, "address": item.address})], "address changed"
    if kind == "late credit":
        if shipment["days_in_transit"] <= rules.late_days:
            return [], "denied, parcel not late"
        return [("issue_credit", {"order_id": about, "amount": rules.goodwill})], f"credited {rules.goodwill}"
    if kind == "lost parcel":
        if shipment["parcel"] != "lost":
            return [], f"denied, {quoted('parcel', shipment['parcel'])}"
        if rules.lost == "replacement":
            return [replacement], "replaced"
        return pay_back(about, order["amount"], tier, rules, books)
    if kind == "duplicate charge":
        if payment["charges"] < 2:
            return [], "denied, one charge"
        return pay_back(about, order["amount"], tier, rules, books)
    if kind == "overcharge":
        if payment["excess"] == 0:
            return [], "denied, no excess"
        return pay_back(about, payment["excess"], tier, rules, books)
    if kind in REFUNDS or kind in CHANGES:
        if order["category"] == rules.category:
            return [], "denied by category"
        window = rules.damage_days if "damaged" in kind or "defective" in kind else rules.return_days
        if shipment["days_since_delivery"] > window:
            return [], "denied by window"
        if kind.startswith("replace") and books("inventory", order["sku"])["stock"] > 0:
            return [replacement], "replaced"
        return pay_back(about, order["amount"], tier, rules, books)
    record, name = {
        "order status": (order, rules.field),
        "order amount": (order, "amount"),
        "order item": (order, "item"),
        "parcel status": (shipment, "parcel"),
        "transit days": (shipment, "days_in_transit"),
        "payment status": (payment, "payment"),
        "payment method": (payment, "method"),
        "stock": (books("inventory", about), "stock"),
        "tier": ({"tier": tier}, "tier"),
    }[kind]
    return [], quoted(name, record[name])


def expected(task: Task) -> tuple[list[Write], list[str]]:
    """All writes in order and every line of the answer."""
    rules, items, books = rules_of(task), items_of(task), Books(task)
    fatal: dict[str, Any] = task.goal.get("fatal") or {}
    handover: Write = ("open_ticket", {"topic": "handover"})
    customer = books("customers", task.goal["customer"])
    if fatal.get("item") == -1:
        return ([handover], ["Handed over."]) if fatal["exhausted"] else ([], ["Customer not found."])
    guarded = {"every request": None, "changes": CHANGES, "refunds": REFUNDS}[rules.identity]
    if customer["pin"] != task.goal["pin"] and (guarded is None or any(item.kind in guarded for item in items)):
        return [], ["Identity not verified."]
    writes: list[Write] = []
    lines: list[str] = []
    for place, item in enumerate(items):
        mine, result = expected_of(item, customer["tier"], rules, books)
        if fatal.get("item") == place:
            before = next((i for i, (tool, _) in enumerate(mine) if tool == fatal["tool"]), fatal["writes"])
            mine, result = mine[:before], "not found"
            if fatal["exhausted"]:
                mine, result = [*mine, handover], "handed over"
        writes += mine
        lines.append(f"{mark(place)}. {result}")
    return writes, lines


def check(task: Task, desk: store.Desk, messages: Sequence[Message]) -> Outcome:
    """Compare the final store and answer with what the task should end in."""
    if not task.goal:
        return Outcome(success=True, reason="a free request has no goal to check")
    writes, lines = expected(task)
    twin = store.Desk(task.start)
    try:
        for name, arguments in writes:
            getattr(store, name)(twin, **arguments)
        wanted, found = twin.dump(), desk.dump()
    finally:
        twin.close()
    missing = [table for table in wanted if any(row not in found[table] for row in wanted[table])]
    extra = [
        table
        for table in wanted
        if any(row not in wanted[table] for row in found[table]) or len(found[table]) > len(wanted[table])
    ]
    answer = messages[-1].content if messages[-1].role == "assistant" else ""
    checks = {
        "goal reached": not missing,
        "nothing forbidden": not extra,
        "answer right": answer.strip().splitlines() == lines,
    }
    if rules_of(task).identity == "every request" and writes and not task.goal.get("fatal"):
        called = [call.name for message in messages for call in message.tool_calls]
        first = next((i for i, name in enumerate(called) if name in {write[0] for write in writes}), len(called))
        checks["identity verified first"] = "verify_identity" in called[:first]
    wrong = [name for name, good in checks.items() if not good]
    detail = f" (missing in {missing}, unexpected in {extra})" if missing or extra else ""
    return Outcome(success=not wrong, checks=checks, reason=f"not {', not '.join(wrong)}{detail}" if wrong else "")
