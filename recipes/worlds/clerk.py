"""The procedure carried out: by the teacher, who answers every read from the calls that the trajectory holds, and by
the goal check, which answers them from the records.

The teacher keeps no memory. Each turn it walks the whole request again; the first call that it needs and does not have
is its next action. So it continues rightly from any state, also one that a student wandered into. Where it works alone
(`walk`), each such call is made as it comes up, so that one walk is the whole trajectory. Its notes quote each step
before it is decided, with the rule and the record's words that decide it beside each other.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engrain.errors import ToolFailure
from engrain.task import Task
from engrain.trajectory import Message, Outcome, ToolCall
from worlds.language import compared, quoted
from worlds.spec import (
    Asked,
    By,
    Check,
    Choice,
    Condition,
    Counts,
    Do,
    End,
    Is,
    Jump,
    Limit,
    Over,
    Read,
    Ref,
    Says,
    Stop,
)
from worlds.store import Store, written
from worlds.world import Procedure, World

ATTEMPTS = 3


class Act(Exception):
    """The next action: a turn whose call is needed now."""

    def __init__(self, turn: Message) -> None:
        self.turn = turn


class Ended(Exception):
    """This item ends here, with this result."""

    def __init__(self, result: str) -> None:
        self.result = result


class Exhausted(Exception):
    """A tool kept failing."""


Call = Callable[[str, dict[str, Any], Sequence[str]], dict[str, Any]]
"""(tool, arguments, fields that are needed) -> result. Raises `Act`, `Ended` or `Exhausted`."""
Make = Callable[[Message], Message]
"""A turn with one call -> what the tool answers."""


@dataclass
class Clerk:
    world: World
    task: Task
    call: Call
    notes: list[str] = field(default_factory=list)
    """What there is to say since the last result."""
    title: str = ""
    """The item at hand; the notes of every turn start with it."""
    said: str = ""
    """The item's mark and the requester's words: notes on what was asked quote them."""
    done: int = -1
    """The index of the item that is being done; -1 before the first."""
    known: dict[str, Any] = field(default_factory=dict)
    """What was read of the requester, then of the item, by path."""

    def answer(self) -> str:
        """The whole request, item by item; what the requester is told."""
        goal = self.task.goal
        try:
            self.steps("", goal["requester"], {})
        except Ended as ended:
            return ended.result
        except Exhausted:
            self.hand_over("request")
            return "handed over"
        requester, lines = dict(self.known), list[str]()
        for place, item in enumerate(goal["items"]):
            self.done, self.known = place, dict(requester)
            self.title, self.said = title(self.world, place, item), request(place, item)
            self.notes.append(self.title)
            lines.append(f"{mark(place)}. {self.item(item)}")
            self.notes.append(lines[-1])
        return "\n".join(lines)

    def item(self, item: Mapping[str, Any]) -> str:
        try:
            return self.steps(item["kind"], item["about"], item["asked"])
        except Ended as ended:
            return ended.result
        except Exhausted:
            self.hand_over(self.world.shown[item["kind"]])
            return "handed over"

    def hand_over(self, topic: str) -> None:
        self.call("hand_over", {"topic": topic}, ())

    def steps(self, kind: str, about: str, asked: Mapping[str, Any]) -> str:
        """Carry out a procedure; the result of its `End`, or nothing if it has none."""
        world = self.world
        procedure = world.procedures[kind]
        main = world.kinds[kind].about if kind else world.family.requester
        names = {world.family.requester: self.task.goal["requester"], main: about}
        needs, lines = world.needed[kind], world.lines[kind]
        place = 0
        while place < len(procedure.steps):
            step = procedure.steps[place]
            said = lines[place]
            place += 1
            match step:
                case Read(record, by):
                    self.notes.append(f"{said}: {quoted(world.shown[by], self.known[by])}" if by else said)
                    names[record] = self.known[by] if by else about
                    self.read(record, names[record], needs)
                    for at, to in world.records[record].fields.items():
                        if isinstance(to, Ref) and f"{record}.{at}" in self.known:
                            names[to.record] = self.known[f"{record}.{at}"]
                case Check(record):
                    self.notes.append(said)
                    try:
                        self.read(record, names.setdefault(record, about), ())
                    except Exhausted:
                        self.notes.append("ignore it")
                case Do(action, _):
                    given, line = self.given(step, asked, said)
                    self.notes.append(line)
                    self.act(action, names[world.actions[action].on], given, needs)
                case Stop() | Jump():
                    true, line = self.decided(step, procedure, said)
                    self.notes.append(line)
                    if true and isinstance(step, Stop):
                        raise Ended(step.result)
                    if true and isinstance(step, Jump):
                        place = procedure.places[step.to]
                case End(result, shows):
                    self.notes.append(said)
                    return result + (f", {quoted(world.shown[shows], self.known[shows])}" if shows else "")
        return ""

    def decided(self, step: Stop | Jump, procedure: Procedure, said: str) -> tuple[bool, str]:
        """Whether to stop or jump, and the note that says why after the step's line."""
        true, why = self.holds(step.when)
        if step.unless:
            why += ", met" if true else ", unmet"
        if true == step.unless:
            then = "go on"
        else:
            then = "stop" if isinstance(step, Stop) else f"go to {procedure.mark(procedure.places[step.to])}"
        return true != step.unless, f"{said}: {why}; {then}"

    def given(self, step: Do, asked: Mapping[str, Any], line: str) -> tuple[dict[str, Any], str]:
        """The arguments of an action, and the note that says where they come from after the step's line."""
        shown, given, grounds = self.world.shown, dict[str, Any](), list[str]()
        for name, source in step.arguments.items():
            said = shown[f"{step.action}.{name}"]
            value = given[said] = self.value(source, asked)
            ground = ""
            if isinstance(source, By):
                ground = f"{self.rule(source.rule)}, "
            elif isinstance(source, Asked):
                ground = f"{up_to(self.said, value)} = "
            elif shown[source.path] != said:
                ground = f"{quoted(shown[source.path], value)}, "
            grounds.append(ground + quoted(said, value))
        return given, f"{line}: {'; '.join(grounds)}" if given else line

    def read(self, record: str, name: str, needs: Collection[str]) -> None:
        shown = self.world.shown
        fields = {at: shown[f"{record}.{at}"] for at in self.world.records[record].fields}
        needed = [fields[at] for at in fields if f"{record}.{at}" in needs]
        result = self.call(record, {shown[f"{record}.id"]: name}, needed)
        self.known |= {f"{record}.{at}": result[said] for at, said in fields.items() if said in result}

    def act(self, action: str, name: str, given: dict[str, Any], needs: Collection[str]) -> None:
        shown, gives = self.world.shown, self.world.actions[action].gives
        arguments = {shown[f"{self.world.actions[action].on}.id"]: name, **given}
        result = self.call(action, arguments, [shown[f"{action}.{at}"] for at in gives if f"{action}.{at}" in needs])
        self.known |= {f"{action}.{at}": result.get(shown[f"{action}.{at}"]) for at in gives}

    def value(self, source: Any, asked: Mapping[str, Any]) -> Any:
        match source:
            case By(rule):
                return self.ruled(rule)[1]
            case Asked(slot):
                return asked[slot]
        return self.known[source.path]

    def ruled(self, name: str) -> tuple[str, Any]:
        """How a rule is written in the notes, and what it says for the case at hand."""
        rule, said, shown = self.world.rules[name], self.task.goal["rules"][name], self.world.shown
        title, tenant = shown[name], self.task.tenant
        word = '"{}"' if isinstance(rule, Choice) else "{}"
        if rule.by:
            at = self.known[rule.by]
            value = said.get(at, "none")
            return f'{quoted(shown[rule.by], at)}, {tenant} {title} for "{at}": {word.format(value)}', value
        if isinstance(rule, Limit) and rule.rare:
            at, special = self.known[rule.rare], next(word for word in said if word != "else")
            value = said.get(at, said["else"])
            text = f'{tenant} {title}: {said["else"]}, for "{special}" {said[special]}'
            return f"{text}, {quoted(shown[rule.rare], at)}, {_same(at == special)}, {value}", value
        if isinstance(rule, Choice) and rule.fields:
            return f"{tenant} {title}: {word.format(shown[said])}", said
        return f"{tenant} {title}: {word.format(said)}", said

    def rule(self, name: str) -> str:
        return self.ruled(name)[0]

    def holds(self, when: Condition) -> tuple[bool, str]:
        """Whether a condition holds, and why, in words."""
        shown, known = self.world.shown, self.known
        match when:
            case Over(path, rule):
                text, limit = self.ruled(rule)
                over = known[path] > limit
                why = f"{text}, {quoted(shown[path], known[path])}, {compared(limit, known[path])}"
                return over, f"{why}, {'over' if over else 'within'}"
            case Is(path, word, rule):
                text, wanted = self.ruled(rule) if rule else ("", word)
                same = known[path] == wanted
                return same, f"{text}{', ' if text else ''}{quoted(shown[path], known[path])}, {_same(same)}"
            case Says(rule, word):
                text, said = self.ruled(rule)
                return said == word, f"{text}, {_same(said == word)}"
            case Counts(rule, word):
                text, path = self.ruled(rule)
                same = known[path] == word
                return same, f"{text}, {quoted(shown[path], known[path])}, {_same(same)}"


