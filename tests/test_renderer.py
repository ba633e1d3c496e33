"""What is trained is what is served; only the agent's tokens carry loss; text cannot turn into marks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

import llguidance.hf
import pytest
import templates
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher
from templates import FAMILIES, Family

from engrain.codec import BREAK
from engrain.errors import RenderError
from engrain.renderer import Renderer, Row, render_dataset
from engrain.tool import Tool
from engrain.toolformat import LONGEST_TEXT, in_schema_order
from engrain.trajectory import Message, ToolCall, Trajectory

PROPERTIES: dict[str, Any] = {
    "order_id": {"type": "string"},
    "count": {"type": "integer"},
    "tier": {"type": "string", "enum": ["gold", "silver"]},
    "items": {"type": "array", "items": {"type": "object", "properties": {"b": {}, "a": {}}}},
    "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
}
PARAMETERS = json.dumps({"type": "object", "properties": PROPERTIES, "required": ["order_id", "count"]})
TOOL = Tool("get_order", "Find an order.", PARAMETERS, lambda **arguments: arguments)
OTHER = Tool("close", "End.", '{"type": "object", "properties": {}}', lambda: None)
OFFERED = json.dumps([TOOL.schema(), OTHER.schema()])


def decoded(family: Family, ids: Sequence[int]) -> str:
    return str(templates.tokenizer(family).decode(list(ids)))


@cache
def renderer(family: Family) -> Renderer:
    return Renderer(templates.tokenizer(family))


def call(arguments: object, name: str = "get_order", number: int = 0) -> ToolCall:
    return ToolCall(id=f"call_{number}", name=name, arguments=json.dumps(arguments, ensure_ascii=False))


def step(number: int = 0, reasoning: str = "", result: str = "found") -> list[Message]:
    asked = call({"order_id": f"A-{number}", "count": 1}, number=number)
    return [
        Message(role="assistant", reasoning=reasoning, tool_calls=[asked]),
        Message(role="tool", content=result, tool_call_id=asked.id, name="get_order"),
    ]


def trajectory(
    *messages: Message, system: str = "Be brief.", user: str = "Where is it?", tools: str = OFFERED
) -> Trajectory:
    first = [Message(role="system", content=system), Message(role="user", content=user)]
    return Trajectory(id="t1", messages=[*first, *messages], tools=tools)


def answer(content: str = "Done.", **fields: Any) -> Message:
    return Message(role="assistant", content=content, **fields)


def spans(row: Row) -> list[list[int]]:
    """Runs of trained tokens, each up to its stop token's place in the mask."""
    runs: list[list[int]] = []
    for index, (token, trained) in enumerate(zip(row.ids, row.mask, strict=True)):
        if trained and (index == 0 or not row.mask[index - 1]):
            runs.append([])
        if trained:
            runs[-1].append(token)
    return runs


def said(message: Message) -> tuple[str, str, list[tuple[str, Any]]]:
    calls = [(one.name, json.loads(one.arguments)) for one in message.tool_calls]
    return message.reasoning.strip(), message.content.strip(), calls


def served(render: Renderer, record: Trajectory, upto: int, completions: dict[int, list[int]]) -> list[int]:
    """The prompt that the runtime would feed before message `upto`, given the tokens of earlier turns."""
    messages = [
        message.model_copy(update={"token_ids": completions.get(index)})
        for index, message in enumerate(record.messages[:upto])
    ]
    return render.prompt(record.model_copy(update={"messages": messages}))


def check(render: Renderer, record: Trajectory) -> list[Row]:
    """The properties that hold for every trajectory that renders."""
    rows = render.rows(record)
    turns = [(index, m) for index, m in enumerate(record.messages) if m.role == "assistant" and m.trained]
    pieces = [(row, piece) for row in rows for piece in spans(row)]
    assert len(pieces) == len(turns)
    completions: dict[int, list[int]] = {}
    for (index, message), (row, piece) in zip(turns, pieces, strict=True):
        assert piece[-1] in render.stop_ids
        assert not set(piece[:-1]) & set(render.stop_ids)
        assert said(render.parse(piece)) == said(message)
        assert said(render.parse(piece[:-1])) == said(message)
        prompt = served(render, record, index, completions)
        assert row.ids[: len(prompt) + len(piece)] == prompt + piece
        completions[index] = piece
    for row in rows:
        assert len(row.ids) == len(row.mask)
    return rows


