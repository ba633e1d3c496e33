"""Drills: rows that practise one thing many times over.

A trajectory routes a request once, compares two numbers once or twice and looks up a handful of rules, among hundreds
of tokens that are easy by then. A drill is nothing but that: items routed to their procedures, steps decided, steps and
rules found by their names, numbers and dates compared, or a text repeated, which meets words of the vocabulary that no
workflow uses: an embedding that is never trained is lost to every adapter on top. Results are put together into an
answer. Or notes are followed by their calls.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from engrain.errors import ToolFailure
from engrain.task import Task
from engrain.trajectory import Message, Trajectory
from worlds.catalogue import TRAINED, family
from worlds.clerk import Clerk, expected, mark, plan, request, title
from worlds.disguise import DISGUISED, disguised
from worlds.drawing import KINDS, draw
from worlds.english import NONE, English
from worlds.language import blended, compared, date_of, made_up
from worlds.lookalikes import lookalikes
from worlds.openings import opened
from worlds.spec import Do, Jump, Ref, Stop
from worlds.store import Store
from worlds.tasks import Rules, make_task, redrawn, walk, write_rules
from worlds.workflow import tenants, workflow
from worlds.world import World

COMPARISONS, COMPARED_WORDS = 12, 0.25
"""In a drill in comparing, and the share of words among them."""
WORDS = 60
CALLS = 0.1
"""Share of the drills that call tools."""
ROUTED_IN_OTHER_WORDS = 0.8
"""Share of drills in routing that are in other words; a family's own are learnt by heart in place of looking."""

ROUTED = ((6, 16), (6, 16), (16, 56))
"""Items in a drill in routing, one range or another."""
ANSWERED = ((6, 20), (20, 56))
"""Items in a drill in results, one range or the other."""
MOST_CALLS = 12

Drill = tuple[str, str, str]
"""System prompt, what is asked, the answer."""


@dataclass(frozen=True)
class Desk:
    """A world with one tenant."""

    world: World
    tenant: str
    said: Rules
    rng: random.Random

    def task(self, items: int) -> Task:
        return make_task(self.world, self.tenant, self.said, self.rng, items, name="drill")

    @property
    def profile(self) -> str:
        """Its bullets in any order; a rule is always worded alike."""
        bullets = [
            f"- {bullet}"
            for name in self.said
            for bullet in write_rules(self.world, {name: self.said[name]}, random.Random(f"{self.world.seed}/{name}"))
        ]
        return "\n".join([f"Rules of {self.tenant}:", *self.rng.sample(bullets, len(bullets))])


def drills(
    seed: int,
    count: int,
    english: English = NONE,
    families: Sequence[str] = TRAINED,
    only: str = "",
    ruled: tuple[int, int] = KINDS,
) -> Iterator[Trajectory]:
    """`count` drills, or so many of `only` one kind; the same for the same seed.

    Drills in rules are of worlds with so many kinds of request (from, to), and fewer have fewer rules.
    """
    rng = random.Random(f"drills/{seed}")

    def desk(size: tuple[int, int], share: float = DISGUISED) -> Desk:
        return _desk(rng, english, families, size, share)

    kinds: dict[str, tuple[int, Callable[[], Drill]]] = {
        "decide": (4, lambda: decide(desk((1, 4)))),
        "route": (5, lambda: route(desk(KINDS, ROUTED_IN_OTHER_WORDS))),
        "steps": (2, lambda: steps(desk((2, 6)))),
        "rules": (2, lambda: rules(desk(ruled))),
        "compare": (1, lambda: compare(rng, english)),
        "repeat": (2, lambda: repeat(rng, english)),
        "results": (3, lambda: results(desk((2, 6)))),
    }
    for number in range(count):
        name = f"drill-{seed}-{number}"
        if not only and rng.random() < CALLS:
            yield calls(desk(KINDS), name)
            continue
        kind = only or rng.choices(list(kinds), [weight for weight, _ in kinds.values()])[0]
        system, asked, answer = kinds[kind][1]()
        while not answer:  # nothing in that world is decided
            system, asked, answer = kinds[kind][1]()
        yield _trajectory(name, kind, (system, asked, answer))


