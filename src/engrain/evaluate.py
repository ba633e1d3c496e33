"""Evaluation: arms x splits -> a table with intervals.

An arm is a policy and the instructions in its prompt. Every arm meets the same tasks, so differences are paired.
Success comes from batched rollouts; latency from a sample of tasks run one at a time, which batching would blur. A
finished arm x split lies on disk as trajectories and is not run again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from engrain.arms import Arm
from engrain.errors import InputError
from engrain.files import replacing
from engrain.policy import Policy
from engrain.rollout import UNTIMED, Budget, rollout
from engrain.score import Interval, Score, paired_difference, score, successes
from engrain.trajectory import Trajectory, read_trajectories, write_trajectories
from engrain.workflow import Workflow

SETTINGS = "settings.json"
REPORT = "report.json"
TABLE = "report.md"
Progress = Callable[[str, str, int, int], None]
"""(arm, split, tasks done, tasks in all)"""


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    splits: tuple[str, ...]
    tasks: int = 300
    latency_tasks: int = 10
    seed: int = 1000
    parallel: int = 16
    budget: Budget = UNTIMED


@dataclass(frozen=True)
class Latency:
    """Seconds a step, decoding and its prompt included, the tool not; one task at a time."""

    mean: float
    p95: float
    tasks: int
    steps: int


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

    headings = (
        "split", "arm", "success % [95%]", "invalid calls %", "cut-off turns %", "steps", "prompt tokens/step",
        "new tokens/step", "s/step", "tasks",
    )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def rows(self) -> list[tuple[str, ...]]:
        return [
            (
                split,
                arm,
                cell.score.success.percent(),
                f"{100 * cell.score.invalid:.2f}",
                f"{100 * cell.score.truncated:.2f}",
                f"{cell.score.steps:.1f}",
                f"{cell.score.prompt_tokens:.0f}",
                f"{cell.score.completion_tokens:.0f}",
                f"{cell.latency.mean:.3f}",
                str(cell.score.tasks),
            )
            for split in self.plan.splits
            for arm, cells in self.cells.items()
            for cell in [cells[split]]
        ]

    def notes(self) -> list[str]:
        """What the table does not say: paired differences, and why tasks failed."""
        lines = [
            f"{arm} minus prompt on {split}: {difference.percent()} points of success, paired by task"
            for arm, splits in self.differences.items()
            for split, difference in splits.items()
        ]
        return lines + [
            f"{arm} on {split} failed: " + "; ".join(f"{count} x {reason}" for reason, count in top)
            for arm, cells in self.cells.items()
            for split, cell in cells.items()
            if (top := list(cell.score.failures.items())[:3])
        ]


def evaluate(
    workflow: Workflow, arms: Sequence[Arm], plan: Plan, out: Path, progress: Progress = lambda *_: None
) -> Report:
    """Run what is not yet in `out`, then write `report.json` and `report.md` there."""
    unknown = [split for split in plan.splits if split not in workflow.splits]
    if unknown:
        raise InputError(f"unknown split {unknown[0]!r}; {workflow.name!r} has {', '.join(workflow.splits)}")
    _claim(out, workflow, arms, plan)
    cells: dict[str, dict[str, Cell]] = {}
    outcomes: dict[str, dict[str, dict[str, float]]] = {}
    runs = _Runs(workflow, plan, out, progress)
    for arm in arms:
        policy = cache(partial(arm.policy, plan.parallel))  # not loaded if all that it would run is there
        for split in plan.splits:
            many = runs(arm, policy, split)
            few = runs(arm, policy, split, alone=True)
            cells.setdefault(arm.name, {})[split] = Cell(score(many, seed=plan.seed), latency(few))
            outcomes.setdefault(arm.name, {})[split] = successes(many)
    report = Report(workflow.name, plan, cells, _differences(outcomes, plan))
    write_report(out, report.to_dict(), markdown(report))
    return report


def _claim(out: Path, workflow: Workflow, arms: Sequence[Arm], plan: Plan) -> None:
    """A directory holds one evaluation; more arms or splits may join it later."""
    settings = {"workflow": workflow.name, "plan": {**asdict(plan), "splits": []}, "arms": {}}
    before = read_settings(out)
    known = dict(before.get("arms", {})) if before else {}
    settings["arms"] = {**known, **{arm.name: arm.digest for arm in arms}}
    if before is not None and (
        {**before, "arms": {}} != json.loads(json.dumps({**settings, "arms": {}}))
        or any(known.get(arm.name, arm.digest) != arm.digest for arm in arms)
    ):
        raise InputError(f"{out} holds an evaluation with other settings or agents; choose another directory with -o")
    write_settings(out, settings)


def read_settings(out: Path) -> dict[str, Any] | None:
    """What the directory's results were made with; None if there are none yet."""
    path = out / SETTINGS
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); choose another directory with -o") from error


