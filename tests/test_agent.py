"""The committed agent: small enough for the repository, and one set of weights that acts by each tenant's rules."""

from __future__ import annotations

from dataclasses import asdict
from importlib import import_module
from itertools import count, islice
from pathlib import Path
from random import Random

import pytest

from engrain import agent as agents
from engrain.agent import load_agent
from engrain.errors import ModelError
from engrain.rollout import rollout
from engrain.task import Task
from engrain.trajectory import Trajectory
from engrain.workflow import load_workflow

ROOT = Path(__file__).parents[1]
AGENT = ROOT / "agents" / "support_desk"
DESK = load_workflow(ROOT / "examples" / "support_desk")
generator, rules = (import_module(f"engrain_workflow_support_desk.{name}") for name in ("tasks", "rules"))


def pair(seed: int, one: str, other: str) -> list[Task]:
    """One request over the same records, for two tenants."""
    ours, theirs = (rules.parse(DESK.tenants[name].rules) for name in (one, other))
    task = generator.make_task(Random(seed), one, ours, 1, split="pair", seed=seed)
    goal = {**task.goal, "rules": asdict(theirs)}
    return [task, task.model_copy(update={"id": f"{task.id}-{other}", "tenant": other, "goal": goal})]


def writes(task: Task) -> list[tuple[str, str]]:
    calls = [turn.tool_calls[0] for turn, _ in generator.walk(task, generator.TOOLS) if turn.tool_calls]
    return [(call.name, call.arguments) for call in calls]


def succeeded(trajectory: Trajectory) -> bool:
    return trajectory.outcome is not None and trajectory.outcome.success


def test_the_committed_agent_serves_each_tenant_by_its_own_rules():
    pairs = (pair(seed, "harbor", "kestrel") for seed in count())
    differing = list(islice((tasks for tasks in pairs if writes(tasks[0]) != writes(tasks[1])), 6))
    runs = rollout(DESK, [task for tasks in differing for task in tasks], load_agent(AGENT).policy(DESK), parallel=1)
    done = {run.task for run in runs if succeeded(run)}
    assert sum(all(task.id in done for task in tasks) for tasks in differing) >= 5


def test_the_committed_agent_fits_in_a_repository():
    assert sum(file.stat().st_size for file in AGENT.rglob("*") if file.is_file()) < 16 * 2**20


def test_a_hypernetwork_is_a_directory_or_the_bundled_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert agents.named_hypernetwork(tmp_path) == tmp_path
    assert (agents.named_hypernetwork(Path("bundled")) / "hypernetwork.json").is_file()
    monkeypatch.setattr(agents, "BUNDLED_HYPERNETWORK", tmp_path / "none")
    with pytest.raises(ModelError, match="recipes/hypernetwork"):
        agents.named_hypernetwork(Path("bundled"))
