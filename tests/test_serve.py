"""The committed agent over HTTP, met by OpenAI's own client."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from serving import AGENT, served, task_of

from engrain.agent import load_agent
from engrain.keys import Everybody, Keys, add_key
from engrain.policy import EndpointTeacher
from engrain.rollout import rollout
from engrain.scheduler import Job
from engrain.score import succeeded
from engrain.service import Prepared, Service
from engrain.task import Task
from engrain.workflow import Workflow


@contextmanager
def asker(url: str, key: str, patience: int = 0) -> Iterator[Callable[..., Any]]:
    """`create` of the official client's chat completions."""
    with openai.OpenAI(base_url=url, api_key=key, max_retries=patience, timeout=60) as client:
        yield client.chat.completions.create


def asking(task: Task, **more: Any) -> dict[str, Any]:
    return {"model": "support_desk", "messages": [{"role": "user", "content": task.request}], **more}


def test_whole_tasks_go_as_they_do_here_and_thoughts_need_not_be_sent_back(
    desk: Workflow, desk_url: str, desk_keys: dict[str, str]
) -> None:
    tasks = [task_of(desk, "harbor", number) for number in range(4)]
    ours = rollout(desk, tasks, load_agent(AGENT).policy(desk, parallel=4), parallel=4)
    here = {run.task: run for run in ours}
    with closing(EndpointTeacher(desk_url, "support_desk", desk_keys["harbor"])) as there:
        runs = list(rollout(desk, tasks, there, parallel=4))
    for run in runs:
        own = here[run.task]
        assert succeeded(run) == succeeded(own)
        for remote, local in zip(run.messages, own.messages, strict=True):
            assert (remote.role, remote.content, remote.reasoning) == (local.role, local.content, local.reasoning)
            calls = [[(call.name, call.arguments) for call in one.tool_calls] for one in (remote, local)]
            assert calls[0] == calls[1]
    assert sum(map(succeeded, here.values())) >= 3


