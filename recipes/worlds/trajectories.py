"""Trajectories of many worlds: what a base is trained on.

The context in the prompt is full (procedures, rules, tool schemas), in part (procedures and rules) or none; worlds
whose context is left out come back, so that they can be learnt by heart.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from engrain.task import Task
from engrain.trajectory import Message, Trajectory
from engrain.workflow import Workflow
from worlds.catalogue import TRAINED, family
from worlds.disguise import disguised
from worlds.drawing import KINDS, draw
from worlds.lookalikes import lookalikes
from worlds.openings import opened
from worlds.tasks import Rules, make_task, redrawn, walk
from worlds.workflow import tenants, workflow
from worlds.world import World

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
    """Share of tasks with 10 to 44."""
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
    for one in _cases(random.Random(f"worlds/{seed}"), seed, count, depths, families, lexicon):
        yield one.trajectory()


def edited_trajectories(
    seed: int, count: int, depths: Depths, families: Sequence[str] = TRAINED
) -> Iterator[tuple[Trajectory, Trajectory | None]]:
    """As `trajectories`, each beside what it is after an edit of one rule; None if no edit that was tried matters."""
    rng = random.Random(f"edited worlds/{seed}")
    for one in _cases(rng, seed, count, depths, families, ()):
        rules, before = one.task.goal["rules"], one.trajectory()
        edits = (one.edited(redrawn(one.world, rules, name, rng)) for name in rng.sample(list(rules), len(rules)))
        changed = (after for edit in edits if (after := edit.trajectory()).messages[1:] != before.messages[1:])
        yield before, next(changed, None)


@dataclass(frozen=True)
class _Case:
    world: World
    rules: Mapping[str, Rules]
    """By tenant."""
    flow: Workflow
    task: Task
    depth: str

    def edited(self, said: Rules) -> _Case:
        """The same task when its tenant's rules say this."""
        rules = {**self.rules, self.task.tenant: said}
        task = self.task.model_copy(update={"goal": {**self.task.goal, "rules": said}})
        return replace(self, rules=rules, flow=workflow(self.world, rules), task=task)

    def trajectory(self) -> Trajectory:
        """What the teacher does."""
        return _trajectory(self.flow, self.task, self.depth, walk(self.world, self.task))


def _cases(
    rng: random.Random, seed: int, count: int, depths: Depths, families: Sequence[str], lexicon: Sequence[str]
) -> Iterator[_Case]:
    made = 0
    while made < count:
        depth = rng.choices(("full", "part", "none"), (depths.full, depths.part, 1 - depths.full - depths.part))[0]
        number = HOME + rng.randrange(depths.home) if depth == "none" else seed * 1_000_000 + made
        of = family(families[number % len(families)] if depth == "none" else rng.choice(families))
        if depth != "none":
            of = lookalikes(of, rng)
        if depth != "none" and rng.random() < depths.disguised:
            of = disguised(of, rng, lexicon)
        if depth != "none":
            of = opened(of, rng)
        world = draw(of, number, (2, 3) if depth != "none" and rng.random() < depths.small else KINDS)
        rules = tenants(world, 0, 2)
        flow = workflow(world, rules)
        for turn in range(min(depths.per_world, count - made)):
            tenant = list(rules)[turn % len(rules)]
            few, many, long = rng.choice((1, 1, 2, 3)), rng.randint(4, 9), rng.randint(10, 44)
            items = rng.choices((few, many, long), (1 - depths.many - depths.long, depths.many, depths.long))[0]
            faults = rng.choice((1, 1, 2)) if rng.random() < depths.faults else 0
            task = make_task(
                world, tenant, rules[tenant], rng, items, name=f"world-{seed}-{made}", seed=seed, faults=faults
            )
            yield _Case(world, rules, flow, task, depth)
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
