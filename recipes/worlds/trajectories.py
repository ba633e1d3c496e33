"""Trajectories of many worlds: what a base is trained on.

The context in the prompt is full (procedures, rules, tool schemas), in part (procedures and rules) or none; worlds
whose context is left out come back, so that they can be learnt by heart.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from engrain.task import Task
from engrain.trajectory import Message, Trajectory
from engrain.workflow import Workflow
from worlds.catalogue import TRAINED, family
from worlds.disguise import disguised
from worlds.drawing import KINDS, draw
from worlds.openings import opened
from worlds.tasks import make_task, walk
from worlds.workflow import tenants, workflow

HOME = 10**9
"""Seeds from here on are of the worlds that come back."""
UNSEEN = 2 * 10**9
"""Seeds from here on are of the worlds that a base is probed on: nothing may train on them."""


@dataclass(frozen=True)
class Depths:
    """Shares of trajectories by how much of their context is in the prompt; the rest has none of it."""

    full: float = 0.5
    part: float = 0.4
    home: int = 8
    """How many worlds come back."""
    small: float = 0.0
    """Share of worlds with 2 or 3 kinds of request: less to read before each turn."""
    faults: float = 0.2
    many: float = 0.15
    """Share of tasks with 4 to 9 items."""
    long: float = 0.0
    """Share of tasks with 10 to 32."""
    per_world: int = 6
    disguised: float = 0.0
    """Share of worlds that are in other words than their family's, but for those that come back."""


def trajectories(
    seed: int,
    count: int,
    depths: Depths = Depths(),
    families: Sequence[str] = TRAINED,
    lexicon: Sequence[str] = (),
) -> Iterator[Trajectory]:
    """`count` successful teacher trajectories; the same for the same seed. Disguises take words of the lexicon."""
    rng = random.Random(f"worlds/{seed}")
    made = 0
    while made < count:
        depth = rng.choices(("full", "part", "none"), (depths.full, depths.part, 1 - depths.full - depths.part))[0]
        number = HOME + rng.randrange(depths.home) if depth == "none" else seed * 1_000_000 + made
        of = family(families[number % len(families)] if depth == "none" else rng.choice(families))
        if depth != "none" and rng.random() < depths.disguised:
            of = disguised(of, rng, lexicon)
        if depth != "none":
            of = opened(of, rng)
        world = draw(of, number, (2, 3) if depth != "none" and rng.random() < depths.small else KINDS)
        rules = tenants(world, 0, 2)
        flow = workflow(world, rules)
        for turn in range(min(depths.per_world, count - made)):
            tenant = list(rules)[turn % len(rules)]
            few, many, long = rng.choice((1, 1, 2, 3)), rng.randint(4, 9), rng.randint(10, 32)
            items = rng.choices((few, many, long), (1 - depths.many - depths.long, depths.many, depths.long))[0]
            faults = rng.choice((1, 1, 2)) if rng.random() < depths.faults else 0
            task = make_task(
                world, tenant, rules[tenant], rng, items, name=f"world-{seed}-{made}", seed=seed, faults=faults
            )
            yield _trajectory(flow, task, depth, list(walk(world, task)))
            made += 1


def _trajectory(flow: Workflow, task: Task, depth: str, turns: Sequence[Message]) -> Trajectory:
    full = "none" if depth == "none" else "full"
    system = Message(role="system", content=flow.system(task.tenant, full))
    return Trajectory(
        id=f"{task.id}:teacher",
        messages=[system, Message(role="user", content=task.request), *turns],
        tools=flow.schemas("full" if depth == "full" else "none"),
        workflow=flow.name,
        tenant=task.tenant,
        task=task.id,
        kind=task.kind,
        seed=task.seed,
        teacher="script",
    )
