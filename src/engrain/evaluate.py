"""Evaluation: arms x splits -> a table with intervals.

An arm is a policy and the instructions in its prompt. Every arm meets the same tasks, so differences are paired.
Success comes from batched rollouts; latency from a sample of tasks run one at a time, which batching would blur. With
several trials each is the same tasks with another sampling seed. A finished arm x split, all trials, lies on disk as
trajectories and is not run again. So do the runs of the workflow's teacher on these tasks, which show the edges between
phases that there are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

from engrain.arms import Arm
from engrain.budget import UNTIMED, Budget
from engrain.coverage import Coverage, branch_table, coverage
from engrain.errors import InputError
from engrain.failure_kinds import failure_kinds, said, total
from engrain.page import Document, Notes, Table, write_report
from engrain.plots import Runs, plots, reduced
from engrain.policy import Policy, ScriptTeacher
from engrain.repeats import numbered, sampled
from engrain.results import kept, read_settings, write_settings
from engrain.rollout import rollout
from engrain.score import TIMES, Interval, Latency, Score, latency, paired_difference, score, successes, verdict
from engrain.task import Task
from engrain.trajectory import Trajectory
from engrain.workflow import Workflow

Progress = Callable[[str, str, int, int], None]
"""(arm, split, tasks done, tasks in all)"""


@dataclass(frozen=True)
class Plan:
    """How much is measured. Raises `InputError` for several trials without sampling."""

    splits: tuple[str, ...]
    tasks: int = 300
    latency_tasks: int = 10
    seed: int = 1000
    parallel: int = 16
    budget: Budget = UNTIMED
    trials: int = 1
    """Runs of each task."""
    temperature: float = 0.0
    """At 0 decoding is greedy."""

    def __post_init__(self) -> None:
        if self.trials > 1 and self.temperature <= 0:
            raise InputError(f"{self.trials} trials at temperature 0 are the same run {self.trials} times, since "
                             "greedy decoding is deterministic; give --temperature, such as 0.7")  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One arm on one split."""

    score: Score
    latency: Latency


