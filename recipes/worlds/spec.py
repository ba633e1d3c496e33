"""What a family of workflows is: kinds of record, rules that differ between tenants, actions, and procedures.

A family is data. Names have alternatives, `"order|purchase"`: the first is the key by which the family itself speaks of
it, and each world picks one to show. A path is a record's key and a field's, `"order.amount"`; what an action gave back
is read in the same way, `"approval.answer"`. Phrases and texts may hold `[a|b]`, of which one is picked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Number:
    """Whole numbers from `low` to `high`; with `day`, the dates that lie as many days after the first of 2026."""

    low: int
    high: int
    day: bool = False


@dataclass(frozen=True)
class Word:
    """One of `"a|b|c"`."""

    options: str


@dataclass(frozen=True)
class Ref:
    """The identifier of a record of another kind, made with this one; of the requester's, if it is that kind."""

    record: str


Values = Number | Word | Ref


@dataclass(frozen=True)
class Record:
    """A kind of record. Every one has an identifier; `fields` are the rest, by name."""

    fields: Mapping[str, Values]


@dataclass(frozen=True)
class Limit:
    """A rule that is a number, or a date with `day`. With `by`, the path of a word, there is one for each of its
    options; with `rare`, the path of a word too, one of its options has a number of its own."""

    low: int
    high: int
    step: int = 1
    by: str = ""
    rare: str = ""
    day: bool = False


@dataclass(frozen=True)
class Choice:
    """A rule that is a word: one of `options`, or of those of the path `of`, or one of the fields at the paths
    `fields`. With `by`, as for `Limit`; then a share of `missing` has none."""

    options: str = ""
    of: str = ""
    fields: Sequence[str] = ()
    by: str = ""
    missing: float = 0.0


Rule = Limit | Choice


@dataclass(frozen=True)
class Over:
    """The number at a path is greater than a rule's; the date is after it."""

    path: str
    rule: str
    likely: float = 0.3


@dataclass(frozen=True)
class Is:
    """The word at a path is `word`, or that of a rule."""

    path: str
    word: str = ""
    rule: str = ""
    likely: float = 0.3


@dataclass(frozen=True)
class Says:
    """A rule says `word`; for `missing` rules, `none`."""

    rule: str
    word: str


@dataclass(frozen=True)
class Counts:
    """The one field that a rule names says `word`."""

    rule: str
    word: str
    likely: float = 0.3


Condition = Over | Is | Says | Counts


@dataclass(frozen=True)
class Of:
    """An argument that is read: the value at a path."""

    path: str


@dataclass(frozen=True)
class By:
    """An argument that a rule says."""

    rule: str


@dataclass(frozen=True)
class Asked:
    """An argument that the request says."""

    slot: str


Source = Of | By | Asked


@dataclass(frozen=True)
class Read:
    """Read a record: the one that the request is about, or the one that the field at a path refers to."""

    record: str
    by: str = ""


@dataclass(frozen=True)
class Check:
    """Read a record again, to see that an action took effect."""

    record: str


@dataclass(frozen=True)
class Do:
    action: str
    arguments: Mapping[str, Source] = field(default_factory=dict)


@dataclass(frozen=True)
class Stop:
    """End with this result if the condition holds (or, with `unless`, does not)."""

    result: str
    when: Condition
    unless: bool = False


@dataclass(frozen=True)
class Jump:
    """Go to the step that follows the label `to` if the condition holds (or, with `unless`, does not)."""

    to: str
    when: Condition
    unless: bool = False


@dataclass(frozen=True)
class End:
    """The result; `shows` is the path of what it tells."""

    result: str
    shows: str = ""


Step = Read | Check | Do | Stop | Jump | End | str
"""A string is a label: the name of the step after it."""


@dataclass(frozen=True)
class Action:
    """A tool that changes something, on which kind of record: its arguments beside that record's identifier, the fields
    that it `sets`, and what it `gives` back, which the task decides."""

    on: str
    arguments: Mapping[str, Values] = field(default_factory=dict)
    sets: Mapping[str, str] = field(default_factory=dict)
    gives: Mapping[str, Word] = field(default_factory=dict)


@dataclass(frozen=True)
class Kind:
    """A kind of request: its name, what it is for, the phrases it comes in, what it is about and what is to be done.

    A phrase holds `{id}`, unless it is about the requester, and each of the `slots`. Every phrase of a kind shares a
    word with its name or gloss that no other kind's name or gloss has.
    """

    gloss: str
    phrases: Sequence[str]
    about: str
    steps: Sequence[Step]
    slots: Mapping[str, Values] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """Everything is keyed by its alternatives. `opening` is done once, about the `requester`, before the items of a
    request."""

    name: str
    places: str
    """Who works there: "a shop|an online store"."""
    requester: str
    records: Mapping[str, Record]
    rules: Mapping[str, Rule]
    actions: Mapping[str, Action]
    kinds: Mapping[str, Kind]
    opening: Sequence[Step] = ()