def edited_drills(
    seed: int,
    count: int,
    families: Sequence[str] = TRAINED,
    ruled: tuple[int, int] = KINDS,
    share: float = DISGUISED,
    decisions: float = 0.0,
) -> Iterator[tuple[Trajectory, Trajectory]]:
    """Drills in rules, or a share of them in decisions, each beside what it is after an edit of one rule that matters
    to it; a `share` in other words."""
    rng = random.Random(f"edited/{seed}")
    for number in range(count):
        name, kind = f"edited-{seed}-{number}", "decide" if rng.random() < decisions else "rules"
        pair = None
        while pair is None:
            desk = _desk(rng, NONE, families, ruled, share)
            if desk.said:
                pair = edited_decisions(desk) if kind == "decide" else edited_rules(desk)
        before, after = pair
        yield _trajectory(name, kind, before), _trajectory(f"{name}-after", kind, after)


def _desk(rng: random.Random, english: English, families: Sequence[str], size: tuple[int, int], share: float) -> Desk:
    """Of a world with so many kinds of request (from, to); a share of them are in other words than their family's."""
    of = lookalikes(family(rng.choice(families)), rng)
    if rng.random() < share:
        of = disguised(of, rng, english.words)
    world = draw(opened(of, rng), rng.randrange(10**9), size)
    ((tenant, said),) = tenants(world, rng.randrange(10**9), 1).items()
    return Desk(world, tenant, said, rng)


def _trajectory(name: str, kind: str, drill: Drill) -> Trajectory:
    system, asked, answer = drill
    messages = [
        Message(role="system", content=system),
        Message(role="user", content=asked),
        Message(role="assistant", content=answer),
    ]
    return Trajectory(id=name, messages=messages, kind=kind, teacher="drill")


def calls(desk: Desk, name: str) -> Trajectory:
    """The last notes of a task's turns, each with the identifier that it lacks, to be said again and carried out."""
    flow = workflow(desk.world, {desk.tenant: desk.said})
    asked, answers = "Carry out:", list[Message]()
    for turn in walk(desk.world, desk.task(desk.rng.randint(2, 4))):
        if turn.tool_calls and len(answers) < 2 * MOST_CALLS:
            note, call = turn.reasoning.rpartition("\n")[2], turn.tool_calls[0]
            of, about = next(iter(json.loads(call.arguments).items()))
            asked += f"\n{note} [{of} {about}]"
            answers += [
                Message(role="assistant", reasoning=note, tool_calls=[call]),
                Message(role="tool", content='{"ok": true}', tool_call_id=call.id, name=call.name),
            ]
    messages = [
        Message(role="system", content="You practise."),
        Message(role="user", content=asked),
        *answers,
        Message(role="assistant", content="Done."),
    ]
    return Trajectory(id=name, messages=messages, tools=flow.schemas("full"), kind="calls", teacher="drill")


def decide(desk: Desk) -> Drill:
    """Every step that decides or calls with something, for a few items, in any order; their records are given."""
    return _decisions(desk, [desk.task(1) for _ in range(desk.rng.randint(2, 4))], desk.rng.random())


def edited_decisions(desk: Desk) -> tuple[Drill, Drill] | None:
    """A drill in decisions, and the same after one rule was drawn again that changes what is right, if one does."""
    tasks, order = [desk.task(1) for _ in range(desk.rng.randint(2, 4))], desk.rng.random()
    system, asked, answer = _decisions(desk, tasks, order)
    for name in desk.rng.sample(list(desk.said), len(desk.said)):
        said = redrawn(desk.world, desk.said, name, desk.rng)
        other = [task.model_copy(update={"goal": {**task.goal, "rules": said}}) for task in tasks]
        edited = _decisions(replace(desk, said=said), other, order)
        if edited[1] == asked and edited[2] != answer:
            return (system, asked, answer), edited
    return None


