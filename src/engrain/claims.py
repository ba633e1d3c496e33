"""The suite `sources`: what the articles behind Engrain assert, measured on one workflow.

Every way of adapting an agent meets the same tasks, on the same base and machine: the tenants it knows and new ones,
faults, long tasks, a crowd of tenants, profiles with canaries, a rule that changes, and general probes before and
after. Invariant: what is finished lies on disk and is not measured again; what cannot be measured here is kept as the
reason why.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

from engrain.agent import HYPERNETWORK, Agent, as_policy
from engrain.arms import Arm, agent_arms
from engrain.budget import UNTIMED, Budget
from engrain.canary import EXTRACTION, Leaks, extraction, leaks, plant
from engrain.controls import CONTROLS
from engrain.crowd import Made, crowded, make_all
from engrain.errors import InputError
from engrain.evaluate import Plan, Progress, evaluate
from engrain.facts import MiniLM
from engrain.files import replacing
from engrain.policy import Policy
from engrain.probe import Suite, attempts
from engrain.results import kept
from engrain.score import Interval, paired_difference, succeeded
from engrain.spent import Spent, stopwatch
from engrain.trajectory import Trajectory, read_trajectories
from engrain.workflow import Workflow

ARMS = (
    "prompt", "few_shot", "rag", "rag_strict", "orchestrated", "lora", "full", "hypernetwork", "hypernetwork_rag",
    "another", "empty", "base", "code", "teacher",
)  # fmt: skip
CROWDED = ("rag", "rag_strict")
"""Arms that read more when there are more tenants; the others read their own tenant's rules, or none."""
COMPILED = ("lora", "full", "hypernetwork")
ROLES: Mapping[str, Sequence[str]] = {
    "seen tenants": ("held_out", "test", "train"),
    "new tenants": ("unseen",),
    "rare rules": ("rare",),
    "faults": ("faults",),
    "20 steps": ("long20",),
    "40 steps": ("long40",),
}
"""What is asked, and the names of splits that ask it; the first that the workflow has."""
SCRIPTS = ("code", "teacher")
"""Arms without a model."""
SEEN = "seen tenants"
GENERAL = ("copy", "compare")
"""Probes of the suite that tell what a base forgot."""
NA = "not applicable: "


@dataclass(frozen=True)
class Sizes:
    """How many tasks: of the seen tenants, of each other split, and run one at a time."""

    tasks: int = 300
    fewer: int = 60
    latency: int = 10
    budget: Budget = UNTIMED
    crowds: tuple[int, ...] = (1, 10, 100, 1000)
    """Numbers of tenants."""


QUICK = Sizes(tasks=8, fewer=3, latency=1, budget=replace(UNTIMED, steps=24, completion_tokens=4096), crowds=(1, 10))


@dataclass(frozen=True)
class Method:
    """One arm, as measured. Where there is no number, there is a reason."""

    runs: Mapping[str, Sequence[Trajectory]]
    """By role, of those that the workflow has splits for."""
    alone: Sequence[Trajectory]
    """Runs of the seen tenants' tasks, one at a time."""
    kinds: Mapping[str, Mapping[str, int]]
    """Failed runs of the seen tenants by kind and how."""
    leaks: Leaks | str
    update: Spent | str
    """From the change of a rule until it is acted on."""
    forgets: Interval | str
    """General probes, adapted minus base."""
    once: float
    """Seconds of compiling."""
    megabytes: float


@dataclass(frozen=True)
class Measured:
    workflow: Workflow
    sizes: Sizes
    roles: Mapping[str, str]
    """The split of each role; or why there is none."""
    methods: Mapping[str, Method]
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Why an arm was not measured."""
    crowds: Mapping[int, Mapping[str, Sequence[Trajectory]]] = field(default_factory=dict)
    """Runs of the seen tenants' tasks by number of tenants and arm, of the arms that read more for it."""
    made: Made | str = f"{NA}there is no hypernetwork"
    """Adapters for the largest crowd."""


