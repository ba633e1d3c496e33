"""Whole runs with the server's own tools, and what operators see of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from serving import AGENT, task_of

from engrain.agent import load_agent
from engrain.rollout import rollout
from engrain.task import Task
from engrain.workflow import Workflow


@pytest.fixture(scope="module")
def spans() -> Iterator[InMemorySpanExporter]:
    """What is exported from now on."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    yield exporter
    provider.shutdown()


def asked(url: str, key: str, request: str, **more: Any) -> httpx.Response:
    body = {"model": "support_desk", "input": request, **more}
    return httpx.post(f"{url}/agent/runs", json=body, headers={"Authorization": f"Bearer {key}"}, timeout=60)


def events(response: httpx.Response) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def said(messages: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(message["role"], message.get("content", "")) for message in messages]


def test_a_run_is_what_the_agent_does_here_whole_and_streamed(
    desk: Workflow, desk_url: str, desk_keys: dict[str, str], spans: InMemorySpanExporter
) -> None:
    request = task_of(desk, "harbor").request
    task = Task(id="request", request=request, tenant="harbor")
    (here,) = rollout(desk, [task], load_agent(AGENT).policy(desk, parallel=1), parallel=1)
    spans.clear()
    whole = asked(desk_url, desk_keys["harbor"], request).json()
    expected = [(message.role, message.content) for message in here.messages]
    assert said(whole["messages"]) == expected and whole["steps"] == here.steps
    told = events(asked(desk_url, desk_keys["harbor"], request, stream=True))
    assert said([event["message"] for event in told[:-1]]) == expected
    assert told[-1]["type"] == "done" and told[-1]["outcome"] == whole["outcome"]
    assert told[-1]["usage"] == whole["usage"] and whole["usage"]["output_tokens"] > 0
    made = list(spans.get_finished_spans())
    (run, *_) = [span for span in made if span.name == "invoke_agent support_desk"]
    assert run.context is not None
    steps = [span for span in made if span.parent is not None and span.parent.span_id == run.context.span_id]
    tools = [message.name for message in here.messages if message.role == "tool"]
    assert sorted(named(steps, "execute_tool")) == sorted(f"execute_tool {name}" for name in tools)
    turns = sum(message.role == "assistant" for message in here.messages)
    assert len(named(steps, "chat")) == turns == here.steps
    assert all(request not in str(span.attributes) for span in made)


def named(spans: list[ReadableSpan], operation: str) -> list[str]:
    return [span.name for span in spans if (span.attributes or {}).get("gen_ai.operation.name") == operation]


def test_a_run_ends_after_its_steps(desk: Workflow, desk_url: str, desk_keys: dict[str, str]) -> None:
    made = asked(desk_url, desk_keys["harbor"], task_of(desk, "harbor").request, max_steps=1).json()
    assert made["steps"] == 1 and made["outcome"]["reason"] == "budget: steps"
    assert asked(desk_url, desk_keys["harbor"], "").status_code == 400
    assert asked(desk_url, "wrong", "hello").status_code == 401


def test_an_agent_with_one_adapter_for_all_has_none_to_show(desk_url: str, desk_keys: dict[str, str]) -> None:
    answer = httpx.get(f"{desk_url}/adapters", headers={"Authorization": f"Bearer {desk_keys['harbor']}"})
    assert answer.status_code == 400 and "lora agent" in answer.json()["error"]["message"]
