"""The committed agent met by the official client's `responses`."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from serving import task_of

from engrain.workflow import Workflow


@pytest.fixture(scope="module")
def client(desk_url: str, desk_keys: dict[str, str]) -> openai.OpenAI:
    return openai.OpenAI(base_url=desk_url, api_key=desk_keys["harbor"], max_retries=0, timeout=60)


def ask(client: openai.OpenAI, input: Any, **more: Any) -> Any:
    return client.responses.create(model="support_desk", input=input, **more)


def calls(response: Any) -> list[tuple[str, str]]:
    return [(item.name, item.arguments) for item in response.output if item.type == "function_call"]


def test_a_conversation_goes_on_by_its_id_as_it_would_by_its_items(desk: Workflow, client: openai.OpenAI) -> None:
    request = task_of(desk, "harbor").request
    first = ask(client, request)
    assert first.status == "completed" and first.usage.total_tokens > 0
    chat = client.chat.completions.create(model="support_desk", messages=[{"role": "user", "content": request}])
    made = chat.choices[0].message.tool_calls or []
    assert calls(first) == [(call.function.name, call.function.arguments) for call in made if call.type == "function"]
    (call,) = (item for item in first.output if item.type == "function_call")
    found = {"type": "function_call_output", "call_id": call.call_id, "output": json.dumps({"error": "not_found"})}
    by_id = ask(client, [found], previous_response_id=first.id)
    items = [item.model_dump(exclude_none=True) for item in first.output]
    by_items = ask(client, [{"role": "user", "content": request}, *items, found], store=False)
    assert by_id.output_text == by_items.output_text and calls(by_id) == calls(by_items)
    assert by_id.usage.input_tokens == by_items.usage.input_tokens > first.usage.input_tokens
    assert client.responses.retrieve(first.id).output == first.output
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(by_items.id)
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        ask(client, [found], previous_response_id=first.id)


def test_a_stream_tells_of_the_same_items_and_is_kept(desk: Workflow, client: openai.OpenAI) -> None:
    request = task_of(desk, "harbor", 1).request
    for more in ({}, {"tool_choice": "none"}):
        whole, texts = ask(client, request, **more), {"response.reasoning_text": "", "response.output_text": ""}
        events = list(ask(client, request, stream=True, **more))
        assert [event.sequence_number for event in events] == list(range(len(events)))
        for event in events:
            kind, _, end = event.type.rpartition(".")
            if kind in texts:
                texts[kind] = texts[kind] + event.delta if end == "delta" else texts[kind]
                assert end == "delta" or event.text == texts[kind]
        assert events[0].type == "response.created" and events[-1].type == "response.completed"
        last = events[-1].response
        assert [item.type for item in last.output] == [item.type for item in whole.output]
        assert last.output_text == whole.output_text == texts["response.output_text"] and calls(last) == calls(whole)
        assert [event.item.id for event in events if event.type == "response.output_item.done"] == [
            item.id for item in last.output
        ]
        assert client.responses.retrieve(last.id).output == last.output
    assert whole.output_text and not calls(whole)


def test_instructions_tools_and_limits_are_the_callers(desk: Workflow, client: openai.OpenAI) -> None:
    request = task_of(desk, "harbor").request
    look = {"type": "function", "name": "look", "parameters": {"type": "object", "properties": {}}}
    for choice in ("required", {"type": "function", "name": "look"}):
        assert calls(ask(client, request, tools=[look], tool_choice=choice)) == [("look", "{}")]
    plain, told = ask(client, request, max_output_tokens=2), ask(client, request, instructions="You are a clerk. " * 9)
    assert plain.status == "incomplete" and plain.incomplete_details.reason == "max_output_tokens"
    assert plain.usage.input_tokens != told.usage.input_tokens and told.instructions.startswith("You are a clerk.")


@pytest.mark.parametrize(
    ("input", "more", "says"),
    [
        ([{"type": "computer_call"}], {}, "input.0.type"),
        ([{"type": "function_call_output", "call_id": "call_9", "output": "x"}], {}, "call_9"),
        ([{"role": "wizard", "content": "x"}], {}, "input.0.role"),
        ("hello", {"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ("hello", {"background": True}, "background"),
        ("hello", {"text": {"format": {"type": "json_object"}}}, "text.format"),
    ],
)
def test_what_is_not_taken_is_refused(client: openai.OpenAI, input: Any, more: dict[str, Any], says: str) -> None:
    with pytest.raises(openai.BadRequestError, match=says):
        ask(client, input, **more)


def test_a_response_is_its_tenants_only(
    desk: Workflow, client: openai.OpenAI, desk_url: str, desk_keys: dict[str, str]
) -> None:
    made = ask(client, task_of(desk, "harbor").request)
    other = openai.OpenAI(base_url=desk_url, api_key=desk_keys["kestrel"], max_retries=0)
    for reach in (lambda: other.responses.retrieve(made.id), lambda: other.responses.delete(made.id),
                  lambda: ask(other, "and now?", previous_response_id=made.id)):  # fmt: skip
        with pytest.raises(openai.NotFoundError):
            reach()
    assert client.responses.retrieve(made.id).id == made.id
