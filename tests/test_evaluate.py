"""Arms meet the same tasks, finished work is kept, and the report says what the trajectories say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from engrain.adapters import Adapters
from engrain.agent import load_agent
from engrain.arms import Arm, agent_arms, default_arms
from engrain.context import Context
from engrain.errors import InputError
from engrain.evaluate import Plan, evaluate
from engrain.policy import Episode, Policy, ScriptTeacher
from engrain.rollout import Budget
from engrain.trajectory import Message, read_trajectories
from engrain.workflow import Workflow, load_workflow

PLAN = Plan(("held_out",), tasks=12, latency_tasks=2, seed=3, parallel=4)


class Silent:
    """Answers at once, without doing anything: right only where the rules forbid to lend."""

    name = "silent"

    def __call__(self, episodes: Sequence[Episode], /) -> list[Message]:
        return [Message(role="assistant", content="Sorry.", token_ids=[1, 2], prompt_tokens=7) for _ in episodes]

    def finish(self, episode: Episode, /) -> None:
        pass


@pytest.fixture
def workflow(library: Path) -> Workflow:
    return load_workflow(library)


def arms(workflow: Workflow, loaded: list[str]) -> list[Arm]:
    def policy(name: str, made: Policy) -> Arm:
        def load(parallel: int) -> Policy:
            loaded.append(name)
            return made

        return Arm(name, "none", name, load)

    return [policy("prompt", Silent()), policy("lora", ScriptTeacher(workflow))]


def test_a_teacher_wins_and_the_difference_is_paired(workflow: Workflow, tmp_path: Path) -> None:
    report = evaluate(workflow, arms(workflow, []), PLAN, tmp_path)
    teacher, silent = (report.cells[arm]["held_out"].score for arm in ("lora", "prompt"))
    assert teacher.success.mean == 1 and teacher.calls > 0 and teacher.failures == {}
    assert 0 < silent.success.mean < 1 and silent.calls == 0 and silent.steps == 1
    assert (silent.prompt_tokens, silent.completion_tokens) == (7, 2)
    difference = report.differences["lora"]["held_out"]
    assert difference.mean == pytest.approx(1 - silent.success.mean)
    assert difference.low > 0
    tasks = [{one.task for one in read_trajectories(tmp_path / f"{arm}.held_out.jsonl")} for arm in ("lora", "prompt")]
    assert tasks[0] == tasks[1] and len(tasks[0]) == 12
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["cells"]["lora"]["held_out"]["score"]["success"]["mean"] == 1
    assert "| held_out | lora | 100.0 [100.0, 100.0] |" in (tmp_path / "report.md").read_text()
    assert len(report.rows()[0]) == len(report.headings)


def test_latency_comes_from_tasks_run_alone(workflow: Workflow, tmp_path: Path) -> None:
    report = evaluate(workflow, arms(workflow, []), PLAN, tmp_path)
    latency = report.cells["lora"]["held_out"].latency
    assert latency.tasks == 2 and latency.steps >= 4 and latency.p95 >= latency.mean * 0.5 > 0


def test_finished_work_is_kept(workflow: Workflow, tmp_path: Path) -> None:
    loaded: list[str] = []
    first = evaluate(workflow, arms(workflow, loaded), PLAN, tmp_path)
    assert loaded == ["prompt", "lora"]
    again = evaluate(workflow, arms(workflow, loaded), PLAN, tmp_path)
    assert loaded == ["prompt", "lora"] and (again.rows(), again.notes()) == (first.rows(), first.notes())
    (tmp_path / "lora.held_out.jsonl").unlink()
    assert evaluate(workflow, arms(workflow, loaded), PLAN, tmp_path).cells["lora"]["held_out"].score.tasks == 12
    assert loaded == ["prompt", "lora", "lora"]
    more = evaluate(workflow, arms(workflow, loaded), replace(PLAN, splits=("held_out", "train")), tmp_path)
    assert set(more.cells["lora"]) == {"held_out", "train"}


def test_another_evaluation_is_not_mixed_in(workflow: Workflow, tmp_path: Path) -> None:
    evaluate(workflow, arms(workflow, []), PLAN, tmp_path)
    with pytest.raises(InputError, match="other settings or agents"):
        evaluate(workflow, arms(workflow, []), replace(PLAN, seed=4), tmp_path)
    with pytest.raises(InputError, match="other settings or agents"):
        evaluate(workflow, [replace(arm, digest="new") for arm in arms(workflow, [])], PLAN, tmp_path)
    with pytest.raises(InputError, match="unknown split 'nowhere'; 'library' has train, held_out"):
        evaluate(workflow, arms(workflow, []), replace(PLAN, splits=("nowhere",)), tmp_path / "other")


def test_arms_of_an_agent(agent: Path, workflow: Workflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engrain.agent.LONGEST_CONTEXT", 780)  # an untrained model rambles on
    loaded = load_agent(agent)
    names = default_arms(loaded, None)
    assert names == ["base", "prompt", "lora"]
    made = agent_arms(names, loaded, None, workflow)
    assert [arm.instructions for arm in made] == ["none", "full", "none"]
    assert made[0].digest == made[1].digest != made[2].digest
    plan = Plan(("held_out",), tasks=1, latency_tasks=1, seed=3, parallel=2, budget=Budget(steps=1))
    report = evaluate(workflow, made, plan, tmp_path)
    tokens = {arm: cells["held_out"].score.prompt_tokens for arm, cells in report.cells.items()}
    assert tokens["prompt"] > 2 * tokens["lora"]
    systems = [next(read_trajectories(tmp_path / f"{arm}.held_out.jsonl")).messages[0] for arm in ("prompt", "lora")]
    assert workflow.procedure in systems[0].content and workflow.procedure not in systems[1].content
    with pytest.raises(InputError, match="compile one with --to full"):
        agent_arms(["full"], loaded, None, workflow)
    with pytest.raises(InputError, match="unknown arm 'magic'"):
        agent_arms(["magic"], loaded, None, workflow)


def test_a_hypernetwork_is_measured_under_other_contexts_too(
    hyper_agent: Path, workflow: Workflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engrain.agent.LONGEST_CONTEXT", 780)
    made = load_agent(hyper_agent)
    names = default_arms(made, None)
    assert names == ["base", "prompt", "hypernetwork", "another", "shuffled", "empty"]
    read: dict[str, list[Context]] = {}
    for arm in agent_arms(names[2:], made, None, workflow):
        monkeypatch.setattr(
            Adapters, "__call__", lambda self, context, arm=arm: read.setdefault(arm.name, []).append(context)
        )
        plan = Plan(("held_out",), tasks=1, latency_tasks=1, seed=3, parallel=1, budget=Budget(steps=1))
        evaluate(workflow, [arm], plan, tmp_path / arm.name)
    tenant = next(workflow.tasks("held_out", 3)).tenant
    own, other, mixed, none = (read[name][0] for name in names[2:])
    assert own == workflow.context(tenant) and none == Context()
    assert other in [workflow.context(name) for name in workflow.tenants if name != tenant]
    assert mixed != own
    words = [sorted(word for rule in one.rules for word in rule.text.split()) for one in (mixed, own)]
    assert words[0] == words[1]
