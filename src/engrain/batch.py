"""Whole rows packed into flat streams.

A batch is one stream of tokens without padding: rows lie end to end, positions restart at each row, and attention
never looks across rows (`model.packed_attention` reads `lengths`). Which rows share a batch is a pure function of
the rows' lengths, the capacity and a seed, so that training can be resumed exactly.
"""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Int
from torch import Tensor

if TYPE_CHECKING:
    from engrain.renderer import Row

WINDOW = 32
"""Rows are packed within random windows of this many capacities: rows of one length do not flock together."""


@dataclass(frozen=True)
class Packed:
    """One flat stream of whole rows."""

    ids: Int[Tensor, " tokens"]
    position_ids: Int[Tensor, " tokens"]
    mask: Bool[Tensor, " tokens"]
    """Tokens that carry loss. Never a row's first token, which nothing predicts."""
    lengths: tuple[int, ...]

    def to(self, device: torch.device) -> Packed:
        return Packed(self.ids.to(device), self.position_ids.to(device), self.mask.to(device), self.lengths)


def pack(rows: Sequence[Row], capacity: int, seed: int) -> list[list[int]]:
    """Row indices for each batch: every row exactly once, none split, best fit decreasing within random windows.

    A batch exceeds `capacity` tokens only if it is a single row that does.
    """
    if capacity < 1:
        raise ValueError(f"capacity must be at least 1 token, got {capacity}")
    chance = random.Random(f"pack:{seed}")
    order = list(range(len(rows)))
    chance.shuffle(order)
    lengths = [len(row.ids) for row in rows]
    windows = _windows(order, lengths, WINDOW * capacity)
    bins = [batch for window in windows for batch in _fit(window, lengths, capacity)]
    chance.shuffle(bins)
    return bins


def collate(rows: Sequence[Row]) -> Packed:
    """Rows laid end to end."""
    lengths = tuple(len(row.ids) for row in rows)
    ids = torch.tensor([token for row in rows for token in row.ids], dtype=torch.long)
    mask = torch.tensor([trained for row in rows for trained in row.mask], dtype=torch.bool)
    position_ids = torch.cat([torch.arange(length) for length in lengths]) if lengths else torch.zeros_like(ids)
    return Packed(ids, position_ids, mask & (position_ids > 0), lengths)


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