def _same(same: bool) -> str:
    return "same" if same else "other"


def mark(place: int) -> str:
    """The mark of an item by its place from 0: (a) to (z), then (aa)."""
    return f"({chr(ord('a') + place % 26) * (1 + place // 26)})"


class History:
    """Answers calls from those that a trajectory holds, and else by `make`."""

    def __init__(self, world: World, messages: Sequence[Message], make: Make) -> None:
        self.made, self.make = sum(len(message.tool_calls) for message in messages), make
        results = {message.tool_call_id: message for message in messages if message.role == "tool"}
        self.calls: dict[tuple[str, str], list[Message]] = {}
        for message in messages:
            for call in message.tool_calls:
                if call.id in results:
                    self.calls.setdefault((call.name, _canonical(call.arguments)), []).append(results[call.id])
        self.names = world.tool_names
        self.clerk: Clerk

    def __call__(self, tool: str, arguments: dict[str, Any], needs: Sequence[str]) -> dict[str, Any]:
        """The result of a call. Each uses up attempts until one succeeds."""
        attempts = self.calls.get((self.names[tool], json.dumps(arguments, sort_keys=True)), [])
        notes = self.clerk.notes
        for number in range(1, ATTEMPTS + 1):
            attempt = attempts.pop(0) if attempts else self.make(self.turn(tool, arguments))
            notes[:] = [self.clerk.title] if self.clerk.title else []
            if attempt.error == "missing_record":
                notes.append("not found")
                raise Ended("not found")
            result = {} if attempt.error else _fields(attempt.content)
            if not attempt.error and all(name in result for name in needs):
                return result
            notes.append(f"retry {number}" if number < ATTEMPTS else f"failed {ATTEMPTS} times")
        raise Exhausted

    def turn(self, tool: str, arguments: dict[str, Any]) -> Message:
        """The notes since the last result, then a call. The first turn begins with the plan."""
        clerk = self.clerk
        notes = clerk.notes if self.made else [*plan(clerk.world, clerk.task), *clerk.notes]
        self.made += 1
        call = ToolCall(
            id=f"call_{self.made}", name=self.names[tool], arguments=json.dumps(arguments, ensure_ascii=False)
        )
        return Message(role="assistant", reasoning="\n".join(notes), tool_calls=[call])


