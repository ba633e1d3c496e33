"""`/v1/agent/runs`: a request in words, met by the whole loop. Tools are called here, as the workflow defines them.

    {"model": "support_desk", "input": "Where is my parcel?", "stream": true}

Streamed, each message is an event as it comes about, and the outcome is the last one. A caller that goes away ends its
run before its next step.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from opentelemetry.trace import Span
from pydantic import BaseModel, ConfigDict, Field

from engrain.budget import Budget
from engrain.errors import EngrainError, InputError
from engrain.keys import Caller
from engrain.rollout import rollout
from engrain.serve.refused import Refused
from engrain.serve.server import Server
from engrain.task import Task
from engrain.trajectory import Message, Trajectory

MOST_RUNS = 64
"""At a time; each has a thread, which mostly waits."""


class RunRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")
    model: str
    input: str = Field(min_length=1)
    stream: bool = False
    max_steps: int = Field(default=Budget().steps, ge=1, le=1000)


def routes(server: Server) -> APIRouter:
    router, known = APIRouter(), Depends(server.caller)
    threads = ThreadPoolExecutor(MOST_RUNS, thread_name_prefix="engrain-run")
    under_way = set[Future[Trajectory]]()

    @router.post("/v1/agent/runs", response_model=None)
    async def run(body: RunRequest, request: Request, caller: Caller = known) -> Response:
        server.check_model(body.model)
        if len(under_way) >= MOST_RUNS:
            raise Refused(429, f"{MOST_RUNS} runs are under way", "server_error", "overloaded", after=1)
        server.admission.enter(caller)
        started = _Run(server, caller.tenant, body, server.telemetry.run(request.headers))
        future = threads.submit(started.work)
        under_way.add(future)
        loop = asyncio.get_running_loop()

        def leave() -> None:
            under_way.discard(future)
            server.admission.leave(caller, sum(started.used))

        future.add_done_callback(lambda _: (started.tell(None), loop.call_soon_threadsafe(leave)))
        if body.stream:
            return StreamingResponse(started.events(future), media_type="text/event-stream")
        return JSONResponse(await started.whole(future, request))

    return router


class _Gone(Exception):
    """The caller has gone."""


class _Run:
    def __init__(self, server: Server, tenant: str, body: RunRequest, span: Span) -> None:
        self._server, self._tenant, self._body, self._span = server, tenant, body, span
        self._loop = asyncio.get_running_loop()
        self._messages: asyncio.Queue[Message | None] = asyncio.Queue()
        self._id = f"run_{uuid.uuid4().hex}"
        self._gone = False
        self.used = (0, 0)
        """Tokens read and written."""

    def tell(self, message: Message | None) -> None:
        self._loop.call_soon_threadsafe(self._messages.put_nowait, message)

    def work(self) -> Trajectory:
        """On a thread of its own."""
        try:
            workflow = self._server.service.workflow(self._tenant)
            policy = self._server.service.policy(self._tenant, workflow)
            task = Task(id=self._id, request=self._body.input, tenant=self._tenant)
            budget = Budget(steps=self._body.max_steps)
            (done,) = rollout(workflow, [task], policy, parallel=1, budget=budget, on_step=self._step)
            return done
        finally:
            self._span.end()

    def _step(self, trajectory: Trajectory, message: Message) -> None:
        if self._gone:
            raise _Gone
        read, written = self.used
        self.used = read + (message.prompt_tokens or 0), written + len(message.token_ids or ())
        self._server.telemetry.step(self._span, message)
        self.tell(message)

    async def events(self, future: Future[Trajectory]) -> AsyncIterator[str]:
        try:
            while (message := await self._messages.get()) is not None:
                yield _event({"type": "step", "id": self._id, "message": _plain(message)})
            try:
                yield _event({"type": "done", **self._head(future.result())})
            except EngrainError as error:
                yield _refused(error).event()
            yield "data: [DONE]\n\n"
        finally:
            self._gone = True

    async def whole(self, future: Future[Trajectory], request: Request) -> dict[str, Any]:
        waiting = asyncio.wrap_future(future)
        while not (await asyncio.wait({waiting}, timeout=0.5))[0]:
            self._gone = self._gone or await request.is_disconnected()
        try:
            done = waiting.result()
        except EngrainError as error:
            raise _refused(error) from error
        except _Gone as error:
            raise Refused(499, "the caller went away") from error
        return self._head(done) | {"messages": [_plain(message) for message in done.messages]}

    def _head(self, done: Trajectory) -> dict[str, Any]:
        read, written = self.used
        return {
            "id": self._id,
            "object": "agent.run",
            "model": self._body.model,
            "outcome": done.outcome.model_dump() if done.outcome is not None else None,
            "in_prompt": done.meta.get("in_prompt", ""),
            "steps": done.steps,
            "usage": {"input_tokens": read, "output_tokens": written, "total_tokens": read + written},
        }


def _refused(error: EngrainError) -> Refused:
    return Refused(400, str(error)) if isinstance(error, InputError) else Refused(500, str(error), "server_error")


def _plain(message: Message) -> dict[str, Any]:
    return message.model_dump(exclude={"token_ids", "logprobs", "trained"}, exclude_defaults=True) | {
        "role": message.role
    }


def _event(event: dict[str, Any]) -> str:
    return f"data: {json.dumps(event, ensure_ascii=False)}\n\n"
