"""The worlds: every family's teacher reaches its goals, records go either way, and what is held out stays out."""

from __future__ import annotations

import random
import re
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from engrain.budget import Budget
from engrain.policy import Program, ScriptTeacher
from engrain.rollout import rollout
from engrain.trajectory import Message, ToolCall

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "recipes"))

from worlds import catalogue  # noqa: E402
from worlds.clerk import decide, expected  # noqa: E402
from worlds.disguise import KEPT, disguised  # noqa: E402
from worlds.drawing import draw  # noqa: E402
from worlds.language import blended, compared, key  # noqa: E402
from worlds.lookalikes import lookalikes  # noqa: E402
from worlds.openings import opened  # noqa: E402
from worlds.spec import Jump, Stop  # noqa: E402
from worlds.tasks import walk  # noqa: E402
from worlds.trajectories import Depths, trajectories  # noqa: E402
from worlds.workflow import tenants, workflow  # noqa: E402

WORLDS = 3


def made(name: str, seed: int):
    world = draw(catalogue.family(name), seed)
    rules = tenants(world, 0, 3)
    return world, rules, workflow(world, rules)


def test_there_are_sixteen_families_and_four_are_held_out():
    assert len(catalogue.NAMES) >= 16 and len(catalogue.HELD_OUT) == 4
    assert set(catalogue.HELD_OUT) <= set(catalogue.NAMES) and not set(catalogue.HELD_OUT) & set(catalogue.TRAINED)


@pytest.mark.parametrize("name", catalogue.NAMES)
def test_the_teacher_reaches_every_goal(name):
    for seed in range(WORLDS):
        _, _, flow = made(name, seed)
        for split in flow.splits:
            tasks = list(islice(flow.tasks(split, 1), 1 if split == "long40" else 6))
            for run in rollout(flow, tasks, ScriptTeacher(flow), parallel=1, budget=Budget(steps=200)):
                assert run.outcome is not None and run.outcome.success, (run.task, run.outcome, run.meta)


@pytest.mark.parametrize("name", catalogue.NAMES)
def test_the_program_reads_every_request_and_reaches_its_goal(name):
    _, _, flow = made(name, 0)
    assert flow.code is not None
    for split in flow.splits:
        tasks = list(islice(flow.tasks(split, 2), 1 if split == "long40" else 12))
        for run in rollout(flow, tasks, Program(flow.code), parallel=1, budget=Budget(steps=200)):
            assert run.outcome is not None and run.outcome.success, (run.task, run.outcome, run.messages[1].content)


def test_the_program_knows_no_words_but_its_own():
    _, rules, flow = made("clinic", 0)
    assert flow.code is not None
    turn = flow.code(next(iter(rules)), [Message(role="user", content="Hello, I am here: sing me a song.")])
    assert turn.content == "not understood" and not turn.tool_calls


@pytest.mark.parametrize("name", catalogue.NAMES)
def test_each_step_that_decides_goes_either_way(name):
    family = catalogue.family(name)
    procedures = {"": family.opening, **{key(kind): spec.steps for kind, spec in family.kinds.items()}}
    ways: dict[tuple[str, int], set[bool]] = {}
    for kind, steps in procedures.items():
        numbered = enumerate(step for step in steps if not isinstance(step, str))
        ways |= {(kind, place): set() for place, step in numbered if isinstance(step, (Stop, Jump))}
    assert len(family.kinds) >= 7
    for seed in range(60):
        world, _, flow = made(name, seed)
        for task in islice(flow.tasks("train", 2), 30):
            notes = "\n".join(message.reasoning for message in walk(world, task))
            for kind, place in [at for at, seen in ways.items() if len(seen) < 2 and at[0] in world.procedures]:
                procedure = world.procedures[kind]
                said = f"{procedure.mark(place)} {world.text(procedure.steps[place], procedure)}: "
                ends = re.findall(rf"{re.escape(said)}.*; (go on|stop|go to)", notes)
                ways[kind, place].update(end == "go on" for end in ends)
        if all(len(seen) == 2 for seen in ways.values()):
            return
    assert not [at for at, seen in ways.items() if len(seen) < 2]