def _canonical(arguments: str) -> str:
    try:
        return json.dumps(json.loads(arguments), sort_keys=True)
    except json.JSONDecodeError:
        return arguments


def _fields(content: str) -> dict[str, Any]:
    """A result's fields; one that was renamed to a new version of itself means the same."""
    try:
        result = json.loads(content)
    except json.JSONDecodeError:
        return {}
    return {name.removesuffix("_v2"): value for name, value in result.items()} if isinstance(result, dict) else {}


def decide(world: World, task: Task, messages: Sequence[Message]) -> Message:
    """The teacher's next turn."""

    def act(turn: Message) -> Message:
        raise Act(turn)

    try:
        return last(world, task, messages, act)
    except Act as next_action:
        return next_action.turn


def last(world: World, task: Task, messages: Sequence[Message], make: Make) -> Message:
    """The teacher's last turn; `make` makes the calls that the messages do not hold."""
    history = History(world, messages, make)
    clerk = history.clerk = Clerk(world, task, history)
    content = clerk.answer()
    return Message(role="assistant", reasoning="\n".join(clerk.notes), content=content)


def title(world: World, place: int, item: Mapping[str, Any]) -> str:
    """What the notes of an item begin with. Up to the colon it is like the item's line in the plan: the mark and a
    colon are what leads there."""
    return f"{mark(place)} now: {world.title(item['kind'])} {item['about']}"


def request(place: int, item: Mapping[str, Any]) -> str:
    """An item in the requester's words."""
    return f"{mark(place)} {item['said']}"


def up_to(said: str, value: object) -> str:
    """A request up to a value that it names: the value is where the quotation ends."""
    found = re.search(rf"(?<!\w){re.escape(str(value))}(?!\w)", said)
    assert found is not None, f"{said!r} does not name {value!r}"
    return said[: found.end()]


def plan(world: World, task: Task) -> list[str]:
    """Each item in the requester's words until the index has one of them, what it says there, and the procedure."""
    lines = ["Plan:"]
    for place, item in enumerate(task.goal["items"]):
        kind, about = item["kind"], item["about"]
        lines.append(f"{mark(place)} {world.cited(kind, item['said'])}: {world.title(kind)} {about}")
    return lines


def expected(world: World, task: Task) -> tuple[list[tuple[str, dict[str, Any]]], str]:
    """What should be done and answered, worked out from the records; only faults that end an item matter."""
    store, counts = Store(world, task), Counter[str]()
    faults = {(fault.tool, fault.nth): fault for fault in task.faults if fault.recovery == "fatal"}

    def call(tool: str, arguments: dict[str, Any], needs: Sequence[str]) -> dict[str, Any]:
        name = world.tool_names[tool]
        counts[name] += 1
        if fault := faults.get((name, counts[name])):
            if fault.kind == "missing_record":
                raise Ended("not found")
            raise Exhausted
        try:
            return store.do(tool, arguments)
        except ToolFailure as failure:
            raise Ended("not found") from failure

    answer = Clerk(world, task, call).answer()
    return store.writes, answer


def check(world: World, task: Task, store: Store, messages: Sequence[Message]) -> Outcome:
    """Compare what was done and answered with what should be."""
    writes, answer = expected(world, task)
    said = messages[-1].content.strip() if messages[-1].role == "assistant" else ""
    checks = {"goal reached": written(store.writes) == written(writes), "answer right": said == answer}
    wrong = [name for name, good in checks.items() if not good]
    return Outcome(success=not wrong, checks=checks, reason=f"not {', not '.join(wrong)}" if wrong else "")
