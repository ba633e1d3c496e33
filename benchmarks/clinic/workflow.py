"""A clinic's desk of a family that no base was trained on, written as the bundled base reads procedures.

The support desk's procedure is prose, which that base cannot follow: there, prompting and orchestrating fail before
they can be compared with anything. Here they work. Half of the tenants are trained on; the others are split `unseen`.

    engrain compile benchmarks/clinic -o agents/clinic
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))

from worlds.catalogue import family
from worlds.drawing import draw
from worlds.tasks import long_task
from worlds.trajectories import UNSEEN
from worlds.workflow import tenants
from worlds.workflow import workflow as flow_of

from engrain.task import Task

FAMILY, SEED, TENANTS = "clinic", UNSEEN - 102, 24
"""The first of the families held out, and a seed that no probe draws, of a world with English names."""
WORLD = draw(family(FAMILY), SEED)
RULES = tenants(WORLD, 0, TENANTS)
SEEN = tuple(RULES)[: TENANTS // 2]
CALLS = {"long20": 20, "long40": 40}


def tasks(split: str, seed: int) -> Iterator[Task]:
    """Of the seen tenants, and of the others in split `unseen`."""
    rules = {name: said for name, said in RULES.items() if (name in SEEN) != (split == "unseen")}
    if split not in CALLS:
        yield from flow_of(WORLD, rules).tasks(split, seed)
    number = 0
    while True:
        name, task = list(rules)[number % len(rules)], f"{split}-{seed}-{number}"
        rng = random.Random(f"{FAMILY}/{task}")
        yield long_task(WORLD, name, rules[name], rng, CALLS[split], name=task, split=split, seed=seed)
        number += 1


workflow = replace(
    flow_of(WORLD, RULES), name=FAMILY, tasks=tasks, splits=("train", "held_out", "unseen", "faults", *CALLS)
)
