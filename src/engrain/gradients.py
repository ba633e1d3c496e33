"""Gradients of a summed loss over rows that are shared among threads.

On CPU each thread takes whole rows and runs its own forward and backward with single-threaded kernels. Threads then
meet once a step instead of once an operation, so one that lost its core does not hold up the other in every kernel. The
sum over threads is taken in a fixed order: same rows and threads, same bits.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from engrain.batch import Packed, collate

if TYPE_CHECKING:
    from engrain.renderer import Row

Loss = Callable[[Packed], tuple[Tensor, int]]
"""The summed loss of a packed batch and the number of its terms."""


@dataclass(frozen=True)
class Sum:
    """A loss summed over rows, the number of its terms, and its gradient with respect to each of the asked tensors."""

    loss: float
    terms: int
    gradients: list[Tensor]


class Gradients:
    """`workers` threads that share `threads` of torch's; open while in use."""

    def __init__(self, workers: int, threads: int, pass_tokens: int) -> None:
        self._workers, self._threads, self._pass_tokens = workers, threads, pass_tokens
        self._before = threads
        self._pool: ThreadPoolExecutor | None = None

    def __call__(
        self, loss: Loss, rows: Sequence[Row], into: Sequence[Tensor], stopping: threading.Event
    ) -> Sum | None:
        """The sum over all rows, or None if `stopping` was set before its end."""

        def work(share: Sequence[Row]) -> Sum | None:
            return _accumulate(loss, passes(share, self._pass_tokens), into, stopping)

        shares = share_rows(rows, self._workers)
        sums = list(map(work, shares) if self._pool is None else self._pool.map(work, shares))
        done = [one for one in sums if one is not None]
        if len(done) < len(sums):
            return None
        for other in done[1:]:
            _add(done[0].gradients, other.gradients)
        return Sum(sum(one.loss for one in done), sum(one.terms for one in done), done[0].gradients)

    def __enter__(self) -> Self:
        self._before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        if self._workers > 1:
            single = {"initializer": torch.set_num_threads, "initargs": (max(1, self._threads // self._workers),)}
            self._pool = ThreadPoolExecutor(self._workers, **single)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown()
        torch.set_num_threads(self._before)


def keep_freed_memory() -> None:
    """Ask glibc to reuse large blocks: returning each activation to the system costs a fifth of a step on CPU."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-8, 1)  # M_ARENA_MAX: other arenas return memory in spite of it
    except (OSError, AttributeError):  # another C library
        return


def share_rows(rows: Sequence[Row], threads: int) -> list[list[Row]]:
    """At most `threads` shares of about equal tokens: longest row first, each to the lightest share."""
    shares: list[list[Row]] = [[] for _ in range(threads)]
    loads = [0] * threads
    for row in sorted(rows, key=lambda row: -len(row.ids)):
        lightest = loads.index(min(loads))
        shares[lightest].append(row)
        loads[lightest] += len(row.ids)
    return [share for share in shares if share]


def passes(rows: Sequence[Row], tokens: int) -> Iterator[list[Row]]:
    """The rows in order, cut into runs of at most `tokens`; a longer row runs alone."""
    run: list[Row] = []
    held = 0
    for row in rows:
        if run and held + len(row.ids) > tokens:
            yield run
            run, held = [], 0
        run.append(row)
        held += len(row.ids)
    if run:
        yield run


def _accumulate(loss: Loss, runs: Iterator[list[Row]], into: Sequence[Tensor], stopping: threading.Event) -> Sum | None:
    total, terms = 0.0, 0
    sums: list[Tensor] = []
    for run in runs:
        if stopping.is_set():
            return None
        value, count = loss(collate(run).to(into[0].device))
        gradients = torch.autograd.grad(value, into, allow_unused=True, materialize_grads=True)
        if sums:
            _add(sums, gradients)
        else:
            sums = list(gradients)
        total, terms = total + value.item(), terms + count
    return Sum(total, terms, sums)


def _add(sums: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    for total, gradient in zip(sums, gradients, strict=True):
        total.add_(gradient)
