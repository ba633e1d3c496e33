"""Arms meet the same tasks, each told what it should be, and the report says how the hypernetwork differs from each."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from desk import workflow as desk

from engrain.adapter import ConstantAdapter, save_peft
from engrain.adapters import Adapters
from engrain.budget import Budget
from engrain.cli import invoke
from engrain.compare import OURS, Arm, arms, compare
from engrain.context import Context
from engrain.controls import CONTROLS
from engrain.encoder import BaseEncoder
from engrain.errors import InputError
from engrain.hypernetwork import Hypernetwork, save_hypernetwork
from engrain.learned import Settings
from engrain.model import load_base, sites
from engrain.policy import Episode, ScriptTeacher
from engrain.probe import Capability, Plan, Subject, Trial, WholeTask
from engrain.trajectory import Message, read_trajectories

PLAN = Plan(tasks=4, seeds=2, parallel=2)


def whole(seed: int) -> Iterator[Trial]:
    return (WholeTask(desk, task) for task in desk.tasks("train", seed))


SUITE = (Capability("tasks", "whole tasks", whole, budget=Budget(steps=8)),)


class Silent:
    """Never acts."""

    def __call__(self, episodes: Sequence[Episode], /) -> list[Message]:
        return [Message(role="assistant", content="Sorry.") for _ in episodes]

    def finish(self, episode: Episode, /) -> None:
        pass


@pytest.fixture
def made(tiny_base: Path, tmp_path: Path) -> Path:
    base = load_base(tiny_base)
    torch.manual_seed(0)
    source = Hypernetwork(BaseEncoder(base), sites(base.model), Settings(shared_rank=2, width=16, layers=1))
    save_hypernetwork(tmp_path / "hyper", source, base)
    return tmp_path / "hyper"


def test_differences_are_of_the_same_tasks_and_prompts_differ_by_arm(tmp_path: Path) -> None:
    teacher, silent = Subject("a", lambda parallel: ScriptTeacher(desk)), Subject("b", lambda parallel: Silent())
    chosen = {"prompt": Arm(silent, "full"), OURS: Arm(teacher, "shared"), "base": Arm(silent, "none")}
    found = compare(chosen, SUITE, "code", PLAN, tmp_path)
    assert found.cells[OURS]["tasks"].success.mean == 1.0
    failed = found.cells["prompt"]["tasks"].success.mean
    assert set(found.differences) == {"prompt", "base"}
    assert found.differences["prompt"]["tasks"].mean == pytest.approx(1 - failed) and failed < 1
    systems = {name: next(read_trajectories(tmp_path / name / "tasks.0.jsonl")).messages[0].content for name in chosen}
    assert "Rules of" in systems["prompt"] and "Rules of" not in systems[OURS]
    assert desk.procedure in systems[OURS] and desk.procedure not in systems["base"]
    assert json.loads((tmp_path / "report.json").read_text())["cells"][OURS]["tasks"]["tasks"] == 8
    assert (tmp_path / "report.md").read_text().count("\n| tasks |") == 3
    assert (tmp_path / "report.html").read_text().count("<td>tasks</td>") == 3

    again = compare(chosen, SUITE, "code", PLAN, tmp_path)  # all of it is there already
    assert again == found


def test_each_arm_reads_its_own_context(
    made: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engrain.agent.LONGEST_CONTEXT", 64)  # no turn is written
    base = load_base(tiny_base)
    save_peft(ConstantAdapter(sites(base.model), 2)(()).detach(), tmp_path / "lora", str(tiny_base))
    found = arms(made, tiny_base, {"constant": tmp_path / "lora", "other": made})
    assert list(found) == ["base", "prompt", OURS, *CONTROLS, "constant", "other"]
    assert found["prompt"].instructions == "full" and found["constant"].instructions == "shared"
    assert len({arm.subject.digest for name, arm in found.items() if name not in ("prompt", "other")}) == len(found) - 2

    read: dict[str, list[Context]] = {}
    for name in (OURS, *CONTROLS):
        seen = read.setdefault(name, [])
        monkeypatch.setattr(Adapters, "__call__", lambda self, context, seen=seen: seen.append(context))
        compare({name: found[name]}, SUITE, "code", Plan(tasks=1, seeds=1), tmp_path / name)
    tenant = next(desk.tasks("train", 0)).tenant
    first = {name: contexts[0] for name, contexts in read.items()}
    assert first[OURS] == desk.context(tenant) and first["empty"] == Context()
    assert first["another"] in [desk.context(name) for name in desk.tenants if name != tenant]
    assert first["shuffled"] not in (first[OURS], Context())

    for against in ({"base": made}, {"nothing": tmp_path}):
        with pytest.raises(InputError):
            arms(made, tiny_base, against)


def test_the_command_prints_the_table_and_refuses_unknown_arms(
    made: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engrain.agent.LONGEST_CONTEXT", 64)
    (tmp_path / "suite").mkdir()
    (tmp_path / "suite" / "probes.py").write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom test_compare import SUITE as suite\n"
    )
    run = partial(_run, "compare", made, "--base", tiny_base, "--suite", tmp_path / "suite", "--split", "tasks")
    assert (
        run("-n", 2, "--seeds", 1, "--processes", 1, "--arms", f"{OURS},empty", "-o", tmp_path / "out", "--json") == 0
    )
    report = json.loads(capsys.readouterr().out)
    assert set(report["cells"]) == {OURS, "empty"} and set(report["differences"]) == {"empty"}
    assert run("--arms", "magic", "-o", tmp_path / "out") == 2
    assert "unknown arm 'magic'" in capsys.readouterr().err
    assert run("--against", "other=nowhere", "-o", tmp_path / "out") == 2


def _run(*arguments: object) -> int:
    return invoke([str(one) for one in arguments])
