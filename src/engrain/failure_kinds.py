"""Failures by kind: what stalled a run, by definitions that can be executed.

The teacher gives the right next turn from any state, so it is asked at each turn of a failed run, from that very
history. Where the run first did something else it *departed*; what follows is a consequence. A call that was refused as
invalid changed nothing: it is not a departure but an error, after which the next turn is judged.

A failed run has one kind. In order of precedence:

1. **other**: there is no goal check's word, or it is not the agent's failure or not to be read (the workflow or the
   policy raised, a call is malformed), or it never departed and came to its end, so that the teacher would have failed
   too.
2. **recovery paralysis**: the departure is the turn after a failed call, or after a result that a fault had
   mutilated. The agent repeated the failing call beyond what the teacher would do, gave up where the teacher goes on,
   or went on where the teacher repeats, hands over or stops. It precedes the next kind since a call repeated until the
   budget ends is the cause of that end.
3. **context exhaustion**: the run was ended by a limit (its budget, a full context, the tokens of a turn), or the
   departure repeats a call that had already succeeded with the same arguments, or asks for what the request or a
   result already said, or contradicts what it had read: it calls with a value that stands nowhere in place of one that
   the request or a result has, or answers with a number that stands nowhere. It precedes the last kind since a run
   that did not come to its end shows no decision as the one that failed it, and what was lost on the way was no rule.
4. **domain blindness**: calls were valid, and the departure is the first that the tenant's rules or the procedure
   would not have: another value, another tool, an early stop, a further step, another answer.

What is not decided: contradictions in words alone, and whether a departure was harmless. A turn with several calls is
compared with the teacher's as a whole.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from engrain.score import INVALID, matches, same_call, succeeded
from engrain.task import Task
from engrain.trajectory import Message, ToolCall, Trajectory
from engrain.workflow import Workflow

Kind = Literal["recovery paralysis", "context exhaustion", "domain blindness", "other"]
KINDS: tuple[Kind, ...] = ("context exhaustion", "domain blindness", "recovery paralysis", "other")
CRASHES = ("open:", "phase:", "policy:", "check:")
"""How the reasons of runs begin in which something else than the agent failed."""
FULL = "context full"
"""What the engine says of a prompt that does not fit."""


@dataclass(frozen=True)
class Departure:
    """The first turn of a run that is not what its teacher does from the same state and history."""

    place: int
    """Of the turn among the messages."""
    got: Message
    expected: Message


@dataclass(frozen=True)
class Failure:
    """Why one run failed."""

    kind: Kind
    how: str
    """Which of the kind's definitions is met."""
    departure: Departure | None = None


def failure(workflow: Workflow, task: Task, trajectory: Trajectory) -> Failure:
    """The kind of a failed run of the task. Raises `ValueError` for one that succeeded, or is of another task."""
    if succeeded(trajectory) or trajectory.task != task.id:
        raise ValueError(f"expected a failed run of task {task.id!r}, got {trajectory.id!r}")
    if trajectory.outcome is None or not trajectory.messages:
        return Failure("other", "no outcome")
    why, last = trajectory.outcome.reason, trajectory.messages[-1]
    ended = "budget" if why.startswith("budget:") else FULL if why.startswith(f"policy: {FULL}") else ""
    if why.startswith(CRASHES) and not ended:
        return Failure("other", f"{why.partition(':')[0]} raised")
    ended = ended or ("turn cut off" if last.error == "truncated" else "")
    try:
        departed = departure(workflow, task, trajectory)
    except Exception as error:  # the workflow's own code
        return Failure("other", f"the teacher raised {type(error).__name__}")
    if departed is not None and (how := _after_error(trajectory, departed)):
        return Failure("recovery paralysis", how, departed)
    if ended:
        return Failure("context exhaustion", ended, departed)
    if last.error:
        return Failure("other", last.error.replace("_", " "), departed)
    if departed is None:
        return Failure("other", "did as the teacher does")
    if how := _forgot(trajectory.messages, departed):
        return Failure("context exhaustion", how, departed)
    return Failure("domain blindness", _otherwise(departed), departed)


def failure_kinds(
    workflow: Workflow, tasks: Mapping[str, Task], trajectories: Iterable[Trajectory]
) -> dict[str, dict[str, int]]:
    """Failed runs by kind, then by how, most frequent first; `tasks` by id. Every kind is there, also with none."""
    failed = [
        failure(workflow, tasks[run.task], run) if run.task in tasks else Failure("other", "its task is gone")
        for run in trajectories
        if not succeeded(run)
    ]
    counts = Counter((one.kind, one.how) for one in failed).most_common()
    return {kind: {how: count for (of, how), count in counts if of == kind} for kind in KINDS}


def total(parts: Iterable[Mapping[str, Mapping[str, int]]]) -> dict[str, dict[str, int]]:
    """The counts of several splits together."""
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    for part in parts:
        for kind, ways in part.items():
            counts[kind].update(ways)
    return {kind: dict(ways.most_common()) for kind, ways in counts.items()}


def said(kinds: Mapping[str, Mapping[str, int]]) -> str:
    """Counts by kind in words, of those kinds that there are."""
    there = [
        f"{sum(ways.values())} x {kind} ({', '.join(f'{count} {how}' for how, count in ways.items())})"
        for kind, ways in kinds.items()
        if ways
    ]
    return "; ".join(there) or "none"


