"""What makes adapters, compared: arms x the capabilities of a suite, the same tasks for all.

`evaluate` measures an agent on its own workflow; this measures a hypernetwork on workflows and tenants without end,
with its controls: the base alone, the base with the rules in its prompt, the hypernetwork under other contexts, and any
other hypernetworks or constant LoRAs. All but `prompt` are told everything except the tenant's rules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from engrain.adapter import Adapter, load_peft
from engrain.adapters import Adapters
from engrain.agent import as_policy, file_digest, text_digest
from engrain.controls import CONTROLS, Control, own
from engrain.errors import InputError
from engrain.evaluate import Progress
from engrain.hypernetwork import HEAD, load_hypernetwork
from engrain.model import Base, base_digest, load_base
from engrain.page import Document, Notes, Table, markdown, write_report
from engrain.policy import Episode, Policy
from engrain.probe import Cell, Plan, Subject, Suite, probe, subject
from engrain.renderer import Renderer
from engrain.score import Interval, paired_difference, succeeded
from engrain.trajectory import read_trajectories
from engrain.workflow import Instructions

OURS = "hypernetwork"
Outcomes = dict[tuple[str, str, str], float]
"""1.0 or 0.0 by workflow, tenant and task."""


@dataclass(frozen=True)
class Arm:
    """Who meets the tasks, and what its prompt says."""

    subject: Subject
    instructions: Instructions


@dataclass(frozen=True)
class Comparison:
    plan: Plan
    cells: Mapping[str, Mapping[str, Cell]]
    """By arm and capability."""
    differences: Mapping[str, Mapping[str, Interval]]
    """The hypernetwork's success minus each other arm's, on the same tasks, resampled by tenant."""

    headings = ("probe", "arm", "success % [95%]", "by seed %", "hypernetwork - arm [95%]", "tasks", "tenants")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def rows(self) -> list[tuple[str, ...]]:
        return [
            (
                name,
                arm,
                cell.success.percent(),
                ", ".join(f"{100 * share:.1f}" for share in cell.seeds),
                self.differences[arm][name].percent() if arm in self.differences else "",
                str(cell.tasks),
                str(cell.tenants),
            )
            for name in next(iter(self.cells.values()))
            for arm, cell in ((arm, cells[name]) for arm, cells in self.cells.items())
        ]

    def notes(self) -> list[str]:
        return [
            f"{arm} on {name} failed: "
            + "; ".join(f"{count} x {why}" for why, count in list(cell.failures.items())[:3])
            for arm, cells in self.cells.items()
            for name, cell in cells.items()
            if cell.failures
        ]

    def document(self) -> Document:
        about = (
            f"{self.plan.tasks} tasks a seed, {self.plan.seeds} seeds, greedy decoding, calls constrained to the "
            "tools' schemas. 95% bootstrap intervals over tenants."
        )
        return Document("Comparison", about, (Table(self.headings, tuple(self.rows())), Notes(tuple(self.notes()))))

    def markdown(self) -> str:
        return markdown(self.document())


def arms(hypernetwork: Path, base: Path, against: Mapping[str, Path]) -> dict[str, Arm]:
    """All of them by name; `against` are directories of hypernetworks or of constant LoRAs in PEFT's format.

    Raises `InputError`.
    """
    found = {"base": Arm(subject(base), "shared"), "prompt": Arm(subject(base), "full")}
    found[OURS] = Arm(_reading(hypernetwork, base), "shared")
    found |= {name: Arm(_reading(hypernetwork, base, control), "shared") for name, control in CONTROLS.items()}
    for name, path in against.items():
        if name in found:
            raise InputError(f"an arm {name!r} is there already; name {path} otherwise")
        if (path / HEAD).is_file():
            found[name] = Arm(_reading(path, base), "shared")
        elif (path / "adapter_config.json").is_file():
            found[name] = Arm(_constant(path, base), "shared")
        else:
            raise InputError(f"{path}: neither {HEAD} nor adapter_config.json there; give a hypernetwork or an adapter")
    return found


def compare(
    chosen: Mapping[str, Arm], suite: Suite, code: str, plan: Plan, out: Path, progress: Progress = lambda *_: None
) -> Comparison:
    """Run what is not yet in `out`, then write `report.json`, `report.md` and `report.html` there."""
    cells: dict[str, Mapping[str, Cell]] = {}
    outcomes: dict[str, dict[str, Outcomes]] = {}
    for name, arm in chosen.items():
        asked = [replace(capability, instructions=arm.instructions) for capability in suite]

        def of_arm(capability: str, seed: str, done: int, of: int, name: str = name) -> None:
            progress(f"{name}: {capability}", seed, done, of)

        cells[name] = probe(arm.subject, asked, code, plan, out / name, of_arm).cells
        outcomes[name] = {capability.name: _outcomes(out / name, capability.name, plan) for capability in suite}
    differences: dict[str, dict[str, Interval]] = {}
    if OURS in outcomes:
        for name in [name for name in outcomes if name != OURS]:
            differences[name] = {
                one: paired_difference(outcomes[OURS][one], done, lambda task: task[:2])
                for one, done in outcomes[name].items()
            }
    made = Comparison(plan, cells, differences)
    write_report(out, made.to_dict(), made.document())
    return made


AdapterOf = Callable[[Episode], Adapter]


def _reading(path: Path, base: Path, control: Control = own) -> Subject:
    """A hypernetwork that reads each tenant's rules, or what a control gives it."""

    def load(loaded: Base) -> AdapterOf:
        adapters = Adapters(load_hypernetwork(path, loaded))
        return lambda episode: adapters(
            control(episode.workflow.context, episode.task.tenant, list(episode.workflow.tenants))
        )

    return _adapted(path, base, control.__name__, load)


def _constant(path: Path, base: Path) -> Subject:
    """One LoRA for all."""

    def load(loaded: Base) -> AdapterOf:
        adapter = load_peft(path)
        return lambda episode: adapter

    return _adapted(path, base, "constant", load)


def _adapted(path: Path, base: Path, name: str, load: Callable[[Base], AdapterOf]) -> Subject:
    """The base with what a directory's files make of an episode."""

    def policy(parallel: int) -> Policy:
        loaded = load_base(base)
        return as_policy(loaded.model, Renderer(loaded.tokenizer), parallel, load(loaded))

    files = " ".join(file_digest(file) for file in sorted(path.iterdir()) if file.is_file())
    return Subject(text_digest(f"{base_digest(base)} {files} {name}"), policy)


def _outcomes(out: Path, capability: str, plan: Plan) -> Outcomes:
    runs = [run for seed in range(plan.seeds) for run in read_trajectories(out / f"{capability}.{seed}.jsonl")]
    return {(run.workflow, run.tenant, run.task): float(succeeded(run)) for run in runs}
