"""`Policy`: episodes -> the next assistant turn of each. Teachers, endpoints, logs and compiled agents all are one.

Invariant: a policy answers for every episode it is given, in order. Where it has no answer for one it returns the
exception in that place, and the others go on.
"""

from __future__ import annotations

import email.utils
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, Self, runtime_checkable
from urllib.parse import urlsplit

import httpx

from engrain.errors import EngrainError, InputError
from engrain.task import Task
from engrain.tool import Tool, in_background
from engrain.trajectory import Message, ToolCall, Trajectory
from engrain.workflow import Phase, Workflow


@dataclass(eq=False)
class Episode:
    """One task under way, as a policy sees it. The same object at every turn, so caches can be keyed by it."""

    task: Task
    trajectory: Trajectory
    phase: Phase
    tools: tuple[Tool, ...]
    """The tools allowed in this phase."""
    workflow: Workflow
    """What it is a task of: a hypernetwork reads its tenant's rules there."""


@runtime_checkable
class Policy(Protocol):
    """It may also have a `name`; `in_prompt(task)`: why the context belongs into this task's prompt, else ""; and
    `sampled(temperature, seed)`: the same policy, its tokens drawn so."""

    def __call__(self, episodes: Sequence[Episode], /) -> Sequence[Message | Exception]:
        """One assistant turn an episode, or the reason why there is none."""
        ...

    def finish(self, episode: Episode, /) -> None:
        """The episode is over: drop what was kept for it."""
        ...


class OneByOne:
    """A policy that answers for each episode by itself, and keeps nothing of it."""

    def __call__(self, episodes: Sequence[Episode], /) -> list[Message | Exception]:
        return [self._turn(episode) for episode in episodes]

    def finish(self, episode: Episode, /) -> None:
        pass

    def _turn(self, episode: Episode) -> Message | Exception:
        raise NotImplementedError


class ScriptTeacher(OneByOne):
    """The workflow's own teacher, state -> action."""

    name = "script"

    def __init__(self, workflow: Workflow) -> None:
        self._next = workflow.teacher

    def sampled(self, temperature: float, seed: int) -> Self:
        """Nothing of it is drawn."""
        return self

    def _turn(self, episode: Episode) -> Message | Exception:
        try:
            return self._next(episode.task, episode.trajectory.messages)
        except Exception as error:
            return error


class Program(ScriptTeacher):
    """The workflow's plain code, which knows no more of a task than its tenant and its messages."""

    name = "code"

    def __init__(self, code: Callable[[str, Sequence[Message]], Message]) -> None:
        self._next = lambda task, messages: code(task.tenant, messages)


class ReplayTeacher(OneByOne):
    """Says again what the log of the same task says, turn by turn, whatever the tools answer this time.

    A successful log is preferred over a failed one. Whether the actions still reach the goal, the goal check tells.
    """

    name = "replay"

    def __init__(self, trajectories: Iterable[Trajectory]) -> None:
        self._turns: dict[str, list[Message]] = {}
        succeeded: set[str] = set()
        for trajectory in trajectories:
            success = trajectory.outcome is not None and trajectory.outcome.success
            if trajectory.task not in self._turns or (success and trajectory.task not in succeeded):
                self._turns[trajectory.task] = [turn for turn in trajectory.messages if turn.role == "assistant"]
            if success:
                succeeded.add(trajectory.task)

    def _turn(self, episode: Episode) -> Message | Exception:
        turns = self._turns.get(episode.task.id)
        if turns is None:
            return InputError(f"no log of task {episode.task.id!r}; record one or leave the task out")
        step = episode.trajectory.steps
        if step >= len(turns):
            return InputError(f"the log of task {episode.task.id!r} ends after {len(turns)} turns without an answer")
        turn = turns[step]
        return Message(
            role="assistant",
            content=turn.content,
            reasoning=turn.reasoning,
            trained=turn.trained,
            tool_calls=[call.model_copy() for call in turn.tool_calls],
        )


@dataclass(frozen=True)
class Retry:
    """How often and how patiently a failed request is sent again."""

    times: int = 5
    first: float = 0.5
    """Seconds before the first repetition; each further one waits about twice as long."""
    longest: float = 60.0
    """No wait is longer, whatever `Retry-After` asks for."""

    def pause(self, attempt: int, asked: float | None) -> float:
        """Seconds to wait after attempt number `attempt`, counted from 0, when the server asked for `asked`."""
        wait = self.first * 2**attempt * random.uniform(0.75, 1.25) if asked is None else asked
        return min(wait, self.longest)


