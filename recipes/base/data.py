"""What the bundled base trains on: the support desk with tenants drawn at random, in three depths of context; drills.

A row carries the whole procedure, schemas and profile in its prompt (`full`), the profile alone (`rules`), or nothing
(`none`). With a profile, each tenant has a name and rules of its own, so a name tells nothing and the rules must be
read; without one, tenants come back, so that a name is worth looking at. The tenants of
`examples/support_desk/tenants` and the held-out wording never occur.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from drills import drills

from engrain.context import Section
from engrain.policy import ScriptTeacher
from engrain.rollout import Budget, rollout
from engrain.task import Task
from engrain.trajectory import Message, Trajectory
from engrain.workflow import Workflow, load_workflow

DESK = Path(__file__).resolve().parents[2] / "examples" / "support_desk"
ONSETS, VOWELS, CODAS = (
    letters.split(",")
    for letters in (
        "b,c,d,f,g,h,j,k,l,m,n,p,r,s,t,v,w,z,bl,br,ch,cl,cr,dr,fl,fr,gl,gr,pl,pr,sh,sl,sp,st,sw,th,tr",
        "a,e,i,o,u,ai,ea,ee,oa,ou",
        ",,b,d,ck,g,l,ll,m,n,nd,ng,nt,p,r,rd,rk,rn,s,st,t,th,x",
    )
)


@dataclass(frozen=True)
class Mix:
    """Shares of rows by depth of context, and of tasks with many items or with faults."""

    full: float = 0.04
    rules: float = 0.26
    many: float = 0.15
    faults: float = 0.25
    population: int = 40
    """How many tenants come back in the rows without context."""
    drills: float = 0.25
    """Share of drills among all rows."""


def _tenant(rng: random.Random, taken: Collection[str]) -> str:
    """A made-up name; its pieces are spread over the vocabulary."""
    while True:
        syllables = (rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS) for _ in range(rng.choice((2, 2, 3))))
        if (name := "".join(syllables)) not in taken:
            return name


def _population(count: int, desk: Workflow, tenant_rules: Any) -> dict[str, Any]:
    """Tenants that come back, by name, the same in every chunk."""
    rng, regulars = random.Random("population"), dict[str, Any]()
    for _ in range(count):
        regulars[_tenant(rng, {*desk.tenants, *regulars})] = tenant_rules.draw(rng)
    return regulars


def _system(workflow: Workflow, tenant: str, depth: str) -> str:
    if depth == "rules":
        return f"{workflow.system(tenant, 'none')}\n\nRules of {tenant}:\n{workflow.tenants[tenant].markdown()}"
    return workflow.system(tenant, "full" if depth == "full" else "none")


def rows(seed: int, count: int, mix: Mix = Mix(), english: Sequence[str] = ()) -> Iterator[Trajectory]:
    """About `count` trajectories and drills, the same for the same seed."""
    drilled = round(count * mix.drills)
    yield from practice(seed, drilled, mix, english)
    yield from trajectories(seed, count - drilled, mix)


def practice(seed: int, count: int, mix: Mix = Mix(), english: Sequence[str] = ()) -> Iterator[Trajectory]:
    """Drills about the same tenants as in `trajectories`."""
    desk = load_workflow(DESK)
    tenant_rules = import_module("engrain_workflow_support_desk.rules")
    requests = import_module("engrain_workflow_support_desk.requests")
    make_item = import_module("engrain_workflow_support_desk.tasks").make_item
    rng = random.Random(f"drills/{seed}")
    regulars = _population(mix.population, desk, tenant_rules)

    def tenant() -> tuple[str, dict[str, str]]:
        known = rng.random() < 0.4
        if known:
            name, rules = rng.choice(list(regulars.items()))
        else:
            name, rules = _tenant(rng, {*desk.tenants, *regulars}), tenant_rules.draw(rng)
        section = Section("tenant", name, tuple(tenant_rules.write(rules, rng)))
        system = _system(replace(desk, tenants={name: section}), name, "none" if known else "rules")
        return system, {f"{rule} of {name}": value for rule, value in tenant_rules.said(rules).items()}

    def lines() -> dict[str, str]:
        """What a customer asks for in few kinds of request, so that many lines share their words."""
        kinds = rng.sample(requests.KINDS, 3)
        taken: set[str] = set()
        items = [make_item(rng.choice(kinds), rng, taken) for _ in range(rng.randint(8, 20))]
        return {requests.mark(place): item.said for place, item in enumerate(requests.say(items, rng, held_out=False))}

    return drills(rng, count, tenant, tenant_rules.judged, lines, english)


def trajectories(seed: int, count: int, mix: Mix = Mix()) -> Iterator[Trajectory]:
    """`count` teacher trajectories; the same for the same seed."""
    desk = load_workflow(DESK)
    tenant_rules = import_module("engrain_workflow_support_desk.rules")  # a module of what `load_workflow` imported
    make_task = import_module("engrain_workflow_support_desk.tasks").make_task
    rng = random.Random(f"base/{seed}")
    tenants: dict[str, Section] = {}
    tasks: list[Task] = []
    depths: dict[str, str] = {}
    regulars = _population(mix.population, desk, tenant_rules)
    for number in range(count):
        depth = rng.choices(("full", "rules", "none"), (mix.full, mix.rules, 1 - mix.full - mix.rules))[0]
        if depth == "none":
            name, rules = rng.choice(list(regulars.items()))
        else:
            name, rules = _tenant(rng, {*desk.tenants, *regulars, *tenants}), tenant_rules.draw(rng)
        tenants[name] = Section("tenant", name, tuple(tenant_rules.write(rules, rng)))
        many = rng.random() < mix.many or depth == "full"
        # the whole context leaves about half of the longest row
        items = rng.randint(3, 12 if depth == "full" else 24) if many else rng.choice((1, 1, 2, 3))
        faults = rng.choice((1, 1, 2)) if rng.random() < mix.faults else 0
        task = make_task(rng, name, rules, items, split="base", seed=seed * 1_000_000 + number, faults=faults)
        tasks.append(task)
        depths[task.id] = depth
    workflow = replace(desk, tenants=tenants)
    for trajectory in rollout(workflow, tasks, ScriptTeacher(workflow), parallel=1, budget=Budget(steps=200)):
        if trajectory.outcome is None or not trajectory.outcome.success:
            raise AssertionError(f"the teacher failed {trajectory.task}: {trajectory.outcome}")
        depth = depths[trajectory.task]
        system = Message(role="system", content=_system(workflow, trajectory.tenant, depth))
        tools = workflow.schemas("full" if depth == "full" else "none")
        yield trajectory.model_copy(update={"messages": [system, *trajectory.messages[1:]], "tools": tools})
