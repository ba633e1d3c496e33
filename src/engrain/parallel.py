"""One iterator over the trajectories that several processes make.

Processes are forked, so that workflows and teachers, which are live objects, need not be pickled: start them before
any thread. Invariant: when the iterator ends or is closed, no process is left.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from engrain.errors import EngrainError, InputError
from engrain.trajectory import Trajectory

Work = TypeVar("Work")


def merged(
    play: Callable[[list[Work]], Iterator[Trajectory]], shares: list[list[Work]]
) -> Generator[Trajectory, None, None]:
    """The trajectories of every share, as they come; in this process if there is but one share of work.

    Raises `InputError` or `EngrainError` when a process ends with an error or dies.
    """
    shares = [share for share in shares if share]
    if len(shares) <= 1:
        for share in shares:
            yield from play(share)
        return
    context = multiprocessing.get_context("fork")
    workers, open_ends = [], []
    try:
        for share in shares:
            ours, theirs = context.Pipe(duplex=False)
            worker = context.Process(target=_work, args=(theirs, [*open_ends, ours], play, share), daemon=True)
            worker.start()
            theirs.close()
            workers.append(worker)
            open_ends.append(ours)
        while open_ends:
            for end in wait(open_ends):
                assert isinstance(end, Connection)
                kind, text = _receive(end)
                if kind == "mistake":
                    raise InputError(text)
                if kind == "error":
                    raise EngrainError(f"a process failed: {text}")
                if kind == "end":
                    open_ends.remove(end)
                else:
                    yield Trajectory.from_json(text)
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def _receive(end: Connection) -> tuple[str, str]:
    try:
        return end.recv()
    except EOFError:
        return "error", "it died without a word (out of memory?); use fewer processes"


def _work(
    end: Connection, inherited: list[Connection], play: Callable[[Any], Iterator[Trajectory]], share: Any
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    for other in inherited:
        other.close()  # else a dead parent would go unnoticed
    with suppress(OSError):
        try:
            for trajectory in play(share):
                end.send(("run", trajectory.to_json()))
            end.send(("end", ""))
        except InputError as error:
            end.send(("mistake", str(error)))
        except EngrainError as error:
            end.send(("error", str(error)))
        except Exception as error:
            end.send(("error", f"{type(error).__name__}: {error}"))
