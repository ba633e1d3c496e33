"""Intervals cover, pairs cancel what tasks share, calls match by value."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engrain.score import (
    Interval,
    bootstrap,
    matches,
    paired_difference,
    pass_k,
    same_call,
    score,
    successes,
    verdict,
)
from engrain.trajectory import Message, Outcome, ToolCall, Trajectory


def run(task: str, success: bool, *turns: Message, reason: str = "") -> Trajectory:
    return Trajectory(id=task, task=task, messages=list(turns), outcome=Outcome(success=success, reason=reason))


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=40))
def test_interval_brackets_the_mean_and_repeats(values: list[float]) -> None:
    first, again = bootstrap(values, resamples=400), bootstrap(values, resamples=400)
    assert first == again
    assert min(values) - 1e-9 <= first.low <= first.high <= max(values) + 1e-9
    assert first.mean == pytest.approx(np.mean(values))


def test_interval_has_the_width_that_theory_gives() -> None:
    interval = bootstrap([1.0] * 150 + [0.0] * 150)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * math.sqrt(0.25 / 300), rel=0.05)


def test_interval_is_the_same_in_blocks() -> None:
    """More values than fit one block of indices."""
    values = list(np.random.default_rng(1).normal(size=5000))
    interval = bootstrap(values, resamples=1000)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 / math.sqrt(5000), rel=0.1)


def test_values_of_one_cluster_are_drawn_together() -> None:
    """Ten tenants whose ten tasks are all alike tell as much as ten tasks."""
    values = [float(tenant % 2) for tenant in range(10) for _ in range(10)]
    tenants = [tenant for tenant in range(10) for _ in range(10)]
    clustered, alone = bootstrap(values, tenants), bootstrap(values)
    assert clustered == bootstrap([float(tenant % 2) for tenant in range(10)])
    assert clustered.high - clustered.low > 2.5 * (alone.high - alone.low)
    assert bootstrap(values, list(range(100))) == alone
    large = bootstrap([1.0, 1.0, 1.0, 0.0], ["a", "a", "a", "b"])
    assert (large.mean, large.low, large.high) == (0.75, 0.0, 1.0)
    with pytest.raises(ValueError, match="a cluster for each of 2 values"):
        bootstrap([1.0, 0.0], ["a"])


def test_no_values_is_not_zero() -> None:
    assert math.isnan(bootstrap([]).mean)


def test_pairs_cancel_the_difficulty_that_tasks_share() -> None:
    hard = {f"t{i}": float(i % 2) for i in range(100)}
    assert paired_difference(hard, hard) == bootstrap([0.0])
    better = {**hard, "t0": 1.0, "only here": 1.0}
    assert paired_difference(better, hard).mean == pytest.approx(0.01)


def test_score_counts_calls_steps_and_reasons() -> None:
    call = ToolCall(id="call_0", name="look", arguments="{}")
    step = Message(role="assistant", tool_calls=[call], token_ids=[1, 2, 3], prompt_tokens=10)
    refused = Message(role="tool", name="look", error="not_allowed")
    failed = Message(role="tool", name="look", error="timeout")
    answer = Message(role="assistant", content="done", token_ids=[1], prompt_tokens=30)
    cut = Message(role="assistant", error="truncated", token_ids=[1, 2], prompt_tokens=20)
    unread = Message(role="assistant", error="malformed_call", prompt_tokens=20)
    result = score(
        [
            run("a", True, step, failed, answer),
            run("b", False, step, refused, answer, reason="budget: steps"),
            run("c", False, cut, unread, reason="budget: steps (64)"),
        ]
    )
    assert (result.tasks, result.calls, result.steps) == (3, 2, 6 / 3)
    assert result.invalid == pytest.approx(2 / 3)  # a tool's own failure is not an invalid call
    assert result.truncated == pytest.approx(1 / 6)
    assert (result.prompt_tokens, result.completion_tokens) == (20, 2)
    assert result.failures == {"budget: steps": 2}
    assert result.success.mean == pytest.approx(1 / 3)
    assert successes([run("a", True), run("b", False)]) == {"a": 1.0, "b": 0.0}


def trials(**outcomes: str) -> list[Trajectory]:
    """`a="101"`: task a, right in the first and third of three trials."""
    return [run(task, bit == "1") for task, bits in outcomes.items() for bit in bits]


def test_pass_k_is_the_share_of_ways_to_draw_k_trials_that_all_succeed() -> None:
    outcomes = {"a": "1111", "b": "1101", "c": "0100", "d": "0000"}
    runs = trials(**outcomes)
    for k in (1, 2, 3, 4):
        ways = [[set(drawn) == {"1"} for drawn in combinations(bits, k)] for bits in outcomes.values()]
        assert pass_k(runs, k).mean == pytest.approx(np.mean([np.mean(way) for way in ways]))
    with pytest.raises(ValueError, match=r"pass\^5: expected k from 1 to the 4 trials"):
        pass_k(runs, 5)
    with pytest.raises(ValueError, match="the 3 trials"):
        pass_k([*runs, *trials(e="111")], 4)


def test_trials_of_one_task_are_one_cluster() -> None:
    always, never = {f"t{n}": "1111" for n in range(10)}, {f"u{n}": "0000" for n in range(10)}
    made = score(trials(**always, **never))
    assert (made.tasks, made.trials, list(made.pass_k)) == (20, 4, [1, 2, 4])
    assert made.success == bootstrap([1.0] * 10 + [0.0] * 10) == made.pass_k[1] == made.pass_k[4]
    mixed = trials(**{f"t{n}": "1010" for n in range(20)})
    assert score(mixed).success == Interval(0.5, 0.5, 0.5) and score(mixed).pass_k[4].mean == 0
    assert successes(mixed)["t0"] == 0.5
    once = score(trials(a="1", b="0"))
    assert (once.trials, once.pass_k) == (1, {1: once.success}) and score([]).pass_k == {}


def test_a_difference_averages_over_trials() -> None:
    first, second = successes(trials(a="11", b="10")), successes(trials(a="10", b="00"))
    assert paired_difference(first, second) == Interval(0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("difference", "said"),
    [
        (Interval(0.12, 0.03, 0.21), "lora is better than prompt by 12.0 points [3.0, 21.0]"),
        (Interval(-0.12, -0.21, -0.03), "lora is worse than prompt by 12.0 points [3.0, 21.0]"),
        (Interval(0.02, -0.02, 0.06), "the interval of 2.0 points [-2.0, 6.0] includes 0); with 300 tasks a difference "
         "under 4.0 points would not be seen"),
        (Interval(0.05, 0.0, 0.1), "no difference shown"),
        (Interval(-0.05, -0.1, 0.0), "no difference shown"),
        (Interval(0.002, 0.0004, 0.006), "[0.0, 0.6] includes 0"),
        (Interval(0.0, 0.0, 0.0), "with 300 tasks a difference under 1.0 points would not be seen"),
        (bootstrap([]), "no difference shown"),
    ],
)  # fmt: skip
def test_what_a_difference_lets_one_say(difference: Interval, said: str) -> None:
    assert said in verdict("lora", "prompt", difference, 300)
    assert "for want of tasks" in verdict("lora", "prompt", difference, 0)


@given(st.floats(-1, 1), st.floats(0, 1), st.floats(0, 1), st.integers(1, 1000))
def test_nothing_is_better_or_worse_whose_interval_includes_zero(
    mean: float, below: float, above: float, tasks: int
) -> None:
    text = verdict("a", "b", Interval(mean, mean - below, mean + above), tasks)
    if mean - below <= 0 <= mean + above:
        assert "better" not in text and "worse" not in text and f"with {tasks} tasks" in text
    else:
        assert "includes 0" not in text or min(abs(mean - below), abs(mean + above)) < 0.001


@pytest.mark.parametrize(
    ("arguments", "equal"),
    [
        ('{"a": 1, "b": "x"}', True),
        ('{"b":"x","a":1.0}', True),
        ('{"a": "1", "b": "x"}', False),
        ('{"a": true, "b": "x"}', False),
        ('{"a": 1}', False),
        ('{"a": 1, "b": "x", "c": null}', False),
        ('{"a": 1, "b"', False),
    ],
)
def test_calls_match_by_value(arguments: str, equal: bool) -> None:
    expected = ToolCall(id="call_0", name="f", arguments='{"a": 1, "b": "x"}')
    assert same_call(expected, ToolCall(id="other", name="f", arguments=arguments)) is equal
    assert not same_call(expected, ToolCall(id="call_0", name="g", arguments=expected.arguments))


def test_a_turn_matches_only_with_all_its_calls_in_order() -> None:
    first, second = (ToolCall(id=name, name=name) for name in "fg")
    expected = Message(role="assistant", tool_calls=[first, second])
    assert matches(expected, expected)
    assert not matches(expected, Message(role="assistant", tool_calls=[second, first]))
    assert not matches(expected, Message(role="assistant", tool_calls=[first]))
