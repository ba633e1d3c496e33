"""Tenants and tasks of a world: seeded and without end.

Records are drawn so that each condition of a procedure goes either way, and numbers lie near the limit that they are
held against.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from engrain.errors import ToolFailure
from engrain.fault import FAILURES, disturbed, refused
from engrain.task import Fault, Task
from engrain.tool import Observation, failed
from engrain.trajectory import Message, ToolCall
from worlds.clerk import ATTEMPTS, last, mark
from worlds.language import date_of, day_of, vary
from worlds.spec import Choice, Condition, Counts, Is, Jump, Limit, Number, Over, Ref, Rule, Says, Stop, Word
from worlds.store import Store
from worlds.world import World

Rules = Mapping[str, Any]
"""What a tenant's rules say, by key: a number or word, or several by a word (`else` for all others)."""

STREETS = ("Oak Street", "Mill Lane", "Park Road", "High Street", "River Way", "Station Road", "Church Lane")
OPENINGS = (
    "Hello, I am {id}",
    "Hi, {id} here",
    "{id} here",
    "Good morning, my id is {id}",
    "Dear team, this is {id}",
)
LISTS = ("I need a few things:", "Please do the following:", "Several matters:", "Please look at these:")
CLOSINGS = ("", "", "Thank you.", "Thanks.", "Please be quick.")
NUMBER_WORDINGS = (
    "The {name} is {value}.",
    "With us the {name} is {value}.",
    "Keep to this {name}: {value}.",
    "Our {name} is {value}.",
)
WORD_WORDINGS = (
    'The {name} is "{value}".',
    'With us the {name} is "{value}".',
    'As {name} take "{value}".',
    'Our {name} is "{value}".',
)
NUMBER_PARAPHRASES = (
    "As for the {name}, it has been set to {value}.",
    "Whatever you do, remember that {value} is our {name}.",
    "{value} counts as the {name} here.",
)
WORD_PARAPHRASES = (
    'As for the {name}, it has been set to "{value}".',
    'Whatever you do, remember that "{value}" is our {name}.',
    '"{value}" counts as the {name} here.',
)
"""For measurements: nothing is trained on these."""


def draw_rules(world: World, rng: random.Random) -> dict[str, Any]:
    """A random tenant: a value for each rule that the world asks for."""
    return {name: _drawn(world, name, world.rules[name], rng) for name in world.used_rules}


def _drawn(world: World, name: str, rule: Rule, rng: random.Random) -> Any:
    def one() -> Any:
        if isinstance(rule, Limit):
            number = rng.randrange(rule.low, rule.high + 1, rule.step)
            return date_of(number) if rule.day else number
        if rule.fields:
            return rng.choice(rule.fields)
        return rng.choice(world.words[name] if rule.options else world.options(rule.of))

    if rule.by:
        missing = rule.missing if isinstance(rule, Choice) else 0.0
        return {word: one() for word in world.options(rule.by) if rng.random() >= missing}
    if isinstance(rule, Limit) and rule.rare:
        return {"else": one(), rng.choice(world.options(rule.rare)): one()}
    return one()


def redrawn(world: World, rules: Rules, name: str, rng: random.Random) -> dict[str, Any]:
    """The rules with one drawn again, which may leave it as it was; of several values that it has, one is drawn."""
    said, drawn = rules[name], _drawn(world, name, world.rules[name], rng)
    if isinstance(said, Mapping):
        shared = [word for word in said if word in drawn]
        word = rng.choice(shared) if shared else ""
        drawn = {**said, word: drawn[word]} if shared else said
    return {**rules, name: drawn}


def write_rules(world: World, rules: Rules, rng: random.Random, paraphrased: bool = False) -> list[str]:
    """The bullets of a profile, in random order and wording."""
    number_wordings = NUMBER_PARAPHRASES if paraphrased else NUMBER_WORDINGS
    word_wordings = WORD_PARAPHRASES if paraphrased else WORD_WORDINGS
    bullets: list[str] = []
    for name, said in rules.items():
        rule, title = world.rules[name], world.shown[name]
        wordings = number_wordings if isinstance(rule, Limit) else word_wordings
        if rule.by:
            names = {word: f'{title} for "{word}"' for word in said}
            bullets += [rng.choice(wordings).format(name=names[word], value=said[word]) for word in said]
        elif isinstance(said, Mapping):
            special = next(word for word in said if word != "else")
            bullets.append(
                rng.choice(wordings).format(name=title, value=f'{said["else"]}, for "{special}" {said[special]}')
            )
        else:
            value = world.shown[said] if isinstance(rule, Choice) and rule.fields else said
            bullets.append(rng.choice(wordings).format(name=title, value=value))
    rng.shuffle(bullets)
    return bullets


