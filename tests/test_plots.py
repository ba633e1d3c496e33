"""Bins hold the runs that they name, and the calibration error is that of Guo et al. on cases worked out by hand."""

from __future__ import annotations

import math

import pytest

from engrain.page import Distribution, Lines, Table
from engrain.plots import Run, Runs, against_steps, calibration, calibration_error, confidence, plots, reduced
from engrain.trajectory import Message, Outcome, Trajectory


def turn(*logprobs: float, seconds: float | None = None) -> Message:
    return Message(role="assistant", logprobs=list(logprobs) or None, seconds=seconds)


def run(success: bool, *turns: Message) -> Trajectory:
    return Trajectory(id="a", task="t", messages=[Message(role="user"), *turns], outcome=Outcome(success=success))


def test_confidence_is_the_probability_of_all_that_was_written() -> None:
    assert confidence(run(True, turn(math.log(0.5), math.log(0.5)), turn(math.log(0.8)))) == pytest.approx(0.2)
    assert confidence(run(True, turn(-1e9))) == 0 and confidence(run(True, turn(1e-7))) == 1
    for unknown in (run(True), run(True, turn()), run(True, turn(-1.0), turn()), run(True, turn(math.nan))):
        assert confidence(unknown) is None


def test_runs_are_reduced_to_what_the_plots_need() -> None:
    found = reduced([run(True, turn(0.0), turn(0.0)), run(False)], [run(True, turn(seconds=0.123456), turn())])
    assert found == Runs((Run("t", 2, True, 1.0), Run("t", 0, False, None)), (0.1235,))


def test_success_is_counted_in_the_bin_of_the_steps_that_a_run_took() -> None:
    steps = {1: True, 2: False, 5: True, 6: True, 20: True, 40: False, 41: True, 0: True}
    runs = Runs(tuple(Run(f"{count}", count, success, None) for count, success in steps.items()), ())
    plot = against_steps("held_out", {"lora": runs, "none": Runs((), ())})
    assert plot.labels == ("1", "2-5", "6-20", "21-40", ">40")
    found = [(point.x, point.mean, point.count) for point in plot.series["lora"]]
    assert found == [(0, 1.0, 2), (1, 0.5, 2), (2, 1.0, 2), (3, 0.0, 1), (4, 1.0, 1)]
    assert (plot.series["lora"][1].low, plot.series["lora"][1].high) == (0.0, 1.0)
    assert [point.mean for point in plot.series["none"]] == [None] * 5
    again = Runs((Run("a", 3, True, None), Run("a", 3, False, None)), ())  # a task twice is still one task
    (point,) = [point for point in against_steps("", {"lora": again}).series["lora"] if point.mean is not None]
    assert (point.low, point.mean, point.high) == (0.5, 0.5, 0.5)


def test_calibration_error_of_cases_worked_out_by_hand() -> None:
    right = [Run("t", 1, True, 1.0)] * 4
    assert calibration_error(right) == 0
    assert calibration_error([Run("t", 1, False, 1.0)] * 4) == 1
    # (0.7, 0.8]: 3 of 4 right at 0.75, no gap; (0.1, 0.2]: 1 of 1 right at 0.2, a gap of 0.8, a fifth of the runs
    mixed = [*[Run("t", 1, True, 0.75)] * 3, Run("t", 1, False, 0.75), Run("t", 1, True, 0.2)]
    assert calibration_error(mixed) == pytest.approx(0.8 / 5)
    # means are taken in a bin: two that are off in opposite directions cancel
    assert calibration_error([Run("t", 1, True, 0.5), Run("t", 1, False, 0.45)]) == pytest.approx(0.025)
    assert math.isnan(calibration_error([]))
    plot = calibration("held_out", {"lora": mixed})
    assert [(point.x, point.mean, point.count) for point in plot.series["lora"]] == [(0.2, 1.0, 1), (0.75, 0.75, 4)]


def test_what_there_is_nothing_for_is_not_drawn() -> None:
    sure, unsure = Runs((Run("t", 1, True, 0.9),), (0.1,)), Runs((Run("t", 3, False, None),), ())
    blocks = plots({"held_out": {"lora": sure, "teacher": unsure}, "faults": {"teacher": unsure}})
    assert [(type(block), getattr(block, "title", "")) for block in blocks] == [
        (Lines, "Success against steps: held_out"),
        (Lines, "Success against steps: faults"),
        (Distribution, "Seconds a step: held_out"),
        (Lines, "Calibration: held_out"),
        (Table, ""),
    ]
    assert isinstance(blocks[3], Lines) and list(blocks[3].series) == ["lora"]
    assert isinstance(blocks[4], Table) and blocks[4].rows == (("held_out", "lora", "0.100", "90.0", "100.0", "1"),)
    assert len(plots({"faults": {"teacher": unsure}})) == 1
