"""Trajectories for the bundled base: the support desk with tenants drawn at random, in three depths of context.

A row carries the whole procedure, schemas and profile in its prompt (`full`), the profile alone (`rules`), or nothing
(`none`). With a profile, each tenant has a name and rules of its own, so a name tells nothing and the rules must be
read; without one, tenants come back, so that a name is worth looking at. The tenants of
`examples/support_desk/tenants` and the held-out wording never occur.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from engrain.context import Section
from engrain.policy import ScriptTeacher
from engrain.rollout import rollout
from engrain.task import Task
from engrain.trajectory import Message, Trajectory
from engrain.workflow import Workflow, load_workflow

DESK = Path(__file__).resolve().parents[2] / "examples" / "support_desk"
SYLLABLES = [
    "ba",
    "be",
    "bo",
    "da",
    "de",
    "do",
    "fa",
    "fi",
    "ga",
    "go",
    "ka",
    "ke",
    "la",
    "lo",
    "ma",
    "mi",
    "na",
    "no",
    "pa",
    "pe",
    "ra",
    "ro",
    "sa",
    "so",
    "ta",
    "to",
    "va",
    "vi",
]


@dataclass(frozen=True)
class Mix:
    """Shares of rows by depth of context, and of tasks with many items or with faults."""

    full: float = 0.04
    rules: float = 0.26
    many: float = 0.15
    faults: float = 0.25
    population: int = 40
    """How many tenants come back in the rows without context."""


def _tenant(rng: random.Random, names: set[str]) -> str:
    while (name := "".join(rng.choices(SYLLABLES, k=3))) in names:
        pass
    return name


def _population(count: int, tenant_rules: Any) -> dict[str, Any]:
    """Tenants that come back, by name, the same in every chunk; their names have two syllables."""
    rng = random.Random("population")
    names = rng.sample([first + last for first in SYLLABLES for last in SYLLABLES], count)
    return {name: tenant_rules.draw(rng) for name in names}


def _system(workflow: Workflow, tenant: str, depth: str) -> str:
    if depth == "rules":
        return f"{workflow.system(tenant, 'none')}\n\nRules of {tenant}:\n{workflow.tenants[tenant].markdown()}"
    return workflow.system(tenant, "full" if depth == "full" else "none")


def trajectories(seed: int, count: int, mix: Mix = Mix()) -> Iterator[Trajectory]:
    """`count` teacher trajectories of fresh random tenants; the same for the same seed."""
    desk = load_workflow(DESK)
    tenant_rules = import_module("engrain_workflow_support_desk.rules")  # a module of what `load_workflow` imported
    make_task = import_module("engrain_workflow_support_desk.tasks").make_task
    rng = random.Random(f"base/{seed}")
    tenants: dict[str, Section] = {}
    tasks: list[Task] = []
    depths: dict[str, str] = {}
    regulars = _population(mix.population, tenant_rules)
    for number in range(count):
        depth = rng.choices(("full", "rules", "none"), (mix.full, mix.rules, 1 - mix.full - mix.rules))[0]
        if depth == "none":
            name, rules = rng.choice(list(regulars.items()))
        else:
            name, rules = _tenant(rng, {*desk.tenants, *tenants}), tenant_rules.draw(rng)
        tenants[name] = Section("tenant", name, tuple(tenant_rules.write(rules, rng)))
        many = rng.random() < mix.many or depth == "full"
        items = rng.randint(3, 12) if many else rng.choice((1, 1, 2, 3))
        faults = rng.choice((1, 1, 2)) if rng.random() < mix.faults else 0
        task = make_task(rng, name, rules, items, split="base", seed=seed * 1_000_000 + number, faults=faults)
        tasks.append(task)
        depths[task.id] = depth
    workflow = replace(desk, tenants=tenants)
    for trajectory in rollout(workflow, tasks, ScriptTeacher(workflow), parallel=1):
        if trajectory.outcome is None or not trajectory.outcome.success:
            raise AssertionError(f"the teacher failed {trajectory.task}: {trajectory.outcome}")
        depth = depths[trajectory.task]
        system = Message(role="system", content=_system(workflow, trajectory.tenant, depth))
        tools = workflow.schemas("full" if depth == "full" else "none")
        yield trajectory.model_copy(update={"messages": [system, *trajectory.messages[1:]], "tools": tools})
