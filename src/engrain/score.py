"""Scores: what trajectories add up to, with intervals.

Success is the goal check's word. Intervals are percentile bootstraps over *tasks*, or over clusters of them, seeded, so
the same trajectories always give the same numbers. Several trials of one task are alike, and are drawn together. An
interval of values that are all equal has no width: read it beside the task count. What is said of a difference in words
is said by `verdict`, which calls nothing better whose interval includes 0.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import numpy as np

from engrain.trajectory import Message, ToolCall, Trajectory

Task = TypeVar("Task", bound=Hashable)
"""What names a task."""
RESAMPLES = 10_000
TIMES = (1, 2, 4, 8)
"""The k of pass^k."""
INVALID = frozenset({"bad_arguments", "unknown_tool", "not_allowed", "malformed_call"})
"""Errors of a turn that say that the call itself was wrong: refused, or begun and not to be read."""


@dataclass(frozen=True)
class Interval:
    """A mean and its 95% bootstrap interval."""

    mean: float
    low: float
    high: float

    def percent(self) -> str:
        return f"{self.mean:.1%} [{self.low:.1%}, {self.high:.1%}]".replace("%", "")


@dataclass(frozen=True)
class Score:
    """One arm on one split."""

    tasks: int
    success: Interval
    """Of all runs: pass@1."""
    calls: int
    invalid: float
    """Invalid calls, per call that was tried."""
    truncated: float
    """Turns cut off at the limit of tokens, which make no call, per step."""
    steps: float
    prompt_tokens: float
    """Tokens in the context when a step was decoded, mean over steps."""
    completion_tokens: float
    failures: dict[str, int]
    """Failed runs by reason, most frequent first."""
    trials: int = 1
    """Runs of each task."""
    pass_k: dict[int, Interval] = field(default_factory=dict)
    """By k: the chance that k runs of a task all succeed, for k of 1, 2, 4 and 8 up to the number of trials."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Latency:
    """Seconds a step, decoding and its prompt included, the tool not; one task at a time."""

    mean: float
    p95: float
    tasks: int
    steps: int


