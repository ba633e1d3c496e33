"""The drills: each asks for what its prompt says, and answers it rightly."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

from worlds.clerk import mark, up_to
from worlds.drills import drills, edited_drills
from worlds.english import English


@pytest.fixture(scope="module")
def drilled():
    by_kind: dict[str, list[tuple[str, str, str]]] = {}
    for drill in drills(5, 120, english=English(("One two three.", "Four five."), ("seven", "eight"))):
        if drill.kind != "calls":
            system, asked, answer = (message.content for message in drill.messages)
            by_kind.setdefault(drill.kind, []).append((system, asked, answer))
    assert set(by_kind) == {"decide", "route", "steps", "rules", "compare", "repeat", "results"}
    return by_kind


def test_notes_become_the_calls_that_they_name():
    drilled = [drill for drill in drills(5, 120) if drill.kind == "calls"]
    assert len(drilled) > 3
    for drill in drilled:
        _, asked, *turns = drill.messages
        tools = {tool["function"]["name"]: tool["function"]["parameters"] for tool in json.loads(drill.tools)}
        lines = asked.content.splitlines()[1:]
        made = [turn for turn in turns if turn.tool_calls]
        assert len(made) == len(lines) >= 1
        for line, turn in zip(lines, made, strict=True):
            call, given = turn.tool_calls[0], json.loads(turn.tool_calls[0].arguments)
            assert line.startswith(f"{turn.reasoning} [") and call.name in line
            assert list(given) == tools[call.name]["required"]
            assert all(f"{value}" in line for value in given.values())


def test_steps_are_those_of_the_manual(drilled):
    for system, asked, answer in drilled["steps"]:
        lines = answer.splitlines()
        assert [line.split()[0] for line in lines] == asked.removeprefix("Steps: ").split(", ")
        assert set(lines) <= set(system.splitlines())


def test_items_are_routed_by_words_that_they_share_with_the_index_and_said_again(drilled):
    for system, asked, answer in drilled["route"]:
        index = [line.removeprefix("- ") for line in system.splitlines() if line.startswith("- ")]
        items = [line for line in asked.splitlines() if line.startswith("(")]
        first, *lines = answer.splitlines()
        assert first == "Plan:" and len(lines) == 2 * len(items) >= 12
        titles = set()
        for item, line in zip(items, lines[: len(items)], strict=True):
            cited, route = line.rsplit(": ", 1)
            title, about = route.rsplit(" ", 1)
            (gloss,) = [head.rsplit(": ", 1)[0] for head in index if head.endswith(f": {title}")]
            tails = [" ".join(gloss.split()[at:]) for at in range(len(gloss.split()))]
            cue = next(tail for tail in tails if cited.endswith(f" {tail}"))
            assert item.startswith(cited.removesuffix(cue)) and about in asked
            assert cue.split()[0].strip(",").lower() in item.lower()
            titles.add(f"{item.split()[0]} now: {route}")
        assert set(lines[len(items) :]) == titles


def test_results_are_put_together_in_the_order_of_their_items(drilled):
    for _, asked, answer in drilled["results"]:
        noted = [line for line in asked.splitlines() if re.match(r"\([a-z]+\)\. ", line)]
        lines = answer.splitlines()
        assert sorted(noted) == sorted(lines) and len(lines) >= 6
        assert [line.split(".")[0] for line in lines] == [mark(place) for place in range(len(lines))]
        assert noted != lines


def test_an_edited_decision_asks_the_same_of_other_rules():
    for before, after in edited_drills(3, 12, decisions=1.0):
        said, edited = ([message.content for message in one.messages] for one in (before, after))
        assert before.kind == "decide" and said[1] == edited[1] and said[2] != edited[2]
        rules, others = (set(one[0].splitlines()) for one in (said, edited))
        assert len(rules - others) == len(others - rules) == 1
        assert [line.split(":")[0] for line in said[2].splitlines()] == [
            line.split(":")[0] for line in edited[2].splitlines()
        ]


def test_decisions_quote_the_manual_and_the_records(drilled):
    for system, asked, answer in drilled["decide"]:
        decided = [line for line in answer.splitlines() if not line.startswith("(")]
        order = next(line for line in asked.splitlines() if line.startswith("Decide: "))
        assert len(decided) == order.count("(")
        for line in decided:
            step = next(step for step in system.splitlines() if line.startswith(f"{step}: "))
            why = line.removeprefix(step)
            ended = re.search(r"(?:, ((?:un)?met))?; (stop|go on|go to [A-Z]\d+|go to the end)$", line)
            assert ended or re.search(r" (with|by|from) ", step)
            if ended:
                assert bool(ended[1]) == (" unless " in step)
                assert ended[1] is None or (ended[1] == "met") == (ended[2] == "go on")
            for name, value in re.findall(r'(?<!for )("\w+"): ("[^"]*"|\d+)', why):
                # a value that is no record's comes from a field, a rule or the request
                argument = not ended and f"{name}: {value}" not in asked
                said = (f": {value}" in asked, value in system, value.strip('"') in why.partition(" = ")[0])
                assert any(said) if argument else f"{name}: {value}" in asked
            for field in re.findall(r' from ("\w+")', step):
                assert re.search(f'{field}: ("[^"]*"|\\d+)', why)  # where it was read, before what it is passed as
            if " as asked" in step:
                quote, _, values = why[why.index("(") :].partition(" = ")
                assert any(line.startswith(quote) for line in asked.splitlines())
                assert any(quote.endswith(" " + value.strip('"')) for value in re.findall(r': ("[^"]*"|\d+)', values))


@pytest.mark.parametrize(
    ("said", "value", "quote"),
    [
        ("(a) move M14 to friday, please", "friday", "(a) move M14 to friday"),
        ("(b) book 4 seats in M4 for noon today", 4, "(b) book 4"),
        ("(c) a fine at once, not fines", "fine", "(c) a fine"),
        ("(d) not fines but a fine", "fine", "(d) not fines but a fine"),
    ],
)
def test_a_request_is_quoted_up_to_the_value_that_it_asks_for(said, value, quote):
    assert up_to(said, value) == quote


def test_rules_are_those_of_the_profile(drilled):
    for system, asked, answer in drilled["rules"]:
        first, *given = asked.splitlines()
        names = [name.split(" ", 1) for name in first.removeprefix("Rules: ").split("; ")]
        records = {place: json.loads(record) for place, record in (line.split(" ", 1) for line in given)}
        lines = answer.splitlines()
        assert [line for line in lines if line in records] == list(records)
        for (place, name), line in zip(names, [line for line in lines if line not in records], strict=True):
            assert name.split(" for its ")[0] in line
            value = line.split(", ")[-1].split(": ")[-1]
            assert value == '"none"' or value in system
            for field, word in re.findall(r'(?<!for )"(\w+)": "([^"]*)"', line):
                assert records[place][field] == word


def test_comparisons_are_right(drilled):
    for _, _, answer in drilled["compare"]:
        words = re.findall(r'"(\w+)", "(\w+)", (same|other)', answer)
        assert all((first == second) == (word == "same") for first, second, word in words)
        pairs = re.findall(r"([\d-]+), ([\d-]+): [^,]+, (within|over)", answer)
        assert pairs and len(pairs) + len(words) == answer.count(";") + 1
        for limit, value, word in pairs:
            limit, value = (int(text.replace("-", "")) for text in (limit, value))
            assert (value <= limit) == (word == "within")


def test_texts_are_repeated(drilled):
    for _, asked, answer in drilled["repeat"]:
        words = answer.split()
        assert asked == f"Repeat: {answer}" and {"three.", "five."} & {*words} and {"seven", "eight"} & {*words}
        codes_and_made_up = {*words} - {"One", "two", "three.", "Four", "five.", "seven", "eight"}
        assert len(codes_and_made_up) > 15


def test_one_kind_can_be_asked_for():
    assert {drill.kind for drill in drills(5, 20, only="route")} == {"route"}


def test_the_seed_decides():
    first, again, other = (list(drills(seed, 12)) for seed in (1, 1, 2))
    assert first == again and [d.messages for d in first] != [d.messages for d in other]
