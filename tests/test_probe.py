"""A policy that reads the context is right on every probe and one that does not is not; finished work is kept."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import islice
from pathlib import Path

import pytest
import torch
from desk import workflow as desk
from models import random_rows
from transformers import PreTrainedModel

from engrain import probe as probing
from engrain.budget import Budget
from engrain.cli import invoke
from engrain.errors import InputError
from engrain.model import Base, load_base
from engrain.policy import Episode, Policy, ScriptTeacher
from engrain.probe import Capability, Gate, NextTurn, Plan, Subject, Trial, WholeTask, load_suite, measure, probe
from engrain.rollout import rollouts
from engrain.task import Task
from engrain.train import TrainConfig, train
from engrain.trajectory import Message, ToolCall, read_trajectories

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "recipes"))

from worlds import catalogue, contexts, probes  # noqa: E402
from worlds.clerk import decide, expected  # noqa: E402
from worlds.drawing import draw  # noqa: E402
from worlds.tasks import NUMBER_PARAPHRASES, NUMBER_WORDINGS, WORD_PARAPHRASES, WORD_WORDINGS  # noqa: E402
from worlds.trajectories import HOME, UNSEEN, trajectories  # noqa: E402
from worlds.world import World  # noqa: E402

Capture = pytest.CaptureFixture[str]


def whole(seed: int) -> Iterator[Trial]:
    return (WholeTask(desk, task) for task in desk.tasks("train", seed))


def finding(seed: int) -> Iterator[Trial]:
    for task in desk.tasks("train", seed):
        order = task.goal["order"]
        yield NextTurn(desk, task, (), lambda turn, order=order: order in turn.tool_calls[0].arguments)


def said(seed: int) -> Iterator[Trial]:
    return (NextTurn(desk, task, (), lambda turn: True) for task in desk.tasks("train", seed))


SUITE = (
    Capability("find", "the order", finding, Gate(least=0.9)),
    Capability("refund", "whole tasks", whole),
    Capability("again", "the same tasks", whole, Gate(most=0.1), before="refund"),
)
PLAN = Plan(tasks=6, seeds=2, parallel=4)


class Silent:
    """Has no answer where there is something to refund."""

    def __call__(self, episodes: Sequence[Episode], /) -> list[Message | Exception]:
        return [
            ValueError("lost") if episode.task.goal["refund"] else Message(role="assistant") for episode in episodes
        ]

    def finish(self, episode: Episode, /) -> None:
        pass


def subject(policy: Policy, loaded: list[int] | None = None, digest: str = "base") -> Subject:
    def load(parallel: int) -> Policy:
        if loaded is not None:
            loaded.append(parallel)
        return policy

    return Subject(digest, load)


def test_a_report_says_what_was_right(tmp_path: Path) -> None:
    report = probe(subject(ScriptTeacher(desk)), SUITE, "code", PLAN, tmp_path)
    assert [cell.success.mean for cell in report.cells.values()] == [1, 1, 1]
    assert [(cell.tasks, cell.tenants, cell.seeds) for cell in report.cells.values()] == [(12, 2, (1.0, 1.0))] * 3
    assert [cell.gate for cell in report.cells.values()] == ["at least 90: ok", "-", "at most 10: missed"]
    assert report.pairs["again"].success.mean == 1 and report.pairs["again"].tasks == 12
    table = (tmp_path / "report.md").read_text()
    assert "| find | 100.0 [100.0, 100.0] | 100.0, 100.0 | at least 90: ok | 12 | 2 |" in table
    assert "again: right before and after the change: 100.0 [100.0, 100.0]% of 12 tasks" in table
    assert json.loads((tmp_path / "report.json").read_text())["cells"]["find"]["success"]["mean"] == 1
    one = next(read_trajectories(tmp_path / "find.0.jsonl"))
    assert desk.procedure in one.messages[0].content and one.steps == 1 and one.tools != "[]"


def test_a_policy_without_an_answer_is_wrong_and_says_why(tmp_path: Path) -> None:
    suite = (Capability("say", "anything", said),)
    report = probe(subject(Silent()), suite, "code", PLAN, tmp_path)
    cell = report.cells["say"]
    assert 0 < cell.success.mean < 1 and set(cell.failures) == {"lost"}


def test_finished_probes_are_kept_and_an_interrupted_one_is_run_again(tmp_path: Path) -> None:
    loaded: list[int] = []
    asked: list[str] = []

    class Counting(ScriptTeacher):
        def __call__(self, episodes: Sequence[Episode], /) -> list[Message | Exception]:
            asked.extend(episode.task.id for episode in episodes)
            return super().__call__(episodes)

    who = subject(Counting(desk), loaded)

    def stop(name: str, seed: str, done: int, tasks: int) -> None:
        if (name, seed, done) == ("refund", "seed 1", 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        probe(who, SUITE, "code", PLAN, tmp_path, stop)
    kept = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("*.jsonl")}
    assert set(kept) == {"find.0.jsonl", "find.1.jsonl", "refund.0.jsonl"}
    journal = tmp_path / "refund.1.jsonl.partial"
    done = [json.loads(line)["task"] for line in journal.read_text().splitlines()]
    with journal.open("a") as file:
        file.write('{"torn')
    asked.clear()
    assert probe(who, SUITE[:2], "code", PLAN, tmp_path).cells["refund"].tasks == 12 and not journal.exists()
    assert len(done) == 3 and len(set(asked)) == 3 and not set(asked) & set(done)
    loaded.pop()
    report = probe(who, SUITE, "code", PLAN, tmp_path)
    assert loaded == [4, 4] and all((tmp_path / name).stat().st_mtime_ns == time for name, time in kept.items())
    assert probe(who, SUITE, "code", PLAN, tmp_path).rows() == report.rows() and loaded == [4, 4]
    with pytest.raises(InputError, match="base was 'base', now 'other'"):
        probe(subject(ScriptTeacher(desk), digest="other"), SUITE, "code", PLAN, tmp_path)
    with pytest.raises(InputError, match="suite was 'code', now 'edited'"):
        probe(who, SUITE, "edited", PLAN, tmp_path)


def test_processes_share_the_work(tmp_path: Path) -> None:
    who = subject(ScriptTeacher(desk))
    alone = probe(who, SUITE, "code", PLAN, tmp_path / "alone")
    shared = probe(who, SUITE, "code", Plan(6, 2, 4, processes=2), tmp_path / "shared")
    assert shared.rows() == alone.rows() and shared.pairs == alone.pairs


def test_too_few_trials_are_a_mistake(tmp_path: Path) -> None:
    few = Capability("few", "", lambda seed: islice(whole(seed), 3))
    with pytest.raises(InputError, match="makes 3 trials of seed 0, not 6"):
        probe(subject(ScriptTeacher(desk)), (few,), "code", PLAN, tmp_path)


# The suite of worlds


@cache
def world_of(name: str) -> World:
    family, _, seed = name.rpartition("_")
    return draw(catalogue.family(family), int(seed))


class Teacher:
    """The teacher of whatever world an episode is of, for the task that `sees` makes of its own."""

    def __init__(self, sees: Callable[[Episode], Task]) -> None:
        self.sees = sees

    def __call__(self, episodes: Sequence[Episode], /) -> list[Message]:
        return [decide(world_of(one.trajectory.workflow), self.sees(one), one.trajectory.messages) for one in episodes]

    def finish(self, episode: Episode, /) -> None:
        pass


def with_goal(task: Task, **changed: object) -> Task:
    return task.model_copy(update={"goal": {**task.goal, **changed}})


@pytest.mark.parametrize("capability", probes.suite, ids=lambda one: one.name)
def test_a_perfect_policy_is_right_and_one_that_does_not_read_is_not(capability: Capability) -> None:
    rules = dict[str, dict]()

    def own(episode: Episode) -> Task:
        return episode.task

    def guessed(episode: Episode) -> Task:
        """The rules of whichever tenant of the world came first; for `copy`, an identifier out of the air."""
        first = rules.setdefault(episode.trajectory.workflow, episode.task.goal["rules"])
        items = [{**item, "about": "X0000"} for item in episode.task.goal["items"]]
        return with_goal(episode.task, **({"items": items} if capability.name == "copy" else {"rules": first}))

    trials = list(islice(capability.trials(3), 3 if capability.name == "long40" else 16))
    right, blind = (
        [one.outcome.success for one in probing.attempts(capability, trials, Teacher(sees)) if one.outcome]
        for sees in (own, guessed)
    )
    assert len(right) == len(trials) and all(right)
    assert 0 < len(blind) == len(trials) and not all(blind)
    assert capability.name not in ("copy", "compare", "edit") or sum(blind) <= 0.7 * len(blind)


def test_the_suite_is_of_worlds_that_nothing_trains_on() -> None:
    trained = {run.workflow for run in trajectories(1, 40)}
    for capability in probes.suite:
        seen = set()
        for seed in range(2):
            for trial in islice(capability.trials(seed), 2 if capability.name == "long40" else 12):
                family, _, number = trial.workflow.name.rpartition("_")
                assert int(number) >= UNSEEN > HOME
                assert (family in catalogue.HELD_OUT) == (capability.name == "families")
                seen.add(trial.workflow.name)
        assert len(seen) >= 2 and not seen & trained
    assert {one.name for one in probes.suite if one.instructions == "none"} == {"control"}


def test_a_copy_must_be_exact() -> None:
    for trial in islice(probes.trials(catalogue.TRAINED, probes.copying, 0), 12):
        assert isinstance(trial, NextTurn)
        turn = teacher(trial)
        assert trial.right(turn)
        [call] = turn.tool_calls
        named = probes.identifiers([call])
        value = next(iter(named.values()))
        other = value[:-1] + str((int(value[-1]) + 1) % 10)
        altered = turn.model_copy(
            update={"tool_calls": [call.model_copy(update={"arguments": call.arguments.replace(value, other)})]}
        )
        assert not trial.right(altered) and not trial.right(Message(role="assistant", content=value))
        broken = ToolCall(id="x", name=call.name, arguments=call.arguments[:-2])
        assert not trial.right(turn.model_copy(update={"tool_calls": [broken]}))


def test_a_verdict_must_be_the_same() -> None:
    verdicts = []
    for trial in islice(probes.trials(catalogue.TRAINED, probes.comparing, 0), 16):
        assert isinstance(trial, NextTurn)
        turn = teacher(trial)
        step, verdict = trial.right.args  # type: ignore[attr-defined]
        assert trial.right(turn) and turn.reasoning.count(verdict) >= 1
        for old, new in (("within", "over"), ("over", "within"), ("; ", "; now ")):
            if old in verdict:
                lines = [
                    line.replace(old, new) if line.startswith(step) else line for line in turn.reasoning.split("\n")
                ]
                assert not trial.right(turn.model_copy(update={"reasoning": "\n".join(lines)}))
        assert not trial.right(Message(role="assistant", content=verdict))
        verdicts.append(re.split("[;,]", verdict)[0])
    assert 4 <= verdicts.count("over") <= 12


def test_an_edit_changes_one_line_of_the_profile_and_what_is_right() -> None:
    before = {
        (one.workflow.name, one.task.tenant, one.task.id): one
        for one in islice(probes.trials(catalogue.TRAINED, probes.whole, 0), 40)
    }
    shared = 0
    for trial in islice(probes.trials(catalogue.TRAINED, probes.edited, 0), 32):
        old = before.get((trial.workflow.name, trial.task.tenant, trial.task.id))
        if old is None:
            continue
        shared += 1
        tenant, world = trial.task.tenant, world_of(trial.workflow.name)
        lines = [one.workflow.system(tenant, "full").splitlines() for one in (old, trial)]
        assert sum(a != b for a, b in zip(*lines, strict=True)) == 1
        assert old.task.request == trial.task.request and old.task.start == trial.task.start
        assert expected(world, old.task) != expected(world, trial.task)
        others = set(old.workflow.tenants) - {tenant}
        assert all(old.workflow.tenants[other] == trial.workflow.tenants[other] for other in others)
    assert shared >= 16


def teacher(trial: NextTurn) -> Message:
    messages = [Message(role="user", content=trial.task.request), *trial.history]
    return decide(world_of(trial.workflow.name), trial.task, messages)


# A model, and the command


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """A suite of the desk, in a folder of its own."""
    folder = tmp_path / f"suite_of_{tmp_path.name.replace('-', '_')}"
    folder.mkdir()
    (folder / "probes.py").write_text(
        "from desk import workflow\n"
        "from engrain.probe import Capability, NextTurn\n"
        "from engrain.rollout import Budget\n\n\n"
        "def turns(seed):\n"
        "    return (NextTurn(workflow, task, (), lambda turn: True) for task in workflow.tasks('train', seed))\n\n\n"
        "suite = (Capability('say', 'anything', turns, instructions='none', budget=Budget(steps=1)),)\n"
    )
    return folder


@pytest.fixture(autouse=True)
def short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """An untrained model rambles on."""
    monkeypatch.setattr("engrain.agent.LONGEST_CONTEXT", 160)


def test_a_model_in_memory_is_measured(tiny_base: Path) -> None:
    base = load_base(tiny_base)
    suite = (
        Capability("say", "", said, instructions="none"),
        Capability("refund", "", whole, instructions="none", budget=Budget(steps=1)),
    )
    shares = measure(base, suite, 3, seed=7)
    assert list(shares) == ["say", "refund"] and shares["say"] == 1 and 0 <= shares["refund"] <= 1
    assert measure(base, suite, 3, seed=7) == shares


def test_a_model_can_be_measured_while_it_is_trained(tiny_base: Path, tmp_path: Path) -> None:
    config = TrainConfig(tokens=400, batch_tokens=200, threads=1, precision="fp32", probe_every_steps=1)
    suite = (Capability("say", "", said, instructions="none"),)
    plain, watched = load_base(tiny_base), load_base(tiny_base)

    def look(step: int, model: PreTrainedModel) -> dict[str, float]:
        return measure(Base(model, watched.tokenizer), suite, 2, seed=step)

    train(plain, None, random_rows(20), config, tmp_path / "plain")
    train(watched, None, random_rows(20), config, tmp_path / "watched", probe=look)
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), watched.model.parameters(), strict=True))
    logged = [json.loads(line) for line in (tmp_path / "watched" / "metrics.jsonl").read_text().splitlines()]
    assert sum(line.get("say") == 1 for line in logged) >= 2


def test_the_command_goes_on_and_reports(suite: Path, tiny_base: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "report"
    command = ["base", "probe", str(tiny_base), "--suite", str(suite), "-n", "5", "--seeds", "2", "-o", str(out)]
    assert invoke([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["cells"]["say"]["tasks"] == 6 and report["cells"]["say"]["seeds"] == [1.0, 1.0]
    (out / "say.1.jsonl").rename(out / "kept")
    assert invoke(command) == 0
    shown = capsys.readouterr().out
    assert "100.0 [100.0, 100.0]" in shown and f"written: {out}/report.json" in shown
    assert "<td>say</td>" in (out / "report.html").read_text()
    assert (out / "say.1.jsonl").read_text().count("\n") == (out / "kept").read_text().count("\n") == 3


def test_mistakes_are_one_line(
    suite: Path, tiny_base: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: object) -> str:
        assert invoke(["base", "probe", *map(str, arguments), "-o", str(tmp_path / "report")]) == 2
        done = capsys.readouterr()
        assert done.out == "" and "Traceback" not in done.err and done.err.count("error: ") == 1
        return done.err

    options = ("--suite", suite, "-n", 2, "--seeds", 1)
    assert "no config.json" in refused(tmp_path / "gone", *options)
    assert "unknown probe 'fly'; the suite has say" in refused(tiny_base, *options, "--probes", "say,fly")
    assert "no probes.py there" in refused(tiny_base, "--suite", tmp_path)
    (tmp_path / "odd.py").write_text("suite = [1]\n")
    assert "expected a module-level `suite" in refused(tiny_base, "--suite", tmp_path / "odd.py")
    (tmp_path / "torn.py").write_text("suite = (\n")
    assert "torn.py: line 1: SyntaxError" in refused(tiny_base, "--suite", tmp_path / "torn.py")
    monkeypatch.setattr(probing, "SUITE", tmp_path / "none")
    assert "has no suite; give one with --suite" in refused(tiny_base)
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_base.iterdir():
        (broken / file.name).write_bytes(file.read_bytes() if file.suffix != ".safetensors" else b"torn")
    for processes in (1, 2):
        assert "cannot load the base" in refused(broken, *options, "--processes", processes)
    assert not (tmp_path / "report" / "report.json").exists()


def test_the_default_suite_is_that_of_worlds() -> None:
    assert [one.name for one in load_suite(probing.SUITE)] == [one.name for one in probes.suite]
    assert load_suite(probing.SUITE) is probes.suite


def test_contexts_are_paraphrased_and_exceptions_decide() -> None:
    by_name = {capability.name: capability for capability in contexts.suite}
    for capability in contexts.suite:
        trials = list(islice(capability.trials(0), 1))
        assert all(isinstance(trial, WholeTask) for trial in trials)
        flows = {id(trial.workflow): trial.workflow for trial in trials}
        for flow in flows.values():
            tasks = [(flow, trial.task) for trial in trials if trial.workflow is flow]
            for run in rollouts(tasks, ScriptTeacher(flow), budget=Budget(steps=200)):
                assert run.outcome is not None and run.outcome.success
    assert not {*NUMBER_WORDINGS, *WORD_WORDINGS} & {*NUMBER_PARAPHRASES, *WORD_PARAPHRASES}
    parts = [re.split(r"{\w+}", wording) for wording in (*NUMBER_PARAPHRASES, *WORD_PARAPHRASES)]
    for trial in islice(by_name["paraphrase"].trials(1), 2):
        rules = trial.workflow.tenants[trial.task.tenant].rules
        assert rules and all(any(all(part in rule for part in own) for own in parts) for rule in rules)
    for trial in islice(by_name["rare-rules"].trials(1), 2):
        special = [said for said in trial.task.goal["rules"].values() if isinstance(said, dict) and "else" in said]
        assert any(len(set(said.values())) > 1 for said in special)