def write_settings(out: Path, settings: Mapping[str, Any]) -> None:
    with replacing(out / SETTINGS) as file:
        json.dump(settings, file, indent=2)


def kept(
    path: Path, count: int, make: Callable[[], Iterable[Trajectory]], progress: Callable[[int, int], None]
) -> list[Trajectory]:
    """The trajectories of a file; if there is none, `count` of them are made and written there."""
    if path.exists():
        return list(read_trajectories(path))
    trajectories: list[Trajectory] = []
    progress(0, count)
    for trajectory in make():
        trajectories.append(trajectory)
        progress(len(trajectories), count)
    write_trajectories(path, trajectories)
    return trajectories


@dataclass(frozen=True)
class _Runs:
    """Trajectories of an arm on a split: from disk, or made and written there."""

    workflow: Workflow
    plan: Plan
    out: Path
    progress: Progress

    def __call__(self, arm: Arm, policy: Callable[[], Policy], split: str, *, alone: bool = False) -> list[Trajectory]:
        path = self.out / f"{arm.name}.{split}{'.latency' if alone else ''}.jsonl"
        plan = self.plan
        count, parallel = (plan.latency_tasks, 1) if alone else (plan.tasks, plan.parallel)
        label = f"{split} one at a time" if alone else split

        def make() -> Iterable[Trajectory]:
            tasks = islice(self.workflow.tasks(split, plan.seed), count)
            options = {"parallel": parallel, "budget": plan.budget, "instructions": arm.instructions}
            return rollout(self.workflow, tasks, policy(), added=arm.added, **options)

        return kept(path, count, make, partial(self.progress, arm.name, label))


def latency(trajectories: Sequence[Trajectory]) -> Latency:
    seconds = [
        message.seconds
        for trajectory in trajectories
        for message in trajectory.messages
        if message.role == "assistant" and message.seconds is not None
    ]
    mean, p95 = (float(np.mean(seconds)), float(np.percentile(seconds, 95))) if seconds else (math.nan, math.nan)
    return Latency(mean, p95, len(trajectories), len(seconds))


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


def write_report(out: Path, report: Mapping[str, Any], text: str) -> None:
    with replacing(out / REPORT) as file:
        json.dump(_finite(report), file, indent=2, ensure_ascii=False)
    with replacing(out / TABLE) as file:
        file.write(text)


def markdown(report: Report) -> str:
    plan = report.plan
    about = (
        f"{plan.tasks} tasks a split, seed {plan.seed}, greedy decoding. Success: goal check, 95% bootstrap interval "
        f"over tasks. s/step: mean over {plan.latency_tasks} tasks run one at a time."
    )
    return page(report.workflow, about, report.headings, report.rows(), report.notes())


def page(title: str, about: str, headings: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    """A table in Markdown, between what it is and notes on it."""
    lines = ["| " + " | ".join(row) + " |" for row in (headings, ["---"] * len(headings), *rows)]
    return "\n".join([f"# {title}", "", about, "", *lines, "", *(f"- {note}" for note in notes), ""])


def _finite(value: Any) -> Any:
    """NaN is not JSON."""
    match value:
        case dict():
            return {key: _finite(item) for key, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
        case float() if not math.isfinite(value):
            return None
        case _:
            return value
