"""What a piece of work took: seconds by the clock, and seconds of CPU, which stand for energy."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Spent:
    seconds: float
    cpu_seconds: float | None
    """Of this process and of those that it has waited for; None where they were not counted."""

    def __add__(self, other: Spent) -> Spent:
        seconds = self.seconds + other.seconds
        if self.cpu_seconds is None or other.cpu_seconds is None:
            return Spent(seconds, None)
        return Spent(seconds, self.cpu_seconds + other.cpu_seconds)


def stopwatch() -> Callable[[], Spent]:
    """Counts from here on: each call says what was spent since."""
    began, cpu = time.perf_counter(), _cpu_seconds()
    return lambda: Spent(time.perf_counter() - began, _cpu_seconds() - cpu)


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)