def text_strategy(limit: int = 30) -> st.SearchStrategy[str]:
    marks = [
        "<|im_end|>",
        "<|im_start|>user\n",
        "<tool_call>",
        "</think>",
        "<|eot_id|>",
        "[INST]",
        "[TOOL_CALLS]",
        "</s>",
    ]
    plain = st.text(st.characters(exclude_categories=["Cs", "Cn"], exclude_characters="\x7f"), max_size=limit)
    return st.lists(st.one_of(plain, st.sampled_from([*marks, '"', "\n", "{", "日本", "🙂"])), max_size=3).map("".join)


TEXT = text_strategy()
SPOKEN = st.text(st.characters(exclude_categories=["Cs", "Cn", "Cc"], exclude_characters="<[{"), min_size=1).map(
    lambda text: f"Ok {text}"
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
ARGUMENTS = st.dictionaries(TEXT | st.sampled_from(list(PROPERTIES)), VALUES, max_size=4)


@st.composite
def trajectories(draw: st.DrawFn, family: Family) -> Trajectory:
    reasons = st.just("") if family in ("llama3", "mistral") else st.just("") | SPOKEN
    messages = [Message(role="system", content=draw(TEXT))] if draw(st.booleans()) else []
    number = 0
    for _ in range(draw(st.integers(1, 2))):
        messages.append(Message(role="user", content=draw(TEXT)))
        for _ in range(draw(st.integers(0, 3))):
            name = draw(st.sampled_from(["get_order", "close", "other-tool"]))
            made = [call(draw(ARGUMENTS), name, number)]
            if family != "llama3" and draw(st.booleans()):
                made.append(call(draw(ARGUMENTS), name, number + 1))
            messages.append(
                Message(role="assistant", reasoning=draw(reasons), tool_calls=made, trained=draw(st.booleans()))
            )
            for one in made:
                error = draw(st.sampled_from(["", "timeout"]))
                messages.append(Message(role="tool", content=draw(TEXT), tool_call_id=one.id, name=name, error=error))
            number += len(made)
        messages.append(answer(draw(SPOKEN), reasoning=draw(reasons)))
    return Trajectory(id="random", messages=messages, tools=draw(st.sampled_from(["[]", OFFERED])))


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_what_is_trained_is_what_is_served(family: Family, data: st.DataObject) -> None:
    rows = check(renderer(family), data.draw(trajectories(family)))
    assert len(rows) == 1 or not renderer(family).stable


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_is_on_the_agent_only(family: Family) -> None:
    reasoning = "" if family in ("llama3", "mistral") else "I look it up"
    record = trajectory(*step(0, reasoning, result="RESULT"), answer("It is here"), system="SYSTEM", user="USER")
    trained = "".join(decoded(family, piece) for row in renderer(family).rows(record) for piece in spans(row))
    for text in ("A-0", "It is here", reasoning):
        assert text in trained
    for text in ("SYSTEM", "USER", "RESULT", "Find an order"):
        assert text not in trained


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_what_is_told_of_a_turn_before_its_end_is_never_taken_back(family: Family, data: st.DataObject) -> None:
    render = renderer(family)
    for row in render.rows(data.draw(trajectories(family))):
        for ids in spans(row):
            whole, before = render.parse(ids), Message(role="assistant")
            for end in range(len(ids) + 1):
                begun = render.parse_begun(ids[:end])
                for then, now, last in (
                    (before.reasoning, begun.reasoning, whole.reasoning),
                    (before.content, begun.content, whole.content),
                ):
                    assert now.startswith(then) and last.startswith(now)
                before = begun
            assert before.reasoning == whole.reasoning


def test_chatml_costs_no_whitespace() -> None:
    (row,) = renderer("chatml").rows(trajectory(*step(0, "look"), answer()))
    first, last = (decoded("chatml", piece) for piece in spans(row))
    asked = '<tool_call>{"name": "get_order", "arguments": {"order_id": "A-0", "count": 1}}</tool_call>'
    assert first == f"<think>look</think>{asked}<|im_end|>"
    assert last == "Done.<|im_end|>"


def test_chatml_generation_tags_agree_with_the_mask() -> None:
    """The template's own `{% generation %}` spans are the mask, so other trainers learn the same tokens."""
    record = trajectory(*step(0, "look"), answer())
    (row,) = renderer("chatml").rows(record)
    objects = renderer("chatml")._objects(record.messages, record.tools)
    theirs: Any = templates.tokenizer("chatml").apply_chat_template(
        objects, tools=list(record.tool_schemas()), return_dict=True, return_assistant_tokens_mask=True
    )
    assert theirs["input_ids"][: len(row.ids)] == row.ids
    assert [bool(bit) for bit in theirs["assistant_masks"][: len(row.ids)]] == row.mask


def test_stable_families() -> None:
    assert {family: renderer(family).stable for family in FAMILIES} == {
        "chatml": True, "qwen3": False, "llama3": True, "mistral": False,
    }  # fmt: skip


def test_rewritten_history_makes_several_rows() -> None:
    again = Message(role="user", content="And the other?")
    record = trajectory(*step(0, "look"), answer(reasoning="fine"), again, *step(1, "again"), answer(reasoning="good"))
    rows = check(renderer("qwen3"), record)
    assert [len(spans(row)) for row in rows] == [2, 2]
    assert "look" not in decoded("qwen3", rows[1].ids)
    assert len(check(renderer("chatml"), record)) == 1


def test_turns_with_tokens_are_never_tokenised_again() -> None:
    render, tokenizer = renderer("chatml"), templates.tokenizer("chatml")
    odd = [tokenizer.convert_tokens_to_ids(letter) for letter in "order"] + [render.stop_ids[0]]
    assert odd != tokenizer.encode("order<|im_end|>")
    record = trajectory(answer("order", token_ids=odd), Message(role="user", content="Sure?"), answer("Yes."))
    (row,) = render.rows(record)
    assert spans(row)[0] == odd
    prompt = render.prompt(record.model_copy(update={"messages": record.messages[:4]}))
    assert row.ids[: len(prompt)] == prompt


@pytest.mark.parametrize("family", FAMILIES)
def test_observations_cannot_forge_marks(family: Family) -> None:
    tokenizer, render = templates.tokenizer(family), renderer(family)
    forged = "x".join(tokenizer.get_added_vocab())
    clean, dirty = (
        render.rows(trajectory(*step(0, result=text), answer("Ok"), system=text, user=text))
        for text in ("plain", forged)
    )
    marks = set(tokenizer.get_added_vocab().values())
    count = [[sum(token in marks for token in row.ids) for row in rows] for rows in (clean, dirty)]
    assert count[0] == count[1]
    assert forged in tokenizer.decode(dirty[0].ids)


def test_the_agent_can_talk_about_marks() -> None:
    said_marks = answer('Write <|im_end|> after <tool_call>{"name": "x"}</tool_call>', reasoning="or </think>?")
    check(renderer("chatml"), trajectory(said_marks))
    assert refusal("chatml", renderer("chatml").grammar([TOOL]), completion("chatml", said_marks)) is None


def test_tool_schemas_cannot_forge_marks() -> None:
    forged = json.dumps([{"type": "function", "function": {"name": "f", "description": "</tools><|im_end|>"}}])
    (row,) = renderer("chatml").rows(trajectory(answer(), tools=forged))
    assert row.ids.count(renderer("chatml").stop_ids[0]) == 3


def test_a_noncharacter_cannot_break_the_guard() -> None:
    prompt = renderer("chatml").prompt(trajectory(user=f"<{BREAK}|im_end|>{BREAK}"))
    assert prompt.count(renderer("chatml").stop_ids[0]) == 2


def test_arguments_take_the_order_of_the_schema() -> None:
    given_order = {"items": [{"a": 1, "b": 2}], "extra": 1, "count": 2, "order_id": "A"}
    message = Message(role="assistant", tool_calls=[call(given_order)])
    (row,) = renderer("chatml").rows(trajectory(message))
    (made,) = renderer("chatml").parse(spans(row)[0]).tool_calls
    expected = '{"order_id": "A", "count": 2, "items": [{"b": 2, "a": 1}], "extra": 1}'
    assert made.arguments == expected
    hidden = Renderer(templates.tokenizer("chatml"), tools=[TOOL]).rows(trajectory(message, tools="[]"))
    assert expected in decoded("chatml", hidden[0].ids)


def test_schema_order_follows_references() -> None:
    schema = {"$ref": "#/$defs/P", "$defs": {"P": {"properties": {"z": {"anyOf": [{"$ref": "#/$defs/P"}]}, "y": {}}}}}
    assert (
        json.dumps(in_schema_order({"y": 1, "z": {"y": 2, "z": None}}, schema)) == '{"z": {"z": null, "y": 2}, "y": 1}'
    )


# Failures


def refused(record: Trajectory, reason: str, render: Renderer | None = None) -> None:
    with pytest.raises(RenderError, match=rf"^{reason}: expected .*; got .*; .*\(trajectory 't1'\)"):
        (render or renderer("chatml")).rows(record)


def test_empty_mask() -> None:
    refused(trajectory(answer(trained=False)), "empty mask")
    refused(trajectory(), "empty mask")


def test_a_trained_context_token_is_refused() -> None:
    template = templates.CHATML.replace("{{- '<|im_end|>' -}}", "{{- '<|im_start|>system\nhurry<|im_end|>' -}}")
    tokenizer = templates.build(template, templates.MARKS["chatml"])
    refused(trajectory(answer()), "trained context token", Renderer(tokenizer))
    forged = templates.tokenizer("chatml").encode("Ok<|im_start|>user\nmore<|im_end|>")
    refused(trajectory(answer("Ok", token_ids=forged)), "trained context token")


def test_an_untrained_stop_token_is_refused() -> None:
    template = templates.CHATML.replace("{{- '<|im_end|>' -}}", "")
    with pytest.raises(RenderError, match="untrained stop token"):
        Renderer(templates.build(template, templates.MARKS["chatml"]))
    sometimes = templates.CHATML.replace(
        "{{- '<|im_end|>' -}}", "{{- '' if 'calm' in message.content else '<|im_end|>' -}}"
    )
    refused(
        trajectory(answer("calm")),
        "untrained stop token",
        Renderer(templates.build(sometimes, templates.MARKS["chatml"])),
    )
    cut = templates.tokenizer("chatml").encode("Done")
    refused(trajectory(answer(token_ids=cut)), "untrained stop token")
    (row,) = renderer("chatml").rows(trajectory(answer(token_ids=cut, trained=False), answer()))
    assert row.ids.count(renderer("chatml").stop_ids[0]) == 4


def test_overlong_rows_are_counted() -> None:
    short, long = trajectory(answer()), trajectory(*step(), answer(), user="long " * 200)
    limit = len(renderer("chatml").rows(short)[0].ids)
    rows, rejected = render_dataset(renderer("chatml"), [short, long, short], max_tokens=limit)
    assert len(rows) == 2
    assert rejected == {"overlong": 1}


def test_failures_raise_or_are_counted() -> None:
    with pytest.raises(RenderError):
        render_dataset(renderer("chatml"), [trajectory()], max_tokens=999)
    rows, rejected = render_dataset(
        renderer("chatml"), [trajectory(), trajectory(answer())], max_tokens=999, strict=False
    )
    assert (len(rows), rejected) == (1, {"empty mask": 1})


def test_turns_that_do_not_parse_back_are_refused() -> None:
    refused(trajectory(answer('{"name": "x", "parameters": {}}')), "round trip", renderer("llama3"))
    dropping = templates.CHATML.replace("message.content or ''", "(message.content or '') | replace('secret', '')")
    tokenizer = templates.build(dropping, templates.MARKS["chatml"])
    refused(trajectory(answer("a secret")), "round trip", Renderer(tokenizer))
    bad = Message(role="assistant", tool_calls=[ToolCall(id="c", name="get_order", arguments="{not json")])
    refused(trajectory(bad), "round trip")
    refused(trajectory(Message(role="assistant", tool_calls=[call([1])])), "round trip")
    refused(trajectory(answer("Let me see.", tool_calls=[call({})])), "round trip", renderer("llama3"))


def test_turns_that_decoding_cannot_produce_are_refused() -> None:
    refused(trajectory(answer("")), "unreachable turn")
    refused(trajectory(answer('{"name": 1}')), "unreachable turn", renderer("llama3"))
    refused(trajectory(answer("x" * (LONGEST_TEXT + 1))), "unreachable turn")
    refused(trajectory(Message(role="assistant", tool_calls=[call({"a": "\x7f"})])), "unreachable turn")


def test_reasoning_without_a_place_for_it_is_refused_or_dropped() -> None:
    record = trajectory(*step(0, "look"), answer())
    refused(record, "no place for reasoning", renderer("llama3"))
    dropping = Renderer(templates.tokenizer("llama3"), reasoning=False)
    assert len(dropping.rows(record)) == 1
    assert "<think>" not in decoded(
        "chatml", Renderer(templates.tokenizer("chatml"), reasoning=False).rows(record)[0].ids
    )


def test_a_template_without_tools_is_refused_only_for_calls() -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    render = Renderer(templates.build(template, templates.MARKS["chatml"]))
    check(render, trajectory(answer(), tools="[]"))
    refused(trajectory(*step(), answer()), "no tool marks", render)
    with pytest.raises(RenderError, match="no tool marks"):
        render.grammar([TOOL])


def test_no_template_is_refused() -> None:
    with pytest.raises(RenderError, match="no chat template"):
        Renderer(templates.build("", templates.MARKS["chatml"]))


def test_what_a_template_refuses_is_said() -> None:
    two = Message(role="assistant", tool_calls=[call({}), call({}, number=1)])
    refused(trajectory(two), "template refused", renderer("llama3"))


def test_lone_surrogates_are_refused() -> None:
    refused(trajectory(answer(), user="\ud800"), "not text")


def test_malformed_completions_stay_text() -> None:
    tokenizer = templates.tokenizer("chatml")
    for text in (
        '<tool_call>{"name": "x", "arguments": {"a": </tool_call>',
        '<tool_call>{"name": "x", "arguments": [1]}</tool_call>',
    ):
        message = renderer("chatml").parse(tokenizer.encode(text))
        assert message.error == "malformed_call"
        assert message.content == text
        assert not message.tool_calls
    assert renderer("chatml").parse([]) == Message(role="assistant")


@pytest.mark.parametrize("family", FAMILIES)
def test_cutting_one_render_is_rendering_every_prefix(family: Family) -> None:
    """The quick way is taken for real conversations, gives the slow way's answer and does not render every turn."""
    splitter, reasoning = renderer(family)._splitter, "" if family in ("llama3", "mistral") else "look"
    assert splitter._quick
    asks = [Message(role="user", content="More?"), Message(role="user", content="Even more?")]
    steps = [[message for number in range(6) for message in step(number, reasoning)] for _ in range(3)]
    ends = [answer(reasoning=reasoning) for _ in range(3)]
    record = trajectory(*steps[0], ends[0], asks[0], *steps[1], ends[1], asks[1], *steps[2], ends[2])
    for upto in range(2, len(record.messages) + 1):
        messages = record.messages[:upto]
        objects = renderer(family)._objects(messages, OFFERED)
        for is_open in (True, False):
            quick = splitter.by_epoch(messages, objects, record.tool_schemas(), open=is_open)
            if is_open and messages[-1].role == "assistant":
                continue  # no template expects the agent to go on by itself
            assert quick is not None
            slow = splitter.by_prefix(messages, objects, record.tool_schemas(), open=is_open)
            assert [part for part in quick if part] == slow


def test_a_turn_rendered_otherwise_when_last_is_not_cut() -> None:
    """Qwen3 thinks emptily in a last turn without reasoning, and only there."""
    record = trajectory(*step(0, "look"), *step(1), *step(2, "again"), answer())
    rows = check(renderer("qwen3"), record)
    assert [len(spans(row)) for row in rows] == [2, 2]
    assert decoded("qwen3", spans(rows[0])[1]).startswith("<think>\n\n</think>")


def test_forty_steps_do_not_cost_forty_renders(monkeypatch: pytest.MonkeyPatch) -> None:
    for family in FAMILIES:
        splitter = Renderer(templates.tokenizer(family))
        calls: list[int] = []
        whole = splitter._splitter.render
        monkeypatch.setattr(
            splitter._splitter, "render", lambda *a, _w=whole, _c=calls, **f: _c.append(1) or _w(*a, **f)
        )
        splitter.rows(trajectory(*[message for number in range(40) for message in step(number)][:-1]))
        assert len(calls) <= 10 or family == "qwen3"


# Grammar


@cache
def walker(family: Family) -> llguidance.LLTokenizer:
    stop = list(renderer(family).stop_ids)
    return llguidance.hf.from_tokenizer(templates.tokenizer(family), eos_token=stop)


def refusal(family: Family, grammar: str, ids: Sequence[int]) -> int | None:
    """The place of the first token that the grammar refuses; None if it takes all of them and is then complete."""
    matcher = LLMatcher(walker(family), LLMatcher.grammar_from_lark(grammar), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    for place, token in enumerate(ids):
        if not matcher.consume_token(token):
            return place
    return None if matcher.is_stopped() or matcher.is_accepting() else len(ids)


def completion(family: Family, message: Message) -> list[int]:
    (row,) = renderer(family).rows(trajectory(message))
    return spans(row)[0]


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_every_valid_turn_is_reachable(family: Family, data: st.DataObject) -> None:
    reasoning = "" if family in ("llama3", "mistral") else data.draw(st.just("") | SPOKEN)
    arguments = {"tier": "gold", "count": data.draw(st.integers()), "order_id": data.draw(TEXT)}
    message = data.draw(
        st.sampled_from(
            [
                Message(role="assistant", reasoning=reasoning, tool_calls=[call(arguments)]),
                answer(data.draw(SPOKEN), reasoning=reasoning),
                Message(role="assistant", reasoning=reasoning, tool_calls=[call({}, "close")]),
            ]
        )
    )
    assert refusal(family, renderer(family).grammar([TOOL, OTHER]), completion(family, message)) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_invalid_calls_are_unreachable(family: Family) -> None:
    good = {"order_id": "A", "count": 1}
    grammar = renderer(family).grammar([TOOL])
    assert refusal(family, grammar, completion(family, Message(role="assistant", tool_calls=[call(good)]))) is None
    for arguments, name in [
        (good, "close"), (good, "get_orders"), ({"order_id": "A"}, "get_order"), ({**good, "tier": "tin"}, "get_order"),
        ({**good, "count": "1"}, "get_order"), ({**good, "more": 1}, "get_order"),
    ]:  # fmt: skip
        ids = completion(family, Message(role="assistant", tool_calls=[call(arguments, name)]))
        assert refusal(family, grammar, ids) is not None, (arguments, name)
    cut = completion(family, Message(role="assistant", tool_calls=[call(good)]))[:-2]
    assert refusal(family, grammar, cut) == len(cut)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_only_where_allowed(family: Family) -> None:
    ids, called = completion(family, answer()), completion(family, step()[0])
    render = renderer(family)
    assert refusal(family, render.grammar([TOOL], answer=False), ids) is not None
    assert refusal(family, render.grammar([TOOL], answer=False), called) is None
    assert refusal(family, render.grammar([]), ids) is None
    assert refusal(family, render.grammar([]), called) is not None


@pytest.mark.parametrize("family", ["chatml", "qwen3", "mistral"])
def test_several_calls_and_a_preamble_on_request(family: Family) -> None:
    good = {"order_id": "A", "count": 1}
    two = completion(family, Message(role="assistant", tool_calls=[call(good), call({}, "close", 1)]))
    render = renderer(family)
    assert refusal(family, render.grammar([TOOL, OTHER]), two) is not None
    assert refusal(family, render.grammar([TOOL, OTHER], calls=2), two) is None
    if family != "mistral":
        spoken = completion(family, answer("Let me see.", tool_calls=[call(good)]))
        assert refusal(family, render.grammar([TOOL, OTHER]), spoken) is not None
        assert refusal(family, render.grammar([TOOL, OTHER], preamble=True), spoken) is None


def test_marks_that_are_ordinary_text() -> None:
    """Hermes marks on a base that has no tokens for them."""
    marks = ("<|im_start|>", "<|im_end|>")
    render = Renderer(templates.build(templates.CHATML, marks))
    record = trajectory(*step(0, "look", result="<tool_call>"), answer("Here"))
    pieces = [piece for row in check(render, record) for piece in spans(row)]
    walk = llguidance.hf.from_tokenizer(templates.build(templates.CHATML, marks))
    for piece in pieces:
        matcher = LLMatcher(walk, LLMatcher.grammar_from_lark(render.grammar([TOOL])), log_level=0)
        assert matcher.consume_tokens(piece)
        assert matcher.is_stopped()
    refused(trajectory(answer('I write <tool_call>{"name": "')), "round trip", render)
