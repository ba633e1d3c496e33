"""The clinic that benchmarks compile: its teacher reaches every goal, and unseen tenants are not in training."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

from engrain.policy import ScriptTeacher
from engrain.rollout import rollout
from engrain.workflow import Workflow, load_workflow


@pytest.fixture(scope="module")
def clinic() -> Workflow:
    return load_workflow(Path(__file__).parents[1] / "benchmarks" / "clinic")


def test_its_teacher_reaches_every_goal(clinic: Workflow) -> None:
    assert set(clinic.splits) >= {"train", "held_out", "unseen", "faults", "long40"}
    for split in clinic.splits:
        runs = list(rollout(clinic, islice(clinic.tasks(split, 3), 3), ScriptTeacher(clinic)))
        assert all(run.outcome and run.outcome.success for run in runs), split
        if split.startswith("long"):
            calls = [sum(len(message.tool_calls) for message in run.messages) for run in runs]
            assert min(calls) >= int(split.removeprefix("long"))


def test_half_of_its_tenants_are_in_no_split_but_one(clinic: Workflow) -> None:
    named = {split: {task.tenant for task in islice(clinic.tasks(split, 0), 24)} for split in clinic.splits}
    unseen = named.pop("unseen")
    assert len(unseen) == 12 and unseen < set(clinic.tenants)
    assert all(len(of) == 12 and not of & unseen for of in named.values())


def test_no_task_is_in_two_splits(clinic: Workflow) -> None:
    asked = [task.request for split in clinic.splits for task in islice(clinic.tasks(split, 0), 20)]
    assert len(set(asked)) == len(asked)
