"""Many tenants: what changes for an arm when there are ten, a hundred or a thousand of them.

Those that the tasks are of stay; the others' rules are drawn from theirs, with other numbers, so that every one is
plausible and few are alike. Invariant: the same workflow, split and count give the same crowd, and a larger one holds
all of a smaller.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

from engrain.agent import Agent
from engrain.context import Section
from engrain.spent import stopwatch
from engrain.task import Task
from engrain.workflow import Workflow

LOOKED_AT = 1_000
"""Tasks of a split, for the tenants that they are of."""


def crowded(workflow: Workflow, split: str, count: int, seed: int) -> Workflow:
    """The workflow with `count` tenants, and only the tasks of those that it keeps of its own.

    The first are the ones that the split's tasks of a seed ask for, in their order.
    """
    asked = dict.fromkeys(task.tenant for task in islice(workflow.tasks(split, seed), LOOKED_AT))
    own = [workflow.tenants[name] for name in asked if name in workflow.tenants]
    rng = random.Random(f"crowd/{workflow.name}")
    kept = {one.name: one for one in own[:count]}
    while own and len(kept) < count:
        drawn = _drawn(own, f"tenant_{len(kept)}", rng)
        kept[drawn.name] = drawn

    def tasks(of: str, seed: int) -> Iterator[Task]:
        return (task for task in workflow.tasks(of, seed) if task.tenant in kept)

    return replace(workflow, tenants=kept, tasks=tasks)


def _drawn(own: list[Section], name: str, rng: random.Random) -> Section:
    """A profile of as many rules as somebody has, each in somebody's words."""
    rules = []
    for place in range(len(rng.choice(own).rules)):
        of = rng.choice([one for one in own if len(one.rules) > place])
        parts = re.split(f"({re.escape(of.name)}|[1-9])", of.rules[place])
        rules.append("".join(name if part == of.name else _digit(part, rng) for part in parts))
    return Section("tenant", name, tuple(rules))


def _digit(part: str, rng: random.Random) -> str:
    return str(rng.randint(1, 9)) if part in "123456789" and part else part


@dataclass(frozen=True)
class Made:
    """Adapters for every tenant of a crowd."""

    tenants: int
    seconds: float
    megabytes: float
    """Of one tenant's, in memory."""


def make_all(agent: Agent, workflow: Workflow) -> Made:
    """A hypernetwork's adapters for every tenant of a workflow, one after the other."""
    adapters, spent = agent.adapters(agent.load_base()), stopwatch()
    for tenant in workflow.tenants:
        for context in agent.contexts(workflow, tenant).values():
            adapters(context)
    seconds, (count, size) = spent().seconds, adapters.kept()
    phases = len(agent.contexts(workflow, next(iter(workflow.tenants))))
    return Made(len(workflow.tenants), seconds, phases * size / max(1, count) / 1e6)
