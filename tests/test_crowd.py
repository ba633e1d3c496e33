"""Crowds of tenants keep whose tasks are run, and draw the rest from their rules."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from engrain.crowd import crowded
from engrain.workflow import load_workflow


def test_a_larger_crowd_holds_a_smaller_one_and_only_tasks_of_its_own_tenants(library: Path) -> None:
    workflow = load_workflow(library)
    one, many = (crowded(workflow, "held_out", count, 1000) for count in (1, 40))
    (first,) = one.tenants
    assert {task.tenant for task in islice(one.tasks("held_out", 1000), 8)} == {first}
    assert {task.tenant for task in islice(many.tasks("held_out", 1000), 8)} == set(workflow.tenants)
    assert len(many.tenants) == 40 and many.tenants[first] == workflow.tenants[first]
    assert list(crowded(workflow, "held_out", 20, 1000).tenants.values()) == list(many.tenants.values())[:20]


def test_the_others_say_what_somebody_says_of_themselves_with_other_numbers(library: Path) -> None:
    many = crowded(workflow := load_workflow(library), "held_out", 40, 1000)
    shapes = {_shape(rule, name) for name, one in workflow.tenants.items() for rule in one.rules}
    drawn = [one for name, one in many.tenants.items() if name not in workflow.tenants]
    assert {_shape(rule, one.name) for one in drawn for rule in one.rules} <= shapes
    assert len({one.rules for one in drawn}) > 1


def _shape(rule: str, tenant: str) -> str:
    return "".join("0" if letter.isdigit() else letter for letter in rule.replace(tenant, "TENANT"))
