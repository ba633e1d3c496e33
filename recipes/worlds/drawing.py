"""A world of a family: a seed decides which kinds of request there are and what everything is called."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

from worlds.language import key, made_up, pick
from worlds.spec import Action, Choice, Family, Jump, Record, Ref, Says, Step, Stop
from worlds.world import World

READ_VERBS = "get|read|fetch|find|show|look_up|load|open"
HAND_OVER = "hand_over|open_ticket|call_colleague|escalate_case"
KINDS = (4, 9)
"""How many kinds of request a world has, at least and at most."""
INVENTED = 0.3
"""Share of worlds whose nouns are made up."""


def draw(family: Family, seed: int, size: tuple[int, int] = KINDS) -> World:
    """The world of a family, a seed and a range for the number of its kinds; always the same."""
    return _Draw(family, seed, size).world()


class _Draw:
    def __init__(self, family: Family, seed: int, size: tuple[int, int]) -> None:
        self.family, self.seed, self.size = family, seed, size
        self.rng = random.Random(f"{family.name}/{seed}")
        self.shown: dict[str, str] = {}
        self.taken: set[str] = set()
        self.invented = self.rng.random() < INVENTED

    def name(self, at: str, alternatives: str, spell: str = "{}") -> None:
        """Call what is at a key by one of its names, no two alike."""
        picks = self.rng.sample(alternatives.split("|"), alternatives.count("|") + 1)
        names = [spell.format(name) for name in picks]
        if self.invented and " " not in names[0]:
            names = [spell.format(made_up(self.rng, self.taken))]
        name = next((name for name in names if name not in self.taken), "")
        while not name or name in self.taken:
            name = spell.format(made_up(self.rng))
        self.taken.add(name)
        self.shown[at] = name

    def world(self) -> World:
        family, rng = self.family, self.rng
        kinds = {key(name): kind for name, kind in family.kinds.items()}
        kept = rng.sample(list(kinds), min(len(kinds), rng.randint(*self.size)))
        records = {key(name): _keyed(record) for name, record in family.records.items()}
        rules = {key(name): rule for name, rule in family.rules.items()}
        for name in family.records:
            self.name(key(name), name)
        for name, kind in family.kinds.items():
            self.shown[key(name)] = pick(name, rng)
            assert kind.about in records, (family.name, name)
        for name in family.rules:
            self.name(key(name), name)
        self.name_fields()
        self.name_tools()
        actions = {
            key(name): Action(action.on, _by_key(action.arguments), action.sets, _by_key(action.gives))
            for name, action in family.actions.items()
        }
        letters = dict(zip(records, rng.sample("ABCDEFGHJKLMNPRSTUVWXYZ", len(records)), strict=True))
        choices = {name: rule for name, rule in rules.items() if isinstance(rule, Choice) and rule.options}
        return World(
            family=family,
            seed=self.seed,
            kinds={name: kinds[name] for name in kept},
            shown=self.shown,
            letters=letters,
            words={name: self.words(name, rule) for name, rule in choices.items()},
            extra=tuple(name for name in actions if rng.random() < 0.3),
            records=records,
            rules=rules,
            actions=actions,
        )

    def words(self, name: str, rule: Choice) -> tuple[str, ...]:
        """Invented ones too, but for the words that a step names."""
        options = rule.options.split("|")
        conditions = [step.when for step in self.steps() if isinstance(step, (Stop, Jump))]
        named = {when.rule for when in conditions if isinstance(when, Says)}
        if self.invented and name not in named:
            return tuple(made_up(self.rng, self.taken) for _ in options)
        return tuple(options)

    def steps(self) -> Iterator[Step]:
        yield from self.family.opening
        for kind in self.family.kinds.values():
            yield from kind.steps

    def name_fields(self) -> None:
        for alternatives, record in self.family.records.items():
            owner = key(alternatives)
            shape = self.rng.choice(("{}_id", "{}_number", "{}_ref", "{}_code"))
            self.name(f"{owner}.id", self.shown[owner].replace(" ", "_"), shape)
            for field_name, values in record.fields.items():
                at = f"{owner}.{key(field_name)}"
                if isinstance(values, Ref):
                    continue
                self.name(at, field_name)
        for alternatives, record in self.family.records.items():
            for field_name, values in record.fields.items():
                if isinstance(values, Ref):  # called as the identifier that it is
                    self.shown[f"{key(alternatives)}.{key(field_name)}"] = self.shown[f"{values.record}.id"]

    def name_tools(self) -> None:
        spell = self.rng.choice((_snake, _camel, _noun_first))
        verb = pick(READ_VERBS, self.rng)
        for alternatives in self.family.records:
            owner = key(alternatives)
            self.shown[f"get {owner}"] = self.unique(spell(verb, self.shown[owner]))
        for alternatives, action in self.family.actions.items():
            name = key(alternatives)
            chosen = made_up(self.rng, self.taken) if self.invented else pick(alternatives, self.rng)
            self.shown[f"do {name}"] = self.unique(spell(chosen, self.shown[action.on]))
            for argument in action.arguments:
                self.shown[f"{name}.{key(argument)}"] = pick(argument, self.rng)
            for given in action.gives:
                self.name(f"{name}.{key(given)}", given)
        self.shown["hand_over"] = self.unique(pick(HAND_OVER, self.rng))

    def unique(self, name: str) -> str:
        while name in self.taken:
            name += "_2"
        self.taken.add(name)
        return name


def _snake(verb: str, noun: str) -> str:
    return f"{verb}_{noun}".replace(" ", "_")


def _camel(verb: str, noun: str) -> str:
    first, *others = _snake(verb, noun).split("_")
    return first + "".join(word.capitalize() for word in others)


def _noun_first(verb: str, noun: str) -> str:
    return f"{noun}_{verb}".replace(" ", "_")


def _by_key(mapping: Mapping[str, Any]) -> dict[str, Any]:
    return {key(name): value for name, value in mapping.items()}


def _keyed(record: Record) -> Record:
    return Record(_by_key(record.fields))
