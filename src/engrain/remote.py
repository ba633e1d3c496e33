"""`Remote`: turns decoded by a vLLM server elsewhere, for whoever would use a `Scheduler` here.

vLLM gets the very tokens that training saw and the turn's grammar, and gives back tokens; text, tools and thoughts are
ours to read. Invariant: the tenant that a job is submitted for decides the model that is asked, and every accepted job
ends: with a completion, with the error that ended it, or cancelled.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import CancelledError
from typing import Any

import httpx

from engrain.agent import Agent
from engrain.constrain import Grammars
from engrain.errors import EngrainError, InputError, Overloaded
from engrain.renderer import Renderer
from engrain.scheduler import MOST_WAITING, Job
from engrain.turn import GREEDY, Completion, Request

KEY = "ENGRAIN_UPSTREAM_KEY"
"""The environment variable with the server's API key, if it wants one."""
LOOK = 0.1
"""Seconds between looks at whether a caller has gone."""
PATIENCE = httpx.Timeout(10.0, read=600.0)


class Remote:
    """Accepts requests from any thread; `close` it in the end. Raises `InputError` if no server answers at first."""

    def __init__(
        self, address: str, model_of: Callable[[str], str], renderer: Renderer, most_waiting: int = MOST_WAITING
    ) -> None:
        self._address, self._model_of, self._stop_ids = address.rstrip("/"), model_of, list(renderer.stop_ids)
        self._grammars = Grammars(renderer.tokenizer, len(renderer.tokenizer), self._stop_ids)
        self._most, self._jobs, self._started = most_waiting, set[Job](), set[Job]()
        self._closing, self._changed = False, threading.Condition()
        key = os.environ.get(KEY)
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.models, self._longest = self._look()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engrain-remote", daemon=True)
        self._thread.start()
        self._client = httpx.AsyncClient(timeout=PATIENCE, limits=httpx.Limits(max_connections=None))

    def _look(self) -> tuple[list[str], int]:
        """The models that it names, and the most tokens of a prompt and its turn."""
        try:
            answer = httpx.get(f"{self._address}/models", headers=self._headers, timeout=10.0)
            answer.raise_for_status()
            models = answer.json()["data"]
            return [one["id"] for one in models], next(filter(None, (one.get("max_model_len") for one in models)))
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError, StopIteration) as error:
            problem = f"expected the address of a vLLM server, up to /v1, got {type(error).__name__}: {error}"
            raise InputError(f"{self._address}: {problem}; start one with recipes/serve_vllm/start") from error

    def check(self, request: Request) -> None:
        """Raises `EngrainError` if the prompt does not fit or the grammar does not compile."""
        if not 0 < len(request.prompt) < self._longest:
            raise EngrainError(f"context full: the prompt has {len(request.prompt)} tokens, expected 1 to "
                               f"{self._longest - 1}; shorten the task")  # fmt: skip
        if request.grammar is not None:
            self._grammars.matcher(request.grammar)

    def submit(
        self,
        request: Request,
        tenant: str = "",
        on_tokens: Callable[[list[int]], None] = lambda ids: None,
        *,
        goes_on: bool = False,
    ) -> Job:
        """As `Scheduler.submit`. vLLM queues for itself: all jobs are sent at once."""
        job = Job(request, tenant, on_tokens)
        with self._changed:
            if self._closing:
                raise Overloaded("no more requests are taken, this server is being closed; ask another")
            if len(self._jobs) >= self._most and not goes_on:
                raise Overloaded(f"{len(self._jobs)} requests are under way, at most {self._most} may; try again later")
            self._jobs.add(job)
        job.done.set_running_or_notify_cancel()
        asyncio.run_coroutine_threadsafe(self._work(job), self._loop)
        return job

    def load(self) -> tuple[int, int]:
        """How many are being decoded, and how many wait for their first token."""
        with self._changed:
            return len(self._started), len(self._jobs) - len(self._started)

    def has_room(self) -> bool:
        with self._changed:
            return not self._closing and len(self._jobs) < self._most

    def close(self) -> None:
        """Take no more requests, and return when all that were accepted have ended."""
        with self._changed:
            self._closing = True
            self._changed.wait_for(lambda: not self._jobs)
        asyncio.run_coroutine_threadsafe(self._client.aclose(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _work(self, job: Job) -> None:
        try:
            completion = await self._completion(job)
        except Exception as error:
            completion = error
        with self._changed:
            self._jobs.discard(job)
            self._started.discard(job)
            self._changed.notify_all()
        if isinstance(completion, Exception):
            job.done.set_exception(completion)
        else:
            job.done.set_result(completion)

    async def _completion(self, job: Job) -> Completion:
        began, ids, logprobs, reason = time.perf_counter(), list[int](), list[float](), ""
        try:
            model = await asyncio.to_thread(self._model_of, job.tenant)
            async with self._client.stream(
                "POST", f"{self._address}/completions", json=self._body(job.request, model), headers=self._headers
            ) as answer:
                if answer.is_error:
                    raise EngrainError(f"vLLM refuses {model}: {_said(await answer.aread())}")
                async for choice in _unless_ended(_choices(answer), job):
                    new: list[int] = choice.get("token_ids") or []
                    ids += new
                    logprobs += (choice.get("logprobs") or {}).get("token_logprobs") or ()
                    reason = choice.get("finish_reason") or reason
                    if new:
                        self._started.add(job)
                        job.sent = len(ids)
                        job.on_tokens(new)
        except httpx.HTTPError as error:
            raise EngrainError(f"vLLM at {self._address} was lost: {type(error).__name__}: {error}") from error
        if job.given_up:
            raise CancelledError
        if not reason and not job.enough:
            raise EngrainError(f"vLLM at {self._address} ended a turn without a reason; ask again")
        whole = reason == "stop" and ids[-1:] and ids[-1] in self._stop_ids
        error = "truncated" if reason == "length" else "" if whole or job.enough else "grammar"
        return Completion(ids, logprobs, time.perf_counter() - began, error)

    def _body(self, request: Request, model: str) -> dict[str, Any]:
        sampling = request.sampling or GREEDY
        body: dict[str, Any] = {
            "model": model, "prompt": list(request.prompt), "stream": True, "temperature": sampling.temperature,
            "top_p": sampling.top_p, "seed": sampling.seed, "logprobs": 0, "return_token_ids": True,
            "max_tokens": min(request.max_new, self._longest - len(request.prompt)),
            "add_special_tokens": False, "skip_special_tokens": False, "stop_token_ids": self._stop_ids,
        }  # fmt: skip
        return body if request.grammar is None else body | {"structured_outputs": {"grammar": request.grammar}}


async def _choices(answer: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The one choice of each server-sent event. Raises `EngrainError` for an event that is an error."""
    async for line in answer.aiter_lines():
        said = line.removeprefix("data: ")
        if said == line or said == "[DONE]":
            continue
        event = json.loads(said)
        if "error" in event:
            raise EngrainError(f"vLLM failed: {_said(said)}")
        for choice in event["choices"]:
            yield choice


async def _unless_ended(choices: AsyncIterator[dict[str, Any]], job: Job) -> AsyncIterator[dict[str, Any]]:
    """Until the job's caller has had enough or has gone."""
    while True:
        coming = asyncio.ensure_future(anext(choices, None))
        while not coming.done():
            if job.given_up or job.enough:
                coming.cancel()
                return
            await asyncio.wait({coming}, timeout=LOOK)
        if (choice := coming.result()) is None:
            return
        yield choice


def _said(body: str | bytes) -> str:
    """What an error's body says."""
    try:
        error = json.loads(body)
        return str(error.get("error", error).get("message", error))
    except (ValueError, AttributeError):
        return str(body)[:200]


def check_servable(agent: Agent) -> None:
    """Raises `InputError` for an agent that vLLM cannot serve, with one adapter a request that acts on all tokens."""
    if agent.manifest.config.get("contexts") == "step":
        raise InputError(f"{agent.path} has an adapter for each step, and vLLM one a request; compile it with "
                         "--contexts tenant")  # fmt: skip
    if agent.manifest.config.get("activated"):
        raise InputError(f"{agent.path} has activated adapters, and vLLM's act on all tokens; compile it without "
                         "--activated")  # fmt: skip
