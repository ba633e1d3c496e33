"""Trials differ in the seed alone, and say which they are."""

from __future__ import annotations

from typing import cast

import pytest
from desk import workflow

from engrain.compiled_policy import CompiledPolicy, Decoder
from engrain.errors import InputError
from engrain.policy import ReplayTeacher, ScriptTeacher
from engrain.repeats import numbered, sampled
from engrain.trajectory import Trajectory
from engrain.turn import Sampling


def test_a_trajectory_keeps_the_number_of_its_trial() -> None:
    run = Trajectory(id="t:compiled", task="t", messages=[], meta={"in_prompt": "far"})
    third = Trajectory.from_json(numbered(run, 3).to_json())
    assert (third.id, third.task, third.meta) == ("t:compiled:3", "t", {"in_prompt": "far", "trial": "3"})
    assert run.meta == {"in_prompt": "far"}


def test_a_compiled_policy_draws_in_each_trial_on_one_engine() -> None:
    greedy = CompiledPolicy(cast(Decoder, object()), in_prompt=lambda task: "always")
    first, second = (cast(CompiledPolicy, sampled(greedy, 0.7, trial, "lora")) for trial in (1, 2))
    assert (first._sampling, second._sampling) == (Sampling(0.7, seed=1), Sampling(0.7, seed=2))
    assert first.engine is second.engine is greedy.engine and greedy._sampling is None
    assert first.in_prompt is greedy.in_prompt
    assert sampled(greedy, 0.0, 1, "lora") is greedy


def test_what_cannot_draw_is_refused_and_a_teacher_has_nothing_to_draw() -> None:
    teacher, replay = ScriptTeacher(workflow), ReplayTeacher([])
    assert sampled(teacher, 0.7, 1, "teacher") is teacher
    assert sampled(replay, 0.0, 1, "replay") is replay
    with pytest.raises(InputError, match="arm 'replay' cannot be sampled; leave it out of --arms"):
        sampled(replay, 0.7, 1, "replay")
