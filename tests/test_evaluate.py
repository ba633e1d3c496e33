"""Arms meet the same tasks, finished work is kept, and the report says what the trajectories say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from engrain.agent import load_agent
from engrain.errors import InputError
from engrain.evaluate import Arm, Plan, agent_arms, default_arms, evaluate
from engrain.nextcall import Turn, evaluate_calls, score_turns
from engrain.policy import Episode, Policy, ScriptTeacher
from engrain.rollout import Budget
from engrain.trajectory import Message, ToolCall, read_trajectories
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


def test_arms_of_an_agent(agent: Path, workflow: Workflow, tmp_path: Path) -> None:
    loaded = load_agent(agent)
    names = default_arms(loaded, None)
    assert names == ["base", "prompt", "lora"]
    made = agent_arms(names, loaded, None, workflow)
    assert [arm.instructions for arm in made] == ["none", "full", "none"]
    assert made[0].digest == made[1].digest != made[2].digest
    plan = Plan(("held_out",), tasks=2, latency_tasks=1, seed=3, parallel=2, budget=Budget(steps=1))
    report = evaluate(workflow, made, plan, tmp_path)
    tokens = {arm: cells["held_out"].score.prompt_tokens for arm, cells in report.cells.items()}
    assert tokens["prompt"] > 2 * tokens["lora"]
    systems = [next(read_trajectories(tmp_path / f"{arm}.held_out.jsonl")).messages[0] for arm in ("prompt", "lora")]
    assert workflow.procedure in systems[0].content and workflow.procedure not in systems[1].content
    with pytest.raises(InputError, match="compile one with --to full"):
        agent_arms(["full"], loaded, None, workflow)
    with pytest.raises(InputError, match="unknown arm 'magic'"):
        agent_arms(["magic"], loaded, None, workflow)


# Next calls


def turn(dialogue: str, expected: str, got: str, **arguments: int) -> Turn:
    def message(name: str, arguments: dict[str, int]) -> Message:
        calls = [ToolCall(id="call_0", name=name, arguments=json.dumps(arguments))] if name else []
        return Message(role="assistant", tool_calls=calls)

    return Turn(dialogue, 2, message(expected, {"a": 1}), message(got, arguments))


def test_a_call_counts_with_every_argument() -> None:
    turns = [turn("d", "f", "f", a=1), turn("d", "f", "f", a=2), turn("d", "f", "g", a=1), turn("e", "f", "")]
    turns += [turn("d", "", ""), turn("e", "", "f")]
    score = score_turns(turns)
    assert (score.calls, score.dialogues) == (4, 2)
    assert (score.exact.mean, score.method.mean, score.made_up.mean) == (0.25, 0.5, 0.5)


def test_next_calls_are_asked_for_on_the_logs_own_history(
    agent: Path, runs: Path, workflow: Workflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A policy that knows the log scores 1; one that sees the future would differ from the teacher's history."""
    from engrain.agent import Agent

    logs = tmp_path / "logs.jsonl"
    asked: list[int] = []
    by_id = {one.id: one for one in read_trajectories(runs)}
    with logs.open("w") as file:
        for one in by_id.values():
            file.write(one.model_copy(update={"tools": workflow.schemas("full")}).to_json() + "\n")
    monkeypatch.setattr(Agent, "policy", lambda self, parallel, compiled: Knowing())

    class Knowing(Silent):
        def __call__(self, episodes: Sequence[Episode], /) -> list[Message]:
            asked.extend(len(episode.trajectory.messages) for episode in episodes)
            assert all(episode.trajectory.tools == "[]" and len(episode.tools) == 2 for episode in episodes)
            return [by_id[one.trajectory.id].messages[len(one.trajectory.messages)] for one in episodes]

    report = evaluate_calls(load_agent(agent), None, ["lora"], logs, tmp_path / "out", n=10, parallel=4)
    score = report.scores["seen"]["lora"]
    assert score.exact.mean == 1 and score.made_up.mean == 0 and score.dialogues == 10
    assert asked.count(2) == 10  # every dialogue's first call, after system and user
    assert "| seen | lora | 100.0" in (tmp_path / "out" / "report.md").read_text()
    with pytest.raises(InputError, match="no agent for arm 'full'"):
        evaluate_calls(load_agent(agent), None, ["full"], logs, tmp_path / "out", n=10)


def test_next_calls_of_a_real_model(
    agent: Path, runs: Path, workflow: Workflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engrain.agent.LONGEST_CONTEXT", 160)  # an untrained model rambles on
    logs = tmp_path / "logs.jsonl"
    other = workflow.schemas("full").replace("Lend one copy", "Give away one copy")
    with logs.open("w") as file:
        for number, one in enumerate(read_trajectories(runs)):
            tools = other if number % 2 else workflow.schemas("full")
            file.write(one.model_copy(update={"tools": tools}).to_json() + "\n")
    report = evaluate_calls(load_agent(agent), None, ["base", "lora"], logs, tmp_path / "out", n=1, parallel=2)
    assert set(report.scores) == {"seen", "unseen"} and set(report.scores["seen"]) == {"base", "lora"}
    predicted = (tmp_path / "out" / "lora.seen.calls.jsonl").read_text().strip().split("\n")
    assert len(predicted) >= 2
