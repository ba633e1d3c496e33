"""A world as an Engrain workflow: anything that runs a workflow runs a world."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import count

from engrain.context import Section
from engrain.task import Task
from engrain.trajectory import Message
from engrain.workflow import Phase, Workflow
from worlds.clerk import check, decide
from worlds.language import made_up, vary
from worlds.program import program
from worlds.store import Store
from worlds.tasks import Rules, draw_rules, long_task, make_task, write_rules
from worlds.world import World

PROCEDURE = """\
Each request has items, marked (a), (b) and so on; do them in order, one call at a time. First write a plan: a line \
an item, the words asked up to one that the index has, what the index goes on with, and the identifier. Then follow \
that procedure, step by step: begin each note with the item, quote a step before you decide it, with the tenant's rule \
and the words of the record beside each other, or what is asked up to its value, and compare numbers digit by digit. \
Answer with a line an item: its mark and its result.

"""
PHASES = {
    "plan": "name the procedure of each item, and begin.",
    "execute": "take the next step of the item at hand, or answer when all are done.",
    "validate": "read again what was changed, where the procedure says so, or take its next step.",
    "recover": "a call failed. Repeat it up to two times after a timeout, 429 or 500, or when a field is missing. If "
    "it still fails, ignore it if it only checks, otherwise hand the item over and go on with the next. A missing "
    "record ends the item as not found. A field with a new version in its name means the same.",
}


def tenants(world: World, seed: int, number: int) -> dict[str, Rules]:
    """`number` tenants of a world, by name."""
    rng, drawn = random.Random(f"tenants/{world.family.name}/{world.seed}/{seed}"), dict[str, Rules]()
    for _ in range(number):
        drawn[made_up(rng, drawn)] = draw_rules(world, rng)
    return drawn


def workflow(world: World, rules: Mapping[str, Rules], paraphrased: bool = False) -> Workflow:
    """The workflow of a world for some tenants, whose profiles may be in wordings that nothing is trained on."""
    rng = random.Random(f"profiles/{world.family.name}/{world.seed}")
    names = world.tool_names
    every = tuple(names.values())
    reads = tuple(names[name] for name in world.records)
    acts = {names[name] for name in world.used_actions}
    allowed = {"plan": reads}

    def phase_of(messages: Sequence[Message]) -> str:
        last = messages[-1]
        if last.role != "tool":
            return "plan"
        return "recover" if last.error else "validate" if last.name in acts else "execute"

    def tasks(split: str, seed: int) -> Iterator[Task]:
        for number in count():
            name = list(rules)[number % len(rules)]
            task_rng = random.Random(f"{world.family.name}/{world.seed}/{split}/{seed}/{number}")
            task_name = f"{split}-{seed}-{number}"
            if split == "long40":
                yield long_task(world, name, rules[name], task_rng, 40, name=task_name, split=split, seed=seed)
                continue
            items, faults = task_rng.choice((1, 1, 2, 3)), task_rng.choice((1, 1, 2)) if split == "faults" else 0
            yield make_task(
                world, name, rules[name], task_rng, items, name=task_name, split=split, seed=seed, faults=faults
            )

    return Workflow(
        name=f"{world.family.name}_{world.seed}",
        description=f"You work at {vary(world.family.places, rng)}.",
        procedure=PROCEDURE + world.manual,
        phases=tuple(Phase(name, text, allowed.get(name, every)) for name, text in PHASES.items()),
        tools=tuple(world.tools.values()),
        tenants={
            name: Section("tenant", name, tuple(write_rules(world, said, rng, paraphrased)))
            for name, said in rules.items()
        },
        phase_of=phase_of,
        tasks=tasks,
        splits=("train", "faults", "long40"),
        open=lambda task: Store(world, task),
        teacher=lambda task, messages: decide(world, task, messages),
        check=lambda task, store, messages: check(world, task, store, messages),
        code=program(world, rules),
    )
