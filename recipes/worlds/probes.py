"""What a base must be able to do with workflows that it has never met: the suite of `engrain base probe`.

All worlds and tenants are unseen; only `families` has families that are, too. Every probe of a seed meets the worlds,
tenants and tasks of that seed in the same order, so `tenants`, `edit` and `control` are about the same tasks.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, islice

from engrain.budget import Budget
from engrain.probe import Capability, Gate, NextTurn, Trial, WholeTask
from engrain.task import Task
from engrain.trajectory import Message, ToolCall
from engrain.workflow import Workflow
from worlds.catalogue import HELD_OUT, TRAINED, family
from worlds.clerk import expected
from worlds.drawing import draw
from worlds.spec import Jump, Over, Stop
from worlds.tasks import Rules, redrawn, walk
from worlds.trajectories import UNSEEN
from worlds.workflow import tenants, workflow
from worlds.world import World

TENANTS = 4
PER_TENANT = 2
SEARCHED = 20
"""Tasks of a tenant that are looked at, for those that have what a probe asks for."""
REDRAWN = 4
"""Times that a rule is drawn again, for a value that changes what is right."""
IDENTIFIER = re.compile(r"[A-Z]\d{4,}")
VERDICT = re.compile(r"\b(over|within)(, (?:un)?met)?; (stop|go on|go to \S.*)$")


@dataclass(frozen=True)
class Place:
    """A world with tenants."""

    world: World
    rules: Mapping[str, Rules]
    """By tenant."""
    flow: Workflow


Pick = Callable[[Place, Task, int], Trial | None]
"""(place, task, trials made for its tenant so far) -> a trial, if the task has what the probe asks for."""


def trials(families: Sequence[str], pick: Pick, seed: int, split: str = "train") -> Iterator[Trial]:
    """Without end: `PER_TENANT` of each of `TENANTS` in one world after the other."""
    order = random.Random(f"probes/{seed}").sample(families, len(families))
    for number in count():
        world = draw(family(order[number % len(order)]), UNSEEN + seed * 1_000_000 + number)
        rules = tenants(world, seed, TENANTS)
        place = Place(world, rules, workflow(world, rules))
        made = Counter[str]()
        for task in islice(place.flow.tasks(split, seed), SEARCHED * TENANTS):
            if made[task.tenant] < PER_TENANT and (trial := pick(place, task, made[task.tenant])) is not None:
                made[task.tenant] += 1
                yield trial
            if made.total() == PER_TENANT * TENANTS:
                break


def whole(place: Place, task: Task, made: int) -> WholeTask:
    return WholeTask(place.flow, task)


def copying(place: Place, task: Task, made: int) -> NextTurn | None:
    """A turn whose call carries identifiers."""
    turns = walk(place.world, task)
    carried = [(at, named) for at, turn in enumerate(turns) if (named := identifiers(turn.tool_calls))]
    if not carried:
        return None
    at, named = _rng(place, task).choice(carried)
    return NextTurn(place.flow, task, tuple(turns[:at]), partial(copies, named))


def identifiers(calls: Sequence[ToolCall]) -> dict[str, str]:
    """The arguments of a call that are identifiers; none unless there is exactly one call."""
    try:
        arguments = json.loads(calls[0].arguments) if len(calls) == 1 else {}
    except json.JSONDecodeError:
        return {}
    return {name: value for name, value in arguments.items() if IDENTIFIER.fullmatch(str(value))}


def copies(named: Mapping[str, str], turn: Message) -> bool:
    return identifiers(turn.tool_calls) == named


def comparing(place: Place, task: Task, made: int) -> NextTurn | None:
    """A turn whose note holds a value against a limit; it is over for every second one, so that guessing gets half."""
    wanted = "within" if made % 2 else "over"
    turns = walk(place.world, task)
    decided = [
        (at, step, verdict)
        for at, turn in enumerate(turns)
        for step in _limits(place.world)
        if (verdict := verdict_of(turn, step)).startswith(wanted)
    ]
    if not decided:
        return None
    at, step, verdict = _rng(place, task).choice(decided)
    return NextTurn(place.flow, task, tuple(turns[:at]), partial(decides, step, verdict))


def _limits(world: World) -> list[str]:
    """The marks of the steps that hold a value against a limit."""
    return [
        procedure.mark(place)
        for procedure in world.procedures.values()
        for place, step in enumerate(procedure.steps)
        if isinstance(step, (Stop, Jump)) and isinstance(step.when, Over)
    ]


def verdict_of(turn: Message, step: str) -> str:
    """The verdict on a step and what follows from it, such as `within; go on`; empty if its line has none."""
    line = next((line for line in turn.reasoning.splitlines() if line.startswith(f"{step} ")), "")
    found = VERDICT.search(line)
    return found[0] if found else ""


def decides(step: str, verdict: str, turn: Message) -> bool:
    return verdict_of(turn, step) == verdict


def edited(place: Place, task: Task, made: int) -> WholeTask | None:
    """The task after an edit of one line of its tenant's profile that changes what is right."""
    world, rules, rng = place.world, task.goal["rules"], _rng(place, task)
    right = expected(world, task)
    for name in rng.sample(list(rules), len(rules)) * REDRAWN:
        changed = redrawn(world, rules, name, rng)
        after = task.model_copy(update={"goal": {**task.goal, "rules": changed}})
        if expected(world, after) != right:
            return WholeTask(workflow(world, {**place.rules, task.tenant: changed}), after)
    return None


def _rng(place: Place, task: Task) -> random.Random:
    return random.Random(f"{place.flow.name}/{task.id}")


LONG = Budget(steps=128, completion_tokens=32_768, seconds=float("inf"))

suite = (  # the gates are those of a base of the size that two cores train
    Capability(
        "copy",
        "the next turn, after a history that the teacher wrote, calls with the right identifiers",
        partial(trials, TRAINED, copying),
        Gate(least=0.97),
    ),
    Capability(
        "compare",
        "the next turn says rightly whether a number or date is over a rule's limit, and what follows; half are over",
        partial(trials, TRAINED, comparing),
        Gate(least=0.92),
    ),
    Capability(
        "tenants",
        "whole tasks of unseen tenants in unseen worlds of trained families",
        partial(trials, TRAINED, whole),
        Gate(least=0.8),
    ),
    Capability(
        "families",
        "whole tasks of the families that are held out",
        partial(trials, HELD_OUT, whole),
        Gate(least=0.5),
    ),
    Capability(
        "edit",
        "whole tasks of `tenants` after an edit of one line of the profile that changes what is right",
        partial(trials, TRAINED, edited),
        Gate(least=0.75),
        before="tenants",
    ),
    Capability(
        "long40",
        "whole tasks of at least 40 calls, as `tenants`",
        partial(trials, TRAINED, whole, split="long40"),
        Gate(least=0.65),
        budget=LONG,
    ),
    Capability(
        "control",
        "the tasks of `tenants` with nothing of the context in the prompt",
        partial(trials, TRAINED, whole),
        instructions="none",
    ),
)
