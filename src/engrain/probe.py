"""Capability probes: what a base can do with the context in its prompt, before anything is compiled.

A suite names capabilities. Each makes trials without end from a seed: whole tasks, judged by their workflow's goal
check, or the one turn that follows a history which the teacher wrote. What a tenant's tasks have in common makes them
alike, so intervals come from resampling tenants. What is finished lies on disk as trajectories and is not run again.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from engrain.agent import as_policy
from engrain.budget import UNTIMED, Budget
from engrain.errors import InputError
from engrain.evaluate import Progress
from engrain.files import appending
from engrain.model import Base, base_digest, load_base
from engrain.page import Document, Notes, Table, write_report
from engrain.parallel import merged
from engrain.policy import Episode, Policy
from engrain.record import complete_runs, partial_path
from engrain.renderer import Renderer
from engrain.results import kept, read_settings, write_settings
from engrain.rollout import rollouts
from engrain.score import Interval, bootstrap, failures, succeeded
from engrain.task import Task
from engrain.trajectory import Message, Outcome, Trajectory
from engrain.workflow import Instructions, Workflow, importing

SUITE = Path(__file__).resolve().parents[2] / "recipes" / "worlds"
"""The default suite: in the repository, not in the package."""


@dataclass(frozen=True)
class WholeTask:
    """A task to carry out, judged by the workflow's goal check."""

    workflow: Workflow
    task: Task


@dataclass(frozen=True)
class NextTurn:
    """One turn of a task."""

    workflow: Workflow
    task: Task
    history: tuple[Message, ...]
    """What teacher and tools wrote since the request."""
    right: Callable[[Message], bool]


Trial = WholeTask | NextTurn


@dataclass(frozen=True)
class Gate:
    """The share of right trials that a base should reach, or not exceed."""

    least: float = 0.0
    most: float = 1.0

    def says(self, share: float) -> str:
        if self == Gate():
            return "-"
        wanted = f"at least {100 * self.least:g}" if self.least else f"at most {100 * self.most:g}"
        return f"{wanted}: {'ok' if self.least <= share <= self.most else 'missed'}"


@dataclass(frozen=True)
class Capability:
    """One thing to be able to do."""

    name: str
    about: str
    trials: Callable[[int], Iterator[Trial]]
    """Seed -> trials without end, the same for the same seed."""
    gate: Gate = Gate()
    instructions: Instructions = "full"
    budget: Budget = UNTIMED
    before: str = ""
    """The capability that has the same tasks before a change; the report says how often both are right."""


Suite = Sequence[Capability]


@dataclass(frozen=True)
class Subject:
    """What is probed: its digest, and what loads it for so many episodes at a time."""

    digest: str
    policy: Callable[[int], Policy]


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    tasks: int = 170
    """For each capability and seed."""
    seeds: int = 3
    parallel: int = 16
    """Tasks at a time, in each of so many processes."""
    processes: int = 1


@dataclass(frozen=True)
class Cell:
    """One capability, all seeds together."""

    tasks: int
    tenants: int
    success: Interval
    """Resampled by tenant."""
    seeds: tuple[float, ...]
    """Success of each seed."""
    gate: str
    failures: Mapping[str, int]


@dataclass(frozen=True)
class Report:
    digest: str
    plan: Plan
    cells: Mapping[str, Cell]
    pairs: Mapping[str, Cell]
    """Tasks right before and after a change, by the capability that has the change."""
    about: Mapping[str, str]

    headings = ("probe", "success % [95%]", "by seed %", "gate", "tasks", "tenants")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def rows(self) -> list[tuple[str, ...]]:
        return [
            (
                name,
                cell.success.percent(),
                ", ".join(f"{100 * share:.1f}" for share in cell.seeds),
                cell.gate,
                str(cell.tasks),
                str(cell.tenants),
            )
            for name, cell in self.cells.items()
        ]

    def notes(self) -> list[str]:
        """What each probe asks for, which changes were followed, and why trials failed."""
        lines = [f"{name}: {about}" for name, about in self.about.items()]
        lines += [
            f"{name}: right before and after the change: {cell.success.percent()}% of {cell.tasks} tasks that were run "
            "both ways"
            for name, cell in self.pairs.items()
        ]
        return lines + [
            f"{name} failed: " + "; ".join(f"{count} x {reason}" for reason, count in top)
            for name, cell in self.cells.items()
            if (top := list(cell.failures.items())[:3])
        ]

    def document(self) -> Document:
        about = (
            f"Base {self.digest[:12]}, {self.plan.tasks} tasks a seed, {self.plan.seeds} seeds, greedy decoding, calls "
            "constrained to the tools' schemas. 95% bootstrap intervals over tenants."
        )
        table = Table(self.headings, tuple(self.rows()))
        return Document("Capability probes", about, (table, Notes(tuple(self.notes()))))


