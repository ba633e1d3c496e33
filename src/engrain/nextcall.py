"""Next-call evaluation: given a log up to a turn, does the agent make exactly the calls that the log makes?

For logs whose tools cannot be run. Histories are the log's own, so mistakes do not add up. A call counts only if its
method and every argument are right; turns of the log without a call tell how often one is made up. Dialogues count as
`seen` if every tool offered in them was offered in training. Intervals resample dialogues.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engrain.agent import Agent, tool_digest
from engrain.compile import compiled_form
from engrain.errors import InputError
from engrain.evaluate import ARMS, REPORT, TABLE, markdown, write_json
from engrain.files import replacing
from engrain.policy import Episode, Policy
from engrain.score import Interval, bootstrap_ratio, matches
from engrain.task import Task
from engrain.tool import Tool
from engrain.trajectory import Message, Trajectory, read_trajectories
from engrain.workflow import Phase

SPLITS = ("seen", "unseen")


@dataclass(frozen=True)
class Turn:
    """One turn of a log, and what the agent says in its place."""

    dialogue: str
    index: int
    expected: Message
    got: Message

    @property
    def exact(self) -> bool:
        return matches(self.expected, self.got)

    @property
    def method(self) -> bool:
        return [call.name for call in self.expected.tool_calls] == [call.name for call in self.got.tool_calls]


@dataclass(frozen=True)
class CallScore:
    exact: Interval
    """Method and every argument, of the turns that make calls."""
    method: Interval
    made_up: Interval
    """Turns of the log without a call in which the agent makes one."""
    calls: int
    dialogues: int


@dataclass(frozen=True)
class CallReport:
    data: str
    scores: Mapping[str, Mapping[str, CallScore]]
    """By split, then by arm."""

    headings = ("tools", "arm", "exact call % [95%]", "method % [95%]", "made up % [95%]", "calls", "dialogues")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def rows(self) -> list[tuple[str, ...]]:
        return [
            (
                split,
                arm,
                score.exact.percent(),
                score.method.percent(),
                score.made_up.percent(),
                str(score.calls),
                str(score.dialogues),
            )
            for split, arms in self.scores.items()
            for arm, score in arms.items()
        ]

    def notes(self) -> list[str]:
        return []


def evaluate_calls(
    agent: Agent,
    full: Agent | None,
    arms: Sequence[str],
    data: Path,
    out: Path,
    *,
    n: int,
    parallel: int = 16,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> CallReport:
    """Measure arms on at most `n` dialogues a split; writes report and predictions to `out`."""
    agents = {one.manifest.kind: one for one in (agent, full) if one is not None}
    if unknown := [arm for arm in arms if arm not in ("base", "prompt", *agents)]:
        raise InputError(f"no agent for arm {unknown[0]!r}; choose from {', '.join(ARMS)} and give --full for full")
    splits = _by_split(read_trajectories(data), agent, n)
    scores: dict[str, dict[str, CallScore]] = {split: {} for split in splits}
    for arm in arms:
        runs = agents.get(arm, agent)
        keep_tools = arm == "prompt" or bool(runs.manifest.config.get("keep_tools"))
        policy = runs.policy(parallel, compiled=arm in agents)
        for split, dialogues in splits.items():
            say(f"{arm} on {split} tools: {len(dialogues)} dialogues")
            turns = list(_turns(policy, dialogues, keep_tools, parallel, seed))
            _write_turns(out / f"{arm}.{split}.calls.jsonl", turns)
            scores[split][arm] = score_turns(turns, seed)
            say(f"{arm} on {split} tools: {scores[split][arm].exact.percent()} % of calls exact")
    report = CallReport(str(data), scores)
    write_json(out / REPORT, report.to_dict())
    with replacing(out / TABLE) as file:
        about = "Exact: method and every argument, given the log's own history; 95% bootstrap over dialogues."
        file.write(markdown(data.name, about, report.headings, report.rows(), report.notes()))
    return report


def score_turns(turns: Sequence[Turn], seed: int = 0) -> CallScore:
    dialogues = list(dict.fromkeys(turn.dialogue for turn in turns))

    def share(counted: Callable[[Turn], bool], among: Callable[[Turn], bool]) -> Interval:
        parts, wholes = dict.fromkeys(dialogues, 0.0), dict.fromkeys(dialogues, 0.0)
        for turn in filter(among, turns):
            wholes[turn.dialogue] += 1
            parts[turn.dialogue] += counted(turn)
        return bootstrap_ratio(list(parts.values()), list(wholes.values()), seed=seed)

    def calls(turn: Turn) -> bool:
        return bool(turn.expected.tool_calls)

    return CallScore(
        exact=share(lambda turn: turn.exact, calls),
        method=share(lambda turn: turn.method, calls),
        made_up=share(lambda turn: bool(turn.got.tool_calls), lambda turn: not calls(turn)),
        calls=sum(map(calls, turns)),
        dialogues=len(dialogues),
    )


def _by_split(trajectories: Iterator[Trajectory], agent: Agent, n: int) -> dict[str, list[Trajectory]]:
    """The first `n` dialogues of each split that make a call."""
    splits: dict[str, list[Trajectory]] = {split: [] for split in SPLITS}
    known: dict[str, bool] = {}
    for trajectory in trajectories:
        if trajectory.tools not in known:
            digests = {tool_digest(schema) for schema in trajectory.tool_schemas()}
            known[trajectory.tools] = digests <= agent.manifest.tools.keys()
        chosen = splits["seen" if known[trajectory.tools] else "unseen"]
        if len(chosen) < n and any(message.tool_calls for message in trajectory.messages):
            chosen.append(trajectory)
    found = {split: dialogues for split, dialogues in splits.items() if dialogues}
    if not found:
        raise InputError("no trajectory makes a call; expected logs of an agent that calls tools")
    return found


def _turns(
    policy: Policy, dialogues: Sequence[Trajectory], keep_tools: bool, parallel: int, seed: int
) -> Iterator[Turn]:
    """Every turn that makes a call, and as many of the others."""
    for first in range(0, len(dialogues), parallel):
        block = [_Log(dialogue, keep_tools, seed) for dialogue in dialogues[first : first + parallel]]
        while waiting := [log for log in block if log.wanted]:
            episodes = [log.advance() for log in waiting]
            for log, got in zip(waiting, policy(episodes), strict=True):
                if isinstance(got, Exception):
                    got = Message(role="assistant", error=type(got).__name__, content=str(got))
                yield Turn(log.dialogue.id, log.at, log.messages[log.at], got)
        for log in block:
            policy.finish(log.episode)


class _Log:
    """A dialogue, replayed turn by turn in one episode, so that its line in the cache is extended."""

    def __init__(self, dialogue: Trajectory, keep_tools: bool, seed: int) -> None:
        self.dialogue = dialogue
        compiled = compiled_form(dialogue, None, keep_tools=keep_tools)
        self.messages, self.at = compiled.messages, 0
        tools = tuple(_offered(schema) for schema in dialogue.tool_schemas())
        phase = Phase("", "", tuple(tool.name for tool in tools))
        trajectory = compiled.model_copy(update={"messages": []})
        self.episode = Episode(Task(id=dialogue.id, request=""), trajectory, phase, tools)
        turns = [index for index, message in enumerate(self.messages) if message.role == "assistant"]
        calls = [index for index in turns if self.messages[index].tool_calls]
        others = [index for index in turns if not self.messages[index].tool_calls]
        chosen = random.Random(f"{seed} {dialogue.id}").sample(others, min(len(calls), len(others)))
        self.wanted = sorted([*calls, *chosen])

    def advance(self) -> Episode:
        self.at = self.wanted.pop(0)
        self.episode.trajectory.messages[:] = self.messages[: self.at]
        return self.episode


def _offered(schema: dict[str, Any]) -> Tool:
    """A tool that can be called only on paper."""
    function = schema["function"]
    parameters = json.dumps(function.get("parameters") or {"type": "object", "properties": {}}, ensure_ascii=False)
    return Tool(function["name"], function.get("description", ""), parameters, _nothing)


def _nothing(**arguments: Any) -> None:
    return None


def _write_turns(path: Path, turns: Sequence[Turn]) -> None:
    with replacing(path) as file:
        for turn in turns:
            record = {
                "dialogue": turn.dialogue,
                "turn": turn.index,
                "exact": turn.exact,
                "expected": turn.expected.model_dump(mode="json", include={"content", "tool_calls"}),
                "got": turn.got.model_dump(mode="json", include={"content", "tool_calls", "error"}),
            }
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