@dataclass(frozen=True)
class Report:
    workflow: str
    plan: Plan
    cells: Mapping[str, Mapping[str, Cell]]
    """By arm, then by split."""
    differences: Mapping[str, Mapping[str, Interval]]
    """Success of each compiled arm minus the prompt arm's, paired by task, by arm and split."""
    coverage: Mapping[str, Coverage]
    """By arm, all splits together."""
    failure_kinds: Mapping[str, Mapping[str, Mapping[str, Mapping[str, int]]]]
    """Failed runs by arm, split, kind and how."""

    @property
    def headings(self) -> tuple[str, ...]:
        return (
            "split", "arm", "success % [95%]", *(f"pass^{k} % [95%]" for k in self._times()), "invalid calls %",
            "cut-off turns %", "steps", "prompt tokens/step", "new tokens/step", "s/step", "tasks",
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        covered = {arm: found.to_dict() for arm, found in self.coverage.items()}
        return {**asdict(self), "coverage": covered, "verdicts": self.verdicts()}

    def rows(self) -> list[tuple[str, ...]]:
        return [
            (
                split,
                arm,
                cell.score.success.percent(),
                *(cell.score.pass_k[k].percent() for k in self._times()),
                f"{100 * cell.score.invalid:.2f}",
                f"{100 * cell.score.truncated:.2f}",
                f"{cell.score.steps:.1f}",
                f"{cell.score.prompt_tokens:.0f}",
                f"{cell.score.completion_tokens:.0f}",
                "n/a" if math.isnan(cell.latency.mean) else f"{cell.latency.mean:.3f}",
                str(cell.score.tasks),
            )
            for split in self.plan.splits
            for arm, cells in self.cells.items()
            for cell in [cells[split]]
        ]

    def verdicts(self) -> dict[str, dict[str, str]]:
        """The differences in words, by arm and split."""
        return {
            arm: {
                split: verdict(arm, "prompt", one, self.cells[arm][split].score.tasks) for split, one in splits.items()
            }
            for arm, splits in self.differences.items()
        }

    def notes(self) -> list[str]:
        """What the table does not say: paired differences, why tasks failed, and where an arm is weakest."""
        lines = [
            f"{split}: {text}, paired by task" for splits in self.verdicts().values() for split, text in splits.items()
        ]
        lines += [
            f"{arm} on {split} failed: " + "; ".join(f"{count} x {reason}" for reason, count in top)
            for arm, cells in self.cells.items()
            for split, cell in cells.items()
            if (top := list(cell.score.failures.items())[:3])
        ]
        return lines + [f"{arm} {found.weakest()}" for arm, found in self.coverage.items()]

    def _times(self) -> list[int]:
        """The k of the columns of pass^k; pass^1 is the success."""
        return [k for k in TIMES if 1 < k <= self.plan.trials]


def evaluate(
    workflow: Workflow, arms: Sequence[Arm], plan: Plan, out: Path, progress: Progress = lambda *_: None
) -> Report:
    """Run what is not yet in `out`, then write `report.json`, `report.md` and `report.html` there."""
    unknown = [split for split in plan.splits if split not in workflow.splits]
    if unknown:
        raise InputError(f"unknown split {unknown[0]!r}; {workflow.name!r} has {', '.join(workflow.splits)}")
    _claim(out, workflow, arms, plan)
    cells: dict[str, dict[str, Cell]] = {}
    outcomes: dict[str, dict[str, dict[str, float]]] = {}
    covered: dict[str, Coverage] = {}
    kinds: dict[str, dict[str, dict[str, dict[str, int]]]] = {}
    seen: dict[str, dict[str, Runs]] = {split: {} for split in plan.splits}
    tasks = cache(lambda split: list(islice(workflow.tasks(split, plan.seed), max(plan.tasks, plan.latency_tasks))))
    runs = _Runs(workflow, plan, out, progress, tasks)
    teacher = [run for split in plan.splits for run in runs.of_teacher(split)]
    for arm in arms:
        every: list[Trajectory] = []
        with ExitStack() as opened:
            policy = cache(partial(_opened, arm, plan, opened))  # not loaded if all that it would run is there
            for split in plan.splits:
                many = runs(arm, policy, split)
                few = runs(arm, policy, split, alone=True)
                cells.setdefault(arm.name, {})[split] = Cell(score(many, seed=plan.seed), latency(few))
                outcomes.setdefault(arm.name, {})[split] = successes(many)
                asked = {task.id: task for task in tasks(split)}
                kinds.setdefault(arm.name, {})[split] = failure_kinds(workflow, asked, many)
                seen[split][arm.name] = reduced(many, few)
                every += many
        covered[arm.name] = coverage(workflow, every, teacher, seed=plan.seed)
    report = Report(workflow.name, plan, cells, _differences(outcomes, plan), covered, kinds)
    write_report(out, report.to_dict(), document(report, seen))
    return report


def _opened(arm: Arm, plan: Plan, opened: ExitStack) -> Policy:
    """The arm's policy, closed with the stack if it can be."""
    policy = arm.policy(plan.parallel)
    opened.callback(getattr(policy, "close", lambda: None))
    return policy


def _claim(out: Path, workflow: Workflow, arms: Sequence[Arm], plan: Plan) -> None:
    """A directory holds one evaluation; more arms or splits may join it later."""
    settings = {"workflow": workflow.name, "plan": {**asdict(plan), "splits": []}, "arms": {}}
    before = read_settings(out)
    if before is not None:  # made before there were trials
        before["plan"] = {"trials": 1, "temperature": 0.0, **before.get("plan", {})}
    known = dict(before.get("arms", {})) if before else {}
    settings["arms"] = {**known, **{arm.name: arm.digest for arm in arms}}
    if before is not None and (
        {**before, "arms": {}} != json.loads(json.dumps({**settings, "arms": {}}))
        or any(known.get(arm.name, arm.digest) != arm.digest for arm in arms)
    ):
        raise InputError(f"{out} holds an evaluation with other settings or agents; choose another directory with -o")
    write_settings(out, settings)


@dataclass(frozen=True)
class _Runs:
    """Trajectories of an arm on a split: from disk, or made and written there."""

    workflow: Workflow
    plan: Plan
    out: Path
    progress: Progress
    tasks: Callable[[str], list[Task]]

    def __call__(self, arm: Arm, policy: Callable[[], Policy], split: str, *, alone: bool = False) -> list[Trajectory]:
        path = self.out / f"{arm.name}.{split}{'.latency' if alone else ''}.jsonl"
        plan = self.plan
        count, parallel, trials = (plan.latency_tasks, 1, 1) if alone else (plan.tasks, plan.parallel, plan.trials)
        label = f"{split} one at a time" if alone else split

        def make() -> Iterable[Trajectory]:
            prompt = {"instructions": arm.instructions, "added": arm.added}
            for trial in range(1, trials + 1):
                drawing = sampled(policy(), plan.temperature, trial, arm.name)
                tasks = self.tasks(split)[:count]
                for run in rollout(self.workflow, tasks, drawing, parallel=parallel, budget=plan.budget, **prompt):
                    yield numbered(run, trial) if trials > 1 else run

        return kept(path, count * trials, make, partial(self.progress, arm.name, label))

    def of_teacher(self, split: str) -> list[Trajectory]:
        plan, tasks = self.plan, self.tasks(split)[: self.plan.tasks]
        options = {"parallel": plan.parallel, "budget": UNTIMED}
        make = partial(rollout, self.workflow, tasks, ScriptTeacher(self.workflow), **options)
        return kept(self.out / f"reference.{split}.jsonl", len(tasks), make, partial(self.progress, "teacher", split))


def _differences(
    outcomes: Mapping[str, Mapping[str, Mapping[str, float]]], plan: Plan
) -> dict[str, dict[str, Interval]]:
    prompt = outcomes.get("prompt")
    if prompt is None:
        return {}
    return {
        arm: {split: paired_difference(done[split], prompt[split], seed=plan.seed) for split in plan.splits}
        for arm, done in outcomes.items()
        if arm not in ("base", "prompt")
    }


def document(report: Report, seen: Mapping[str, Mapping[str, Runs]]) -> Document:
    """What the page says; `seen` are the runs by split and arm."""
    plan = report.plan
    how = f"sampled at temperature {plan.temperature:g}" if plan.temperature else "greedy decoding"
    how += f", {plan.trials} trials a task" if plan.trials > 1 else ""
    about = (
        f"{plan.tasks} tasks a split, seed {plan.seed}, {how}. Success: goal check, 95% bootstrap interval "
        f"over tasks. s/step: mean over {plan.latency_tasks} tasks run one at a time."
    )
    table = Table(report.headings, tuple(report.rows()))
    kinds = [f"{arm} failed by kind: {said(total(splits.values()))}" for arm, splits in report.failure_kinds.items()]
    headings, rows = branch_table(report.coverage)
    caption = "Branches: success of the runs that took one, all splits together, the worst on average first"
    branches = Table(headings, tuple(rows), caption)
    notes = Notes((*report.notes(), *kinds))
    return Document(report.workflow, about, (table, *plots(seen, plan.seed), notes, branches))