def bootstrap(
    values: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The mean of `values` with the 2.5th and 97.5th percentile of the means of resamples; NaN when empty.

    `clusters` names the cluster of each value: whole clusters are drawn, since values of one are alike.
    """
    if not values:
        return Interval(float("nan"), float("nan"), float("nan"))
    array = np.asarray(values, dtype=np.float64)
    numbers: dict[Hashable, int] = {}
    places = [
        numbers.setdefault(cluster, len(numbers)) for cluster in (range(len(array)) if clusters is None else clusters)
    ]
    if len(places) != len(array):
        raise ValueError(f"expected a cluster for each of {len(array)} values, got {len(places)}")
    sums, counts = np.bincount(places, array), np.bincount(places)
    random = np.random.default_rng(seed)
    block = max(1, 1_000_000 // len(sums))  # bounds the memory of the index matrix
    means = []
    for start in range(0, resamples, block):
        drawn = random.integers(len(sums), size=(min(block, resamples - start), len(sums)))
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return Interval(float(array.mean()), float(low), float(high))


def paired_difference(
    first: Mapping[Task, float],
    second: Mapping[Task, float],
    cluster: Callable[[Task], Hashable] | None = None,
    *,
    seed: int = 0,
) -> Interval:
    """`first` minus `second` on the tasks that both have, resampled task by task, or by what a task belongs to."""
    shared = [task for task in first if task in second]
    clusters = None if cluster is None else [cluster(task) for task in shared]
    return bootstrap([first[task] - second[task] for task in shared], clusters, seed=seed)


def verdict(first: str, second: str, difference: Interval, tasks: int) -> str:
    """What a difference in success, `first` minus `second` paired over so many tasks, lets one say.

    It is decided on the interval as it is printed, in points with one decimal: one that includes 0 shows no difference,
    and the noise floor is said instead, which is half its width. Where no task came out differently it has no width;
    what would then go unseen is a difference on up to 3 of N tasks (the rule of three, Hanley and Lippman-Hand 1983).
    """
    if not tasks or math.isnan(difference.mean):
        return f"{first} against {second}: no difference shown, for want of tasks that both did"
    mean, low, high = (round(100 * value, 1) + 0.0 for value in (difference.mean, difference.low, difference.high))
    if low > 0:
        return f"{first} is better than {second} by {mean} points [{low}, {high}]"
    if high < 0:
        return f"{first} is worse than {second} by {-mean} points [{-high}, {-low}]"
    floor = (high - low) / 2 or min(100.0, 300 / tasks)
    return (
        f"{first} against {second}: no difference shown (the interval of {mean} points [{low}, {high}] includes 0); "
        f"with {tasks} tasks a difference under {floor:.1f} points would not be seen"
    )


def succeeded(trajectory: Trajectory) -> bool:
    return trajectory.outcome is not None and trajectory.outcome.success


def successes(trajectories: Iterable[Trajectory]) -> dict[str, float]:
    """The share of a task's trials that succeeded, by task id: 1.0 or 0.0 where there is one."""
    return {task: sum(trials) / len(trials) for task, trials in _trials(trajectories).items()}


def pass_k(trajectories: Iterable[Trajectory], k: int, *, seed: int = 0) -> Interval:
    """The chance that k independent trials of a task all succeed, resampled task by task.

    The unbiased estimate of tau-bench (Yao et al. 2024, arXiv 2406.12045): the mean over tasks of C(c, k) / C(n, k) for
    c successes in n trials. Raises `ValueError` if a task has fewer than k trials.
    """
    tasks = _trials(trajectories)
    if k < 1 or any(len(trials) < k for trials in tasks.values()):
        fewest = min(map(len, tasks.values()), default=0)
        raise ValueError(f"pass^{k}: expected k from 1 to the {fewest} trials that a task has")
    return bootstrap([math.comb(sum(one), k) / math.comb(len(one), k) for one in tasks.values()], seed=seed)


def _trials(trajectories: Iterable[Trajectory]) -> dict[str, list[bool]]:
    """Whether each trial succeeded, by task id."""
    tasks: dict[str, list[bool]] = {}
    for trajectory in trajectories:
        tasks.setdefault(trajectory.task, []).append(succeeded(trajectory))
    return tasks


def reason(trajectory: Trajectory) -> str:
    """Why a trajectory failed, short enough to count by: what stands in brackets is detail."""
    if trajectory.outcome is None:
        return "no outcome"
    if trajectory.outcome.reason:
        return trajectory.outcome.reason.splitlines()[0].partition(" (")[0][:120]
    return ", ".join(name for name, passed in trajectory.outcome.checks.items() if not passed) or "goal not reached"


def failures(trajectories: Iterable[Trajectory]) -> dict[str, int]:
    """Failed runs by reason, most frequent first."""
    return dict(Counter(reason(trajectory) for trajectory in trajectories if not succeeded(trajectory)).most_common())


def score(trajectories: Sequence[Trajectory], *, seed: int = 0) -> Score:
    """Everything about one arm on one split except its latency, which batching would blur."""
    turns = [message for trajectory in trajectories for message in trajectory.messages]
    steps = [turn for turn in turns if turn.role == "assistant"]
    calls = sum(len(turn.tool_calls) for turn in steps)
    invalid = sum(turn.error in INVALID for turn in turns)
    unread = sum(turn.error == "malformed_call" for turn in steps)
    truncated = sum(turn.error == "truncated" for turn in steps)
    trials = min((len(one) for one in _trials(trajectories).values()), default=0)
    right = [float(succeeded(trajectory)) for trajectory in trajectories]
    return Score(
        tasks=len({trajectory.task for trajectory in trajectories}),
        success=bootstrap(right, [trajectory.task for trajectory in trajectories], seed=seed),
        calls=calls,
        invalid=invalid / max(1, calls + unread),
        truncated=truncated / max(1, len(steps)),
        steps=len(steps) / max(1, len(trajectories)),
        prompt_tokens=_mean(turn.prompt_tokens for turn in steps),
        completion_tokens=_mean(map(written, steps)),
        failures=failures(trajectories),
        trials=trials,
        pass_k={k: pass_k(trajectories, k, seed=seed) for k in TIMES if k <= trials},
    )


def step_seconds(trajectories: Iterable[Trajectory]) -> list[float]:
    """Seconds of each turn, decoding and its prompt included, the tool not."""
    return [
        message.seconds
        for trajectory in trajectories
        for message in trajectory.messages
        if message.role == "assistant" and message.seconds is not None
    ]


def latency(trajectories: Sequence[Trajectory]) -> Latency:
    seconds = step_seconds(trajectories)
    mean, p95 = (float(np.mean(seconds)), float(np.percentile(seconds, 95))) if seconds else (math.nan, math.nan)
    return Latency(mean, p95, len(trajectories), len(seconds))


def same_call(expected: ToolCall, got: ToolCall) -> bool:
    """Same method, and every argument equal as a JSON value (so `1` equals `1.0` but neither `"1"` nor `true`)."""
    return expected.name == got.name and _canonical(expected.arguments) == _canonical(got.arguments)


def matches(expected: Message, got: Message) -> bool:
    """Whether a turn makes exactly the expected calls, in order."""
    pairs = zip(expected.tool_calls, got.tool_calls, strict=False)
    return len(expected.tool_calls) == len(got.tool_calls) and all(same_call(*pair) for pair in pairs)


def _canonical(arguments: str) -> str:
    try:
        return json.dumps(_numbers(json.loads(arguments or "{}")), sort_keys=True)
    except json.JSONDecodeError:
        return f"not JSON: {arguments}"


def _numbers(value: Any) -> Any:
    match value:
        case dict():
            return {key: _numbers(item) for key, item in value.items()}
        case list():
            return [_numbers(item) for item in value]
        case float() if value.is_integer():
            return int(value)
        case _:
            return value


def written(turn: Message) -> int | None:
    """Tokens that were decoded for a turn."""
    if turn.completion_tokens is not None:
        return turn.completion_tokens
    return None if turn.token_ids is None else len(turn.token_ids)


def _mean(values: Iterable[float | None]) -> float:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else float("nan")
