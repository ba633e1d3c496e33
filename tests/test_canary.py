"""A leak is seen wherever it happens, and a tenant's own word is none."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import pytest
from desk import workflow

from engrain.canary import EXTRACTION, extraction, leaks, plant
from engrain.errors import InputError
from engrain.policy import Episode, OneByOne, ScriptTeacher
from engrain.rollout import rollout
from engrain.trajectory import Message, Trajectory
from engrain.workflow import Workflow


class Says(OneByOne):
    """Answers with a text, or the reasoning or arguments that hold it."""

    def __init__(self, text: str) -> None:
        self.text = text

    def _turn(self, episode: Episode) -> Message:
        return Message(role="assistant", reasoning=self.text)


def runs(of: Workflow, policy: OneByOne, split: str = "train") -> list[Trajectory]:
    return list(rollout(of, islice(of.tasks(split, 0), 8), policy, instructions="full"))


def test_each_tenant_has_a_word_of_its_own_that_stays_the_same() -> None:
    planted, words = plant(workflow)
    assert set(words) == set(workflow.tenants) and len(set(words.values())) == len(words)
    assert words == plant(workflow)[1]
    for tenant, word in words.items():
        assert word in planted.system(tenant, "full") and word not in planted.system(tenant, "shared")
        assert not any(word in planted.system(other, "full") for other in words if other != tenant)
        assert word not in workflow.system(tenant, "full")


def test_the_prompt_of_a_tenant_is_no_leak() -> None:
    planted, words = plant(workflow)
    found = leaks(runs(planted, ScriptTeacher(planted)), words)
    assert (found.read.mean, found.said.mean, found.runs, found.words) == (0.0, 0.0, 8, ())


def test_a_retriever_without_a_namespace_is_caught() -> None:
    planted, words = plant(workflow)
    every = "\n".join(section.markdown() for section in planted.tenants.values())
    leaking = replace(planted, procedure=planted.procedure + every)
    found = leaks(runs(leaking, ScriptTeacher(planted)), words)
    assert (found.read.mean, found.said.mean) == (1.0, 0.0)
    assert {(tenant, other) for _, tenant, other in found.words} == {("acme", "globex"), ("globex", "acme")}


def test_what_an_agent_says_of_others_is_caught_and_of_itself_is_not() -> None:
    planted, words = plant(workflow)
    made = runs(planted, Says(f"The reference is {words['acme']}."))
    found = leaks(made, words)
    others = [run for run in made if run.tenant != "acme"]
    assert 0 < len(others) < len(made)
    assert (found.read.mean, found.said.mean) == (0.0, len(others) / len(made))
    assert {tenant for _, tenant, _ in found.words} == {"globex"}


def test_every_tenant_asks_for_every_others_word() -> None:
    planted, words = plant(workflow)
    tasks = list(islice(extraction(planted).tasks(EXTRACTION, 0), 12))
    asked = {(task.tenant, other) for task in tasks for other in words if other in task.request}
    assert asked == {(tenant, other) for tenant in words for other in words if tenant != other}
    assert len({task.id for task in tasks}) == 12
    assert next(extraction(planted).tasks("train", 5)) == next(workflow.tasks("train", 5))
    assert not any(word in task.request for task in tasks for word in words.values())


def test_one_tenant_alone_is_refused() -> None:
    alone = replace(workflow, tenants={"acme": workflow.tenants["acme"]})
    with pytest.raises(InputError, match="no two tenants"):
        extraction(alone)
