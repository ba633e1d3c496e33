"""The teacher: state -> action.

It keeps no memory. Each turn it walks the customer's items through the procedure, answering every read from the calls
that the trajectory already holds; the first thing it needs and does not have is its next action. So it continues
rightly from any state, also one that a student wandered into.

Its notes say why: the customer's words are quoted before they are named, and a rule of the tenant is recalled beside
the value that it is held against. So each decision can be read, and a student decides from what stands right there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engrain.trajectory import Message, ToolCall

from .requests import CHANGES, REFUNDS, Item, group, mark
from .rules import Rules, judged, quoted, said

ATTEMPTS = 3
RENAMED = {"amount": "total", "days_since_delivery": "delivered_days_ago", "days_in_transit": "transit_days"}


class Act(Exception):
    """The next action: a call that is needed now."""

    def __init__(self, name: str, arguments: dict[str, Any]) -> None:
        self.name, self.arguments = name, arguments


class Stop(Exception):
    """This item ends here, with this result."""

    def __init__(self, result: str) -> None:
        self.result = result


@dataclass
class View:
    """The calls of a trajectory and what came back, in the order in which the procedure asks for them."""

    messages: Sequence[Message]
    tenant: str
    says: Mapping[str, str]
    """The tenant's rules by name."""
    notes: list[str] = field(default_factory=list)
    """What there is to say since the last result."""
    title: str = ""
    """The item at hand; every turn's notes start with it."""

    def __post_init__(self) -> None:
        results = {message.tool_call_id: message for message in self.messages if message.role == "tool"}
        self.calls: dict[tuple[str, str], list[Message]] = {}
        for message in self.messages:
            for call in message.tool_calls:
                if call.id in results:
                    self.calls.setdefault((call.name, _key(call.arguments)), []).append(results[call.id])
        self.used: dict[tuple[str, str], int] = {}

    def get(self, tool: str, needs: Sequence[str] = (), **arguments: Any) -> dict[str, Any]:
        """The result of a call, or the decision to make it (again).

        Each `get` uses up attempts until one succeeded with every field that is needed. Raises `Act` when the call
        must be made, `Stop` when the record does not exist and `TimeoutError` when the tool keeps failing.
        """
        key = (tool, _key(json.dumps(arguments)))
        attempts = self.calls.get(key, [])[self.used.get(key, 0) :]
        for number, attempt in enumerate(attempts, 1):
            self.notes[:] = [self.title] if self.title else []
            if attempt.error == "missing_record":
                self.used[key] = self.used.get(key, 0) + number
                raise Stop("not found")
            result = {} if attempt.error else _fields(attempt.content)
            if not attempt.error and all(name in result for name in needs):
                self.used[key] = self.used.get(key, 0) + number
                return result
            if number == ATTEMPTS:
                self.notes.append(f"failed {ATTEMPTS} times")
                self.used[key] = self.used.get(key, 0) + number
                raise TimeoutError(tool)
            self.notes.append(f"retry {number}")
        raise Act(tool, arguments)

    def rule(self, name: str, held_against: str = "") -> None:
        """Note what a rule of this tenant says, and what that means for the value at hand."""
        said = self.says.get(name, "none")
        self.notes.append(f"{self.tenant} {name}: {said}{', ' if held_against else ''}{held_against}")


def _key(arguments: str) -> str:
    try:
        return json.dumps(json.loads(arguments), sort_keys=True)
    except json.JSONDecodeError:
        return arguments


def _fields(content: str) -> dict[str, Any]:
    try:
        result = json.loads(content)
    except json.JSONDecodeError:
        return {}
    back = {renamed: name for name, renamed in RENAMED.items()}
    return {back.get(str(name), str(name)): value for name, value in result.items()} if isinstance(result, dict) else {}


def within(view: View, name: str, limit: int, at: str, record: Mapping[str, Any]) -> bool:
    """Compare in writing, so that the numbers stand beside each other before the decision."""
    view.rule(name, f"{quoted(at, record[at])}, {judged(limit, record[at])}")
    return record[at] <= limit


def same(view: View, name: str, word: str, at: str, record: Mapping[str, Any]) -> bool:
    view.rule(name, f"{quoted(at, record[at])}, {'same' if record[at] == word else 'other'}")
    return record[at] == word


def handle(item: Item, view: View, rules: Rules, tier: str) -> str:
    """Do one item; returns its result in words. Raises `Act` for the next call and `Stop` for an early result."""
    try:
        return _PROCEDURES.get(item.kind, _sensitive)(item, view, rules, tier)
    except TimeoutError:
        view.get("open_ticket", topic="handover")
        return "handed over"


def _confirm(view: View, tool: str, order: str) -> None:
    """Validate a write by reading it back; a read that keeps failing here is ignorable."""
    try:
        view.get(tool, order_id=order)
    except TimeoutError:
        view.notes.append("ignore it")


