"""The committed agent over HTTP, met by OpenAI's own client."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from engrain.agent import load_agent
from engrain.keys import Everybody, Keys, add_key
from engrain.policy import EndpointTeacher
from engrain.rollout import rollout
from engrain.scheduler import Job
from engrain.score import succeeded
from engrain.serve import create_app
from engrain.service import Prepared, Service
from engrain.task import Task
from engrain.workflow import Workflow, load_workflow

ROOT = Path(__file__).parents[1]
AGENT = ROOT / "agents" / "support_desk"


@contextmanager
def served(service: Service, keys: Keys | Everybody) -> Iterator[str]:
    """The address of a running server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = uvicorn.Config(create_app(service, keys), port=port, log_level="error", timeout_graceful_shutdown=30)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.should_exit = True
        thread.join(60)


@pytest.fixture(scope="module")
def desk() -> Workflow:
    return load_workflow(ROOT / "examples" / "support_desk")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    return {"file": str(path)} | {tenant: add_key(path, tenant, 4) for tenant in ("harbor", "kestrel")}


@pytest.fixture(scope="module")
def service(desk: Workflow) -> Service:
    return Service(load_agent(AGENT), desk, parallel=4, most_waiting=8)


@pytest.fixture(scope="module")
def url(service: Service, keys: dict[str, str]) -> Iterator[str]:
    with served(service, Keys(Path(keys["file"]))) as url:
        yield url


@contextmanager
def asker(url: str, key: str, patience: int = 0) -> Iterator[Callable[..., Any]]:
    """`create` of the official client's chat completions."""
    with openai.OpenAI(base_url=url, api_key=key, max_retries=patience, timeout=60) as client:
        yield client.chat.completions.create


def task_of(desk: Workflow, tenant: str, number: int = 0) -> Task:
    return next(islice((task for task in desk.tasks("held_out", 5) if task.tenant == tenant), number, None))


def asking(task: Task, **more: Any) -> dict[str, Any]:
    return {"model": "support_desk", "messages": [{"role": "user", "content": task.request}], **more}


def test_whole_tasks_go_as_they_do_here_and_thoughts_need_not_be_sent_back(
    desk: Workflow, url: str, keys: dict[str, str]
) -> None:
    tasks = [task_of(desk, "harbor", number) for number in range(4)]
    ours = rollout(desk, tasks, load_agent(AGENT).policy(desk, parallel=4), parallel=4)
    here = {run.task: run for run in ours}
    with closing(EndpointTeacher(url, "support_desk", keys["harbor"])) as there:
        runs = list(rollout(desk, tasks, there, parallel=4))
    for run in runs:
        own = here[run.task]
        assert succeeded(run) == succeeded(own)
        for remote, local in zip(run.messages, own.messages, strict=True):
            assert (remote.role, remote.content, remote.reasoning) == (local.role, local.content, local.reasoning)
            calls = [[(call.name, call.arguments) for call in one.tool_calls] for one in (remote, local)]
            assert calls[0] == calls[1]
    assert sum(map(succeeded, here.values())) >= 3


def test_a_stream_says_the_same_in_pieces(desk: Workflow, url: str, keys: dict[str, str]) -> None:
    task = task_of(desk, "kestrel")
    with asker(url, keys["kestrel"]) as ask:
        whole = ask(**asking(task, logprobs=True))
        chunks = list(ask(**asking(task, stream=True, stream_options={"include_usage": True})))
    message = whole.choices[0].message
    choices = [choice for chunk in chunks for choice in chunk.choices]
    thoughts = [getattr(choice.delta, "reasoning_content", None) or "" for choice in choices]
    assert sum(map(bool, thoughts)) > 3 and "".join(thoughts) == message.reasoning_content
    assert "".join(choice.delta.content or "" for choice in choices) == (message.content or "")
    calls = [call.function for choice in choices for call in choice.delta.tool_calls or []]
    assert [(call.name, call.arguments) for call in calls] == [
        (call.function.name, call.function.arguments) for call in message.tool_calls
    ]
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["tool_calls"]
    assert whole.choices[0].finish_reason == "tool_calls" and chunks[-1].usage == whole.usage
    tokens = whole.choices[0].logprobs.content
    assert len(tokens) == whole.usage.completion_tokens and all(token.logprob <= 0 for token in tokens)