def departure(workflow: Workflow, task: Task, trajectory: Trajectory) -> Departure | None:
    """The first departure of a run from its teacher, which is asked at every turn; whatever it raises is raised."""
    messages = trajectory.messages
    for place, turn in enumerate(messages):
        if turn.role != "assistant" or turn.error:
            continue
        if _refused(messages, place) and not messages[place - 1].error:
            continue
        expected = workflow.teacher(task, messages[:place])
        same_words = bool(turn.tool_calls) or turn.content.strip() == expected.content.strip()
        if not (matches(expected, turn) and same_words):
            return Departure(place, turn, expected)
    return None


def _after_error(trajectory: Trajectory, departed: Departure) -> str:
    """What a turn did wrong about the failed call before it; nothing if no call had failed."""
    messages = trajectory.messages
    asked = max((place for place in range(departed.place) if messages[place].role == "assistant"), default=-1)
    bad = [place for place in range(asked + 1, departed.place) if messages[place].role == "tool"]
    mutilated = _mutilated(trajectory)
    names = {messages[place].tool_call_id for place in bad if messages[place].error or place in mutilated}
    if not names:
        return ""
    failed = [call for call in messages[asked].tool_calls if call.id in names]
    if any(same_call(call, again) for call in failed for again in departed.got.tool_calls):
        return "repeated a failing call"
    if not departed.got.tool_calls:
        return "gave up" if departed.expected.tool_calls else "answered otherwise"
    return "went on"


def _mutilated(trajectory: Trajectory) -> set[int]:
    """Places of observations that a fault had rewritten, by the faults that the rollout recorded (`tool#nth:kind`).

    It counts the calls of a tool that are well-formed and allowed.
    """
    faults = {fault.partition(":")[0] for fault in trajectory.meta.get("faults", "").split()}
    made: Counter[str] = Counter()
    places = set()
    for place, message in enumerate(trajectory.messages):
        if message.role == "tool" and message.error not in INVALID | {"budget"}:
            made[message.name] += 1
            if f"{message.name}#{made[message.name]}" in faults:
                places.add(place)
    return places


def _forgot(messages: Sequence[Message], departed: Departure) -> str:
    """Which sign of a lost context a departure shows; nothing if none."""
    before, got, expected = messages[: departed.place], departed.got, departed.expected
    worked = {message.tool_call_id for message in before if message.role == "tool" and not message.error}
    done = [call for message in before for call in message.tool_calls if call.id in worked]
    if any(same_call(call, again) for call in done for again in got.tool_calls):
        return "repeated a call that had succeeded"
    read = "\n".join(message.content for message in before if message.role in ("user", "tool"))
    if got.tool_calls:
        pairs = zip(expected.tool_calls, got.tool_calls, strict=False)
        right, made = next((pair for pair in pairs if not same_call(*pair)), (None, None))
        if right is None or made is None or right.name != made.name:
            return ""
        mine = _arguments(made)
        lost = [
            value for name, value in _arguments(right).items()
            if _stands(value, read) and name in mine and not _stands(mine[name], read)
        ]  # fmt: skip
        return "called with a value from nowhere" if lost else ""
    if expected.tool_calls:
        known = all(_stands(value, read) for call in expected.tool_calls for value in _arguments(call).values())
        return "asked for what was known" if got.content.rstrip().endswith("?") and known else ""
    known = "\n".join([*(message.content for message in before), *(call.arguments for call in done)])
    made_up = _numbers(got.content) - _numbers(known) - _numbers(expected.content)
    return "answered with a number from nowhere" if made_up else ""


def _otherwise(departed: Departure) -> str:
    got, expected = departed.got.tool_calls, departed.expected.tool_calls
    if not got:
        return "stopped early" if expected else "another answer"
    if not expected:
        return "went on"
    pairs = zip(expected, got, strict=False)
    differing = next(((right, made) for right, made in pairs if not same_call(right, made)), None)
    if differing is None:
        return "went on" if len(got) > len(expected) else "stopped early"
    return "another value" if differing[0].name == differing[1].name else "another tool"


def _refused(messages: Sequence[Message], place: int) -> bool:
    """Whether a turn made calls, and each was refused as invalid."""
    ids = {call.id for call in messages[place].tool_calls}
    results = [message for message in messages[place:] if message.role == "tool" and message.tool_call_id in ids]
    return bool(results) and all(result.error in INVALID for result in results)


def _arguments(call: ToolCall) -> dict[str, Any]:
    """What a call gives by name; nothing if it is not to be read."""
    try:
        arguments = json.loads(call.arguments or "{}")
    except json.JSONDecodeError:
        return {}
    return arguments if isinstance(arguments, dict) else {}


def _stands(value: Any, text: str) -> bool:
    """Whether a text has a value, not as a part of another word."""
    return re.search(rf"(?<!\w){re.escape(str(value))}(?!\w)", text) is not None


def _numbers(text: str) -> set[str]:
    """The words of a text that hold a digit."""
    return set(re.findall(r"\w*\d\w*", text))