class EndpointTeacher:
    """A model behind any OpenAI-compatible chat completions endpoint; the requests of a batch run concurrently.

    The key comes from `api_key`, else `ENGRAIN_API_KEY`, else, for openai.com only, `OPENAI_API_KEY`; it goes nowhere
    but into the request's header. `system` writes the system prompt that the endpoint gets in place of the recorded
    one, so that the teacher reads the whole procedure while the recorded agent does not.

    Rate limits, server errors, lost connections and malformed replies are tried again; other refusals are not, and
    after a refused key, model or address no further request is sent.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key: str | None = None,
        *,
        system: Callable[[Episode], str] | None = None,
        timeout: float = 120.0,
        retry: Retry | None = None,
        options: Mapping[str, Any] | None = None,
        send_reasoning: bool = False,
    ) -> None:
        self.name = f"endpoint:{model}"
        self.model = model
        self.system = system
        self.retry = retry or Retry()
        self.options = dict(options or {})
        """Further fields of the request, such as `temperature` or `max_tokens`."""
        self.send_reasoning = send_reasoning
        """Whether earlier reasoning is sent back, as some reasoning models ask for."""
        self._place = _checked_place(base_url)
        self._key = _key(api_key, self._place)
        self._url = base_url.rstrip("/") + "/chat/completions"
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._client = httpx.Client(timeout=timeout, headers=headers, limits=httpx.Limits(max_connections=None))
        self._refused = ""

    def __call__(self, episodes: Sequence[Episode], /) -> list[Message | Exception]:
        stop = threading.Event()
        try:
            running = [in_background(partial(self._turn, episode, stop)) for episode in episodes]
            return [_outcome(future) for future in running]
        except BaseException:  # Ctrl-C: send nothing more
            stop.set()
            raise

    def finish(self, episode: Episode, /) -> None:
        pass

    def close(self) -> None:
        self._client.close()

    def _turn(self, episode: Episode, stop: threading.Event) -> Message:
        started = time.perf_counter()
        message = self._ask(self._request(episode), stop)
        return message.model_copy(update={"seconds": time.perf_counter() - started})

    def _request(self, episode: Episode) -> dict[str, Any]:
        messages = [_to_openai(message, self.send_reasoning) for message in episode.trajectory.messages]
        if self.system is not None:
            messages = [message for message in messages if message["role"] != "system"]
            messages.insert(0, {"role": "system", "content": self.system(episode)})
        tools = {"tools": [tool.schema() for tool in episode.tools]} if episode.tools else {}
        return {"model": self.model, "messages": messages, **tools, **self.options}

    def _ask(self, request: dict[str, Any], stop: threading.Event) -> Message:
        problem = ""
        for attempt in range(self.retry.times + 1):
            if self._refused or stop.is_set():
                raise EngrainError(self._refused or "interrupted")
            asked = None
            try:
                response = self._client.post(self._url, json=request)
                if response.status_code == 200:
                    return _from_openai(response)
                problem = f"HTTP {response.status_code}: {self._said(response)}"
                self._raise_if_final(response.status_code, problem)
                asked = _seconds_asked(response.headers.get("Retry-After", ""))
            except (httpx.TransportError, httpx.DecodingError, _Malformed) as error:
                problem = f"{type(error).__name__.strip('_')}: {error}"
            if attempt < self.retry.times:
                stop.wait(self.retry.pause(attempt, asked))
        raise EngrainError(f"endpoint {self._place}: gave up after {self.retry.times + 1} requests; {problem}")

    def _raise_if_final(self, status: int, problem: str) -> None:
        if status in _AGAIN or status >= 500:
            return
        fix = _FIXES.get(status, "see the endpoint's message")
        refusal = f"endpoint {self._place} refused the request: {problem}; {fix}"
        if status in _FIXES:
            self._refused = refusal
        raise EngrainError(refusal)

    def _said(self, response: httpx.Response) -> str:
        text = " ".join(response.text.split())
        return (text.replace(self._key, "***") if self._key else text)[:300]


_AGAIN = (408, 409, 425, 429)
_FIXES = {
    401: "check the API key",
    402: "check the account",
    403: "check the API key's rights",
    404: "check the address and the model's name",
}


class _Malformed(Exception):
    """A reply that does not have the form of a chat completion."""


def _checked_place(base_url: str) -> str:
    """The endpoint's host and port, without anything secret an address may hold. Raises `InputError`."""
    try:
        url = urlsplit(base_url)
        port = f":{url.port}" if url.port else ""
    except ValueError:
        url, port = urlsplit(""), ""
    if url.scheme not in ("http", "https") or not url.hostname:
        raise InputError(f"endpoint: expected an address like http://localhost:8000/v1, got {base_url!r}")
    return url.hostname + port


def _key(given: str | None, place: str) -> str:
    key = given if given is not None else os.environ.get("ENGRAIN_API_KEY", "")
    if not key and given is None and f".{place.split(':')[0]}".endswith(".openai.com"):
        key = os.environ.get("OPENAI_API_KEY", "")
    key = key.strip()
    if not (key.isascii() and (key.isprintable() or not key)):
        raise InputError("endpoint: the API key holds characters that no HTTP header can carry; copy it again")
    return key


def _outcome(future: Future[Message]) -> Message | Exception:
    try:
        return future.result()
    except Exception as error:
        return error


def _seconds_asked(text: str) -> float | None:
    """`Retry-After`: seconds, or a date."""
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _to_openai(message: Message, reasoning: bool) -> dict[str, Any]:
    sent: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.role == "tool":
        sent["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        sent["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
        sent["content"] = message.content or None
    if reasoning and message.reasoning:
        sent["reasoning_content"] = message.reasoning
    return sent


def _from_openai(response: httpx.Response) -> Message:
    try:
        choice = response.json()["choices"][0]
        turn = choice["message"]
        calls = [_call(call) for call in turn.get("tool_calls") or []]
        reasoning = turn.get("reasoning_content") or turn.get("reasoning") or ""
        message = Message(role="assistant", content=_text(turn.get("content")), reasoning=reasoning, tool_calls=calls)
        usage = response.json().get("usage") or {}
        message.prompt_tokens, message.completion_tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise _Malformed(f"expected a chat completion, got {response.text[:200]!r} ({type(error).__name__})") from error
    if choice.get("finish_reason") in ("length", "content_filter"):
        reason = choice["finish_reason"]
        raise EngrainError(f"endpoint: the reply was cut ({reason}); raise max_tokens or shorten the task")
    return message


def _call(call: dict[str, Any]) -> ToolCall:
    arguments = call["function"].get("arguments") or "{}"
    if not isinstance(arguments, str):  # some servers send the object
        arguments = json.dumps(arguments, ensure_ascii=False)
    return ToolCall(id=call.get("id") or "", name=call["function"]["name"], arguments=arguments)


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "".join(part["text"] for part in content if part.get("type") == "text")
    return content or ""
