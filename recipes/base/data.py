"""What the bundled base trains on: drills and trajectories of procedural worlds (`recipes/worlds`), never of the
families that are held out nor of the support desk.

Each stage is a mix of its own. Nothing but routing comes first, then nothing but decisions: all of a trajectory depends
on them, and diluted in it, routing was still at chance after 20 million tokens. Then all drills: short rows, most of
whose tokens teach. Then trajectories, of small worlds more often than of large ones, since a large one is much to read
before each turn. Last come long requests, faulty tools and large worlds, while the learning rate falls.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engrain.trajectory import Trajectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from worlds.disguise import DISGUISED
from worlds.drills import drills
from worlds.english import NONE, English
from worlds.trajectories import Depths, trajectories


@dataclass(frozen=True)
class Stage:
    """A part of the training."""

    name: str
    parts: int
    """Of the recipe's tokens, which all stages together divide."""
    drills: float
    """Share of drills among its rows."""
    depths: Depths
    only: str = ""
    """The one kind of drills; all by default."""
    lr: float = 1.0
    """Where the learning rate starts, as a share of the recipe's; it falls as a cosine."""
    final: float = 1.0
    """What it falls to, as a share of where it started."""
    batch_tokens: int = 4096
    longest: int = 4096
    """Longer rows are left out."""


STAGES = (
    Stage("routes", 1, drills=1.0, only="route", depths=Depths(), batch_tokens=3072),
    Stage("decisions", 1, drills=1.0, only="decide", depths=Depths()),
    Stage("drills", 1, drills=0.9, depths=Depths(small=1.0, disguised=DISGUISED), batch_tokens=3072),
    Stage("context", 5, drills=0.4, depths=Depths(small=0.6, many=0.5, disguised=DISGUISED), final=0.5, longest=6144),
    Stage(
        "anneal",
        8,
        drills=0.35,
        depths=Depths(full=0.6, part=0.3, small=0.3, many=0.3, long=0.6, faults=0.3, disguised=DISGUISED),
        lr=0.5,
        final=0.05,
        batch_tokens=32_768,
        longest=16_384,
    ),
)


def tokens_of(stage: Stage, of: int) -> int:
    """A stage's tokens, of those of all stages."""
    return of * stage.parts // sum(one.parts for one in STAGES)


def rows(stage: Stage, seed: int, count: int, english: English = NONE) -> Iterator[Trajectory]:
    """`count` drills and trajectories, the same for the same seed."""
    drilled = round(count * stage.drills)
    yield from drills(seed, drilled, english, only=stage.only)
    yield from trajectories(seed, count - drilled, stage.depths, lexicon=english.words)
