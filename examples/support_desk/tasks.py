"""The task generator: seeded and without end.

A task is a customer with one or more items, a store in which each item's rule matters, and, in some, faults placed on
calls that the teacher would make, each with the recovery that is right for it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from engrain.task import Fault, Task
from engrain.tool import Tool
from engrain.trajectory import Message

from . import teacher
from .goal import items_of, rules_of
from .requests import KINDS, Item, request, say
from .rules import CATEGORIES, METHODS, TIERS, Rules
from .store import READS, Desk

GOODS = ("lamp", "chair", "desk", "kettle", "camera", "phone", "jacket", "boots", "tent", "watch", "guitar", "mixer")
STAGES = ("open", "packed", "shipped", "delivered")
STREETS = ("Oak Street", "Mill Lane", "Park Road", "High Street", "River Way", "Station Road", "Church Lane")
NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gia", "Hugo", "Ivy", "Jon", "Kim", "Leo", "Mia", "Noa")
CARRIERS = ("dhl", "ups", "dpd", "gls")
SPLITS = ("train", "held_out", "wording", "faults", "long20", "long40", "unseen")


def _code(letter: str, digits: int, rng: random.Random, taken: set[str]) -> str:
    while True:
        code = letter + "".join(rng.choice("0123456789") for _ in range(digits))
        if code not in taken:
            taken.add(code)
            return code


def _near(limit: int, rng: random.Random) -> int:
    """Half of the time close to a limit, where the rule decides; never below 1."""
    spread = max(3, limit // 4) if rng.random() < 0.5 else limit
    return max(1, limit + rng.randint(-spread, spread))


def _order_rows(item: Item, tier: str, rules: Rules, rng: random.Random, taken: set[str]) -> dict[str, list[Any]]:
    """One order with all its records, drawn so that the rules for its kind go either way."""
    order, sku = item.about, _code("S", 3, rng, taken)
    stages = [rng.choice(STAGES) for _ in range(3)]
    window = rules.damage_days if item.kind.endswith(("damaged", "defective")) else rules.return_days
    if item.kind in ("cancel", "change address") and rng.random() < 0.5:
        stages[("status", "state", "fulfilment").index(rules.field)] = "open"
    parcels = ("lost", "lost", "moving", "delivered") if item.kind == "lost parcel" else ("moving", "delivered", "held")
    rare = rng.random()
    method = (
        rules.method if rare < 0.04 else rng.choice(METHODS) if rare < 0.08 else rng.choice(("card", "paypal", "bank"))
    )
    rare = rng.random()
    category = (
        rules.category
        if rare < 0.04
        else rng.choice(CATEGORIES)
        if rare < 0.08
        else rng.choice(("home", "garden", "sport", "music"))
    )
    late = item.kind == "late credit"
    rows: dict[str, list[Any]] = {
        "orders": [
            {
                "order_id": order,
                "customer_id": "",
                "item": rng.choice(GOODS),
                "sku": sku,
                "category": category,
                "amount": _near(rules.limits[tier], rng),
                "status": stages[0],
                "state": stages[1],
                "fulfilment": stages[2],
                "address": f"{rng.randint(1, 99)} {rng.choice(STREETS)}",
            }
        ],
        "shipments": [
            {
                "order_id": order,
                "carrier": rng.choice(CARRIERS),
                "parcel": rng.choice(parcels),
                "days_in_transit": _near(rules.late_days, rng) if late else rng.randint(1, 12),
                "days_since_delivery": _near(window, rng) if rng.random() < 0.6 else rng.randint(0, window),
            }
        ],
        "payments": [
            {
                "order_id": order,
                "method": method,
                "payment": rng.choice(("paid", "pending")),
                "charges": rng.choice((1, 2)) if item.kind == "duplicate charge" else 1,
                "excess": rng.choice((0, _near(rules.limits[tier], rng))) if item.kind == "overcharge" else 0,
            }
        ],
        "inventory": [{"sku": sku, "stock": rng.choice((0, 1, 2, 5, 9, 14))}],
    }
    if rng.random() < 0.2:
        rows["approvals"] = [{"order_id": order, "role": "anyone", "approved": False}]
    return rows


def make_item(kind: str, rng: random.Random, taken: set[str]) -> Item:
    """An item of a kind, about an identifier that is not `taken` yet."""
    if kind in ("tier", "fraud", "safety", "legal", "press", "privacy", "invoice", "callback", "billing"):
        return Item(kind)
    if kind == "stock":
        return Item(kind, _code("S", 3, rng, taken))
    if kind.endswith("ticket"):
        return Item(kind, _code("T", 4, rng, taken))
    address = f"{rng.randint(1, 99)} {rng.choice(STREETS)}" if kind == "change address" else ""
    return Item(kind, _code("A", 4, rng, taken), address)


def make_task(
    rng: random.Random,
    tenant: str,
    rules: Rules,
    count: int,
    *,
    split: str,
    seed: int,
    held_out: bool = False,
    faults: int = 0,
) -> Task:
    """A task of `count` items for one tenant. `held_out` takes the wording that is never trained on."""
    taken: set[str] = set()
    customer, tier = _code("C", 4, rng, taken), rng.choice(TIERS)
    right_pin = "".join(rng.choice("0123456789") for _ in range(4))
    pin = right_pin if count > 3 or rng.random() > 0.04 else right_pin[::-1]
    kinds = rng.choices(KINDS, k=count) if count > 1 else [rng.choice(KINDS)]
    items = say([make_item(kind, rng, taken) for kind in kinds], rng, held_out)
    start: dict[str, list[Any]] = {
        "customers": [{"customer_id": customer, "name": rng.choice(NAMES), "tier": tier, "pin": right_pin}]
    }
    for item in items:
        if item.about.startswith("A"):
            for table, rows in _order_rows(item, tier, rules, rng, taken).items():
                start.setdefault(table, []).extend(rows)
        elif item.about.startswith("S"):
            start.setdefault("inventory", []).append({"sku": item.about, "stock": rng.randint(0, 30)})
        elif item.about.startswith("T"):
            status = "open" if item.kind == "close ticket" else "closed"
            start.setdefault("tickets", []).append({"ticket_id": item.about, "topic": "billing", "ticket": status})
    for row in start.get("orders", []):
        row["customer_id"] = customer
    goal = {"customer": customer, "pin": pin, "items": [asdict(item) for item in items], "rules": asdict(rules)}
    task = Task(
        id=f"{split}-{seed}",
        request=request(items, customer, pin, rng, held_out),
        tenant=tenant,
        kind=items[0].kind if count == 1 else "several",
        split=split,
        seed=seed,
        goal=goal,
        start=start,
    )
    return add_faults(task, faults, rng) if faults else task


def next_turn(task: Task, messages: Sequence[Message]) -> Message:
    """The teacher, for a task of this generator."""
    return decide(task, messages)[0]


def decide(task: Task, messages: Sequence[Message]) -> tuple[Message, int]:
    """The teacher's turn and the index of the item that it serves."""
    goal = task.goal
    return teacher.decide(items_of(task), goal["customer"], goal["pin"], task.tenant, rules_of(task), messages)