def test_a_stream_says_the_same_in_pieces(desk: Workflow, desk_url: str, desk_keys: dict[str, str]) -> None:
    task = task_of(desk, "kestrel")
    with asker(desk_url, desk_keys["kestrel"]) as ask:
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
    desk: Workflow, desk_service: Service, desk_url: str, desk_keys: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, submit = list[str](), desk_service.submit

    def watched(prepared: Prepared, on_tokens: Callable[[list[int]], None]) -> Job:
        prompts.append(desk_service.text(prepared.request.prompt))
        return submit(prepared, on_tokens)

    monkeypatch.setattr(desk_service, "submit", watched)
    for tenant in ("harbor", "kestrel"):
        with asker(desk_url, desk_keys[tenant]) as ask:
            made = ask(**asking(task_of(desk, "harbor"), max_tokens=1, user="harbor"))
        assert made.choices[0].finish_reason == "length" and f"Tenant: {tenant}." in prompts.pop()
    for headers in ({}, {"Authorization": desk_keys["harbor"]}, {"Authorization": f"Bearer {desk_keys['harbor']}x"}):
        answer = httpx.get(f"{desk_url}/models", headers=headers)
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
    answer = httpx.get(f"{desk_url}/models", headers={"Authorization": f"Bearer {desk_keys['harbor']}"})
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
        ({"tools": [], "tool_choice": "required"}, 400, "no such tool"),
        ({"tool_choice": {"type": "function", "function": {"name": "fly"}}}, 400, "'fly'"),
        ({"stop": ["x"] * 5}, 400, "stop"),
        ({"n": 2}, 400, "n: "),
        ({"temperature": 9}, 400, "temperature"),
        ({"presence_penalty": 1.5}, 400, "presence_penalty"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_status_that_clients_know(
    desk: Workflow, desk_url: str, desk_keys: dict[str, str], change: dict[str, Any], status: int, says: str
) -> None:
    body = asking(task_of(desk, "harbor")) | change
    headers = {"Authorization": f"Bearer {desk_keys['harbor']}"}
    answer = httpx.post(f"{desk_url}/chat/completions", json=body, headers=headers, timeout=60)
    assert answer.status_code == status and says in answer.json()["error"]["message"], answer.text


def test_bodies_that_are_none_or_too_large_are_refused(desk_url: str, desk_keys: dict[str, str]) -> None:
    headers = {"Authorization": f"Bearer {desk_keys['harbor']}", "Content-Type": "application/json"}
    place = f"{desk_url}/chat/completions"
    assert httpx.post(place, content=b"{nonsense", headers=headers).status_code == 400
    assert httpx.post(place, content=b" " * (8 * 2**20 + 1), headers=headers).status_code == 413
    assert httpx.post(place, content=iter([b"{}"]), headers=headers).status_code == 411


def test_a_caller_that_goes_away_frees_its_place_and_nobody_waits_for_it(
    desk: Workflow, desk_service: Service, desk_url: str, desk_keys: dict[str, str]
) -> None:
    asked = [asking(task_of(desk, "harbor", number)) for number in range(12)]
    with asker(desk_url, desk_keys["harbor"]) as ask, asker(desk_url, desk_keys["harbor"], patience=5) as ask_again:
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


def test_a_conversation_may_bring_tools_of_its_own_or_want_none(
    desk: Workflow, desk_url: str, desk_keys: dict[str, str]
) -> None:
    task = task_of(desk, "harbor")
    given = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    with asker(desk_url, desk_keys["harbor"]) as ask:
        required = ask(**asking(task, tools=[given], tool_choice="required")).choices[0].message
        spoken = ask(**asking(task, tool_choice="none")).choices[0].message
        named = {"type": "function", "function": {"name": "get_order"}}
        chosen = ask(**asking(task, tool_choice=named)).choices[0].message
    assert [(call.function.name, call.function.arguments) for call in required.tool_calls] == [("look", "{}")]
    assert not spoken.tool_calls
    assert [call.function.name for call in chosen.tool_calls] == ["get_order"]


def test_an_answer_ends_before_a_stop_and_no_part_of_it_is_streamed(
    desk: Workflow, desk_url: str, desk_keys: dict[str, str]
) -> None:
    with asker(desk_url, desk_keys["harbor"]) as ask:
        asked = asking(task_of(desk, "harbor"), tool_choice="none", max_tokens=40)
        whole = ask(**asked).choices[0].message.content
        assert len(whole) > 12
        stop = whole[6:12]
        for text in (stop, whole[6:11] + "?"):
            cut = ask(**asked, stop=["nowhere to be found", text])
            expected, reason = (whole[:6], "stop") if text == stop else (whole, "length")
            assert cut.choices[0].message.content == expected and cut.choices[0].finish_reason == reason
            pieces = [chunk.choices[0].delta.content or "" for chunk in ask(**asked, stop=text, stream=True)]
            assert "".join(pieces) == expected


def test_a_tenant_has_so_many_tokens_a_minute_whatever_key_it_comes_with(
    desk: Workflow, desk_service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "keys.json"
    few = [add_key(path, "harbor", tokens_a_minute=40) for _ in range(2)]
    other, nobody = add_key(path, "kestrel"), add_key(path, "nobody")
    monkeypatch.setattr(desk_service, "close", lambda: None)
    with served(desk_service, Keys(path)) as url:

        def status(key: str) -> tuple[int, str | None]:
            headers = {"Authorization": f"Bearer {key}"}
            body = asking(task_of(desk, "harbor"), max_tokens=100)
            answer = httpx.post(f"{url}/chat/completions", json=body, headers=headers, timeout=60)
            return answer.status_code, answer.headers.get("Retry-After")

        assert status(few[0])[0] == 200
        refused, wait = status(few[1])
        assert refused == 429 and wait is not None and int(wait) >= 1
        assert status(other)[0] == 200 and status(nobody)[0] == 403


def test_metrics_count_and_name_nobody(desk: Workflow, desk_url: str, desk_keys: dict[str, str]) -> None:
    root = desk_url.removesuffix("/v1")

    def value(name: str) -> float:
        lines = httpx.get(f"{root}/metrics").text.split("\n")
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    before = {name: value(name) for name in ("engrain_turns_total", "engrain_tokens_total")}
    with asker(desk_url, desk_keys["harbor"]) as ask:
        made = ask(**asking(task_of(desk, "harbor")))
    assert value("engrain_turns_total") == before["engrain_turns_total"] + 1
    assert value("engrain_tokens_total") == before["engrain_tokens_total"] + made.usage.total_tokens
    assert value('engrain_http_requests_total{route="/v1/chat/completions",status="200"}') >= 1
    assert value("engrain_first_token_seconds_count") >= 1 and value("engrain_turns_decoding") == 0
    assert httpx.get(f"{root}/nowhere").status_code == 404 and httpx.get(f"{root}/readyz").status_code == 200
    text = httpx.get(f"{root}/metrics").text
    assert "harbor" not in text and "nowhere" not in text
