"""A library's lending desk: find the book, then lend it by the branch's rules. Change it into your own workflow.

Engrain reads `workflow` at the end. Try it: `engrain record . -o runs.jsonl -n 20`, then `engrain compile . -o agent`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engrain.errors import ToolFailure
from engrain.task import Task
from engrain.tool import from_function
from engrain.trajectory import Message, Outcome, ToolCall
from engrain.workflow import Phase, Workflow, read_tenants

TITLES = ("Emma", "Ulysses", "Beloved", "Dracula", "Persuasion", "Walden", "Middlemarch", "Frankenstein")
ASKS = {
    "train": ("I would like to borrow {}.", "Can I take {} home?", "Please lend me {}."),
    "held_out": ("Is {} there for me to borrow?", "May I have {}, please?"),
}
TENANTS = read_tenants(Path(__file__).parent / "tenants")


@dataclass
class Library:
    """The state that the tools act on: made afresh for each task."""

    copies: dict[str, int]
    loans: list[tuple[str, int]] = field(default_factory=list)


def find_book(library: Library, title: str) -> dict[str, str | int]:
    """Look a book up by its title.

    Args:
        title: The title as the reader wrote it.
    """
    if title not in library.copies:
        raise ToolFailure("missing_record", f"no book called {title}")
    return {"title": title, "copies": library.copies[title]}


def lend_book(library: Library, title: str, days: int) -> dict[str, str | int]:
    """Lend one copy of a book.

    Args:
        title: The title of the book.
        days: How many days the loan lasts.
    """
    library.copies[title] -= 1
    library.loans.append((title, days))
    return {"title": title, "days": days}


def phase_of(messages: Sequence[Message]) -> str:
    """Nothing is lent before it was looked up."""
    return "lend" if any(message.role == "tool" and not message.error for message in messages) else "find"


def teacher(task: Task, messages: Sequence[Message]) -> Message:
    """The right next turn, from any state."""
    results = [message for message in messages if message.role == "tool"]
    found = [json.loads(result.content) for result in results if result.name == "find_book" and not result.error]
    if any(result.name == "lend_book" and not result.error for result in results):
        return Message(role="assistant", content=f"{task.goal['title']} is yours for {days(task)} days.")
    if found and found[-1]["copies"] < 2:
        return Message(role="assistant", content="Sorry, the last copy stays here.")
    if found:
        return call(len(results), "lend_book", title=task.goal["title"], days=days(task))
    return call(len(results), "find_book", title=task.goal["title"])


def call(number: int, name: str, **arguments: str | int) -> Message:
    calls = [ToolCall(id=f"call_{number}", name=name, arguments=json.dumps(arguments))]
    return Message(role="assistant", tool_calls=calls)


def days(task: Task) -> int:
    return int(TENANTS[task.tenant].settings["days"])


def tasks(split: str, seed: int) -> Iterator[Task]:
    """Requests without end; the same split and seed give the same tasks."""
    random_ = random.Random(f"{split} {seed}")
    number = 0
    while True:
        title, ask, tenant = random_.choice(TITLES), random_.choice(ASKS[split]), random_.choice(sorted(TENANTS))
        copies = {name: random_.randint(1, 4) for name in TITLES}
        yield Task(
            id=f"{split}-{seed}-{number}",
            request=ask.format(title),
            tenant=tenant,
            split=split,
            seed=seed,
            goal={"title": title},
            start={"copies": copies},
        )
        number += 1


def open_library(task: Task) -> Library:
    """The task's own library, or a full one for a request typed by hand."""
    return Library(dict(task.start.get("copies") or dict.fromkeys(TITLES, 3)))


def check(task: Task, library: Library, messages: Sequence[Message]) -> Outcome:
    """Whether exactly the right loan was made."""
    if "title" not in task.goal:
        return Outcome(success=True, reason="a request without a goal is not checked")
    title = task.goal["title"]
    expected = [(title, days(task))] if task.start["copies"][title] > 1 else []
    wrong = "" if library.loans == expected else f"loans are {library.loans}"
    return Outcome(success=not wrong, checks={"loans": not wrong}, reason=wrong)


workflow = Workflow(
    name="library",
    description="You are the lending desk of a library.",
    procedure="Find the book that the reader asks for. Then lend it by the branch's rules, or say why not.",
    phases=(
        Phase("find", "Look the book up by its title.", ("find_book",)),
        Phase("lend", "Lend it if the rules allow.", ("find_book", "lend_book")),
    ),
    tools=(from_function(find_book, state=Library), from_function(lend_book, state=Library)),
    tenants=TENANTS,
    phase_of=phase_of,
    tasks=tasks,
    splits=("train", "held_out"),
    open=open_library,
    teacher=teacher,
    check=check,
)
