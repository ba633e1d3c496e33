"""Continuous batching: turns of many callers through one engine, each joining and leaving between two passes.

One thread owns the engine. What waits is taken tenant by tenant in turn, so a tenant with a thousand requests delays
another's by one. Invariant: a caller gets what `Engine.decode` gives that request alone, and every accepted job ends:
with a completion, with the error that ended it, or cancelled.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field, replace

from engrain.engine import Engine
from engrain.errors import EngrainError, Overloaded
from engrain.turn import Completion, Request, Turn

MOST_WAITING = 256


@dataclass(eq=False)
class Job:
    """A request on its way; any thread may end it early.

    After `cancel`, `done` raises `CancelledError`; after `stop`, it gives what was written until then.
    """

    request: Request
    tenant: str
    on_tokens: Callable[[list[int]], None]
    done: Future[Completion] = field(default_factory=Future)
    sent: int = 0
    given_up: bool = False
    enough: bool = False

    def cancel(self) -> None:
        self.given_up = True

    def stop(self) -> None:
        self.enough = True


class Scheduler:
    """Accepts requests from any thread; `close` it in the end. Nobody else may use the engine meanwhile."""

    def __init__(self, engine: Engine, most_waiting: int = MOST_WAITING) -> None:
        self._engine, self._most_waiting = engine, most_waiting
        self._waiting: OrderedDict[str, deque[Job]] = OrderedDict()
        """By tenant, the one whose turn is next first."""
        self._active: dict[Job, Turn] = {}
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="engrain-scheduler", daemon=True)
        self._thread.start()

    def check(self, request: Request) -> None:
        """Raises `EngrainError` if the prompt does not fit or the grammar does not compile."""
        self._engine.check(request)

    def submit(
        self,
        request: Request,
        tenant: str = "",
        on_tokens: Callable[[list[int]], None] = lambda ids: None,
        *,
        goes_on: bool = False,
    ) -> Job:
        """A job, of which `done` is resolved later. `on_tokens` gets new tokens from the engine's thread, which waits.

        Raises `Overloaded` after `close`, or if too many wait already and it does not go on with what was accepted.
        """
        job = Job(request, tenant, on_tokens)
        with self._changed:
            if self._closing:
                raise Overloaded("no more requests are taken, this engine is being closed; ask another")
            if (waiting := self._count()) >= self._most_waiting and not goes_on:
                raise Overloaded(f"{waiting} requests wait already, at most {self._most_waiting} may; try again later")
            self._waiting.setdefault(tenant, deque()).append(job)
            self._changed.notify()
        return job

    def close(self) -> None:
        """Take no more requests, and return when all that were accepted have ended."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def load(self) -> tuple[int, int]:
        """How many are being decoded, and how many wait."""
        with self._changed:
            return len(self._active), self._count()

    def has_room(self) -> bool:
        """Whether `submit` would take a request now."""
        with self._changed:
            return not self._closing and self._count() < self._most_waiting

    def _count(self) -> int:
        return sum(map(len, self._waiting.values()))

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._active or self._waiting or self._closing):
                    self._changed.wait()
                free = self._engine.parallel - len(self._active)
                chosen = [self._next() for _ in range(min(free, self._count()))]
            for job in chosen:
                self._begin(job)
            for job in [job for job in self._active if job.given_up or job.enough]:
                self._end_early(job)
            if self._active:
                self._advance()
            elif self._closing and not self._waiting:
                return

    def _next(self) -> Job:
        tenant, jobs = self._waiting.popitem(last=False)
        job = jobs.popleft()
        if jobs:
            self._waiting[tenant] = jobs  # behind all others
        return job

    def _begin(self, job: Job) -> None:
        if not job.done.set_running_or_notify_cancel():
            return
        try:
            self._engine.check(job.request)
            (self._active[job],) = self._engine.begin([job.request], list(self._active.values()))
        except Exception as error:
            job.done.set_exception(error)

    def _end_early(self, job: Job) -> None:
        turn = self._active.pop(job)
        self._engine.drop(turn)
        if job.given_up:
            job.done.set_exception(CancelledError())
        else:
            job.done.set_result(replace(turn.completion, ids=turn.ids[: len(turn.logprobs)]))

    def _advance(self) -> None:
        try:
            self._engine.advance(list(self._active.values()))
        except Exception as error:  # nobody's own mistake: whoever was in the pass has lost, and the next may work
            for job, turn in self._active.items():
                self._engine.drop(turn)
                job.done.set_exception(EngrainError(f"decoding failed: {type(error).__name__}: {error}"))
            self._active = {}
            return
        for job, turn in list(self._active.items()):
            new, job.sent = turn.ids[job.sent :], len(turn.ids)
            try:
                job.on_tokens(new)
            except Exception as error:  # the caller's own mistake, or it has gone: its job alone ends with that
                self._engine.drop(self._active.pop(job))
                job.done.set_exception(error)
                continue
            if turn.over:
                del self._active[job]
                job.done.set_result(turn.completion)