def measure(
    workflow: Workflow,
    agents: Sequence[Agent],
    sizes: Sizes,
    out: Path,
    *,
    facts: Path | None = None,
    suite: Suite = (),
    seed: int = 1000,
    parallel: int = 16,
    progress: Progress = lambda *_: None,
) -> Measured:
    """Run what is not yet in `out`. `suite` has the general probes, if any."""
    roles = {role: _split(workflow, role, names) for role, names in ROLES.items()}
    there = {role: split for role, split in roles.items() if not split.startswith(NA)}
    plan = Plan((there[SEEN],), sizes.tasks, sizes.latency, seed, parallel, sizes.budget)
    rest = replace(plan, splits=tuple(split for role, split in there.items() if role != SEEN), tasks=sizes.fewer)
    arms, left_out = _available(agents, workflow, facts)
    seen = evaluate(workflow, arms, plan, out / "seen", progress)
    evaluate(workflow, arms, replace(rest, latency_tasks=0), out / "others", progress)
    alone = replace(rest, splits=(there[SEEN],), latency_tasks=0)
    leaking = _leaks(workflow, agents, facts, alone, out, progress)
    by_kind = {agent.manifest.kind: agent for agent in agents}
    general = _General(suite, sizes.fewer, parallel, out / "general", progress)
    methods = {}
    for arm in arms:
        runs = {
            role: list(read_trajectories(out / ("seen" if role == SEEN else "others") / f"{arm.name}.{split}.jsonl"))
            for role, split in there.items()
        }
        agent = by_kind.get("hypernetwork" if arm.name.startswith("hypernetwork") else arm.name)
        methods[arm.name] = Method(
            runs,
            list(read_trajectories(out / "seen" / f"{arm.name}.{there[SEEN]}.latency.jsonl")),
            seen.failure_kinds[arm.name][there[SEEN]],
            leaking.get(arm.name, f"{NA}this arm has no tenants' rules to leak"),
            _once(out / "updates" / f"{arm.name}.json", partial(update, arm.name, agent, workflow), Spent),
            general(agents[0], agent, workflow) if agent else f"{NA}the weights are the base's",
            agent.manifest.seconds if agent else 0.0,
            _megabytes(agent) if agent else 0.0,
        )
    crowds, made = _crowds(workflow, agents, facts, alone, sizes, out, progress)
    return Measured(workflow, sizes, roles, methods, left_out, crowds, made)


def _split(workflow: Workflow, role: str, names: Sequence[str]) -> str:
    found = next((name for name in names if name in workflow.splits), "")
    return found or f"{NA}{workflow.name!r} has no split {names[0]!r}"


def _available(agents: Sequence[Agent], workflow: Workflow, facts: Path | None) -> tuple[list[Arm], dict[str, str]]:
    """The arms that can be run here, and why the others cannot."""
    arms, left_out = list[Arm](), dict[str, str]()
    for name in ARMS:
        try:
            arms += agent_arms([name], agents, workflow, facts)
        except InputError as error:
            left_out[name] = str(error)
    return arms, left_out


def _crowds(
    workflow: Workflow,
    agents: Sequence[Agent],
    facts: Path | None,
    plan: Plan,
    sizes: Sizes,
    out: Path,
    progress: Progress,
) -> tuple[dict[int, dict[str, Sequence[Trajectory]]], Made | str]:
    """Each number of tenants: runs of the arms that read more for it; and a hypernetwork's adapters for the largest."""
    split, runs = plan.splits[0], dict[int, dict[str, Sequence[Trajectory]]]()
    if not workflow.tenants:
        return runs, f"{NA}there are no tenants"
    for count in sizes.crowds:
        crowd, place = crowded(workflow, split, count, plan.seed), out / f"crowd_{count}"
        arms = [arm for arm in _available(agents, crowd, facts)[0] if arm.name in CROWDED]
        if not arms:
            break
        evaluate(crowd, arms, plan, place, progress)
        runs[count] = {arm.name: list(read_trajectories(place / f"{arm.name}.{split}.jsonl")) for arm in arms}
    hyper = next((agent for agent in agents if agent.manifest.kind == "hypernetwork"), None)
    if hyper is None:
        return runs, Measured.made
    largest = crowded(workflow, split, max(sizes.crowds), plan.seed)
    return runs, _once(out / "crowd.json", partial(make_all, hyper, largest), Made)


def _leaks(
    workflow: Workflow, agents: Sequence[Agent], facts: Path | None, plan: Plan, out: Path, progress: Progress
) -> dict[str, Leaks | str]:
    """What each arm read and said of other tenants' canaries, in its usual tasks and asked for them."""
    if len(workflow.tenants) < 2:
        return dict.fromkeys(ARMS, f"{NA}there is one tenant")
    planted, words = plant(workflow)
    asked = extraction(planted)
    arms = [arm for arm in _available(agents, asked, facts)[0] if arm.name not in SCRIPTS]
    plan = replace(plan, splits=(*plan.splits, EXTRACTION))
    evaluate(asked, arms, plan, out / "canary", progress)
    paths = {arm.name: [out / "canary" / f"{arm.name}.{split}.jsonl" for split in plan.splits] for arm in arms}
    return {
        name: leaks([run for path in found for run in read_trajectories(path)], words) for name, found in paths.items()
    }