def load_suite(path: Path) -> Suite:
    """The `suite` of `DIR/probes.py` or of a Python file, imported as part of the package that its folder is.

    Raises `InputError`.
    """
    file = (path / "probes.py" if path.is_dir() else path).resolve()
    if not file.is_file() or file.suffix != ".py":
        raise InputError(f"{path}: no probes.py there; give a suite with --suite, such as recipes/worlds of Engrain's "
                         "repository")  # fmt: skip
    if (place := str(file.parent.parent)) not in sys.path:
        sys.path.insert(0, place)
    with importing(file):
        module = import_module(f"{file.parent.name}.{file.stem}")
    if Path(str(module.__file__)).resolve() != file:
        raise InputError(f"{file}: its folder has the name of another package, {module.__file__}; rename it")
    suite = getattr(module, "suite", None)
    if not isinstance(suite, Sequence) or not suite or not all(isinstance(one, Capability) for one in suite):
        raise InputError(f"{file}: expected a module-level `suite = (Capability(...), ...)`, got {suite!r:.80}")
    return suite


def chosen(suite: Suite, names: Sequence[str]) -> Suite:
    """The named capabilities in the suite's order; all without names. Raises `InputError` for an unknown one."""
    known = [capability.name for capability in suite]
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"unknown probe {unknown[0]!r}; the suite has {', '.join(known)}")
    return [capability for capability in suite if not names or capability.name in names]


def measure(base: Base, suite: Suite, tasks: int, seed: int = 0, parallel: int = 16) -> dict[str, float]:
    """The share of right trials of each capability, for a model in memory; to watch one that is being trained.

    Watch on another seed than those that are reported.
    """
    policy = as_policy(base.model, Renderer(base.tokenizer), parallel)
    shares: dict[str, float] = {}
    for capability in suite:
        done = [succeeded(one) for one in attempts(capability, _first(capability, seed, tasks), policy, parallel)]
        shares[capability.name] = sum(done) / len(done)
    return shares


def subject(path: Path) -> Subject:
    """A base directory. Raises `ModelError`."""

    def policy(parallel: int) -> Policy:
        base = load_base(path)
        return as_policy(base.model, Renderer(base.tokenizer), parallel)

    return Subject(base_digest(path), policy)


def probe(who: Subject, suite: Suite, code: str, plan: Plan, out: Path, progress: Progress = lambda *_: None) -> Report:
    """Run what is not yet in `out`, then write `report.json`, `.md` and `.html` there. `code` is the suite's digest."""
    _claim(out, {"base": who.digest, "suite": code, "tasks": plan.tasks})
    load = cache(partial(_load, who, plan))

    def done(capability: Capability, seed: int) -> list[Trajectory]:
        path = out / f"{capability.name}.{seed}.jsonl"
        run = partial(_run, capability, seed, load, plan, partial_path(path))
        trajectories = kept(path, plan.tasks, run, partial(progress, capability.name, f"seed {seed}"))
        partial_path(path).unlink(missing_ok=True)
        return sorted(trajectories, key=_named)

    runs = {capability.name: [done(capability, seed) for seed in range(plan.seeds)] for capability in suite}
    report = Report(
        who.digest,
        plan,
        {capability.name: _cell(runs[capability.name], capability.gate) for capability in suite},
        {one.name: pair for one in suite if (pair := _pairs(runs.get(one.before, []), runs[one.name]))},
        {capability.name: capability.about for capability in suite},
    )
    write_report(out, report.to_dict(), report.document())
    return report


def attempts(
    capability: Capability, trials: Sequence[Trial], policy: Policy, parallel: int = 16
) -> Iterator[Trajectory]:
    """One trajectory with an outcome for each trial."""
    tasks = [(trial.workflow, trial.task) for trial in trials if isinstance(trial, WholeTask)]
    yield from rollouts(
        tasks, policy, parallel=parallel, budget=capability.budget, instructions=capability.instructions
    )
    turns = [trial for trial in trials if isinstance(trial, NextTurn)]
    for start in range(0, len(turns), parallel):
        yield from _write_turns(turns[start : start + parallel], policy, capability.instructions)


def _write_turns(trials: Sequence[NextTurn], policy: Policy, instructions: Instructions) -> Iterator[Trajectory]:
    episodes = [_episode(trial, instructions) for trial in trials]
    for trial, episode, turn in zip(trials, episodes, policy(episodes), strict=True):
        policy.finish(episode)
        outcome = Outcome(success=False, reason=str(turn))
        if isinstance(turn, Message):
            episode.trajectory.messages.append(turn)
            right = trial.right(turn)
            outcome = Outcome(success=right, reason="" if right else turn.error or "not the right turn")
        yield episode.trajectory.model_copy(update={"outcome": outcome})


