"""Arms meet the same tasks, finished work is kept, and the report says what the trajectories say."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from engrain.adapters import Adapters
from engrain.agent import load_agent
from engrain.arms import Arm, agent_arms, default_arms
from engrain.budget import Budget
from engrain.context import Context
from engrain.errors import InputError
from engrain.evaluate import Plan, evaluate
from engrain.page import Distribution, Lines, Notes, Table, read_page
from engrain.policy import Episode, Policy, ScriptTeacher
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


def test_the_page_has_the_table_and_the_plots(workflow: Workflow, tmp_path: Path) -> None:
    report = evaluate(workflow, arms(workflow, []), PLAN, tmp_path)
    table, steps, seconds, notes, branches = read_page(tmp_path / "report.json").blocks
    assert isinstance(table, Table) and list(table.rows) == report.rows()
    assert isinstance(steps, Lines) and isinstance(seconds, Distribution)
    counts = {arm: [point.count for point in points] for arm, points in steps.series.items()}
    assert counts["prompt"] == [12, 0, 0, 0, 0] and counts["lora"][0] == 0 and sum(counts["lora"]) == 12
    assert len(seconds.series["lora"]) == report.cells["lora"]["held_out"].latency.steps
    assert isinstance(notes, Notes) and list(notes.lines[:-2]) == report.notes()
    assert isinstance(branches, Table) and branches.headings[2:] == tuple(
        f"{a}: success % [95%] (runs)" for a in counts
    )
    assert "Success against steps: held_out" in (tmp_path / "report.html").read_text()


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


class Wavering(ScriptTeacher):
    """Does as the teacher does where a draw of the task and the seed allows, else stays silent."""

    def __init__(self, workflow: Workflow, seed: int = 0) -> None:
        super().__init__(workflow)
        self.workflow, self.seed = workflow, seed

    def sampled(self, temperature: float, seed: int) -> Wavering:
        return Wavering(self.workflow, seed)

    def _turn(self, episode: Episode) -> Message | Exception:
        if random.Random(f"{episode.task.id} {self.seed}").random() < 0.3:
            return Message(role="assistant", content="Hm.")
        return super()._turn(episode)


def test_trials_are_the_same_tasks_with_other_seeds(workflow: Workflow, tmp_path: Path) -> None:
    plan = replace(PLAN, trials=4, temperature=0.7)
    wavering = [Arm(name, "none", name, lambda parallel: Wavering(workflow)) for name in ("prompt", "lora")]
    report = evaluate(workflow, wavering, plan, tmp_path)
    runs = list(read_trajectories(tmp_path / "lora.held_out.jsonl"))
    assert len(runs) == 4 * 12 and len({run.id for run in runs}) == 4 * 12
    by_trial = {n: {run.task for run in runs if run.meta["trial"] == n} for n in "1234"}
    assert all(tasks == by_trial["1"] and len(tasks) == 12 for tasks in by_trial.values())
    found = report.cells["lora"]["held_out"].score
    assert (found.tasks, found.trials, list(found.pass_k)) == (12, 4, [1, 2, 4])
    assert 0 < found.pass_k[4].mean < found.pass_k[2].mean < found.success.mean == found.pass_k[1].mean < 1
    assert report.headings[3:5] == ("pass^2 % [95%]", "pass^4 % [95%]")
    assert len(report.rows()[0]) == len(report.headings)
    assert report.differences["lora"]["held_out"].mean == 0  # both arms drew alike
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["cells"]["lora"]["held_out"]["score"]["pass_k"]["4"]["mean"] == found.pass_k[4].mean
    text = (tmp_path / "report.md").read_text()
    assert "temperature 0.7, 4 trials a task" in text and report.rows()[0][3] in text
    assert evaluate(workflow, wavering, plan, tmp_path).rows() == report.rows()
    once = evaluate(workflow, arms(workflow, []), PLAN, tmp_path / "once")
    assert not any("pass^" in heading for heading in once.headings)
    assert "trial" not in next(read_trajectories(tmp_path / "once" / "lora.held_out.jsonl")).meta


def test_trials_need_a_temperature(workflow: Workflow, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="4 trials at temperature 0 are the same run 4 times"):
        replace(PLAN, trials=4)
    with pytest.raises(InputError, match="arm 'prompt' cannot be sampled"):
        evaluate(workflow, arms(workflow, []), replace(PLAN, trials=2, temperature=0.7), tmp_path)


def test_an_agent_draws_other_tokens_in_each_trial(
    agent: Path, workflow: Workflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engrain.agent.LONGEST_CONTEXT", 160)
    plan = Plan(("held_out",), 1, 0, 3, 2, Budget(steps=1), trials=2, temperature=1.0)
    tokens = []
    for name in "ab":
        evaluate(workflow, agent_arms(["base"], [load_agent(agent)], workflow), plan, tmp_path / name)
        runs = read_trajectories(tmp_path / name / "base.held_out.jsonl")
        tokens.append([run.messages[2].token_ids for run in runs])
    assert tokens[0] == tokens[1] and tokens[0][0] != tokens[0][1] and all(tokens[0])


def test_what_was_measured_before_there_were_trials_is_kept(workflow: Workflow, tmp_path: Path) -> None:
    loaded: list[str] = []
    evaluate(workflow, arms(workflow, loaded), PLAN, tmp_path)
    settings = json.loads((tmp_path / "settings.json").read_text())
    del settings["plan"]["trials"], settings["plan"]["temperature"]
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    evaluate(workflow, arms(workflow, loaded), PLAN, tmp_path)
    assert loaded == ["prompt", "lora"]
    with pytest.raises(InputError, match="other settings"):
        evaluate(workflow, arms(workflow, []), replace(PLAN, temperature=0.7), tmp_path)


def test_the_report_says_where_and_how_runs_fail(workflow: Workflow, tmp_path: Path) -> None:
    report = evaluate(workflow, arms(workflow, []), PLAN, tmp_path)
    silent, teacher = report.coverage["prompt"], report.coverage["lora"]
    assert ("edge", "find>lend") in silent.never and ("tool", "lend_book") in silent.never
    assert teacher.never == () and teacher.runs == 12
    failed = sum(report.cells["prompt"]["held_out"].score.failures.values())
    assert report.failure_kinds["prompt"]["held_out"]["domain blindness"] == {"stopped early": failed}
    assert not any(report.failure_kinds["lora"]["held_out"].values())
    assert any(note.startswith("held_out: lora is better than prompt by ") for note in report.notes())
    assert any(note.startswith("prompt is weakest on ") for note in report.notes())
    assert "lora passed on every branch that it took" in report.notes()
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["verdicts"]["lora"]["held_out"].startswith("lora is better than prompt")
    assert written["coverage"]["prompt"]["branches"][0]["success"]["mean"] < 1
    assert written["failure_kinds"]["prompt"]["held_out"]["other"] == {}
    text = (tmp_path / "report.md").read_text()
    assert f"- prompt failed by kind: {failed} x domain blindness ({failed} stopped early)" in text
    assert "| edge | find>lend | - | 100.0 [100.0, 100.0] (" in text


def test_an_arm_that_does_as_the_prompt_is_not_called_better(workflow: Workflow, tmp_path: Path) -> None:
    prompt, teacher = arms(workflow, [])
    report = evaluate(workflow, [prompt, replace(prompt, name="lora"), replace(teacher, name="full")], PLAN, tmp_path)
    same, better = report.notes()[:2]
    assert "lora against prompt: no difference shown" in same and "with 12 tasks a difference under 25.0 points" in same
    assert "full is better than prompt" in better and not any("lora is better" in note for note in report.notes())


def test_arms_of_an_agent(agent: Path, workflow: Workflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engrain.agent.LONGEST_CONTEXT", 780)  # an untrained model rambles on
    loaded = load_agent(agent)
    names = default_arms([loaded])
    assert names == ["base", "prompt", "lora"]
    made = agent_arms(names, [loaded], workflow)
    assert [arm.instructions for arm in made] == ["none", "full", "none"]
    assert made[0].digest == made[1].digest != made[2].digest
    plan = Plan(("held_out",), tasks=1, latency_tasks=1, seed=3, parallel=2, budget=Budget(steps=1))
    report = evaluate(workflow, made, plan, tmp_path)
    tokens = {arm: cells["held_out"].score.prompt_tokens for arm, cells in report.cells.items()}
    assert tokens["prompt"] > 2 * tokens["lora"]
    sure = [one for one in read_page(tmp_path / "report.json").blocks if isinstance(one, Lines) and one.diagonal]
    assert [list(one.series) for one in sure] == [names]  # an engine says how likely its tokens are
    systems = [next(read_trajectories(tmp_path / f"{arm}.held_out.jsonl")).messages[0] for arm in ("prompt", "lora")]
    assert workflow.procedure in systems[0].content and workflow.procedure not in systems[1].content
    with pytest.raises(InputError, match="compile one with --to full"):
        agent_arms(["full"], [loaded], workflow)
    with pytest.raises(InputError, match="unknown arm 'magic'"):
        agent_arms(["magic"], [loaded], workflow)


def test_a_hypernetwork_is_measured_under_other_contexts_too(
    hyper_agent: Path, workflow: Workflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engrain.agent.LONGEST_CONTEXT", 780)
    made = load_agent(hyper_agent)
    names = default_arms([made])
    assert names == ["base", "prompt", "hypernetwork", "another", "shuffled", "empty"]
    read: dict[str, list[Context]] = {}
    for arm in agent_arms(names[2:], [made], workflow):
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