class _Rows:
    """The records that a task starts from."""

    def __init__(self, world: World, rules: Rules, rng: random.Random) -> None:
        self.world, self.rules, self.rng = world, rules, rng
        self.rows: dict[str, dict[str, dict[str, Any]]] = {}
        self.given: dict[str, str] = {}
        self.requester = self.record(world.family.requester)

    def code(self, record: str, digits: int = 4) -> str:
        while True:
            code = self.world.letters[record] + "".join(self.rng.choice("0123456789") for _ in range(digits))
            if code not in self.rows.setdefault(record, {}):
                return code

    def record(self, record: str) -> str:
        name = self.code(record)
        row: dict[str, Any] = {}
        self.rows[record][name] = row
        for at, values in self.world.records[record].fields.items():
            row[at] = self.any(values)
        return name

    def any(self, values: Any) -> Any:
        match values:
            case Number(low, high, day):
                number = self.rng.randint(low, high)
                return date_of(number) if day else number
            case Word(options):
                return self.rng.choice(options.split("|"))
            case Ref(record):
                return self.requester if record == self.world.family.requester else self.record(record)

    def item(self, kind: str) -> str:
        """A record for a request of this kind, with all that it refers to, and what actions on it will give back."""
        world, spec = self.world, self.world.kinds[kind]
        about = self.requester if spec.about == world.family.requester else self.record(spec.about)
        names = {spec.about: about, world.family.requester: self.requester}
        for at, values in world.records[spec.about].fields.items():
            if isinstance(values, Ref):
                names[values.record] = self.rows[spec.about][about][at]
        conditions = [step.when for step in spec.steps if isinstance(step, (Stop, Jump))]
        for action, acted in world.actions.items():
            for at, values in acted.gives.items():
                if acted.on in names:
                    self.given[f"{action}.{at} {names[acted.on]}"] = self.any(values)
        for when in conditions:
            self.bend(when, names)
        return about

    def bend(self, when: Condition, names: Mapping[str, str]) -> None:
        """Make a condition hold as often as it is likely to."""
        if isinstance(when, Says):
            return
        holds = self.rng.random() < when.likely
        if isinstance(when, Over):
            row, at = self.at(when.path, names)
            said = self.limit(when.rule, names)
            limit = day_of(said) if isinstance(said, str) else said
            spread = max(3, limit // 4) if self.rng.random() < 0.6 else max(3, limit)
            value = limit + self.rng.randint(1, spread) if holds else max(0, limit - self.rng.randint(0, spread))
            if row is not None and at not in self.shared(when.path):
                row[at] = date_of(value) if isinstance(said, str) else value
            return
        path = self.rules[when.rule] if isinstance(when, Counts) else when.path
        wanted = when.word or self.word(when, names)
        if path.partition(".")[0] in self.world.actions:
            self.answer(path, wanted, holds, names)
            return
        row, at = self.at(path, names)
        others = [word for word in self.world.options(path) if word != wanted]
        if row is not None and at not in self.shared(path) and (others or holds):
            row[at] = wanted if holds and wanted != "none" else self.rng.choice(others)

    def shared(self, path: str) -> Sequence[str]:
        """What belongs to the requester is the same for every item, so no item may bend it."""
        owner, _, at = path.partition(".")
        return (at,) if owner == self.world.family.requester else ()

    def at(self, path: str, names: Mapping[str, str]) -> tuple[dict[str, Any] | None, str]:
        owner, _, at = path.partition(".")
        return self.rows[owner][names[owner]] if owner in names else None, at

    def answer(self, path: str, wanted: str, holds: bool, names: Mapping[str, str]) -> None:
        action, _, _ = path.partition(".")
        others = [word for word in self.world.options(path) if word != wanted]
        self.given[f"{path} {names[self.world.actions[action].on]}"] = wanted if holds else self.rng.choice(others)

    def limit(self, name: str, names: Mapping[str, str]) -> int | str:
        rule, said = self.world.rules[name], self.rules[name]
        by = rule.by or (rule.rare if isinstance(rule, Limit) else "")
        if not by:
            return said
        row, at = self.at(by, names)
        word = row[at] if row is not None else ""
        return said.get(word, said.get("else", 10))

    def word(self, when: Is | Counts, names: Mapping[str, str]) -> str:
        rule, said = self.world.rules[when.rule], self.rules[when.rule]
        if not rule.by:
            return said
        row, at = self.at(rule.by, names)
        return said.get(row[at], "none") if row is not None else "none"


def make_task(
    world: World,
    tenant: str,
    rules: Rules,
    rng: random.Random,
    count: int,
    *,
    name: str,
    split: str = "train",
    seed: int = 0,
    faults: int = 0,
) -> Task:
    """A task of `count` items for one tenant."""
    rows = _Rows(world, rules, rng)
    for when in (step.when for step in world.family.opening if isinstance(step, (Stop, Jump))):
        if not isinstance(when, (Says, Counts)) and when.path.startswith(f"{world.family.requester}."):
            row, at = rows.at(when.path, {world.family.requester: rows.requester})
            if row is not None and isinstance(when, Is) and when.word:
                others = [word for word in world.options(when.path) if word != when.word]
                row[at] = when.word if rng.random() < when.likely else rng.choice(others)
    items: list[dict[str, Any]] = []
    for kind in rng.choices(list(world.kinds), k=count):
        spec, about = world.kinds[kind], rows.item(kind)
        asked = {slot: _asked(values, rng) for slot, values in spec.slots.items()}
        said = vary(rng.choice(spec.phrases), rng).format(id=about, **asked)
        items.append({"kind": kind, "about": about, "asked": asked, "said": said})
    if count == 1:
        body = f": {items[0]['said']}. "
    else:
        body = f". {rng.choice(LISTS)}\n" + "".join(f"{mark(at)} {item['said']}\n" for at, item in enumerate(items))
    task = Task(
        id=name,
        request=f"{rng.choice(OPENINGS).format(id=rows.requester)}{body}{rng.choice(CLOSINGS)}".strip(),
        tenant=tenant,
        kind=items[0]["kind"] if count == 1 else "several",
        split=split,
        seed=seed,
        goal={"requester": rows.requester, "items": items, "rules": dict(rules)},
        start={"rows": rows.rows, "given": rows.given},
    )
    return add_faults(world, task, faults, rng) if faults else task


def long_task(
    world: World,
    tenant: str,
    rules: Rules,
    rng: random.Random,
    calls: int,
    *,
    name: str,
    split: str = "train",
    seed: int = 0,
    faults: int = 0,
) -> Task:
    """A task for which the teacher makes at least `calls` calls."""
    count = calls // 2
    while count <= 2 * calls:
        task = make_task(world, tenant, rules, rng, count, name=name, split=split, seed=seed)
        missing = calls - sum(len(turn.tool_calls) for turn in walk(world, task))
        if missing <= 0:
            return add_faults(world, task, faults, rng) if faults else task
        count += max(1, missing // 3)
    raise ValueError(f"{world.family.name} {world.seed}: no task of {calls} calls in {2 * calls} items")


def _asked(values: Any, rng: random.Random) -> Any:
    match values:
        case Number(low, high):
            return rng.randint(low, high)
        case Word("address"):
            return f"{rng.randint(1, 99)} {rng.choice(STREETS)}"
        case Word(options):
            return rng.choice(options.split("|"))
    raise TypeError(values)


def walk(world: World, task: Task) -> list[Message]:
    """The teacher's messages and the tools', with the task's faults, as a rollout would record them."""
    store, counts, messages = Store(world, task), Counter[str](), list[Message]()

    def make(turn: Message) -> Message:
        (call,) = turn.tool_calls
        counts[call.name] += 1
        seen = _observe(world, store, task, call, counts[call.name])
        made = Message(role="tool", content=seen.content, tool_call_id=call.id, name=call.name, error=seen.error)
        messages.extend((turn, made))
        return made

    messages.append(last(world, task, [], make))
    return messages


def _observe(world: World, store: Store, task: Task, call: ToolCall, nth: int) -> Observation:
    hits = (fault for fault in task.faults if fault.tool == call.name and fault.nth <= nth < fault.nth + fault.times)
    fault = next(hits, None)
    key, tool = next((key, tool) for key, tool in world.tools.items() if tool.name == call.name)
    if fault is not None and fault.kind in FAILURES:
        return refused(tool, fault.kind)
    try:
        content = json.dumps(store.do(key, json.loads(call.arguments)), ensure_ascii=False)
    except ToolFailure as failure:
        return failed(str(failure.code), str(failure))
    return disturbed(Observation(content), fault)


def add_faults(world: World, task: Task, count: int, rng: random.Random) -> Task:
    """Put up to `count` faults on different tools; at most one of them, the last, is fatal."""
    keys = {tool.name: key for key, tool in world.tools.items()}
    calls = [turn.tool_calls[0].name for turn in walk(world, task) if turn.tool_calls]
    faults: list[Fault] = []
    for place in sorted(rng.sample(range(len(calls)), min(count, len(calls)))):
        tool = calls[place]
        if tool in {fault.tool for fault in faults} or keys[tool] == "hand_over":
            continue
        checks = bool(place) and keys[calls[place - 1]] in world.actions and keys[tool] in world.records
        faults.append(_fault(world, keys[tool], tool, calls[:place].count(tool) + 1, checks, rng))
        if faults[-1].recovery == "fatal":
            break
    return task.model_copy(update={"faults": tuple(faults)})


def _fault(world: World, key: str, tool: str, nth: int, checks: bool, rng: random.Random) -> Fault:
    dice, outage = rng.random(), rng.choice(("timeout", "http_429", "http_500"))
    if checks or dice < 0.5:
        return Fault(tool=tool, kind=outage, nth=nth, times=rng.choice((1, 1, 2)))
    if key in world.records and dice < 0.8:
        at = rng.choice(list(world.records[key].fields))
        shown = world.shown[f"{key}.{at}"]
        kind = "renamed_field" if dice < 0.7 else "partial_result"
        recovery = "ignorable" if kind == "renamed_field" else "normal"
        return Fault(tool=tool, kind=kind, nth=nth, field=shown, renamed=f"{shown}_v2", recovery=recovery)
    if key in world.records and dice < 0.9:
        return Fault(tool=tool, kind="missing_record", nth=nth, recovery="fatal")
    return Fault(tool=tool, kind=outage, nth=nth, times=ATTEMPTS, recovery="fatal")