def walk(task: Task, tools: dict[str, Tool]) -> list[tuple[Message, int]]:
    """The teacher's turns without faults, each with the index of the item that it serves."""
    desk, messages, turns = Desk(task.start), [Message(role="user", content=task.request)], []
    while True:
        turn, item = decide(task, messages)
        turns.append((turn, item))
        if not turn.tool_calls:
            desk.close()
            return turns
        call = turn.tool_calls[0]
        seen = tools[call.name].call(call.arguments, desk)
        messages += [
            turn,
            Message(role="tool", content=seen.content, tool_call_id=call.id, name=call.name, error=seen.error),
        ]


TOOLS: dict[str, Tool] = {}
"""Filled by `workflow.py`; the generator needs to know what calls the teacher makes to place faults on them."""

_READS = {tool.__name__ for tool in READS}
_FIELDS = {"get_order": "amount", "get_shipment": "days_since_delivery", "get_payment": "charges"}
_CONFIRMED = ("issue_refund", "issue_credit", "send_replacement", "cancel_order")


def add_faults(task: Task, count: int, rng: random.Random) -> Task:
    """Put up to `count` faults on different tools; at most one of them, the last, is fatal."""
    turns = [(turn.tool_calls[0].name, item) for turn, item in walk(task, TOOLS) if turn.tool_calls]
    faults: list[Fault] = []
    fatal: dict[str, Any] = {}
    for place in sorted(rng.sample(range(len(turns)), min(count, len(turns)))):
        tool, item = turns[place]
        before = [name for name, _ in turns[:place]]
        if fatal or tool in {fault.tool for fault in faults} or tool == "open_ticket":
            continue
        confirms = bool(before) and before[-1] in _CONFIRMED and tool in _READS
        fault = _fault(tool, before.count(tool) + 1, confirms, rng)
        faults.append(fault)
        if fault.recovery == "fatal":
            done = sum(name not in _READS and served == item for name, served in turns[:place])
            fatal = {"item": item, "tool": tool, "writes": done, "exhausted": fault.kind != "missing_record"}
    goal = {**task.goal, "fatal": fatal} if fatal else task.goal
    return task.model_copy(update={"faults": tuple(faults), "goal": goal})