def _decisions(desk: Desk, tasks: Sequence[Task], order: float) -> Drill:
    world, lines, asked, requests, records = desk.world, list[str](), list[str](), list[str](), list[str]()
    rng = random.Random(order)
    for place, task in enumerate(tasks):
        goal, name = task.goal["items"][0], mark(place)
        clerk, seen = _informed(world, task)
        clerk.said = request(place, goal)
        decided = list(_decided(world, clerk, goal, rng))
        if decided:
            requests.append(clerk.said)
            asked += [f"{name} {step}" for step, _ in decided]
            records += [f"{name} {record}" for record in seen]
            lines += [title(world, place, goal), *(line for _, line in decided)]
    return (
        f"You practise.\n\n{world.manual}\n\n{desk.profile}",
        "\n".join([*requests, f"Decide: {', '.join(asked)}", *records]),
        "\n".join(lines),
    )


def _decided(world: World, clerk: Clerk, item: Mapping[str, Any], rng: random.Random) -> Iterator[tuple[str, str]]:
    """The mark and the note of each step of an item's procedure that decides something, or what to call with."""
    procedure = world.procedures[item["kind"]]
    for place in rng.sample(range(len(procedure.steps)), len(procedure.steps)):
        step, line = procedure.steps[place], world.lines[item["kind"]][place]
        if not all(path in clerk.known for path in world.needs(step)):
            continue
        if isinstance(step, (Stop, Jump)):
            yield procedure.mark(place), clerk.decided(step, procedure, line)[1]
        if isinstance(step, Do) and step.arguments:
            yield procedure.mark(place), clerk.given(step, item["asked"], line)[1]


def _informed(world: World, task: Task) -> tuple[Clerk, list[str]]:
    """A clerk who has read every record of the only item, and these records."""
    store, seen, known = Store(world, task), list[str](), dict[str, Any]()
    item = task.goal["items"][0]
    requester = world.family.requester
    waiting = [(requester, task.goal["requester"]), (world.kinds[item["kind"]].about, item["about"])]
    read: set[str] = set()
    while waiting:
        record, name = waiting.pop()
        if record in read:
            continue
        read.add(record)
        try:
            result = store.do(record, {world.shown[f"{record}.id"]: name})
        except ToolFailure:
            continue
        seen.append(json.dumps(result, ensure_ascii=False))
        for at, values in world.records[record].fields.items():
            if (said := world.shown[f"{record}.{at}"]) in result:
                known[f"{record}.{at}"] = result[said]
                if isinstance(values, Ref):
                    waiting.append((values.record, result[said]))

    def refuse(*_: object) -> dict[str, Any]:
        raise AssertionError("a drill calls no tool")

    return Clerk(world, task, refuse, known=known), seen


def route(desk: Desk) -> Drill:
    """Many items, each to its procedure: the plan that a request begins with; then the items again, in any order, as
    notes begin with them."""
    task = desk.task(desk.rng.randint(*desk.rng.choice(ROUTED)))
    items = list(enumerate(task.goal["items"]))
    desk.rng.shuffle(items)
    again = [title(desk.world, place, item) for place, item in items]
    return f"You practise.\n\n{desk.world.index}", task.request, "\n".join([*plan(desk.world, task), *again])


def steps(desk: Desk) -> Drill:
    """Steps asked for by their marks."""
    lines = list(chain.from_iterable(desk.world.lines.values()))
    chosen = desk.rng.sample(lines, min(len(lines), 16))
    marks = ", ".join(line.partition(" ")[0] for line in chosen)
    return f"You practise.\n\n{desk.world.manual}", f"Steps: {marks}", "\n".join(chosen)


def rules(desk: Desk) -> Drill:
    """Rules asked for by name, as the notes write them; those that depend on a word, for one record after the other."""
    return _ruled(desk, _asked_rules(desk))


def edited_rules(desk: Desk) -> tuple[Drill, Drill]:
    """A drill in rules, and the same after one rule that it asks for was drawn again."""
    asked = _asked_rules(desk)
    name = desk.rng.choice([name for _, names in asked for name in names])
    after = replace(desk, said=redrawn(desk.world, desk.said, name, desk.rng))
    return _ruled(desk, asked), _ruled(after, asked)


Known = dict[str, Any]
"""The words of a record, by path."""


