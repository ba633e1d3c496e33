"""The teacher: state -> action.

It keeps no memory. Each turn it walks the customer's items through the procedure, answering every read from the calls
that the trajectory already holds; the first thing it needs and does not have is its next action. So it continues
rightly from any state, also one that a student wandered into.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from engrain.trajectory import Message, ToolCall

from .requests import CHANGES, REFUNDS, Item
from .rules import Rules

ATTEMPTS = 3
RENAMED = {"amount": "total", "days_since_delivery": "delivered_days_ago", "days_in_transit": "transit_days"}


class Act(Exception):
    """The next action: a call that is needed now."""

    def __init__(self, name: str, arguments: dict[str, Any], first_of_item: bool) -> None:
        self.name, self.arguments, self.first_of_item = name, arguments, first_of_item


class Stop(Exception):
    """This item ends here, with this result."""

    def __init__(self, result: str) -> None:
        self.result = result


@dataclass
class View:
    """The calls of a trajectory and what came back, in the order in which the procedure asks for them."""

    messages: Sequence[Message]
    notes: list[str] = field(default_factory=list)
    asked: int = 0

    def __post_init__(self) -> None:
        results = {message.tool_call_id: message for message in self.messages if message.role == "tool"}
        self.calls: dict[tuple[str, str], list[Message]] = {}
        self.order: dict[str, int] = {}
        for index, message in enumerate(self.messages):
            for call in message.tool_calls:
                if call.id in results:
                    self.calls.setdefault((call.name, _key(call.arguments)), []).append(results[call.id])
                    self.order[call.id] = index
        self.used: dict[tuple[str, str], int] = {}

    def get(self, tool: str, needs: Sequence[str] = (), **arguments: Any) -> dict[str, Any]:
        """The result of a call, or the decision to make it (again).

        Each `get` uses up attempts until one succeeded with every field that is needed. Raises `Act` when the call
        must be made, `Stop` when the record does not exist and `TimeoutError` when the tool keeps failing.
        """
        key = (tool, _key(json.dumps(arguments)))
        attempts = self.calls.get(key, [])[self.used.get(key, 0) :]
        for number, attempt in enumerate(attempts, 1):
            self.asked += 1
            if attempt.error == "missing_record":
                self.used[key] = self.used.get(key, 0) + number
                self.notes.clear()
                raise Stop("not found")
            result = {} if attempt.error else _fields(attempt.content)
            self.notes.clear()
            if not attempt.error and all(name in result for name in needs):
                self.used[key] = self.used.get(key, 0) + number
                return result
            if number == ATTEMPTS:
                self.used[key] = self.used.get(key, 0) + number
                raise TimeoutError(tool)
        raise Act(tool, arguments, self.asked == 0)


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


def within(view: View, value: int, limit: int, what: str) -> bool:
    """Compare in writing, so that the numbers stand beside each other before the decision."""
    fits = value <= limit
    view.notes.append(f"{what} {value} of {limit}: {'within' if fits else 'over'}")
    return fits


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
        view.notes.append("not confirmed, ignorable")


def _pay_back(item: Item, view: View, rules: Rules, tier: str, amount: int, method: str = "") -> str:
    method = method or view.get("get_payment", order_id=item.about, needs=("method",))["method"]
    fits = within(view, amount, rules.limits[tier], f"{tier} refund")
    if not fits and not view.get("request_approval", order_id=item.about, role=rules.role)["approved"]:
        return "denied by approver"
    if method == rules.method:
        view.notes.append(f"{rules.method}: credit")
        view.get("issue_credit", order_id=item.about, amount=amount)
        _confirm(view, "get_payment", item.about)
        return f"credited {amount}"
    view.get("issue_refund", order_id=item.about, amount=amount, api_version=rules.version)
    _confirm(view, "get_payment", item.about)
    return f"refunded {amount}"


def _send_again(item: Item, view: View, rules: Rules) -> str:
    view.get("send_replacement", order_id=item.about, api_version=rules.version)
    _confirm(view, "get_order", item.about)
    return "replaced"


def _in_window(item: Item, view: View, rules: Rules) -> bool:
    shipment = view.get("get_shipment", order_id=item.about, needs=("days_since_delivery",))
    late_report = item.kind in ("refund wrong", "return unwanted", "replace wrong")
    days = rules.return_days if late_report else rules.damage_days
    return within(view, shipment["days_since_delivery"], days, "days")


def _refund(item: Item, view: View, rules: Rules, tier: str) -> str:
    order = view.get("get_order", order_id=item.about, needs=("amount", "category"))
    if order["category"] == rules.category:
        return "denied by category"
    if not _in_window(item, view, rules):
        return "denied by window"
    return _pay_back(item, view, rules, tier, order["amount"])


def _replace(item: Item, view: View, rules: Rules, tier: str) -> str:
    order = view.get("get_order", order_id=item.about, needs=("amount", "category"))
    if order["category"] == rules.category:
        return "denied by category"
    if not _in_window(item, view, rules):
        return "denied by window"
    if view.get("check_stock", sku=order["sku"])["stock"] == 0:
        view.notes.append("no stock: refund")
        return _pay_back(item, view, rules, tier, order["amount"])
    return _send_again(item, view, rules)


def _duplicate(item: Item, view: View, rules: Rules, tier: str) -> str:
    payment = view.get("get_payment", order_id=item.about, needs=("charges", "method"))
    if payment["charges"] < 2:
        return "denied, one charge"
    amount = view.get("get_order", order_id=item.about, needs=("amount",))["amount"]
    return _pay_back(item, view, rules, tier, amount, payment["method"])


def _overcharge(item: Item, view: View, rules: Rules, tier: str) -> str:
    payment = view.get("get_payment", order_id=item.about, needs=("excess", "method"))
    if payment["excess"] == 0:
        return "denied, no excess"
    return _pay_back(item, view, rules, tier, payment["excess"], payment["method"])


def _lost(item: Item, view: View, rules: Rules, tier: str) -> str:
    parcel = view.get("get_shipment", order_id=item.about, needs=("parcel",))["parcel"]
    if parcel != "lost":
        return f"denied, parcel {parcel}"
    if rules.lost == "replacement":
        return _send_again(item, view, rules)
    amount = view.get("get_order", order_id=item.about, needs=("amount",))["amount"]
    return _pay_back(item, view, rules, tier, amount)


def _is_open(item: Item, view: View, rules: Rules) -> bool:
    value = view.get("get_order", order_id=item.about, needs=(rules.field,))[rules.field]
    view.notes.append(f"{rules.field} is {value}")
    return value == "open"


def _cancel(item: Item, view: View, rules: Rules, tier: str) -> str:
    if not _is_open(item, view, rules):
        return "denied, not open"
    view.get("cancel_order", order_id=item.about)
    _confirm(view, "get_order", item.about)
    return "cancelled"


def _address(item: Item, view: View, rules: Rules, tier: str) -> str:
    if not _is_open(item, view, rules):
        return "denied, not open"
    view.get("update_address", order_id=item.about, address=item.address)
    return "address changed"


def _late(item: Item, view: View, rules: Rules, tier: str) -> str:
    days = view.get("get_shipment", order_id=item.about, needs=("days_in_transit",))["days_in_transit"]
    if within(view, days, rules.late_days, "days"):
        return "denied, not late"
    view.get("issue_credit", order_id=item.about, amount=rules.goodwill)
    _confirm(view, "get_payment", item.about)
    return f"credited {rules.goodwill}"


def _sensitive(item: Item, view: View, rules: Rules, tier: str) -> str:
    """Sensitive categories that the tenant escalates; every other matter becomes a ticket."""
    if team := rules.teams.get(item.kind):
        view.get("escalate", category=item.kind, team=team)
        return f"escalated to {team}"
    view.get("open_ticket", topic=item.kind)
    return "ticket opened"


def _set_ticket(item: Item, view: View, rules: Rules, tier: str) -> str:
    status = "closed" if item.kind == "close ticket" else "open"
    view.get("set_ticket", ticket_id=item.about, ticket=status)
    return f"ticket {status}"


def _read(tool: str, name: str):
    def read(item: Item, view: View, rules: Rules, tier: str) -> str:
        return str(view.get(tool, order_id=item.about, needs=(name,))[name])

    return read


def _order_status(item: Item, view: View, rules: Rules, tier: str) -> str:
    return str(view.get("get_order", order_id=item.about, needs=(rules.field,))[rules.field])


_PROCEDURES = {
    "order status": _order_status,
    "parcel status": _read("get_shipment", "parcel"),
    "payment status": _read("get_payment", "payment"),
    "payment method": _read("get_payment", "method"),
    "order amount": _read("get_order", "amount"),
    "order item": _read("get_order", "item"),
    "transit days": _read("get_shipment", "days_in_transit"),
    "stock": lambda item, view, rules, tier: str(view.get("check_stock", sku=item.about)["stock"]),
    "tier": lambda item, view, rules, tier: tier,
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


def needs_identity(items: Sequence[Item], rules: Rules) -> bool:
    guarded = {"every request": None, "changes": CHANGES, "refunds": REFUNDS}[rules.identity]
    return guarded is None or any(item.kind in guarded for item in items)


@dataclass
class Progress:
    """How far the items are: each finished item's result, and whether it took any call."""

    items: Sequence[Item]
    results: list[str] = field(default_factory=list)
    called: list[bool] = field(default_factory=list)

    def unspoken(self) -> list[str]:
        """Results to note down: of the last item that took calls, and of those after it that took none."""
        start = next((i for i in reversed(range(len(self.called))) if self.called[i]), 0)
        return [f"{number} {result}" for number, result in list(enumerate(self.results, 1))[start:]]