@pytest.mark.parametrize("name", catalogue.NAMES)
def test_a_phrase_says_which_procedure_it_needs(name):
    family = catalogue.family(name)

    def words(text: str) -> set[str]:
        return set(re.findall(r"[a-z]{4,}", text.lower()))

    for one, kind in family.kinds.items():
        others = [kind for other, kind in family.kinds.items() if other != one]
        foreign = set[str]().union(*(words(f"{k.gloss} {' '.join(k.phrases)}") for k in others))
        for phrase in kind.phrases:
            fixed = words(re.sub(r"\[[^\]]*\]|{\w+}", " ", phrase))
            options = [words(option) for option in re.findall(r"\[([^\]]*)\]", phrase)]
            own = words(kind.gloss) - foreign
            assert own & fixed or any(own & option for option in options), (one, phrase)


@pytest.mark.parametrize("name", catalogue.NAMES)
def test_worlds_of_a_family_differ_and_come_back(name):
    shown = [tuple(sorted(tool.name for tool in made(name, seed)[0].tools.values())) for seed in range(8)]
    assert len(set(shown)) == 8 and all(5 <= len(tools) <= 20 for tools in shown)
    first, again = made(name, 3), made(name, 3)
    assert first[2].system(next(iter(first[1])), "full") == again[2].system(next(iter(again[1])), "full")
    assert next(first[2].tasks("train", 1)) == next(again[2].tasks("train", 1))


@pytest.mark.parametrize("name", catalogue.NAMES)
def test_a_disguised_family_works_the_same_in_other_words(name):
    family = catalogue.family(name)
    other, again = (disguised(family, random.Random(4), ("seven", "eight")) for _ in range(2))
    assert other == again != disguised(family, random.Random(5))

    def words(of) -> set[str]:
        return set(re.findall(r"[a-z]{4,}", " ".join([*of.records, *of.rules, *of.actions, *of.kinds]))) - KEPT

    assert len(words(other)) == len(words(family)) and not words(other) & words(family)
    assert {len(kind.steps) for kind in other.kinds.values()} == {len(kind.steps) for kind in family.kinds.values()}
    world = draw(other, 1)
    flow = workflow(world, tenants(world, 0, 2))
    for run in rollout(flow, list(islice(flow.tasks("train", 1), 3)), ScriptTeacher(flow), parallel=1):
        assert run.outcome is not None and run.outcome.success, (run.task, run.outcome, run.meta)


@pytest.mark.parametrize("name", catalogue.TRAINED)
def test_openings_have_any_number_of_steps_and_the_teacher_reaches_its_goals(name):
    family, rng = catalogue.family(name), random.Random(3)
    drawn = {repr(other.opening): other for other in (opened(family, rng) for _ in range(40))}
    assert {repr(family.opening), repr(family.opening[:1])} <= set(drawn)
    for other in drawn.values():
        flow = workflow(world := draw(other, 1), tenants(world, 0, 2))
        for run in rollout(flow, list(islice(flow.tasks("train", 1), 3)), ScriptTeacher(flow), parallel=1):
            assert run.outcome is not None and run.outcome.success, (run.task, run.outcome, run.meta)


@pytest.mark.parametrize("name", catalogue.TRAINED)
def test_lookalikes_call_arguments_like_fields_and_the_teacher_reaches_its_goals(name):
    family, rng = catalogue.family(name), random.Random(3)
    drawn = [lookalikes(family, rng) for _ in range(20)]
    fields = {field for record in family.records.values() for names in record.fields for field in names.split("|")}
    written = {argument for action in family.actions.values() for argument in action.arguments}
    new = {argument for of in drawn for action in of.actions.values() for argument in action.arguments} - written
    assert new and {argument.partition("_")[2] for argument in new} <= fields
    for other in drawn[:3]:
        flow = workflow(world := draw(other, 1), tenants(world, 0, 2))
        for run in rollout(flow, list(islice(flow.tasks("train", 1), 3)), ScriptTeacher(flow), parallel=1):
            assert run.outcome is not None and run.outcome.success, (run.task, run.outcome, run.meta)