def _episode(trial: NextTurn, instructions: Instructions) -> Episode:
    workflow, task = trial.workflow, trial.task
    trajectory = Trajectory(
        id=f"{task.id}:turn",
        messages=[
            Message(role="system", content=workflow.system(task.tenant, instructions)),
            Message(role="user", content=task.request),
            *trial.history,
        ],
        tools=workflow.schemas(instructions),
        workflow=workflow.name,
        tenant=task.tenant,
        task=task.id,
        kind=task.kind,
        split=task.split,
        seed=task.seed,
    )
    phase = workflow.phase(trajectory.messages)
    tools = tuple(tool for tool in workflow.tools if tool.name in phase.tools)
    return Episode(task, trajectory, phase, tools, workflow)


def _first(capability: Capability, seed: int, tasks: int) -> list[Trial]:
    trials = list(islice(capability.trials(seed), tasks))
    if len(trials) < tasks:
        raise InputError(f"probe {capability.name!r} makes {len(trials)} trials of seed {seed}, not {tasks}; "
                         "ask for fewer with -n")  # fmt: skip
    return trials


def _run(
    capability: Capability, seed: int, load: Callable[[], Policy], plan: Plan, journal: Path
) -> Iterator[Trajectory]:
    """What the journal holds, then the rest, each written there first.

    Neighbours stay in one process, since they share what their prompts begin with.
    """
    before = _journaled(journal)
    yield from before
    known = {_named(trajectory) for trajectory in before}
    trials = [
        trial
        for trial in _first(capability, seed, plan.tasks)
        if (trial.workflow.name, trial.task.tenant, trial.task.id) not in known
    ]
    size = max(1, math.ceil(len(trials) / plan.processes))
    shares = [trials[start : start + size] for start in range(0, len(trials), size)]
    made = merged(lambda share: attempts(capability, share, load(), plan.parallel), shares)
    with appending(journal) as file, closing(made):
        for trajectory in made:
            bare = _without_tokens(trajectory)
            file.write(bare.to_json() + "\n")
            file.flush()
            yield bare


def _journaled(journal: Path) -> list[Trajectory]:
    """The runs of a journal; a last line that was torn by a stop is cut off."""
    if not journal.exists():
        return []
    runs = list(complete_runs(journal))
    os.truncate(journal, sum(len(line) for _, line in runs))
    return [trajectory for trajectory, _ in runs]


def _named(trajectory: Trajectory) -> tuple[str, str, str]:
    return trajectory.workflow, trajectory.tenant, trajectory.task


def _load(who: Subject, plan: Plan) -> Policy:
    """Called in each process: it must be the first there to compute, so that a fork finds no threads."""
    if plan.processes > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // plan.processes))
    return who.policy(plan.parallel)


def _without_tokens(trajectory: Trajectory) -> Trajectory:
    """The text is enough to judge and to look at, and much smaller."""
    bare = {"token_ids": None, "logprobs": None}
    return trajectory.model_copy(update={"messages": [one.model_copy(update=bare) for one in trajectory.messages]})


def _claim(out: Path, settings: Mapping[str, Any]) -> None:
    """A directory holds the probes of one base and suite; more probes and seeds may join them later."""
    before = read_settings(out)
    if before is None:
        write_settings(out, settings)
    elif changed := [name for name in (*settings, *before) if before.get(name) != settings.get(name)]:
        raise InputError(f"{out} holds results of another kind ({changed[0]} was {before.get(changed[0])!r:.60}, now "
                         f"{settings.get(changed[0])!r:.60}); choose another directory with -o")  # fmt: skip


def _cell(seeds: Sequence[Sequence[Trajectory]], gate: Gate = Gate()) -> Cell:
    every = [trajectory for one in seeds for trajectory in one]
    right = [[float(succeeded(trajectory)) for trajectory in one] for one in seeds]
    tenants = [(trajectory.workflow, trajectory.tenant) for trajectory in every]
    success = bootstrap([value for one in right for value in one], tenants)
    shares = tuple(sum(one) / len(one) for one in right if one)
    return Cell(len(every), len(set(tenants)), success, shares, gate.says(success.mean), failures(every))


def _pairs(before: Sequence[Sequence[Trajectory]], after: Sequence[Sequence[Trajectory]]) -> Cell | None:
    """Success where both are right, on the tasks that both have."""
    were = {_named(trajectory): succeeded(trajectory) for one in before for trajectory in one}
    both = [
        [
            trajectory if were[_named(trajectory)] else trajectory.model_copy(update={"outcome": None})
            for trajectory in one
            if _named(trajectory) in were
        ]
        for one in after
    ]
    return _cell(both) if any(both) else None
