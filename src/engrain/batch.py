"""Whole rows packed into flat streams.

A batch is one stream of tokens without padding: rows lie end to end, positions restart at each row, and attention
never looks across rows (`model.packed_attention` reads `lengths`). Rows of one context lie together, so that its
adapter is made once. Which rows share a batch is a pure function of the rows' lengths and contexts, the capacity and a
seed, so that training can be resumed exactly.
"""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from engrain.context import Context

if TYPE_CHECKING:
    from engrain.renderer import Row

WINDOW = 32
"""Rows are packed within random windows of this many capacities: rows of one length do not flock together."""


CONTEXTS = 4
"""A batch has room for the rows of at least so many contexts."""


@dataclass(frozen=True)
class Packed:
    """One flat stream of whole rows."""

    ids: Int[Tensor, " tokens"]
    position_ids: Int[Tensor, " tokens"]
    mask: Bool[Tensor, " tokens"]
    """Tokens that carry loss. Never a row's first token, which nothing predicts."""
    lengths: tuple[int, ...]
    contexts: tuple[Context, ...]
    """Each context once, in the order in which their rows lie; none if no row has one."""
    spans: tuple[int, ...]
    """Tokens of each context's rows."""
    taught: Bool[Tensor, " targets"]
    """Which of the tokens that carry loss have a teacher's choices in their place."""
    choices: Int[Tensor, "taught choices"]
    """A teacher's likeliest tokens."""
    choice_logprobs: Float[Tensor, "taught choices"]
    partings: Int[Tensor, "2 rivals"]
    """Where a row and its rival part: places in the row, and in the one under the rival's context."""
    turns: tuple[tuple[tuple[int, int], ...], ...] = ()
    """Of each row, where the turns that are said again at its end stand in it; none if no row has any."""
    acting: Bool[Tensor, " tokens"] | None = None
    """On which tokens an activated adapter acts; None for one that acts on all."""

    def to(self, device: torch.device) -> Packed:
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})


def pack(rows: Sequence[Row], capacity: int, seed: int) -> list[list[int]]:
    """Row indices for each batch: every row exactly once, none split, best fit decreasing within random windows.

    A batch exceeds `capacity` tokens only if it is a single row that does.
    """
    if capacity < 1:
        raise ValueError(f"capacity must be at least 1 token, got {capacity}")
    chance = random.Random(f"pack:{seed}")
    units = _units(rows, max(1, capacity // CONTEXTS), chance)
    order = list(range(len(units)))
    chance.shuffle(order)
    lengths = [sum(len(rows[index].ids) for index in unit) for unit in units]
    windows = _windows(order, lengths, WINDOW * capacity)
    bins = [batch for window in windows for batch in _fit(window, lengths, capacity)]
    chance.shuffle(bins)
    return [[index for unit in batch for index in units[unit]] for batch in bins]


def _units(rows: Sequence[Row], tokens: int, chance: random.Random) -> list[list[int]]:
    """Row indices that stay together: rows of one context up to so many tokens, and any other row by itself."""
    units: list[list[int]] = []
    by_context: dict[Context, list[int]] = defaultdict(list)
    for index in range(len(rows)):
        if (context := rows[index].context) is None:
            units.append([index])
        else:
            by_context[context].append(index)
    for indices in by_context.values():
        chance.shuffle(indices)
        held = tokens
        for index in indices:
            length = len(rows[index].ids)
            if held + length > tokens:
                units.append([])
                held = 0
            units[-1].append(index)
            held += length
    return units


def collate(rows: Sequence[Row]) -> Packed:
    """Rows laid end to end, those of one context together. Among rows with contexts, one without has an empty one.

    Of a row with a rival there is a second one under that context, up to where they part, which carries no loss.
    """
    rivals = [(row, row.rival) for row in rows if row.rival is not None]
    laid = [*rows, *(replace(row, ids=row.ids[: one.at + 1], mask=[False] * (one.at + 1), context=one.context,
                             choices=None, rival=None) for row, one in rivals)]  # fmt: skip
    order, spans = list(range(len(laid))), dict[Context, int]()
    if any(row.context is not None for row in laid):
        for row in laid:
            spans[row.context or Context()] = spans.get(row.context or Context(), 0) + len(row.ids)
        numbers = {context: number for number, context in enumerate(spans)}
        order.sort(key=lambda place: numbers[laid[place].context or Context()])
    packed = [laid[place] for place in order]
    lengths = tuple(len(row.ids) for row in packed)
    ids = torch.tensor([token for row in packed for token in row.ids], dtype=torch.long)
    mask = torch.tensor([trained for row in packed for trained in row.mask], dtype=torch.bool)
    position_ids = torch.cat([_positions(row) for row in packed]) if packed else torch.zeros_like(ids)
    mask &= position_ids > 0
    taught = torch.tensor([row.choices is not None for row in packed for _ in row.ids], dtype=torch.bool)[mask]
    starts = dict(zip(order, accumulate(lengths, initial=0), strict=False))
    own = [starts[place] + row.rival.at for place, row in enumerate(rows) if row.rival is not None]
    others = [starts[len(rows) + number] + one.at for number, (_, one) in enumerate(rivals)]
    partings = torch.tensor([own, others], dtype=torch.long)
    contexts = (tuple(spans), tuple(spans.values()))
    collated = Packed(ids, position_ids, mask, lengths, *contexts, taught, *_choices(packed), partings)
    if not any(row.turns for row in packed):
        return collated
    acting = torch.tensor([said >= _own(row) for row in packed for said in range(len(row.ids))], dtype=torch.bool)
    return replace(collated, turns=tuple(row.turns for row in packed), acting=acting)


def _own(row: Row) -> int:
    """Tokens of a row before the turns that are said again."""
    return len(row.ids) - sum(end - start for start, end in row.turns)


def _positions(row: Row) -> Int[Tensor, " tokens"]:
    return torch.cat([torch.arange(_own(row)), *(torch.arange(start, end) for start, end in row.turns)])


def _choices(rows: Sequence[Row]) -> tuple[Int[Tensor, "taught choices"], Float[Tensor, "taught choices"]]:
    """Those of all rows that have some, one after the other."""
    held = [row.choices for row in rows if row.choices is not None]
    if not held:
        return torch.zeros(0, 0, dtype=torch.long), torch.zeros(0, 0)
    tokens = torch.from_numpy(np.concatenate([one.tokens for one in held])).long()
    return tokens, torch.from_numpy(np.concatenate([one.logprobs for one in held])).float()


def _windows(order: Sequence[int], lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    window: list[int] = []
    held = 0
    for index in order:
        window.append(index)
        held += lengths[index]
        if held >= tokens:
            yield window
            window, held = [], 0
    if window:
        yield window


def _fit(window: Sequence[int], lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Longest row first, each into the fullest batch that still has room for it."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, bin), sorted
    for index in sorted(window, key=lambda index: -lengths[index]):
        place = bisect_left(room, (lengths[index], -1))
        left, number = room.pop(place) if place < len(room) else (capacity, len(bins))
        if number == len(bins):
            bins.append([])
        bins[number].append(index)
        if left > lengths[index]:
            insort(room, (left - lengths[index], number))
    return bins
