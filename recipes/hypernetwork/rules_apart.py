"""What the bundled hypernetwork trains on: drills and trajectories of procedural worlds, the tenant's rules taken out
of the prompt. They are the context, and only the adapter can tell them.

Never of the families that are held out, nor of the support desk.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, count
from pathlib import Path

from engrain import markdown
from engrain.context import Context, Section
from engrain.contrast import contrasted
from engrain.renderer import Renderer, Row
from engrain.trajectory import Trajectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from worlds.catalogue import TRAINED
from worlds.disguise import DISGUISED
from worlds.drawing import KINDS
from worlds.drills import drills, edited_drills
from worlds.trajectories import Depths, edited_trajectories

PROFILE = "\n\nRules of "
PER_SEED, PROCESSES = 60, 2
DEPTHS = Depths(full=0.4, part=0.6, small=0.7, many=0.3)
"""Of whole tasks: short prompts before many turns, for most of a prompt teaches nothing."""


@dataclass(frozen=True)
class Stage:
    """A part of the training: a curriculum in the number of rules and in the words that they are in."""

    name: str
    parts: int
    """Of the recipe's tokens, which all stages together divide."""
    most_rules: int
    """Rows of tenants with more are left out."""
    drills: float
    """Share of drills among its rows; the rest are trajectories."""
    decisions: float
    """Share of decisions among its drills, as notes write them; the rest are rules asked for by name."""
    kinds: tuple[int, int] = KINDS
    """Of requests in the worlds of its drills."""
    disguised: float = DISGUISED
    """Share of worlds in other words than their family's."""
    rivals: float = 0.2
    """Share of rows that keep their rival, which costs as much as the row."""
    batch: int = 2048
    """Tokens a step."""
    longest: int = 4096


STAGES = (
    Stage("rules", 3, most_rules=16, drills=1.0, decisions=0.0, kinds=(1, 3)),
    Stage("decisions", 4, most_rules=40, drills=1.0, decisions=0.3, kinds=(1, 4)),
    Stage("tasks", 8, most_rules=40, drills=0.5, decisions=0.3, kinds=(1, 4), batch=4096),
)
"""In whole tasks a rule decides a line in dozens, in drills in decisions every line, and drills in rules alone are
nothing but lookups, several times as many a token: they come first. Alone they teach to give a rule's value wherever
its name is read, be it in the step that asks for it."""
UNRELATED = 0.1
"""Share of rows that no rule bears on: what the base says of them should stay."""


def tokens_of(stage: Stage, of: int) -> int:
    return of * stage.parts // sum(one.parts for one in STAGES)


def told(trajectory: Trajectory) -> tuple[Trajectory, Context]:
    """The trajectory without the tenant's rules in its prompt, and these as its context.

    Raises `ValueError` if there are none.
    """
    system, *rest = trajectory.messages
    before, mark, profile = system.content.partition(PROFILE)
    if not mark:
        raise ValueError(f"{trajectory.id}: no rules in its prompt")
    tenant, _, bullets = profile.partition(":\n")
    named = "" if f"Tenant: {tenant}." in before else f" Tenant: {tenant}."
    prompt = system.model_copy(update={"content": before + named})
    context = Context((Section("tenant", tenant, markdown.rules(bullets)),))
    return trajectory.model_copy(update={"messages": [prompt, *rest]}), context


@dataclass(frozen=True)
class Example:
    trajectory: Trajectory
    context: Context
    prompted: Trajectory
    """With the rules in its prompt."""
    edited: tuple[Trajectory, Context] | None = None
    """What it is after an edit of one rule."""


def examples(stage: Stage, seed: int, number: int, families: tuple[str, ...] = TRAINED) -> Iterator[Example]:
    """`number` drills and trajectories, rules apart, less those without rules; the same for the same seed."""
    drilled = round(number * stage.drills)
    pairs = chain(
        edited_drills(seed, drilled, families, stage.kinds, stage.disguised, stage.decisions),
        edited_trajectories(seed, number - drilled, replace(DEPTHS, disguised=stage.disguised), families),
    )
    for before, after in pairs:
        if (pair := _told(before)) is not None:
            yield Example(*pair, before, edited=_told(after) if after is not None else None)


def _told(trajectory: Trajectory) -> tuple[Trajectory, Context] | None:
    """As `told`; None for a tenant without rules."""
    pair = told(trajectory) if PROFILE in trajectory.messages[0].content else None
    return pair if pair is not None and pair[1].rules else None


Rows = tuple[list[Row], list[Row]]


def rows(renderer: Renderer, stage: Stage, seed: int, tokens: int, families: tuple[str, ...] = TRAINED) -> Rows:
    """Rows with contexts, about so many tokens of them, and the same with the rules in the prompt.

    Where an edit of a rule matters, a row has it as its rival.
    """
    made, prompted = list[Row](), list[Row]()
    held, part = 0, partial(_rows, renderer, stage, seed, families)
    forked = multiprocessing.get_context("fork")  # which hands over what cannot be pickled, such as a renderer
    with ProcessPoolExecutor(PROCESSES, forked, _Part.hold, (part,)) as pool:
        for first in count(step=2 * PROCESSES):
            for own, whole in pool.map(_Part.make, range(first, first + 2 * PROCESSES)):
                made += own
                prompted += whole
                held += sum(len(row.ids) for row in own)
                if held >= tokens:
                    return made, prompted
    raise AssertionError("there are seeds without end")


class _Part:
    """What a process makes."""

    rows: Callable[[int], Rows]

    @classmethod
    def hold(cls, rows: Callable[[int], Rows]) -> None:
        cls.rows = staticmethod(rows)

    @classmethod
    def make(cls, number: int) -> Rows:
        return cls.rows(number)


def _rows(renderer: Renderer, stage: Stage, seed: int, families: tuple[str, ...], number: int) -> Rows:
    made, prompted = list[Row](), list[Row]()
    for example in examples(stage, seed * 100_000 + number, PER_SEED, families):
        if len(example.context.rules) > stage.most_rules:
            continue
        row = _rendered(renderer, example.trajectory, example.context)
        if example.edited is not None:
            row = contrasted(row, _rendered(renderer, *example.edited))
        if len(row.ids) <= stage.longest:
            made.append(row)
            prompted.append(_rendered(renderer, example.prompted))
    return made, prompted


def unrelated(renderer: Renderer, seed: int, contexts: Sequence[Context]) -> list[Row]:
    """One row a context, of drills that no rule bears on: steps found, and items routed."""
    half = len(contexts) // 2
    made = [*drills(seed, half, only="steps"), *drills(seed, len(contexts) - half, only="route")]
    return [_rendered(renderer, one, context) for one, context in zip(made, contexts, strict=True)]


def _rendered(renderer: Renderer, trajectory: Trajectory, context: Context | None = None) -> Row:
    (row,) = renderer.rows(trajectory)
    return replace(row, context=context)
