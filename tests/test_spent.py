"""Counting what work takes."""

from __future__ import annotations

import subprocess
import sys

from engrain.spent import Spent, stopwatch

WORK = "sum(number * number for number in range(3_000_000))"


def test_cpu_seconds_count_processes_that_were_waited_for() -> None:
    spent = stopwatch()
    subprocess.run([sys.executable, "-c", WORK], check=True)
    found = spent()
    assert found.seconds > 0 and (found.cpu_seconds or 0) > 0.05
    assert spent().seconds > found.seconds


def test_what_was_not_counted_stays_unknown_in_a_sum() -> None:
    assert Spent(1.0, 2.0) + Spent(2.0, 3.0) == Spent(3.0, 5.0)
    assert Spent(1.0, 2.0) + Spent(2.0, None) == Spent(3.0, None)