def test_the_key_decides_the_tenant(
    desk: Workflow, service: Service, url: str, keys: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, submit = list[str](), service.submit

    def watched(prepared: Prepared, on_tokens: Callable[[list[int]], None]) -> Job:
        prompts.append(service.text(prepared.request.prompt))
        return submit(prepared, on_tokens)

    monkeypatch.setattr(service, "submit", watched)
    for tenant in ("harbor", "kestrel"):
        with asker(url, keys[tenant]) as ask:
            made = ask(**asking(task_of(desk, "harbor"), max_tokens=1, user="harbor"))
        assert made.choices[0].finish_reason == "length" and f"Tenant: {tenant}." in prompts.pop()
    for headers in ({}, {"Authorization": keys["harbor"]}, {"Authorization": f"Bearer {keys['harbor']}x"}):
        answer = httpx.get(f"{url}/models", headers=headers)
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
    answer = httpx.get(f"{url}/models", headers={"Authorization": f"Bearer {keys['harbor']}"})
    assert [one["id"] for one in answer.json()["data"]] == ["support_desk"]


@pytest.mark.parametrize(
    ("change", "status", "says"),
    [
        ({"model": "gpt-9"}, 404, "support_desk"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "system, developer, user"),
        ({"messages": [{"role": "tool", "tool_call_id": "call_9", "content": "x"}]}, 400, "call_9"),
        ({"messages": [{"role": "user", "content": "word " * 40_000}]}, 400, "context full"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, 400, "tool name"),
        ({"tools": [], "tool_choice": "required"}, 400, "no tools"),
        ({"n": 2}, 400, "n: "),
        ({"temperature": 9}, 400, "temperature"),
        ({"presence_penalty": 1.5}, 400, "presence_penalty"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_status_that_clients_know(
    desk: Workflow, url: str, keys: dict[str, str], change: dict[str, Any], status: int, says: str
) -> None:
    body = asking(task_of(desk, "harbor")) | change
    headers = {"Authorization": f"Bearer {keys['harbor']}"}
    answer = httpx.post(f"{url}/chat/completions", json=body, headers=headers, timeout=60)
    assert answer.status_code == status and says in answer.json()["error"]["message"], answer.text


def test_bodies_that_are_none_or_too_large_are_refused(url: str, keys: dict[str, str]) -> None:
    headers = {"Authorization": f"Bearer {keys['harbor']}", "Content-Type": "application/json"}
    place = f"{url}/chat/completions"
    assert httpx.post(place, content=b"{nonsense", headers=headers).status_code == 400
    assert httpx.post(place, content=b" " * (8 * 2**20 + 1), headers=headers).status_code == 413
    assert httpx.post(place, content=iter([b"{}"]), headers=headers).status_code == 411


def test_a_caller_that_goes_away_frees_its_place_and_nobody_waits_for_it(
    desk: Workflow, service: Service, url: str, keys: dict[str, str]
) -> None:
    asked = [asking(task_of(desk, "harbor", number)) for number in range(12)]
    with asker(url, keys["harbor"]) as ask, asker(url, keys["harbor"], patience=5) as ask_again:
        for one in asked[:6]:  # more than a key may have under way; that one has gone shows a little later
            with ask_again(**one, stream=True) as stream:
                next(iter(stream))
        with ThreadPoolExecutor(4) as callers:
            made = list(callers.map(lambda one: ask_again(**one), asked[:4]))
        assert all(one.choices[0].finish_reason == "tool_calls" for one in made)
        with pytest.raises(openai.RateLimitError), ThreadPoolExecutor(12) as callers:
            list(callers.map(lambda one: ask(**one), asked))


def test_what_was_accepted_is_answered_when_the_server_ends(desk: Workflow) -> None:
    service = Service(load_agent(AGENT), desk, parallel=2)
    with ThreadPoolExecutor(4) as callers:
        with served(service, Everybody("harbor")) as url:
            asked = [
                callers.submit(
                    httpx.post, f"{url}/chat/completions", json=asking(task_of(desk, "harbor", number)), timeout=60
                )
                for number in range(4)
            ]
            time.sleep(0.3)
        assert all(one.result(60).json()["choices"][0]["message"]["tool_calls"] for one in asked)


def test_a_conversation_may_bring_tools_of_its_own_or_want_none(desk: Workflow, url: str, keys: dict[str, str]) -> None:
    task = task_of(desk, "harbor")
    given = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    with asker(url, keys["harbor"]) as ask:
        required = ask(**asking(task, tools=[given], tool_choice="required")).choices[0].message
        spoken = ask(**asking(task, tool_choice="none")).choices[0].message
    assert [(call.function.name, call.function.arguments) for call in required.tool_calls] == [("look", "{}")]
    assert not spoken.tool_calls