def _asked_rules(desk: Desk) -> list[tuple[Known, list[str]]]:
    """Records, each with the rules that are asked for it; the first has any rules, the others those that depend."""
    world = desk.world
    depending = {rule: paths for rule in world.used_rules if (paths := list(world.decided_by(rule)))}
    paths = dict.fromkeys(path for of in depending.values() for path in of)
    asked: list[tuple[Known, list[str]]] = []
    for place in range(desk.rng.randint(3, 5) if depending else 1):
        known = {path: desk.rng.choice(world.options(path)) for path in paths}
        names = list(depending) if place else world.used_rules
        asked.append((known, desk.rng.sample(names, min(len(names), 10))))
    return asked


def _ruled(desk: Desk, places: Sequence[tuple[Known, Sequence[str]]]) -> Drill:
    world, asked, records, lines = desk.world, list[str](), list[str](), list[str]()
    task = Task(id="drill", request="", tenant=desk.tenant, goal={"rules": desk.said})
    for place, (known, names) in enumerate(places):
        clerk = Clerk(world, task, lambda *_: {}, known=known)
        asked += [f"{mark(place)} {world.rule_text(name)}" for name in names]
        records.append(f"{mark(place)} {json.dumps({world.shown[path]: word for path, word in known.items()})}")
        lines += [mark(place), *map(clerk.rule, names)]
    return (
        f"You practise.\n\n{desk.profile}",
        "\n".join([f"Rules: {'; '.join(asked)}", *records]),
        "\n".join(lines),
    )


def results(desk: Desk) -> Drill:
    """What came of many items, noted in any order, then their answer: results that begin alike are told apart by
    their items. Nothing if the request ends before its items."""
    task = desk.task(desk.rng.randint(*desk.rng.choice(ANSWERED)))
    _, answer = expected(desk.world, task)
    items, lines = task.goal["items"], answer.split("\n")
    if len(lines) < len(items):
        return "", "", ""
    notes = [f"{title(desk.world, place, items[place])}\n{line}" for place, line in enumerate(lines)]
    return "You practise.", "\n".join(["Results:", *desk.rng.sample(notes, len(notes))]), answer


def compare(rng: random.Random, english: English = NONE) -> Drill:
    """Limits and values, and words, as in the notes; most numbers have as many digits, and often the first ones in
    common."""
    words = [*english.words, *(made_up(rng) for _ in range(4))]
    asked, judged = list[str](), list[str]()
    while len(asked) < COMPARISONS:
        if rng.random() < COMPARED_WORDS:
            first, other = rng.sample(words, 2)
            second = rng.choice((first, other))
            asked.append(f'"{first}", "{second}"')
            judged.append(f"{asked[-1]}, {'same' if second == first else 'other'}")
            continue
        limit = rng.randint(3, rng.choice((12, 70, 450, 3000)))
        near = max(3, limit // 4) if rng.random() < 0.6 else limit
        value = max(0, limit + rng.randint(-near, near))
        pair = (date_of(limit % 400), date_of(value % 400)) if rng.random() < 0.3 else (limit, value)
        asked.append(f"{pair[0]}, {pair[1]}")
        judged.append(f"{compared(*pair)}, {'over' if _number(pair[1]) > _number(pair[0]) else 'within'}")
    return "You practise.", f"Compare: {'; '.join(asked)}", "; ".join(judged)


def _number(said: int | str) -> int:
    return said if isinstance(said, int) else int(said.replace("-", ""))


def repeat(rng: random.Random, english: English) -> Drill:
    """Sentences, words and blends of two, if there are any, made-up words, codes and fields with numbers, to be said
    again. Codes and numbers share digits, so a short match misleads."""
    digits = rng.sample("0123456789", 3)
    words: list[str] = []
    while len(words) < WORDS:
        words += rng.choice(english.texts).split() if english.texts else ()
        if english.words:
            words += [*rng.choices(english.words, k=5), *(blended(rng, english.words) for _ in range(3))]
        words += [made_up(rng) for _ in range(2)]
        words += ["".join((rng.choice("ABCDEFGHJKLMNPRSTUVWXYZ"), *rng.choices(digits, k=4))) for _ in range(3)]
        words += [f'"{made_up(rng)}": {"".join(rng.choices(digits, k=rng.randint(1, 4)))}' for _ in range(3)]
    text = " ".join(words[:WORDS])
    return "You practise.", f"Repeat: {text}", text
