"""Importing: what others wrote keeps its meaning and its bytes, and what is bad is named by file, line and field."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engrain.dataset import (
    content_digest,
    context_key,
    deduplicate,
    export_file,
    import_file,
    split_by_context,
    train_on_calls,
    until_last_call,
)
from engrain.errors import DataError
from engrain.formats.node import Node, raw_fields, raw_items
from engrain.formats.openai import from_openai, to_openai
from engrain.formats.sharegpt import from_sharegpt, to_sharegpt
from engrain.trajectory import Message, Outcome, ToolCall, Trajectory, write_trajectories

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
ODD_ARGUMENTS = '{"city":  "Z\\u00fcrich",\n "days": 1.0, "days": 2}'
"""JSON that parsing and writing again would change: spaces, an escape, a float, a repeated key."""


def save(path: Path, *records: Any) -> Path:
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in records))
    return path


def load(path: Path, *records: Any, **options: Any) -> list[Trajectory]:
    return list(import_file(save(path / "log.jsonl", *records), **options))


def openai_record(**changes: Any) -> dict[str, Any]:
    call = {"id": "c9", "type": "function", "function": {"name": "weather", "arguments": ODD_ARGUMENTS}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Rain in "}, {"type": "text", "text": "Zürich?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "look it up"},
        {"role": "tool", "tool_call_id": "c9", "content": "yes"},
        {"role": "assistant", "content": "Yes.", "weight": 0},
    ]
    return json.loads(json.dumps({"messages": messages, "tools": [WEATHER], **changes}))


# OpenAI


def test_openai_chat_keeps_arguments_byte_for_byte(tmp_path: Path):
    (trajectory,) = load(tmp_path, openai_record())
    system, user, call, result, answer = trajectory.messages
    assert (system.content, user.content) == ("Be brief.", "Rain in Zürich?")
    assert call.tool_calls == [ToolCall(id="c9", name="weather", arguments=ODD_ARGUMENTS)]
    assert (call.content, call.reasoning, call.trained) == ("", "look it up", True)
    assert (result.tool_call_id, result.name, result.content) == ("c9", "weather", "yes")
    assert (answer.content, answer.trained) == ("Yes.", False)
    assert trajectory.tool_schemas() == [WEATHER] and trajectory.id == "log:1"


def test_openai_legacy_functions(tmp_path: Path):
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": ODD_ARGUMENTS}},
        {"role": "function", "name": "weather", "content": "dry"},
        {"role": "assistant", "content": "Dry.", "function_call": None},
    ]
    (trajectory,) = load(tmp_path, {"messages": messages, "functions": [WEATHER["function"]]})
    call, result = trajectory.messages[1:3]
    assert call.tool_calls[0].arguments == ODD_ARGUMENTS
    assert (result.role, result.name, result.tool_call_id) == ("tool", "weather", call.tool_calls[0].id)
    assert trajectory.tool_schemas() == [WEATHER]


def test_openai_parallel_calls_may_be_answered_in_any_order(tmp_path: Path):
    calls = [{"id": id, "function": {"name": id.upper(), "arguments": ""}} for id in "ab"]
    messages = [
        {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "b", "content": "2"},
        {"role": "tool", "tool_call_id": "a", "content": "1"},
    ]
    (trajectory,) = load(tmp_path, {"messages": messages})
    assert [message.name for message in trajectory.messages[1:]] == ["B", "A"]
    assert trajectory.messages[0].tool_calls[0].arguments == "{}"


def spoilt(*path: Any, value: Any) -> dict[str, Any]:
    """A good OpenAI record with one value replaced."""
    record: Any = openai_record()
    place = record
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return record


FUNCTION = ("messages", 2, "tool_calls", 0, "function")
BAD_OPENAI = [
    (spoilt("messages", value="hello"), "messages", 'expected a list, got "hello"'),
    (spoilt("messages", value=[]), "messages", "at least one assistant turn"),
    (spoilt("messages", 1, value="hi"), "messages.1", "expected an object"),
    (spoilt("messages", 0, "role", value="boss"), "messages.0.role", "expected system, developer"),
    (spoilt("messages", 0, "content", value=7), "messages.0.content", "expected text, got 7"),
    (spoilt("messages", 1, "content", 0, "type", value="image_url"), "messages.1.content.0.type", "text part"),
    (spoilt(*FUNCTION, "arguments", value="{no}"), "messages.2.tool_calls.0.function.arguments", "not JSON"),
    (spoilt(*FUNCTION, "arguments", value="[1]"), "messages.2.tool_calls.0.function.arguments", "of an object"),
    (spoilt(*FUNCTION, "name", value=None), "messages.2.tool_calls.0.function.name", "expected text, got nothing"),
    (spoilt("messages", 3, "tool_call_id", value="c7"), "messages.3.tool_call_id", "answers call 'c7'"),
    (spoilt("messages", 2, "tool_calls", value=None), "messages.3.tool_call_id", "no earlier assistant turn"),
    (spoilt("tools", 0, "function", value={}), "tools.0.function.name", "expected text"),
    (spoilt("tools", value="weather"), "tools", "not JSON"),
]


@pytest.mark.parametrize(("record", "field", "problem"), BAD_OPENAI, ids=[field for _, field, _ in BAD_OPENAI])
def test_a_bad_record_is_named_by_file_line_and_field(tmp_path: Path, record: Any, field: str, problem: str):
    with pytest.raises(DataError) as caught:
        load(tmp_path, openai_record(), "", record)
    error = caught.value
    assert (Path(error.file).name, error.line, error.field) == ("log.jsonl", 3, field)
    assert problem in str(error) and str(error).startswith(f"{error.file}:3: field '{field}': ")


# ShareGPT


def test_sharegpt_calls_and_observations(tmp_path: Path):
    turns = [
        {"from": "human", "value": "Rain?"},
        {"from": "gpt", "value": "<think>\nlook\n</think>\n\nOne moment."},
        {"from": "function_call", "value": f'{{"name": "weather", "arguments": {ODD_ARGUMENTS}}}'},
        {"from": "observation", "value": "yes"},
        {"from": "gpt", "value": "Yes."},
    ]
    (trajectory,) = load(tmp_path, {"conversations": turns, "system": "Hi.", "tools": json.dumps([WEATHER])})
    system, user, call, result, answer = trajectory.messages
    assert [system.content, user.content, answer.content] == ["Hi.", "Rain?", "Yes."]
    assert (call.content, call.reasoning, call.tool_calls[0].arguments) == ("One moment.", "look", ODD_ARGUMENTS)
    assert (result.name, result.tool_call_id, result.content) == ("weather", call.tool_calls[0].id, "yes")
    assert trajectory.tools == json.dumps([WEATHER])


def test_sharegpt_hermes_marks_and_several_calls(tmp_path: Path):
    one, two = '{"name": "a", "arguments": {"x":1}}', '{"arguments": {"y": [ ]}, "name": "b"}'
    marked = [
        {"from": "gpt", "value": f"Both.\n<tool_call>\n{one}\n</tool_call>\n<tool_call>\n{two}\n</tool_call>"},
        {"from": "tool", "value": "<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>"},
    ]
    listed = [
        {"from": "gpt", "value": "Both."},
        {"from": "function_call", "value": f"[{one}, {two}]"},
        {"from": "observation", "value": "1"},
        {"from": "observation", "value": "2"},
    ]
    first, second = load(tmp_path, {"conversations": marked}, {"conversations": listed})
    assert first.messages == second.messages
    calls = [(call.name, call.arguments) for call in first.messages[0].tool_calls]
    assert calls == [("a", '{"x":1}'), ("b", '{"y": [ ]}')]
    assert [(message.name, message.content) for message in first.messages[1:]] == [("a", "1"), ("b", "2")]


@pytest.mark.parametrize(
    ("turns", "field"),
    [
        ([{"from": "gtp", "value": "x"}], "conversations.0.from"),
        ([{"from": "gpt", "value": None}], "conversations.0.value"),
        ([{"from": "gpt", "value": "x"}, {"from": "observation", "value": "y"}], "conversations.1"),
        ([{"from": "function_call", "value": '{"arguments": {}}'}], "conversations.0.value.name"),
        ([{"from": "function_call", "value": "weather()"}], "conversations.0.value"),
        ([{"from": "human", "value": "x"}], "conversations"),
    ],
)
def test_bad_sharegpt_turns_are_named(tmp_path: Path, turns: list[Any], field: str):
    with pytest.raises(DataError) as caught:
        load(tmp_path, {"conversations": turns})
    assert caught.value.field == field


# SGD


SCHEMA = [
    {
        "service_name": "Cafes_1",
        "description": "Cafes",
        "slots": [
            {"name": "town", "description": "Where", "is_categorical": False, "possible_values": []},
            {"name": "kind", "description": "What kind", "is_categorical": True, "possible_values": ["tea", "coffee"]},
            {"name": "seats", "description": "How many", "is_categorical": True, "possible_values": ["1", "2"]},
        ],
        "intents": [
            {
                "name": "Find",
                "description": "Find a cafe",
                "is_transactional": False,
                "required_slots": ["town"],
                "optional_slots": {"kind": "dontcare"},
                "result_slots": ["town"],
            },
            {
                "name": "Book",
                "description": "Book a table",
                "is_transactional": True,
                "required_slots": ["town"],
                "optional_slots": {"seats": "2"},
                "result_slots": ["town"],
            },
        ],
    },
    {
        "service_name": "Trams_1",
        "description": "Trams",
        "slots": [
            {"name": "stop", "description": "Stop", "is_categorical": False, "possible_values": []},
            {"name": "kind", "description": "Kind", "is_categorical": True, "possible_values": ["fast"]},
        ],
        "intents": [
            {
                "name": "Find",
                "description": "Find a tram",
                "is_transactional": False,
                "required_slots": ["stop"],
                "optional_slots": {"kind": "dontcare"},
                "result_slots": [],
            }
        ],
    },
]


def frame(service: str = "Cafes_1", *acts: str, **more: Any) -> dict[str, Any]:
    return {"service": service, "actions": [{"act": act, "slot": "", "values": []} for act in acts], **more}


def turn(speaker: str, utterance: str, *frames: dict[str, Any]) -> dict[str, Any]:
    return {"speaker": speaker, "utterance": utterance, "frames": list(frames) or [frame()]}


def dialogue(**changes: Any) -> dict[str, Any]:
    found = frame(
        service_call={"method": "Find", "parameters": {"kind": "tea", "town": "Bern"}},
        service_results=[{"town": "Bern", "name": f"Café {k}"} for k in range(5)],
    )
    booked = frame(
        "Cafes_1", "NOTIFY_SUCCESS", service_call={"method": "Book", "parameters": {"town": "Bern"}}, service_results=[]
    )
    turns = [
        turn("USER", "Tea in Bern?"),
        turn("SYSTEM", "Café 0 is one.", found),
        turn("USER", "A table there."),
        turn("SYSTEM", "Is that right?", frame("Cafes_1", "CONFIRM")),
        turn("USER", "Yes."),
        turn("SYSTEM", "Done.", booked),
    ]
    return {"dialogue_id": "7_00001", "services": ["Cafes_1"], "turns": turns, **changes}


@pytest.fixture
def sgd(tmp_path: Path) -> Path:
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "schema.json").write_text(json.dumps(SCHEMA))
    return tmp_path


def test_sgd_dialogue_becomes_the_log_of_an_agent(sgd: Path):
    (trajectory,) = load(sgd, dialogue())
    roles = [(message.role[0], message.phase) for message in trajectory.messages]
    assert roles == [
        ("s", ""),
        ("u", ""),
        ("a", "plan"),
        ("t", ""),
        ("a", "plan"),
        ("u", ""),
        ("a", "validate"),
        ("u", ""),
        ("a", "execute"),
        ("t", ""),
        ("a", "execute"),
    ]
    assert trajectory.messages[0].content == "Services: Cafes_1. Today is 2019-03-01."
    call, result, said = trajectory.messages[2:5]
    assert call.tool_calls == [ToolCall(id="call_1", name="Find", arguments='{"town": "Bern", "kind": "tea"}')]
    assert (result.tool_call_id, result.name) == ("call_1", "Find")
    assert json.loads(result.content) == [{"town": "Bern", "name": f"Café {k}"} for k in range(3)]
    assert "é" in result.content and said.content == "Café 0 is one." and not said.tool_calls
    assert trajectory.messages[9].content == "[]" and trajectory.messages[8].tool_calls[0].id == "call_2"
    assert (trajectory.id, trajectory.kind, trajectory.split) == ("7_00001", "Cafes_1", "log")


def test_sgd_tools_are_the_intents_with_enums_defaults_and_required(sgd: Path):
    (trajectory,) = load(sgd, dialogue())
    find, book = [tool["function"] for tool in trajectory.tool_schemas()]
    assert (find["name"], find["description"]) == ("Find", "Cafes_1: Find a cafe")
    assert find["parameters"]["required"] == ["town"] and find["parameters"]["additionalProperties"] is False
    assert find["parameters"]["properties"]["kind"] == {
        "type": "string",
        "description": "What kind",
        "enum": ["tea", "coffee"],
    }
    assert book["parameters"]["properties"]["seats"]["default"] == "2"


def test_an_intent_that_two_services_share_is_one_tool_that_accepts_both(sgd: Path):
    (trajectory,) = load(sgd, dialogue(services=["Cafes_1", "Trams_1"]))
    names = [tool["function"]["name"] for tool in trajectory.tool_schemas()]
    assert names == ["Find", "Book"]
    parameters = trajectory.tool_schemas()[0]["function"]["parameters"]
    assert list(parameters["properties"]) == ["town", "kind", "stop"] and parameters["required"] == []
    assert parameters["properties"]["kind"]["enum"] == ["tea", "coffee", "fast"]


@pytest.mark.parametrize("rows", [0, 1, 9])
def test_sgd_rows_of_a_result_can_be_limited(sgd: Path, rows: int):
    (trajectory,) = load(sgd, dialogue(), results=rows)
    assert len(json.loads(trajectory.messages[3].content)) == min(rows, 5)


CALL = frame(service_call={"method": "Find", "parameters": {"town": "Bern", "size": "big"}})
BAD_SGD = [
    (dialogue(services=["Bars_1"]), "services.0", "service 'Bars_1' is not in the schema"),
    (dialogue(turns=[turn("SYSTEM", "x", CALL)]), "turns.0.frames.0.service_call.parameters.size", "got 'size'"),
    (dialogue(turns=[turn("BOT", "x")]), "turns.0.speaker", 'expected "USER" or "SYSTEM", got "BOT"'),
    (dialogue(turns=[turn("USER", "x")]), "turns", "at least one SYSTEM turn"),
    (
        dialogue(turns=[turn("SYSTEM", "x", frame(service_call={"method": "Sing", "parameters": {}}))]),
        "turns.0.frames.0.service_call.method",
        "got 'Sing'",
    ),
]


@pytest.mark.parametrize(("record", "field", "problem"), BAD_SGD, ids=[field for _, field, _ in BAD_SGD])
def test_bad_dialogues_are_named(sgd: Path, record: Any, field: str, problem: str):
    with pytest.raises(DataError) as caught:
        load(sgd, dialogue(), record)
    assert (caught.value.line, caught.value.field) == (2, field) and problem in str(caught.value)


def test_sgd_schema_is_looked_for_and_asked_for(tmp_path: Path):
    with pytest.raises(DataError, match=r"need their schema; expected .*log/schema\.json or .*schema\.json"):
        load(tmp_path, dialogue())
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    assert load(tmp_path, dialogue()) == load(tmp_path, dialogue(), schemas=tmp_path)
    (tmp_path / "schema.json").write_text("[{}]")
    with pytest.raises(DataError, match="expected a list of SGD services"):
        load(tmp_path, dialogue())


# Our own format, files, skipping

texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
names = st.text("abc_", min_size=1, max_size=6)
objects = st.dictionaries(names, st.one_of(texts, st.integers(), st.floats(allow_nan=False), st.booleans()), max_size=3)


@st.composite
def conversations(draw: st.DrawFn) -> Trajectory:
    """What every chat format can hold: assistant turns do not follow each other, and every call is answered."""
    messages = [Message(role="system", content=draw(texts))] if draw(st.booleans()) else []
    count = 0
    for _ in range(draw(st.integers(1, 4))):
        messages.append(Message(role="user", content=draw(texts)))
        calls = []
        for indent in range(draw(st.integers(0, 3))):
            count += 1
            arguments = json.dumps(draw(objects), indent=indent or None)
            calls.append(ToolCall(id=f"call_{count}", name=draw(names), arguments=arguments))
        content = draw(texts.filter(lambda text: "<" not in text))
        messages.append(Message(role="assistant", content=content, tool_calls=calls, trained=draw(st.booleans())))
        messages += [Message(role="tool", content=draw(texts), tool_call_id=call.id, name=call.name) for call in calls]
    return Trajectory(id=draw(names), messages=messages, tools=draw(st.sampled_from(["[]", json.dumps([WEATHER])])))


@given(conversations())
def test_openai_and_sharegpt_round_trips_are_the_identity(trajectory: Trajectory):
    for to, back in ((to_openai, from_openai), (to_sharegpt, from_sharegpt)):
        record = json.loads(json.dumps(to(trajectory)))
        assert back(Node(record)) == trajectory


@given(objects, st.sampled_from([None, 1, 7]), st.lists(objects, max_size=3))
def test_raw_text_is_found_wherever_it_stands(value: dict[str, Any], indent: int | None, items: list[Any]):
    inner = json.dumps(value, indent=indent)
    fields = raw_fields(f'\n{{ "first" : {inner} ,"b":[1,{{}}], "last":{inner}}}')
    assert fields == {"first": inner, "b": "[1,{}]", "last": inner}
    written = [json.dumps(item, indent=indent) for item in items]
    assert raw_items(f"[ {' , '.join(written)} ]") == written


def test_our_own_format_is_lossless(tmp_path: Path):
    message = Message(
        role="assistant",
        content="ü\u2028",
        reasoning="r",
        trained=False,
        phase="plan",
        seconds=0.1,
        prompt_tokens=3,
        tool_calls=[ToolCall(id="x", name="f", arguments="{not json")],
        token_ids=[1, 2],
        logprobs=[-0.1, -1e-9],
    )
    rich = Trajectory(
        id="t",
        messages=[Message(role="user", content="?"), message],
        tools="[ ]",
        workflow="w",
        tenant="n",
        task="k",
        kind="i",
        split="s",
        seed=3,
        teacher="me",
        outcome=Outcome(success=False, checks={"a": True}, reason="no"),
        meta={"x": "y"},
    )
    write_trajectories(tmp_path / "a.jsonl", [rich, Trajectory(id="u", messages=[])])
    read = list(import_file(tmp_path / "a.jsonl"))
    assert read[0] == rich and export_file(tmp_path / "b.jsonl", read) == 2
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_a_file_may_be_gzipped_a_list_or_begin_with_a_mark(tmp_path: Path):
    (plain,) = load(tmp_path, openai_record(id="a"))
    text = json.dumps(openai_record(id="a"))
    (tmp_path / "a.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "b.json").write_text(f"\n[\n{text},\n\n{text}\n]\n")
    (tmp_path / "c.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert list(import_file(tmp_path / "a.gz")) == [plain]
    assert list(import_file(tmp_path / "b.json")) == [plain, plain]
    assert list(import_file(tmp_path / "c.jsonl")) == [plain]
    (tmp_path / "b.json").write_text(f'[\n{text},\n{{"messages": 3}}]')
    with pytest.raises(DataError) as caught:
        list(import_file(tmp_path / "b.json"))
    assert (caught.value.line, caught.value.field) == (3, "messages")


def test_bad_records_can_be_counted_and_left_out(tmp_path: Path):
    bad: list[DataError] = []
    path = tmp_path / "log.jsonl"
    good = json.dumps(openai_record()).encode()
    half = json.dumps(openai_record(id="\ud83d")).encode()
    deep = b'{"messages": ' + b"[" * 100_000
    lines = [b"{torn", good, b'"\xff"', deep, half, b"[1]", good, b'{"messages": 1' + b"0" * 5000 + b"}"]
    path.write_bytes(b"\n".join(lines))
    assert [one.id for one in import_file(path, on_bad=bad.append)] == ["log:2", "log:7"]
    assert [error.line for error in bad] == [1, 3, 4, 5, 6, 8]
    assert all(error.file == str(path) for error in bad)


def test_files_that_cannot_be_read_at_all(tmp_path: Path):
    skipped: list[DataError] = []
    whole = gzip.compress(json.dumps(openai_record()).encode() * 50)
    for name, content, problem in [
        ("empty.jsonl", b"\n \n", "no records in it"),
        ("torn.gz", whole[: len(whole) // 2], "damaged gzip file"),
        ("list.json", b"[{}, ", "not a JSON list"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=problem):
            list(import_file(tmp_path / name, on_bad=skipped.append))
    with pytest.raises(DataError, match="No such file"):
        list(import_file(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match="unknown format 'csv'; choose one of engrain, openai, sharegpt, sgd"):
        load(tmp_path, openai_record(), format="csv")
    with pytest.raises(DataError, match="cannot tell the format"):
        load(tmp_path, {"text": "hello"})


# Deduplicate, split, choose


def talk(id: str, tenant: str = "", said: str = "hello", **more: Any) -> Trajectory:
    messages = [Message(role="user", content="hi"), Message(role="assistant", content=said, **more)]
    return Trajectory(id=id, tenant=tenant, workflow="w", messages=messages)


def test_duplicates_are_those_that_train_the_same():
    same = [talk("a"), talk("b", seconds=1.0), talk("c", token_ids=[1])]
    other = [talk("d", said="bye"), talk("e", tenant="t"), talk("f", trained=False)]
    assert [one.id for one in deduplicate([*same, *other])] == ["a", "d", "e", "f"]
    assert len({content_digest(one) for one in [*same, *other]}) == 4


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.floats(0.01, 0.99), st.integers(0, 3))
def test_no_context_is_on_both_sides_of_a_split(tenants: list[int], held_out: float, seed: int):
    rows = [talk(str(k), tenant=str(tenant)) for k, tenant in enumerate(tenants)]
    if len(set(tenants)) < 2:
        with pytest.raises(DataError, match="of 1 contexts"):
            split_by_context(rows, held_out, seed)
        return
    train, test = split_by_context(rows, held_out, seed)
    assert train and test and sorted([*train, *test], key=lambda one: int(one.id)) == rows
    assert not {context_key(one) for one in train} & {context_key(one) for one in test}
    assert split_by_context(list(reversed(rows)), held_out, seed)[1] == list(reversed(test))


def test_loss_on_calls_only_and_nothing_after_the_last(sgd: Path):
    (trajectory,) = load(sgd, dialogue())
    trained = [message.trained for message in train_on_calls(trajectory).messages if message.role == "assistant"]
    assert trained == [True, False, False, True, False]
    short = until_last_call(trajectory)
    assert short.messages == trajectory.messages[:9] and len(trajectory.messages) == 11
    assert until_last_call(talk("a")) == talk("a")