def _fault(tool: str, nth: int, confirms: bool, rng: random.Random) -> Fault:
    dice, field = rng.random(), _FIELDS.get(tool, "")
    outage = rng.choice(("timeout", "http_429", "http_500"))
    if confirms:
        times = rng.choice((1, 2, teacher.ATTEMPTS))
        return Fault(tool=tool, kind=outage, nth=nth, times=times, recovery="ignorable" if times == 3 else "normal")
    if tool in _READS and dice < 0.12 and tool not in ("verify_identity", "check_stock"):
        return Fault(tool=tool, kind="missing_record", nth=nth, recovery="fatal")
    if field and dice < 0.3:
        if field in teacher.RENAMED and rng.random() < 0.6:
            return Fault(
                tool=tool,
                kind="renamed_field",
                nth=nth,
                field=field,
                renamed=teacher.RENAMED[field],
                recovery="ignorable",
            )
        return Fault(tool=tool, kind="partial_result", nth=nth, field=field)
    if dice > 0.8:
        return Fault(tool=tool, kind=outage, nth=nth, times=teacher.ATTEMPTS, recovery="fatal")
    return Fault(tool=tool, kind=outage, nth=nth, times=rng.choice((1, 1, 2)))


def steps_of(task: Task) -> int:
    return len(walk(task, TOOLS))


def long_task(rng: random.Random, tenant: str, rules: Rules, steps: int, *, split: str, seed: int) -> Task:
    """A task that the teacher solves in `steps` to `steps + 3` turns."""
    count = max(2, round(steps / 4.2))
    while True:
        task = make_task(rng, tenant, rules, count, split=split, seed=seed)
        taken = steps_of(task)
        if steps <= taken <= steps + 3:
            return task
        count = max(2, count + (1 if taken < steps else -1))


def tasks(split: str, seed: int, tenants: dict[str, Rules]) -> Iterator[Task]:
    """Tasks of a split without end, tenants in turn. The train split mixes single, multiple, long and faulty ones."""
    names = list(tenants)
    number = 0
    while True:
        task_seed = seed * 1_000_000 + number
        rng = random.Random(f"{split}/{task_seed}")
        tenant = names[number % len(names)]
        number += 1
        yield _one(split, rng, tenant, tenants[tenant], task_seed)


def _one(split: str, rng: random.Random, tenant: str, rules: Rules, seed: int) -> Task:
    few = rng.choice((1, 1, 2, 3))
    if split in ("long20", "long40"):
        return long_task(rng, tenant, rules, int(split.removeprefix("long")), split=split, seed=seed)
    if split == "faults":
        return make_task(rng, tenant, rules, few, split=split, seed=seed, faults=rng.choice((1, 1, 2)))
    if split == "train":
        dice = rng.random()
        count = few if dice < 0.8 else rng.randint(4, 7) if dice < 0.92 else rng.randint(8, 24)
        faults = rng.choice((1, 1, 2)) if rng.random() < 0.3 else 0
        return make_task(rng, tenant, rules, count, split=split, seed=seed, faults=faults)
    return make_task(rng, tenant, rules, few, split=split, seed=seed, held_out=split == "wording")


def sample_start(rng: random.Random, rules: Rules) -> dict[str, list[Any]]:
    """Rows for a free request: customer C1000 with PIN 1234, gold, and the orders A1001 (damaged), A1002 and A1003."""
    start: dict[str, list[Any]] = {
        "customers": [{"customer_id": "C1000", "name": "Ada", "tier": "gold", "pin": "1234"}],
        "tickets": [{"ticket_id": "T1000", "topic": "billing", "ticket": "open"}],
    }
    items = (Item("refund damaged", "A1001"), Item("cancel", "A1002"), Item("lost parcel", "A1003"))
    for item in items:
        for table, rows in _order_rows(item, "gold", rules, rng, set()).items():
            start.setdefault(table, []).extend(
                row | {"customer_id": "C1000"} if table == "orders" else row for row in rows
            )
    return start