def test_a_walk_is_what_a_rollout_records():
    world, _, flow = made("returns", 1)
    tasks = list(islice(flow.tasks("faults", 1), 8))
    for task, run in zip(tasks, rollout(flow, tasks, ScriptTeacher(flow), parallel=1), strict=True):
        recorded, walked = (
            [(m.role, m.reasoning, m.content, m.error, [call.arguments for call in m.tool_calls]) for m in messages]
            for messages in (run.messages[2:], walk(world, task))
        )
        assert recorded == walked


def test_no_trajectory_is_of_a_held_out_family():
    depths = Depths(per_world=1, disguised=0.5)
    named = {run.workflow.rsplit("_", 1)[0] for run in trajectories(1, 150, depths)}
    assert len(named) > 8 and not named & set(catalogue.HELD_OUT)


def test_an_edited_rule_changes_what_is_right():
    changed = 0
    for seed in range(4):
        world, _, flow = made("returns", seed)
        for task in islice(flow.tasks("train", 5), 30):
            rules = {**task.goal["rules"], "return window": {"else": 0, "food": 0}}
            edited = task.model_copy(update={"goal": {**task.goal, "rules": rules}})
            changed += expected(world, task) != expected(world, edited)
    assert changed > 5


def test_the_teacher_goes_on_from_a_call_that_it_would_not_have_made():
    world, _, flow = made("returns", 0)
    task = next(flow.tasks("train", 1))
    wrong = Message(role="assistant", tool_calls=[ToolCall(id="x", name="nothing", arguments="{}")])
    seen = Message(role="tool", content="no such tool", tool_call_id="x", name="nothing", error="unknown_tool")
    start = Message(role="user", content=task.request)
    first, after = decide(world, task, [start]), decide(world, task, [start, wrong, seen])
    assert [call.name for call in after.tool_calls] == [call.name for call in first.tool_calls]


def test_faults_of_every_recovery_occur():
    seen = Counter[str]()
    for seed in range(4):
        _, _, flow = made("returns", seed)
        for task in islice(flow.tasks("faults", 1), 30):
            seen.update(fault.recovery for fault in task.faults)
    assert set(seen) == {"normal", "ignorable", "fatal"}


@pytest.mark.parametrize(
    ("limit", "value", "seen"),
    [(35, 31, "33= 51>"), (40, 60, "46<"), (7, 12, "shorter"), (120, 99, "longer"), (21, 21, "22= 11=")],
)
def test_numbers_are_compared_digit_by_digit(limit, value, seen):
    assert compared(limit, value) == f"{limit}, {value}: {seen}"


def test_a_blend_has_the_first_half_of_one_word_and_the_second_of_another():
    assert {blended(random.Random(seed), ("temper", "yellow")) for seed in range(20)} == {
        "tempper",
        "templow",
        "yellper",
        "yelllow",
    }


@pytest.mark.parametrize("name", catalogue.NAMES)
def test_a_request_is_cited_up_to_the_first_word_of_its_own_gloss_and_the_gloss_from_there(name):
    world, _, flow = made(name, 0)
    glosses = {kind: set(re.findall("[a-z]{4,}", at.gloss.lower())) for kind, at in world.kinds.items()}
    for item in (item for task in islice(flow.tasks("train", 1), 20) for item in task.goal["items"]):
        kind, said = item["kind"], item["said"]
        own = glosses[kind].difference(*(words for other, words in glosses.items() if other != kind))
        first = next(found for found in re.finditer("[a-z]{4,}", said.lower()) if found[0] in own)
        cited = world.cited(kind, said)
        assert cited[: first.end()].lower() == said[: first.end()].lower()
        assert world.kinds[kind].gloss.endswith(cited[first.start() :])


def test_a_request_may_be_cited_in_words_that_it_lacks():
    assert (
        draw(catalogue.family("returns"), 0, (99, 99)).cited("damage", "A12 came broken")
        == "A12 came damaged or broken"
    )
