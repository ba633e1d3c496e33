"""`Exact`: many rows in one batch, where that gives each row the bits that it would get alone; else one by one.

Rows are padded to a multiple of `PADDED` tokens, so the shape in which a row is computed is a function of that row.
Whether its neighbours change a row's rounding then depends on the machine's kernels, so it is tried: once for each
padded length, the first row of a batch is computed alone too. Invariant: what a row gives depends on that row alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

PADDED = 8
MOST_ROWS = 64
Run = Callable[[Sequence[int], int], Sequence[Tensor]]
"""Numbers of rows, padded to so many tokens, to tensors that begin with `rows tokens`."""


class Exact:
    """Remembers for which lengths rows must be computed one by one."""

    def __init__(self) -> None:
        self._alone: dict[int, bool] = {}

    def __call__(self, lengths: Sequence[int], run: Run) -> list[list[Tensor]]:
        """What `run` gives for each row, without its padding."""
        found: list[list[Tensor]] = [[] for _ in lengths]
        for padded, numbers in _alike(lengths):
            for chunk in self._chunks(numbers, padded, run):
                for place, number in enumerate(chunk[0]):
                    found[number] = [tensor[place, : lengths[number]].clone() for tensor in chunk[1]]
        return found

    def _chunks(
        self, numbers: Sequence[int], padded: int, run: Run
    ) -> Iterator[tuple[Sequence[int], Sequence[Tensor]]]:
        first = numbers[:MOST_ROWS]
        if len(first) > 1 and padded not in self._alone:
            together, alone = run(first, padded), run(first[:1], padded)
            self._alone[padded] = not all(map(torch.equal, (tensor[:1] for tensor in together), alone))
            if not self._alone[padded]:
                yield first, together
                numbers = numbers[MOST_ROWS:]
        size = 1 if self._alone.get(padded) else MOST_ROWS
        for start in range(0, len(numbers), size):
            chunk = numbers[start : start + size]
            yield chunk, run(chunk, padded)


def _alike(lengths: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    """Padded lengths, and the rows that have them."""
    padded = [-(-length // PADDED) * PADDED for length in lengths]
    for one in sorted(set(padded)):
        yield one, [number for number, length in enumerate(padded) if length == one]