def update(arm: str, agent: Agent | None, workflow: Workflow) -> Spent | str:
    """What it takes from the change of a rule until the arm can act on it, or why that is no question here.

    Weights are compiled again, which took what the manifest says. A prompt is another text at once, and every request
    pays for reading it.
    """
    rule = next((rule for section in workflow.tenants.values() for rule in section.rules), "")
    if arm in ("base", *SCRIPTS) or not rule:
        return f"{NA}it reads no rules"
    if arm in ("lora", "full"):
        assert agent is not None
        return Spent(agent.manifest.seconds, agent.manifest.cpu_seconds)
    if arm in ("rag", "rag_strict"):
        embed = MiniLM()
        spent = stopwatch()
        embed([f"{rule} "])
        return spent()
    if arm in CONTROLS:
        return f"{NA}it is a control"
    if arm.startswith("hypernetwork"):
        assert agent is not None
        name, section = next((name, one) for name, one in workflow.tenants.items() if one.rules)
        edited = workflow.with_tenant(section.without(rule).with_rule(f"{rule} From today on."))
        adapters = agent.adapters(agent.load_base())
        for context in agent.contexts(workflow, name).values():
            adapters(context)
        spent = stopwatch()
        for context in agent.contexts(edited, name).values():
            adapters(context)
        return spent()
    return Spent(0.0, 0.0)


@dataclass(frozen=True)
class _General:
    """Probes that no workflow bears on, of the base and of what was made of it."""

    suite: Suite
    trials: int
    parallel: int
    out: Path
    progress: Progress

    def __call__(self, first: Agent, agent: Agent, workflow: Workflow) -> Interval | str:
        chosen = [capability for capability in self.suite if capability.name in GENERAL]
        if not chosen:
            return f"{NA}there is no suite of general probes here"
        before = self._right("base", lambda: as_policy(first.load_base().model, first.renderer, self.parallel))
        after = self._right(agent.manifest.kind, partial(_adapted, agent, workflow, self.parallel))
        return paired_difference(after, before, lambda task: task[0])

    def _right(self, name: str, policy: Callable[[], Policy]) -> dict[tuple[str, ...], float]:
        def run() -> list[Trajectory]:
            loaded, made = policy(), list[Trajectory]()
            for capability in (one for one in self.suite if one.name in GENERAL):
                trials = list(islice(capability.trials(0), self.trials))
                done = attempts(capability, trials, loaded, self.parallel)
                made += (one.model_copy(update={"kind": capability.name}) for one in done)
            return made

        runs = kept(self.out / f"{name}.jsonl", 2 * self.trials, run, partial(self.progress, name, "general probes"))
        return {(run.workflow, run.tenant, run.task, run.kind): float(succeeded(run)) for run in runs}


def _adapted(agent: Agent, workflow: Workflow, parallel: int) -> Policy:
    """The agent at work outside its workflow; a hypernetwork's adapter is that of the workflow's first tenant."""
    if agent.manifest.kind != "hypernetwork":
        base, one = agent.decoding()
        return as_policy(base.model, agent.renderer, parallel, lambda episode: one)
    base = agent.load_base()
    context = next(iter(agent.contexts(workflow, next(iter(workflow.tenants), "")).values()))
    adapter = agent.adapters(base)(context)
    return as_policy(base.model, agent.renderer, parallel, lambda episode: adapter)


_Found = TypeVar("_Found", Spent, Made)


def _once(path: Path, make: Callable[[], _Found | str], kind: type[_Found]) -> _Found | str:
    """What a file says was measured; if there is none, it is measured and written there."""
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, str) else kind(**found)
    made = make()
    with replacing(path) as file:
        json.dump(made if isinstance(made, str) else asdict(made), file)
    return made


def _megabytes(agent: Agent) -> float:
    """Of what is deployed beside the base; of the whole model where all weights were trained."""
    folder = {"lora": "adapter", "full": "model", "hypernetwork": HYPERNETWORK}[agent.manifest.kind]
    return sum(file.stat().st_size for file in (agent.path / folder).iterdir()) / 1e6
