"""`engrain serve`: OpenAI's chat completions over HTTP, as its official client speaks them.

A key names the tenant; no field of a request does. Errors have OpenAI's form, with the status code that its client
expects. Not taken, and refused: more than one choice, alternatives in `logprobs`, images and sound, penalties, a choice
of one tool by name.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from concurrent.futures import CancelledError
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Header, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.types import ASGIApp, Receive, Scope, Send

from engrain.errors import EngrainError, InputError, Overloaded
from engrain.formats.calls import tools_text
from engrain.formats.node import Node
from engrain.formats.openai import plain_message, read_messages
from engrain.keys import Caller, Everybody, Keys
from engrain.scheduler import Job
from engrain.service import Asked, Prepared, Service
from engrain.tool import Tool
from engrain.trajectory import Message
from engrain.turn import LONGEST_TURN, Completion, Sampling

MOST_BYTES = 8 * 2**20
"""Of a request's body."""


class Refused(Exception):
    """An answer with a status code and OpenAI's error object."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error", code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.body = status, {"error": {"message": message, "type": kind, "param": None, "code": code}}


class Bounded:
    """Middleware that lets nobody send a body without an end."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            length = dict(scope["headers"]).get(b"content-length", b"").decode("latin-1")
            if not length.isdecimal():
                refused = Refused(411, "expected the length of the body in Content-Length")
            elif int(length) > MOST_BYTES:
                refused = Refused(413, f"expected a body of at most {MOST_BYTES} bytes, got {length}")
            else:
                refused = None
            if refused is not None:
                await JSONResponse(refused.body, refused.status)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class StreamOptions(BaseModel):
    include_usage: bool = False


class ChatRequest(BaseModel):
    """What is understood of a request; unknown fields are ignored, as OpenAI's own servers do."""

    model_config = ConfigDict(extra="ignore")
    model: str
    messages: list[dict[str, Any]] = Field(min_length=1)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none", "required"] = "auto"
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    """Greedy unless asked otherwise: that is what was trained and measured."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = None
    logprobs: bool = False
    top_logprobs: Literal[0] | None = None
    n: Literal[1] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None

    def asked(self) -> Asked:
        """Raises `InputError` for messages or tools that cannot be read."""
        schemas = json.loads(tools_text(Node(self.tools or [], path="tools")))
        answers: dict[str, Literal["may", "must", "must not"]] = {"auto": "may", "none": "must", "required": "must not"}
        return Asked(
            read_messages(Node(self.messages, path="messages")).messages,
            None if self.tools is None else [_tool(schema) for schema in schemas],
            answers[self.tool_choice],
            self.max_completion_tokens or self.max_tokens or LONGEST_TURN,
            Sampling(self.temperature or 0.0, self.top_p or 1.0, self.seed or 0),
        )


def create_app(service: Service, keys: Keys | Everybody) -> FastAPI:
    """The server of one agent."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(title="Engrain", lifespan=life, openapi_url=None)
    app.add_middleware(Bounded)
    under_way = Counter[str]()
    created = int(time.time())

    def caller(authorization: Annotated[str, Header()] = "") -> Caller:
        scheme, _, key = authorization.partition(" ")
        found = keys.caller(key.strip() if scheme.lower() == "bearer" else "")
        if found is None:
            raise Refused(401, "no such API key; send one as `Authorization: Bearer KEY`", code="invalid_api_key")
        return found

    known = Depends(caller)

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        headers = {"Retry-After": "1"} if error.status == 429 else None
        return JSONResponse(error.body, error.status, headers)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"] if part != "body")
        return JSONResponse(Refused(400, f"{field or 'body'}: {first['msg']}").body, 400)

    @app.get("/healthz")
    async def healthy() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models(known: Caller = known) -> dict[str, Any]:
        one = {"id": service.name, "object": "model", "created": created, "owned_by": "engrain"}
        return {"object": "list", "data": [one]}

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest, request: Request, known: Caller = known) -> Response:
        if body.model != service.name:
            raise Refused(404, f"no model {body.model!r} here; there is {service.name!r}", code="model_not_found")
        if under_way[known.sha256] >= known.most_at_once:
            raise Refused(429, f"{known.most_at_once} requests of this key are under way", code="rate_limit_exceeded")
        under_way[known.sha256] += 1
        try:
            turn = await Turn.begin(service, known.tenant, body)
        except BaseException:
            under_way[known.sha256] -= 1
            raise

        loop = asyncio.get_running_loop()

        def release() -> None:
            under_way[known.sha256] -= 1

        turn.job.done.add_done_callback(lambda _: loop.call_soon_threadsafe(release))
        if body.stream:
            return StreamingResponse(turn.events(), media_type="text/event-stream", headers=turn.headers)
        return JSONResponse(await _unless_gone(request, turn), headers=turn.headers)

    return app


