"""Requests that come and go get what each would get alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import pytest
from test_engine import RANDOM, adapter, make, prompts, requests

from engrain.engine import Engine
from engrain.errors import EngrainError, Overloaded
from engrain.scheduler import Scheduler
from engrain.turn import Request, Turn


@contextmanager
def scheduler(engine: Engine, most_waiting: int = 64) -> Iterator[Scheduler]:
    running = Scheduler(engine, most_waiting)
    try:
        yield running
    finally:
        running.close()


@contextmanager
def halted(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No pass is made inside."""
    gate, advance = threading.Event(), engine.advance

    def waiting(turns: list[Turn]) -> list[Turn]:
        gate.wait(30)
        return advance(turns)

    monkeypatch.setattr(engine, "advance", waiting)
    try:
        yield
    finally:
        gate.set()


def test_each_gets_what_it_would_get_alone_whenever_it_comes() -> None:
    own = [None, adapter(1), adapter(2)]
    asked = [
        replace(request, sampling=RANDOM if number % 2 else None, adapter=own[number % 3])
        for number, request in enumerate([*requests(), *requests(constrained=False)])
    ]
    pieces: dict[int, list[int]] = {}
    with scheduler(make(parallel=3)) as running, ThreadPoolExecutor(4) as callers:

        def ask(number: int) -> list[int]:
            time.sleep(0.01 * (number % 5))
            seen = pieces.setdefault(number, [])
            return running.submit(asked[number], f"t{number % 2}", seen.extend).done.result(60).ids

        found = list(callers.map(ask, range(len(asked))))
    for number, request in enumerate(asked):
        (alone,) = make().decode([request])
        assert found[number] == alone.ids == pieces[number]


def test_tenants_are_taken_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, order = make(parallel=1), list[str]()
    with scheduler(engine) as running:
        with halted(engine, monkeypatch):
            jobs = [running.submit(Request([1, 2, number], None, 4), "many") for number in range(5)]
            jobs.append(running.submit(Request([3, 4], None, 4), "few"))
            for job in jobs:
                job.done.add_done_callback(lambda _, job=job: order.append(job.tenant))
        for job in jobs:
            job.done.result(60)
    assert order.index("few") <= 2 and order.count("many") == 5


def test_too_many_are_refused_and_those_that_wait_are_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make(parallel=1)
    with scheduler(engine, most_waiting=2) as running:
        with halted(engine, monkeypatch):
            first = running.submit(Request([1, 2], None, 4))
            while first.done.running() is False:
                time.sleep(0.01)
            others = [running.submit(Request([1, number], None, 4)) for number in (3, 4)]
            assert not running.has_room() and running.load() == (1, 2)
            with pytest.raises(Overloaded, match="2 requests wait already"):
                running.submit(Request([1, 5], None, 4))
            others.append(running.submit(Request([1, 6], None, 4), goes_on=True))
        assert all(job.done.result(60).ids for job in (first, *others))
        assert running.has_room()
    with pytest.raises(Overloaded, match="closed"):
        running.submit(Request([1, 2], None, 4))


def test_a_cancelled_job_ends_and_its_neighbours_do_not_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make(parallel=2)
    with scheduler(engine) as running:
        with halted(engine, monkeypatch):
            asked = [Request(prompt, None, 30) for prompt in prompts(4, 9, 6)]
            under_way, kept, waiting = (running.submit(request) for request in asked)
            under_way.cancel()
            waiting.cancel()
        for job in (under_way, waiting):
            with pytest.raises(CancelledError):
                job.done.result(60)
        assert kept.done.result(60).ids == make().decode([asked[1]])[0].ids
    assert all(line.owner is None for line in engine.cache.lines)


def test_a_job_that_has_written_enough_gives_what_is_there() -> None:
    engine, told = make(parallel=1), list[int]()
    asked = Request(prompts(6)[0], None, 40)
    with scheduler(engine) as running:
        stopped = threading.Event()

        def listen(ids: list[int]) -> None:
            told.extend(ids)
            if len(told) >= 5 and stopped.wait(30):
                job.stop()

        job = running.submit(asked, on_tokens=listen)
        stopped.set()
        completion = job.done.result(60)
    assert completion.error == "truncated" and 5 <= len(completion.ids) == len(completion.logprobs) <= len(told) < 40
    whole = make().decode([asked])[0]
    assert completion.ids == whole.ids[: len(completion.ids)] and len(whole.ids) > len(told)


def test_what_goes_wrong_ends_the_jobs_that_it_concerns(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make(parallel=2)

    def deaf(ids: list[int]) -> None:
        raise ConnectionError("gone")

    with scheduler(engine) as running:
        with pytest.raises(EngrainError, match="context full"):
            running.submit(Request([1] * 5000, None, 4)).done.result(60)
        with pytest.raises(ConnectionError, match="gone"):
            running.submit(Request([1, 2, 3], None, 400), "", deaf).done.result(60)
        advance = engine.advance
        monkeypatch.setattr(engine, "advance", lambda turns: 1 / 0)
        with pytest.raises(EngrainError, match="decoding failed: ZeroDivisionError"):
            running.submit(Request([1, 2], None, 4)).done.result(60)
        monkeypatch.setattr(engine, "advance", advance)
        asked = Request([1, 2], None, 4)
        assert running.submit(asked).done.result(60).ids == make().decode([asked])[0].ids
