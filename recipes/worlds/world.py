"""A world: one draw of a family. It fixes which kinds of request there are and the names of everything."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from string import ascii_uppercase
from typing import Any

from engrain.tool import Tool
from worlds.spec import (
    Action,
    Asked,
    By,
    Check,
    Condition,
    Do,
    End,
    Family,
    Is,
    Jump,
    Kind,
    Number,
    Of,
    Over,
    Read,
    Record,
    Ref,
    Rule,
    Source,
    Step,
    Stop,
    Values,
    Word,
)

STRING: Mapping[str, Any] = {"type": "string"}
INTEGER: Mapping[str, Any] = {"type": "integer"}


@dataclass(frozen=True)
class Procedure:
    """Steps with their labels resolved: a jump's target is a place in `steps`."""

    letter: str
    steps: tuple[Step, ...]
    places: Mapping[str, int]

    def mark(self, place: int) -> str:
        return f"{self.letter}{place + 1}" if place < len(self.steps) else "the end"


@dataclass(frozen=True)
class World:
    family: Family
    seed: int
    kinds: Mapping[str, Kind]
    shown: Mapping[str, str]
    """What each record, path, action, argument, rule and kind is called here, by key."""
    letters: Mapping[str, str]
    """The letter with which the identifiers of each record start."""
    words: Mapping[str, tuple[str, ...]]
    """The options of each rule that is a free word."""
    extra: tuple[str, ...]
    """Actions that no procedure needs."""
    records: Mapping[str, Record] = field(default_factory=dict)
    rules: Mapping[str, Rule] = field(default_factory=dict)
    actions: Mapping[str, Action] = field(default_factory=dict)

    @cached_property
    def procedures(self) -> dict[str, Procedure]:
        """By kind; the opening by the empty string."""
        every = {"": self.family.opening, **{name: kind.steps for name, kind in self.kinds.items()}}
        return {name: _resolved(ascii_uppercase[place], steps) for place, (name, steps) in enumerate(every.items())}

    @cached_property
    def lines(self) -> dict[str, tuple[str, ...]]:
        """The steps of each procedure in words, after their marks."""
        return {
            name: tuple(
                f"{procedure.mark(place)} {self.text(step, procedure)}" for place, step in enumerate(procedure.steps)
            )
            for name, procedure in self.procedures.items()
        }

    @cached_property
    def needed(self) -> dict[str, frozenset[str]]:
        """The paths that each procedure reads. What the opening reads of the requester serves every item."""
        own = {
            name: frozenset(path for step in procedure.steps for path in self.needs(step))
            for name, procedure in self.procedures.items()
        }
        return own | {"": frozenset().union(*own.values())}

    @cached_property
    def used_rules(self) -> tuple[str, ...]:
        """Those that some procedure here asks for, in the family's order."""
        asked = {rule for procedure in self.procedures.values() for step in procedure.steps for rule in rules_of(step)}
        return tuple(rule for rule in self.rules if rule in asked)

    @cached_property
    def tool_names(self) -> dict[str, str]:
        """By record for reads, by action for the others; `hand_over` for what cannot be done."""
        reads = {name: self.shown[f"get {name}"] for name in self.records}
        acts = {name: self.shown[f"do {name}"] for name in self.used_actions}
        return {**reads, **acts, "hand_over": self.shown["hand_over"]}

    @cached_property
    def tools(self) -> dict[str, Tool]:
        """Those of `tool_names`, by the same keys."""
        tools: dict[str, Tool] = {}
        for name, record in self.records.items():
            fields = ", ".join(self.shown[f"{name}.{one}"] for one in record.fields)
            described = f"Read one {self.shown[name]}: {fields}."
            tools[name] = self._tool(name, described, {self.shown[f"{name}.id"]: STRING})
        for name in self.used_actions:
            action = self.actions[name]
            arguments = {self.shown[f"{action.on}.id"]: STRING}
            for argument, values in action.arguments.items():
                schema = INTEGER if isinstance(values, Number) else STRING
                offered = self._offered(name, argument)
                arguments[self.shown[f"{name}.{argument}"]] = {**schema, "enum": offered} if offered else schema
            described = f"{name.replace('_', ' ').capitalize()} for one {self.shown[action.on]}."
            tools[name] = self._tool(name, described, arguments)
        tools["hand_over"] = self._tool("hand_over", "Give a case to a colleague.", {"topic": STRING})
        return tools

    def _offered(self, action: str, argument: str) -> list[str]:
        """The words among which a request chooses an argument; none if it comes from elsewhere, too."""
        offered: set[str] = set()
        for kind in self.kinds.values():
            for step in kind.steps:
                if isinstance(step, Do) and step.action == action:
                    source = step.arguments.get(argument)
                    values = kind.slots[source.slot] if isinstance(source, Asked) else None
                    if not isinstance(values, Word) or values.options == "address":
                        return []
                    offered.update(values.options.split("|"))
        return sorted(offered)

    @cached_property
    def used_actions(self) -> tuple[str, ...]:
        steps = [step for procedure in self.procedures.values() for step in procedure.steps]
        needed = {step.action for step in steps if isinstance(step, Do)}
        return tuple(name for name in self.actions if name in needed or name in self.extra)

    def _tool(self, of: str, description: str, arguments: Mapping[str, Any]) -> Tool:
        from worlds.store import run

        schema = {"type": "object", "properties": dict(arguments), "required": list(arguments)}
        schema["additionalProperties"] = False
        return Tool(self.tool_names[of], description, json.dumps(schema), run(of), takes_state=True)

    def options(self, path: str) -> tuple[str, ...]:
        """The words that may stand at a path."""
        values = self.values(path)
        assert isinstance(values, Word), path
        return tuple(values.options.split("|"))

    def values(self, path: str) -> Values:
        owner, _, name = path.partition(".")
        if owner in self.records:
            return self.records[owner].fields[name]
        return self.actions[owner].gives[name]

    def needs(self, step: Step) -> Iterator[str]:
        """The paths that a step reads."""
        for name in rules_of(step):
            yield from self.decided_by(name)
            yield from getattr(self.rules[name], "fields", ())
        match step:
            case Read(_, by) if by:
                yield by
            case Stop() | Jump():
                if path := getattr(step.when, "path", ""):
                    yield path
            case Do(action, arguments):
                yield from (source.path for source in arguments.values() if isinstance(source, Of))
                for name, record in self.records.items():  # whatever may say on which record to act
                    for at, values in record.fields.items():
                        if isinstance(values, Ref) and values.record == self.actions[action].on:
                            yield f"{name}.{at}"
            case End(_, shows) if shows:
                yield shows

    def decided_by(self, rule: str) -> Iterator[str]:
        """The path of the word on which it depends what a rule says, if any."""
        yield from filter(None, (self.rules[rule].by, getattr(self.rules[rule], "rare", "")))

    def text(self, step: Step, procedure: Procedure) -> str:
        """One step in words, without its mark. What is quoted in it is quoted in calls, records and notes, too: the
        same tokens, which is what copying goes by."""
        match step:
            case Read(record, by):
                return self._name(f"get {record}") + (f" by {self._name(by)}" if by else "")
            case Check(record):
                return f"check by {self._name(f'get {record}')}"
            case Do(action, arguments):
                given = [f"{self._name(f'{action}.{name}')} {self._from(source)}" for name, source in arguments.items()]
                return self._name(f"do {action}") + (f" with {', '.join(given)}" if given else "")
            case Stop(result, when, unless):
                return f"stop: {result}, {'unless' if unless else 'if'} {self._condition(when)}"
            case Jump(to, when, unless):
                to = procedure.mark(procedure.places[to])
                return f"go to {to} {'unless' if unless else 'if'} {self._condition(when)}"
            case End(result, shows):
                return f"done: {result}" + (f", {self._name(shows)}" if shows else "")
        raise TypeError(step)

    def rule_text(self, name: str) -> str:
        """A rule as a step asks for it: with the field on which it depends, if there is one."""
        return self.shown[name] + "".join(f" for its {self._name(path)}" for path in self.decided_by(name))

    def _name(self, key: str) -> str:
        return f'"{self.shown[key]}"'

    def _from(self, source: Source) -> str:
        match source:
            case By(rule):
                return f"by {self.rule_text(rule)}"
            case Asked():
                return "as asked"
        return f"from {self._name(source.path)}"

    def _condition(self, when: Condition) -> str:
        match when:
            case Over(path, rule):
                word = "after" if getattr(self.rules[rule], "day", False) else "over"
                return f"{self._name(path)} {word} {self.rule_text(rule)}"
            case Is(path, word, rule):
                return f"{self._name(path)} is " + (self.rule_text(rule) if rule else f'"{word}"')
        return f'{self.rule_text(when.rule)} is "{when.word}"'

    @cached_property
    def index(self) -> str:
        """What each procedure is for (its gloss), then its letter and name: who quotes one goes on with the other."""
        opening = ["- at first, once: A"] if self.family.opening else []
        lines = [f"- {kind.gloss}: {self.title(name)}" for name, kind in self.kinds.items()]
        return "\n".join(opening + lines)

    def title(self, kind: str) -> str:
        return f"{self.procedures[kind].letter} {self.shown[kind]}"

    @cached_property
    def _own_words(self) -> dict[str, set[str]]:
        """The words of each kind's gloss that no other's has."""
        found = {name: set(_words(kind.gloss)) for name, kind in self.kinds.items()}
        return {
            name: words.difference(*(others for other, others in found.items() if other != name))
            for name, words in found.items()
        }

    def cited(self, kind: str, said: str) -> str:
        """A request up to the first word that no other kind's gloss has, and the gloss from there on: who reads the
        request again looks each word up in the index, and goes on there with the first that it finds."""
        gloss = self.kinds[kind].gloss
        own = next(word for word in _words(said) if word in self._own_words[kind])
        return said[: _place_of(own, said)] + gloss[_place_of(own, gloss) :]

    @cached_property
    def manual(self) -> str:
        """The index, then every procedure, a step a line."""
        return "\n".join([self.index, "", *chain.from_iterable(self.lines.values())])


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]{4,}", text.lower())


def _place_of(word: str, text: str) -> int:
    return next(re.finditer(rf"\b{word}\b", text.lower())).start()


def rules_of(step: Step) -> Iterator[str]:
    """The rules that a step asks for."""
    if isinstance(step, (Stop, Jump)) and (rule := getattr(step.when, "rule", "")):
        yield rule
    if isinstance(step, Do):
        yield from (source.rule for source in step.arguments.values() if isinstance(source, By))


def _resolved(letter: str, steps: Sequence[Step]) -> Procedure:
    places: dict[str, int] = {}
    kept: list[Step] = []
    for step in steps:
        if isinstance(step, str):
            places[step] = len(kept)
        else:
            kept.append(step)
    return Procedure(letter, tuple(kept), places)