class Turn:
    """One completion on its way to one caller."""

    def __init__(self, service: Service, prepared: Prepared, body: ChatRequest) -> None:
        self._service, self._prepared, self._body = service, prepared, body
        self._pieces: asyncio.Queue[list[int] | None] = asyncio.Queue()
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.name}
        self.headers = {"X-Engrain-In-Prompt": prepared.in_prompt} if prepared.in_prompt else {}
        loop = asyncio.get_running_loop()

        def tell(piece: list[int] | None) -> None:
            loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

        self.job: Job = service.submit(prepared, tell)
        self.job.done.add_done_callback(lambda _: tell(None))

    @classmethod
    async def begin(cls, service: Service, tenant: str, body: ChatRequest) -> Turn:
        """Raises `Refused`."""
        try:
            prepared = await asyncio.to_thread(lambda: service.prepare(tenant, body.asked()))
            service.check(prepared)
            return cls(service, prepared, body)
        except Overloaded as error:
            raise Refused(429, str(error), "server_error", "overloaded") from error
        except InputError as error:
            raise Refused(400, str(error)) from error
        except EngrainError as error:
            raise Refused(400, str(error), code="context_length_exceeded") from error

    async def whole(self) -> dict[str, Any]:
        while await self._pieces.get() is not None:
            pass
        completion, message = self._ended()
        choice = {"index": 0, "message": plain_message(message), "finish_reason": _reason(message)}
        choice["logprobs"] = self._logprobs(completion.ids, completion.logprobs) if self._body.logprobs else None
        return self._head | {"object": "chat.completion", "choices": [choice], "usage": self._usage(completion)}

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events: text as it is certain, a call when it is whole, then why it ended."""
        try:
            async for event in self._events():
                yield event
        finally:
            self.job.cancel()  # if nobody listens any more

    async def _events(self) -> AsyncIterator[str]:
        ids: list[int] = []
        sent = Message(role="assistant")
        yield self._event({"role": "assistant", "content": ""})
        while (piece := await self._pieces.get()) is not None:
            ids += piece
            begun = self._service.renderer.parse_begun(ids)
            if delta := _delta(sent, begun):
                sent = begun
                yield self._event(delta)
        try:
            completion, message = self._ended()
        except Refused as error:
            yield f"data: {json.dumps(error.body)}\n\n"
            return
        delta = _delta(sent, message)
        if message.tool_calls:
            delta["tool_calls"] = [{"index": n} | call for n, call in enumerate(plain_message(message)["tool_calls"])]
        if delta:
            yield self._event(delta)
        logprobs = self._logprobs(completion.ids, completion.logprobs) if self._body.logprobs else None
        yield self._event({}, _reason(message), logprobs)
        if self._body.stream_options.include_usage:
            last = self._head | {"object": "chat.completion.chunk", "choices": [], "usage": self._usage(completion)}
            yield f"data: {json.dumps(last)}\n\n"
        yield "data: [DONE]\n\n"

    def _ended(self) -> tuple[Completion, Message]:
        """Raises `Refused` where it ended without a completion."""
        try:
            completion = self.job.done.result()
        except CancelledError as error:
            raise Refused(499, "the caller went away") from error
        except EngrainError as error:
            raise Refused(500, str(error), "server_error") from error
        message = self._service.message(self._prepared, completion)
        if completion.error == "grammar":
            raise Refused(500, "constrained decoding gave up on this turn; ask again", "server_error")
        return completion, message

    def _event(self, delta: dict[str, Any], reason: str | None = None, logprobs: Any = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": logprobs}
        chunk = self._head | {"object": "chat.completion.chunk", "choices": [choice]}
        return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"

    def _usage(self, completion: Completion) -> dict[str, int]:
        prompt, written = len(self._prepared.request.prompt), len(completion.ids)
        return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}

    def _logprobs(self, ids: list[int], logprobs: list[float]) -> dict[str, Any]:
        texts = [self._service.text([token]) for token in ids]
        return {
            "content": [
                {"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []}
                for text, logprob in zip(texts, logprobs, strict=True)
            ]
        }


def _tool(schema: dict[str, Any]) -> Tool:
    function = schema["function"]
    parameters = json.dumps(function.get("parameters") or {"type": "object", "properties": {}}, ensure_ascii=False)
    return Tool(function["name"], function.get("description") or "", parameters, _not_here)


def _not_here(**arguments: object) -> None:
    raise AssertionError("a client's tools are called by the client")


def _delta(sent: Message, now: Message) -> dict[str, Any]:
    """What has been added to reasoning and content since."""
    before = {"reasoning_content": (sent.reasoning, now.reasoning), "content": (sent.content, now.content)}
    return {name: new[len(old) :] for name, (old, new) in before.items() if new.startswith(old) and new != old}


def _reason(message: Message) -> str:
    return "length" if message.error == "truncated" else "tool_calls" if message.tool_calls else "stop"


async def _unless_gone(request: Request, turn: Turn) -> dict[str, Any]:
    """The whole answer, or `Refused` once the caller has gone."""
    task = asyncio.ensure_future(turn.whole())
    while not (await asyncio.wait({task}, timeout=0.5))[0]:
        if await request.is_disconnected():
            turn.job.cancel()
    return task.result()
