"""Rows that are computed together have the bits that they have alone, or are computed alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from engrain.exact import MOST_ROWS, PADDED, Exact, Run

LENGTHS = [3, PADDED + 1, 3, PADDED, 2 * PADDED, 1]


def running(noise: Callable[[int], float], asked: list[tuple[int, ...]]) -> Run:
    """Rows that say their number, and something of how many they are."""

    def run(numbers: Sequence[int], padded: int) -> list[Tensor]:
        asked.append((padded, *numbers))
        states = torch.tensor(numbers)[:, None] + torch.arange(padded) / 100 + noise(len(numbers))
        return [states, states[:, :, None].expand(-1, -1, 2)]

    return run


@pytest.mark.parametrize("noise", [0.0, 1e-6])
def test_a_row_gives_what_it_gives_alone(noise: float) -> None:
    exact, asked = Exact(), list[tuple[int, ...]]()
    run = running(lambda rows: noise * (rows > 1), asked)
    for _ in range(2):
        found = exact(LENGTHS, run)
        for number, (length, (one, two)) in enumerate(zip(LENGTHS, found, strict=True)):
            alone = run([number], -(-length // PADDED) * PADDED)
            assert torch.equal(one, alone[0][0, :length]) and two.shape == (length, 2)
    together = sum(len(one) > 2 for one in asked)
    assert together == (2 if noise else 4)  # once for each padded length where it makes a difference, else each time


def test_batches_are_bounded_and_no_rows_are_none() -> None:
    asked = list[tuple[int, ...]]()
    found = Exact()([1] * (MOST_ROWS + 2), running(lambda rows: 0.0, asked))
    assert [int(one[0]) for one, _ in found] == list(range(MOST_ROWS + 2))
    assert max(map(len, asked)) == MOST_ROWS + 1 and Exact()([], running(lambda rows: 0.0, asked)) == []
