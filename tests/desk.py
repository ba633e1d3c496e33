"""A miniature workflow for tests: three tools over SQLite, two phases, two tenants, a teacher and a goal check.

Find the order; refund it if its amount is within the tenant's limit, else write a note; then answer.
"""

from __future__ import annotations

import json
import random
import sqlite3
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any, Literal

from engrain.context import Section
from engrain.errors import ToolFailure
from engrain.task import Task
from engrain.tool import from_function
from engrain.trajectory import Message, Outcome, ToolCall
from engrain.workflow import Phase, Workflow

LIMITS = {"acme": 50, "globex": 100}


class Desk:
    """The store of one task."""

    def __init__(self, orders: dict[str, int]) -> None:
        self.db = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
        self.db.execute("create table orders (id text primary key, amount integer, refunded integer default 0)")
        self.db.execute("create table notes (order_id text, topic text)")
        self.db.executemany("insert into orders (id, amount) values (?, ?)", orders.items())

    def close(self) -> None:
        self.db.close()


def find_order(desk: Desk, order_id: str) -> dict[str, Any]:
    """Read an order.

    Args:
        order_id: The order's number, such as A12.
    """
    row = desk.db.execute("select id, amount from orders where id = ?", (order_id,)).fetchone()
    if row is None:
        raise ToolFailure("missing_record", f"no order {order_id}")
    return {"id": row[0], "amount": row[1]}


def refund_order(desk: Desk, order_id: str, amount: int) -> dict[str, Any]:
    """Pay the amount of an order back.

    Args:
        order_id: The order's number.
        amount: How much, in euros.
    """
    desk.db.execute("update orders set refunded = refunded + ? where id = ?", (amount, order_id))
    return {"refunded": amount}


def write_note(desk: Desk, order_id: str, topic: Literal["over_limit", "handover"] = "over_limit") -> dict[str, Any]:
    """Leave a note on an order for a colleague.

    Args:
        order_id: The order's number.
        topic: What it is about.
    """
    desk.db.execute("insert into notes values (?, ?)", (order_id, topic))
    return {"noted": topic}


def tasks(split: str, seed: int) -> Iterator[Task]:
    ask = {"train": "Refund order {}.", "wording": "Give me my money back for {}!"}[split]
    for number in count():
        chance = random.Random(f"{split}/{seed}/{number}")
        order, amount = f"{chance.choice('ABCD')}{chance.randint(10, 99)}", chance.randint(1, 150)
        tenant = chance.choice(sorted(LIMITS))
        yield Task(
            id=f"{split}-{seed}-{number}",
            request=ask.format(order),
            tenant=tenant,
            kind="refund",
            split=split,
            seed=seed,
            goal={"order": order, "refund": amount if amount <= LIMITS[tenant] else 0},
            start={"orders": {order: amount, "Z00": 7}},
        )


def results(messages: Sequence[Message], tool: str) -> list[dict[str, Any]]:
    """What the successful calls of a tool gave."""
    return [json.loads(turn.content) for turn in messages if turn.name == tool and not turn.error]


def phase_of(messages: Sequence[Message]) -> str:
    return "act" if results(messages, "find_order") else "look"


def teacher(task: Task, messages: Sequence[Message]) -> Message:
    order = task.goal["order"]
    if messages[-1].error == "missing_record":
        return say(f"There is no order {order}.")
    found = results(messages, "find_order")
    if not found:
        return call("find_order", order_id=order)
    amount = found[-1].get("amount", found[-1].get("amount_v2", 0))
    if amount <= LIMITS[task.tenant]:
        done = results(messages, "refund_order")
        return say(f"Refunded {amount}.") if done else call("refund_order", order_id=order, amount=amount)
    noted = results(messages, "write_note")
    return say("It is over the limit.") if noted else call("write_note", order_id=order, topic="over_limit")


def check(task: Task, desk: Desk, messages: Sequence[Message]) -> Outcome:
    refunds = dict(desk.db.execute("select id, refunded from orders where refunded > 0").fetchall())
    notes = desk.db.execute("select order_id from notes").fetchall()
    order, refund = task.goal["order"], task.goal["refund"]
    checks = {
        "refund": refunds == ({order: refund} if refund else {}),
        "note": notes == ([] if refund else [(order,)]),
        "answer": messages[-1].role == "assistant" and bool(messages[-1].content),
    }
    wrong = [name for name, right in checks.items() if not right]
    return Outcome(success=not wrong, checks=checks, reason=", ".join(wrong))


def call(name: str, **arguments: Any) -> Message:
    return Message(role="assistant", tool_calls=[ToolCall(id="", name=name, arguments=json.dumps(arguments))])


def say(text: str) -> Message:
    return Message(role="assistant", content=text)


workflow = Workflow(
    name="desk",
    description="You refund orders.",
    procedure="Find the order. Refund it if its amount is within the limit, else write a note. Then answer.",
    phases=(
        Phase("look", "find the order.", ("find_order",)),
        Phase("act", "refund or note, then answer.", ("find_order", "refund_order", "write_note")),
    ),
    tools=tuple(from_function(function, state=Desk) for function in (find_order, refund_order, write_note)),
    tenants={name: Section("tenant", name, (f"Refund at most {limit} euros.",)) for name, limit in LIMITS.items()},
    phase_of=phase_of,
    tasks=tasks,
    splits=("train", "wording"),
    open=lambda task: Desk(task.start["orders"]),
    teacher=teacher,
    check=check,
)