def _pay_back(item: Item, view: View, rules: Rules, tier: str, due: Mapping[str, Any], at: str = "amount") -> str:
    """Pay what the field `at` of a record says."""
    payment = due if "method" in due else view.get("get_payment", order_id=item.about, needs=("method",))
    view.notes.append(quoted("tier", tier))
    if not within(view, f"{tier} limit", rules.limits[tier], at, due):
        view.rule("approver")
        if not view.get("request_approval", order_id=item.about, role=rules.role)["approved"]:
            return "denied by approver"
    amount = due[at]
    if same(view, "credit method", rules.method, "method", payment):
        view.get("issue_credit", order_id=item.about, amount=amount)
        _confirm(view, "get_payment", item.about)
        return f"credited {amount}"
    view.rule("version")
    view.get("issue_refund", order_id=item.about, amount=amount, api_version=rules.version)
    _confirm(view, "get_payment", item.about)
    return f"refunded {amount}"


def _send_again(item: Item, view: View, rules: Rules) -> str:
    view.rule("version")
    view.get("send_replacement", order_id=item.about, api_version=rules.version)
    _confirm(view, "get_order", item.about)
    return "replaced"


def _taken_back(item: Item, view: View, rules: Rules) -> dict[str, Any]:
    """The order, if its category and the days since its delivery allow to take it back; else raises `Stop`."""
    order = view.get("get_order", order_id=item.about, needs=("amount", "category"))
    if same(view, "no returns", rules.category, "category", order):
        raise Stop("denied by category")
    shipment = view.get("get_shipment", order_id=item.about, needs=("days_since_delivery",))
    late_report = item.kind in ("refund wrong", "return unwanted", "replace wrong")
    name, days = ("return window", rules.return_days) if late_report else ("damage window", rules.damage_days)
    if not within(view, name, days, "days_since_delivery", shipment):
        raise Stop("denied by window")
    return order


def _refund(item: Item, view: View, rules: Rules, tier: str) -> str:
    return _pay_back(item, view, rules, tier, _taken_back(item, view, rules))


def _replace(item: Item, view: View, rules: Rules, tier: str) -> str:
    order = _taken_back(item, view, rules)
    if view.get("check_stock", sku=order["sku"])["stock"] == 0:
        view.notes.append("no stock: refund")
        return _pay_back(item, view, rules, tier, order)
    return _send_again(item, view, rules)


def _duplicate(item: Item, view: View, rules: Rules, tier: str) -> str:
    payment = view.get("get_payment", order_id=item.about, needs=("charges", "method"))
    if payment["charges"] < 2:
        return "denied, one charge"
    order = view.get("get_order", order_id=item.about, needs=("amount",))
    return _pay_back(item, view, rules, tier, {**order, "method": payment["method"]})


def _overcharge(item: Item, view: View, rules: Rules, tier: str) -> str:
    payment = view.get("get_payment", order_id=item.about, needs=("excess", "method"))
    if payment["excess"] == 0:
        return "denied, no excess"
    return _pay_back(item, view, rules, tier, payment, "excess")


def _lost(item: Item, view: View, rules: Rules, tier: str) -> str:
    parcel = view.get("get_shipment", order_id=item.about, needs=("parcel",))["parcel"]
    if parcel != "lost":
        return f"denied, {quoted('parcel', parcel)}"
    view.rule("lost parcel")
    if rules.lost == "replacement":
        return _send_again(item, view, rules)
    return _pay_back(item, view, rules, tier, view.get("get_order", order_id=item.about, needs=("amount",)))


def _where(item: Item, view: View, rules: Rules) -> str:
    """Where the order stands, by the one field that counts."""
    value = str(view.get("get_order", order_id=item.about, needs=(rules.field,))[rules.field])
    view.rule("field", quoted(rules.field, value))
    return value


def _status(item: Item, view: View, rules: Rules, tier: str) -> str:
    return quoted(rules.field, _where(item, view, rules))


def _cancel(item: Item, view: View, rules: Rules, tier: str) -> str:
    if _where(item, view, rules) != "open":
        return "denied, order not open"
    view.get("cancel_order", order_id=item.about)
    _confirm(view, "get_order", item.about)
    return "cancelled"


def _address(item: Item, view: View, rules: Rules, tier: str) -> str:
    if _where(item, view, rules) != "open":
        return "denied, order not open"
    view.get("update_address", order_id=item.about, address=item.address)
    return "address changed"


def _late(item: Item, view: View, rules: Rules, tier: str) -> str:
    shipment = view.get("get_shipment", order_id=item.about, needs=("days_in_transit",))
    if within(view, "late mark", rules.late_days, "days_in_transit", shipment):
        return "denied, parcel not late"
    view.rule("goodwill")
    view.get("issue_credit", order_id=item.about, amount=rules.goodwill)
    _confirm(view, "get_payment", item.about)
    return f"credited {rules.goodwill}"