def next_turn(items: Sequence[Item], customer: str, pin: str, rules: Rules, messages: Sequence[Message]) -> Message:
    """The right next assistant turn."""
    return decide(items, customer, pin, rules, messages)[0]


def decide(
    items: Sequence[Item], customer: str, pin: str, rules: Rules, messages: Sequence[Message]
) -> tuple[Message, int]:
    """The next turn, and the index of the item that it serves (-1 for none in particular)."""
    view, progress = View(messages), Progress(items)
    try:
        tier, refusal = _identify(view, items, customer, pin, rules)
        if refusal:
            return Message(role="assistant", content=refusal), -1
        for item in items:
            view.asked = 0
            try:
                result = handle(item, view, rules, tier)
            except Stop as stop:
                result = stop.result
            progress.results.append(result)
            progress.called.append(view.asked > 0)
    except Act as act:
        item = -1 if act.name in ("get_customer", "verify_identity") else len(progress.results)
        return _call(act, item, progress, view), item
    reasoning = "; ".join([*view.notes, *progress.unspoken()])
    content = "\n".join(f"{number} {result}" for number, result in enumerate(progress.results, 1))
    return Message(role="assistant", reasoning=reasoning, content=content), -1


def _identify(view: View, items: Sequence[Item], customer: str, pin: str, rules: Rules) -> tuple[str, str]:
    """Find and, where the tenant asks for it, verify the customer; returns their tier and a refusal, one empty."""
    try:
        tier = view.get("get_customer", customer_id=customer, needs=("tier",))["tier"]
        guarded = needs_identity(items, rules)
        if guarded and not view.get("verify_identity", customer_id=customer, pin=pin)["verified"]:
            return "", "Identity not verified."
    except Stop:
        return "", "Customer not found."
    except TimeoutError:
        view.get("open_ticket", topic="handover")
        return "", "Handed over."
    return tier, ""


def _call(act: Act, item: int, progress: Progress, view: View) -> Message:
    made = sum(len(message.tool_calls) for message in view.messages)
    notes = list(view.notes)
    if not made:
        notes = [f"{number} {each.title}" for number, each in enumerate(progress.items, 1)]
    elif act.first_of_item and item >= 0:
        notes += [*progress.unspoken(), f"{item + 1} {progress.items[item].title}"]
    call = ToolCall(id=f"call_{made + 1}", name=act.name, arguments=json.dumps(act.arguments, ensure_ascii=False))
    return Message(role="assistant", reasoning="; ".join(notes), tool_calls=[call])
