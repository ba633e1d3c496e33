"""Gradients of a summed loss over rows that are shared among processes.

On CPU each process takes whole rows and runs its own forward and backward with single-threaded kernels: two processes
meet once a step, where two threads share Python's lock at every operation. Rows that cannot be shared evenly are left
to this process alone, with all threads. Parameters lie in memory that the processes share, so an optimizer step in one
is seen by all. The sum over processes is taken in a fixed order: same rows and processes, same bits.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from engrain.batch import Packed, collate
from engrain.errors import EngrainError

if TYPE_CHECKING:
    from engrain.renderer import Row

UNEVEN = 1.14
"""A share with more than so many times its equal part of the cost keeps the others waiting: threads are faster."""
NEVER = float("inf")
"""For compiled layers: other threads need other code, and one process is fast enough alone."""

Loss = Callable[[Packed], AbstractContextManager[tuple[Tensor, int]]]
"""The summed loss of a packed batch and the number of its terms; backward runs inside."""


@dataclass(frozen=True)
class Sum:
    """A loss summed over rows, the number of its terms, and its gradient with respect to each of the asked tensors."""

    loss: float
    terms: int
    gradients: list[Tensor]


Work = Callable[[Sequence["Row"], threading.Event], Sum | None]
"""The sum over some rows with the parameters as they are now, or None if the event was set before its end."""


class Gradients:
    """`work` done by `workers` processes, this one among them; they live while it is open."""

    def __init__(
        self,
        work: Work,
        like: Sequence[Tensor],
        workers: int,
        threads: int,
        uneven: float = UNEVEN,
        twice: float = math.inf,
    ) -> None:
        """At a length of `twice`, attention makes a token twice as dear as the linear layers alone."""
        self._work, self._like, self._workers, self._threads = work, like, workers, threads
        self._uneven, self._twice = uneven, twice
        self._before = threads
        self._helpers: list[_Helper] = []

    def __call__(self, rows: Sequence[Row], stopping: threading.Event) -> Sum | None:
        """The sum over all rows, or None if `stopping` was set before its end."""
        own, *others = self._shares(rows)
        busy = self._helpers[: len(others)]
        for helper, share in zip(busy, others, strict=True):
            helper.begin(share)
        sums = [self._work(own, stopping), *(helper.end() for helper in busy)]
        done = [one for one in sums if one is not None]
        if len(done) < len(sums):
            return None
        for other in done[1:]:
            _add(done[0].gradients, other.gradients)
        return Sum(sum(one.loss for one in done), sum(one.terms for one in done), done[0].gradients)

    def _shares(self, rows: Sequence[Row]) -> Sequence[Sequence[Row]]:
        """One a process, or all rows for this one; sets its threads."""
        shares = share_rows(rows, self._workers, self._twice)
        costs = [sum(_cost(row, self._twice) for row in share) for share in shares]
        together = max(costs) * self._workers > self._uneven * sum(costs)
        torch.set_num_threads(self._threads if together else max(1, self._threads // self._workers))
        return [rows] if together else shares

    def __enter__(self) -> Self:
        self._before = torch.get_num_threads()
        self._helpers = [_Helper(self._work, self._like) for _ in range(self._workers - 1)]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for helper in self._helpers:
            helper.close()
        self._helpers = []
        torch.set_num_threads(self._before)


class _Helper:
    """A forked process that takes shares of rows, and leaves gradients in memory shared with this one."""

    def __init__(self, work: Work, like: Sequence[Tensor]) -> None:
        fork = multiprocessing.get_context("fork")
        self._gradients = [shared(torch.zeros_like(tensor)) for tensor in like]
        self._link, other = fork.Pipe()
        self._process = fork.Process(target=_serve, args=(work, self._gradients, other, self._link), daemon=True)
        self._process.start()
        other.close()

    def begin(self, rows: Sequence[Row]) -> None:
        with _alive():
            self._link.send(rows)

    def end(self) -> Sum | None:
        with _alive():
            found = self._link.recv()
        if isinstance(found, Exception):
            raise found
        if found is None:
            return None
        loss, terms = found
        return Sum(loss, terms, self._gradients)

    def close(self) -> None:
        self._link.close()
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.kill()


@contextmanager
def _alive() -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError) as error:
        raise EngrainError("a training process ended, perhaps for want of memory; run again to resume") from error


def _serve(work: Work, into: Sequence[Tensor], link: Connection, parents: Connection) -> None:
    """Until the other end is closed. Ctrl-C is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parents.close()
    torch.set_num_threads(1)
    while True:
        try:
            rows = link.recv()
        except EOFError:
            return
        try:
            found = work(rows, threading.Event())
        except Exception as error:
            link.send(error)
            continue
        if found is not None:
            for buffer, gradient in zip(into, found.gradients, strict=True):
                buffer.copy_(gradient)
        link.send(None if found is None else (found.loss, found.terms))


def shared(tensor: Tensor) -> Tensor:
    """A copy in memory that forked processes share. Anonymous: /dev/shm is small in containers."""
    buffer = mmap.mmap(-1, max(1, tensor.nbytes))
    return torch.frombuffer(buffer, dtype=tensor.dtype, count=tensor.numel()).view(tensor.shape).copy_(tensor)


def accumulate(
    loss: Loss, rows: Sequence[Row], into: Sequence[Tensor], pass_tokens: int, stopping: threading.Event
) -> Sum | None:
    """The sum over rows, at most `pass_tokens` of them in one forward; None if `stopping` was set before its end."""
    total, terms = 0.0, 0
    sums: list[Tensor] = []
    for run in passes(rows, pass_tokens):
        if stopping.is_set():
            return None
        with loss(collate(run).to(into[0].device)) as (value, count):
            gradients = torch.autograd.grad(value, into, allow_unused=True, materialize_grads=True)
        if sums:
            _add(sums, gradients)
        else:
            sums = list(gradients)
        total, terms = total + value.item(), terms + count
    return Sum(total, terms, sums)


def keep_freed_memory() -> None:
    """Ask glibc to reuse large blocks: returning each activation to the system costs a fifth of a step on CPU."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError):  # another C library
        return


def share_rows(rows: Sequence[Row], workers: int, twice: float = math.inf) -> list[list[Row]]:
    """At most `workers` shares of about equal cost: longest row first, each to the lightest share."""
    shares: list[list[Row]] = [[] for _ in range(workers)]
    loads = [0.0] * workers
    for row in sorted(rows, key=lambda row: -len(row.ids)):
        lightest = loads.index(min(loads))
        shares[lightest].append(row)
        loads[lightest] += _cost(row, twice)
    return [share for share in shares if share]


def _cost(row: Row, twice: float) -> float:
    """In tokens of a row without attention."""
    return len(row.ids) * (1 + len(row.ids) / twice)


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


def _add(sums: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    for total, gradient in zip(sums, gradients, strict=True):
        total.add_(gradient)
