"""What an evaluation's runs look like beyond their means: success against steps, seconds a step, and calibration.

Each arm's runs on a split are first reduced to what the plots need, so that no trajectory is held.

Confidence in a run is the probability that the model gives to all that it wrote there, turn after turn: the exponential
of the sum of its log-probabilities. A mean over tokens would be near 1 for every run, right or wrong. Since a model can
be right in other words as well, it is a lower bound of how sure the model is of what it *does*.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from engrain.page import Block, Distribution, Lines, Point, Table
from engrain.score import bootstrap, step_seconds, succeeded
from engrain.trajectory import Trajectory

STEPS = {"1": 1, "2-5": 5, "6-20": 20, "21-40": 40, ">40": math.inf}
"""Bins of steps, each up to and with so many."""
BINS = 10
"""Of confidence, equally wide."""
RESAMPLES = 2_000
"""For the interval of a bin, of which there are many."""


@dataclass(frozen=True)
class Run:
    """One task as one arm carried it out."""

    task: str
    steps: int
    success: bool
    confidence: float | None
    """The probability of all that it wrote; None where no model wrote it, or it did not say."""


@dataclass(frozen=True)
class Runs:
    """One arm on one split."""

    runs: tuple[Run, ...]
    seconds: tuple[float, ...]
    """Of each step of the tasks that were run alone."""


Split = Mapping[str, Runs]
"""By arm."""


def reduced(many: Iterable[Trajectory], alone: Iterable[Trajectory]) -> Runs:
    """The runs of `many`, and the seconds of `alone`."""
    runs = (Run(one.task, one.steps, succeeded(one), confidence(one)) for one in many)
    return Runs(tuple(runs), tuple(float(f"{seconds:.4g}") for seconds in step_seconds(alone)))


def confidence(trajectory: Trajectory) -> float | None:
    turns = [message.logprobs for message in trajectory.messages if message.role == "assistant"]
    known = [turn for turn in turns if turn]
    total = sum(sum(turn) for turn in known)
    return math.exp(min(0.0, total)) if known and len(known) == len(turns) and not math.isnan(total) else None


def plots(splits: Mapping[str, Split], seed: int = 0) -> tuple[Block, ...]:
    """Three plots of each split, those that there is something for, then the table of calibration errors."""
    timed = [name for name, arms in splits.items() if any(runs.seconds for runs in arms.values())]
    sure = {
        name: {arm: known for arm, runs in arms.items() if (known := _known(runs.runs))}
        for name, arms in splits.items()
    }
    sure = {name: arms for name, arms in sure.items() if arms}
    headings = ("split", "arm", "calibration error", "mean confidence %", "success %", "runs")
    rows = [(name, arm, *_calibrated(known)) for name, arms in sure.items() for arm, known in arms.items()]
    return (
        *(against_steps(name, arms, seed) for name, arms in splits.items()),
        *(seconds_a_step(name, splits[name]) for name in timed),
        *(calibration(name, arms, seed) for name, arms in sure.items()),
        *([Table(headings, tuple(rows), "Calibration")] if rows else []),
    )


def against_steps(split: str, arms: Split, seed: int = 0) -> Lines:
    """The share of runs that succeeded, by how many steps they took."""
    return Lines(
        f"Success against steps: {split}",
        "steps that the run took",
        "success",
        {arm: tuple(_by_steps(runs.runs, seed)) for arm, runs in arms.items()},
        about="A run that gives up early is a short one. 95% bootstrap intervals over tasks; larger marks are of more "
        "runs. An interval of runs that all ended alike has no width.",
        labels=tuple(STEPS),
        shares=True,
    )


def _by_steps(runs: Sequence[Run], seed: int) -> Iterable[Point]:
    least = 0
    for place, most in enumerate(STEPS.values()):
        yield point_of(float(place), [run for run in runs if least <= run.steps <= most], seed)
        least = most + 1


def seconds_a_step(split: str, arms: Split) -> Distribution:
    return Distribution(
        f"Seconds a step: {split}",
        "seconds",
        {arm: runs.seconds for arm, runs in arms.items()},
        about="Of tasks run one at a time, decoding and its prompt included, the tool not. Box: middle half; whiskers: "
        "5% to 95%.",
    )


def calibration(split: str, arms: Mapping[str, Sequence[Run]], seed: int = 0) -> Lines:
    """The share of runs that succeeded, against the model's confidence in them: a reliability diagram.

    Bins as in Guo et al., "On Calibration of Modern Neural Networks", 2017, arXiv 1706.04599.
    """
    return Lines(
        f"Calibration: {split}",
        "probability that the model gave to all that it wrote",
        "success",
        {
            arm: tuple(point_of(_mean([_sure(run) for run in some]), some, seed) for some in _bins(runs))
            for arm, runs in arms.items()
        },
        about="Above the line: right more often than the model's confidence says. Larger marks are of more runs; 95% "
        "bootstrap intervals over tasks.",
        shares=True,
        diagonal=True,
    )


def calibration_error(runs: Sequence[Run]) -> float:
    """The expected calibration error (Guo et al.), 0 to 1: how far success is from confidence in a bin, over runs."""
    gaps = (
        len(some) * abs(_mean([run.success for run in some]) - _mean([_sure(run) for run in some]))
        for some in _bins(runs)
    )
    return sum(gaps) / len(runs) if runs else math.nan


def _calibrated(runs: Sequence[Run]) -> tuple[str, ...]:
    sure, right = _mean([_sure(run) for run in runs]), _mean([run.success for run in runs])
    return f"{calibration_error(runs):.3f}", f"{100 * sure:.1f}", f"{100 * right:.1f}", str(len(runs))


def _bins(runs: Sequence[Run]) -> list[list[Run]]:
    """Those that hold a run, of (0, 0.1], (0.1, 0.2] and so on."""
    bins: list[list[Run]] = [[] for _ in range(BINS)]
    for run in runs:
        bins[max(0, math.ceil(_sure(run) * BINS) - 1)].append(run)
    return [some for some in bins if some]


def point_of(x: float, runs: Sequence[Run], seed: int = 0) -> Point:
    """The share of runs that succeeded, with its interval over tasks."""
    if not runs:
        return Point(x, None)
    right, tasks = [float(run.success) for run in runs], [run.task for run in runs]
    found = bootstrap(right, tasks, resamples=RESAMPLES, seed=seed)
    return Point(x, found.mean, found.low, found.high, len(runs))


def _known(runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if run.confidence is not None]


def _sure(run: Run) -> float:
    assert run.confidence is not None
    return run.confidence


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