def _sensitive(item: Item, view: View, rules: Rules, tier: str) -> str:
    """Sensitive categories that the tenant escalates; every other matter becomes a ticket."""
    team = rules.teams.get(item.kind)
    view.rule(f"{item.kind} team")
    if team:
        view.get("escalate", category=item.kind, team=team)
        return f"escalated, {quoted('team', team)}"
    view.get("open_ticket", topic=item.kind)
    return "ticket opened"


def _set_ticket(item: Item, view: View, rules: Rules, tier: str) -> str:
    status = "closed" if item.kind == "close ticket" else "open"
    view.notes.append(quoted("ticket", status))
    view.get("set_ticket", ticket_id=item.about, ticket=status)
    return quoted("ticket", status)


def _read(tool: str, name: str):
    def read(item: Item, view: View, rules: Rules, tier: str) -> str:
        return quoted(name, view.get(tool, order_id=item.about, needs=(name,))[name])

    return read


def _stock(item: Item, view: View, rules: Rules, tier: str) -> str:
    return quoted("stock", view.get("check_stock", sku=item.about)["stock"])


def _tier(item: Item, view: View, rules: Rules, tier: str) -> str:
    return quoted("tier", tier)


_PROCEDURES = {
    "order status": _status,
    "parcel status": _read("get_shipment", "parcel"),
    "payment status": _read("get_payment", "payment"),
    "payment method": _read("get_payment", "method"),
    "order amount": _read("get_order", "amount"),
    "order item": _read("get_order", "item"),
    "transit days": _read("get_shipment", "days_in_transit"),
    "stock": _stock,
    "tier": _tier,
    "refund damaged": _refund,
    "refund defective": _refund,
    "refund wrong": _refund,
    "return unwanted": _refund,
    "replace damaged": _replace,
    "replace wrong": _replace,
    "duplicate charge": _duplicate,
    "overcharge": _overcharge,
    "lost parcel": _lost,
    "cancel": _cancel,
    "change address": _address,
    "late credit": _late,
    "close ticket": _set_ticket,
    "reopen ticket": _set_ticket,
}


def needs_identity(items: Sequence[Item], rules: Rules) -> str:
    """The mark of the first item for which this tenant verifies identity; empty if there is none."""
    guarded = {"every request": None, "changes": CHANGES, "refunds": REFUNDS}[rules.identity]
    return next((mark(place) for place, item in enumerate(items) if guarded is None or item.kind in guarded), "")


def plan(items: Sequence[Item]) -> str:
    """Each item in the customer's words, then what kind of thing it is."""
    return "\n".join(
        f"{mark(place)} {item.said} = {group(item.kind)} {mark(place)}: {item.title}"
        for place, item in enumerate(items)
    )


def decide(
    items: Sequence[Item], customer: str, pin: str, tenant: str, rules: Rules, messages: Sequence[Message]
) -> tuple[Message, int]:
    """The next turn, and the index of the item that it serves (-1 for none in particular)."""
    view, results = View(messages, tenant, said(rules)), list[str]()
    try:
        tier, refusal = _identify(view, items, customer, pin, rules)
        if refusal:
            return Message(role="assistant", content=refusal), -1
        for place, item in enumerate(items):
            view.title = f"{mark(place)}: {item.title}"
            view.notes.append(view.title)
            try:
                result = handle(item, view, rules, tier)
            except Stop as stop:
                result = stop.result
            results.append(f"{mark(place)}. {result}")
            view.notes.append(results[-1])
    except Act as act:
        item = -1 if act.name in ("get_customer", "verify_identity") else len(results)
        return _call(act, view, items), item
    return Message(role="assistant", reasoning="\n".join(view.notes), content="\n".join(results)), -1


def _identify(view: View, items: Sequence[Item], customer: str, pin: str, rules: Rules) -> tuple[str, str]:
    """Find and, where the tenant asks for it, verify the customer; returns their tier and a refusal, one empty."""
    try:
        tier = view.get("get_customer", customer_id=customer, needs=("tier",))["tier"]
        first = needs_identity(items, rules)
        view.notes.append(quoted("tier", tier))
        view.rule("identity", f"item {first}" if first else "no item")
        if first and not view.get("verify_identity", customer_id=customer, pin=pin)["verified"]:
            return "", "Identity not verified."
    except Stop:
        return "", "Customer not found."
    except TimeoutError:
        view.get("open_ticket", topic="handover")
        return "", "Handed over."
    return tier, ""


def _call(act: Act, view: View, items: Sequence[Item]) -> Message:
    made = sum(len(message.tool_calls) for message in view.messages)
    call = ToolCall(id=f"call_{made + 1}", name=act.name, arguments=json.dumps(act.arguments, ensure_ascii=False))
    return Message(role="assistant", reasoning="\n".join(view.notes) if made else plan(items), tool_calls=[call])
