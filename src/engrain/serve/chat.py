"""`/v1/chat/completions`. Not taken, and refused: more than one choice, alternatives in `logprobs`, images and sound,
penalties."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any, Literal

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from engrain.formats.calls import tools_text
from engrain.formats.node import Node
from engrain.formats.openai import plain_message, read_messages
from engrain.keys import Caller
from engrain.serve.live import Ended, Live, added
from engrain.serve.refused import Refused
from engrain.serve.server import Server
from engrain.service import Asked, as_tool
from engrain.trajectory import Message
from engrain.turn import LONGEST_TURN, Sampling

MOST_STOPS = 4


class StreamOptions(BaseModel):
    include_usage: bool = False


class Named(BaseModel):
    name: str


class OneTool(BaseModel):
    type: Literal["function"]
    function: Named


class ChatRequest(BaseModel):
    """What is understood of a request; unknown fields are ignored, as OpenAI's own servers do."""

    model_config = ConfigDict(extra="ignore")
    model: str
    messages: list[dict[str, Any]] = Field(min_length=1)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none", "required"] | OneTool = "auto"
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    """Greedy unless asked otherwise: that is what was trained and measured."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = None
    logprobs: bool | None = None
    top_logprobs: Literal[0] | None = None
    n: Literal[1] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None

    def asked(self) -> Asked:
        """Raises `InputError` for messages or tools that cannot be read."""
        schemas = json.loads(tools_text(Node(self.tools or [], path="tools")))
        one = self.tool_choice.function.name if isinstance(self.tool_choice, OneTool) else ""
        return Asked(
            read_messages(Node(self.messages, path="messages")).messages,
            None if self.tools is None else [as_tool(schema["function"]) for schema in schemas],
            answer_under("required" if isinstance(self.tool_choice, OneTool) else self.tool_choice),
            self.max_completion_tokens or self.max_tokens or LONGEST_TURN,
            Sampling(self.temperature or 0.0, self.top_p or 1.0, self.seed or 0),
            one,
        )

    def stops(self) -> list[str]:
        """Raises `Refused`."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > MOST_STOPS or not all(stops):
            raise Refused(400, f"stop: expected at most {MOST_STOPS} texts, none of them empty")
        return stops


def answer_under(choice: Literal["auto", "none", "required"]) -> Literal["may", "must", "must not"]:
    """What a tool choice means for an answer in words."""
    return "may" if choice == "auto" else "must" if choice == "none" else "must not"


def routes(server: Server) -> APIRouter:
    router = APIRouter()
    known = Depends(server.caller)

    @router.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest, request: Request, caller: Caller = known) -> Response:
        live = await server.begin(request, caller, body.model, body.asked, body.stops())
        answer = _Answer(server, live, body)
        if body.stream:
            return StreamingResponse(answer.events(), media_type="text/event-stream", headers=live.headers)
        return JSONResponse(answer.whole(await live.ended_unless_gone(request)), headers=live.headers)

    return router


class _Answer:
    def __init__(self, server: Server, live: Live, body: ChatRequest) -> None:
        self._service, self._live, self._body = server.service, live, body
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}

    def whole(self, ended: Ended) -> dict[str, Any]:
        choice = {"index": 0, "message": plain_message(ended.message), "finish_reason": ended.reason}
        choice["logprobs"] = self._logprobs(ended)
        return self._head | {"object": "chat.completion", "choices": [choice], "usage": self._usage(ended)}

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events: text as it is certain, a call when it is whole, then why it ended."""
        try:
            async for event in self._events():
                yield event
        finally:
            self._live.job.cancel()  # if nobody listens any more

    async def _events(self) -> AsyncIterator[str]:
        sent = Message(role="assistant")
        yield self._event({"role": "assistant", "content": ""})
        async for begun in self._live.begun():
            if delta := added(sent, begun):
                sent = begun
                yield self._event(delta)
        try:
            ended = await self._live.ended()
        except Refused as error:
            yield error.event()
            return
        delta: dict[str, Any] = dict(added(sent, ended.message))
        if ended.message.tool_calls:
            calls = plain_message(ended.message)["tool_calls"]
            delta["tool_calls"] = [{"index": n} | call for n, call in enumerate(calls)]
        if delta:
            yield self._event(delta)
        yield self._event({}, ended.reason, self._logprobs(ended))
        if self._body.stream_options is not None and self._body.stream_options.include_usage:
            last = self._head | {"object": "chat.completion.chunk", "choices": [], "usage": self._usage(ended)}
            yield f"data: {json.dumps(last)}\n\n"
        yield "data: [DONE]\n\n"

    def _event(self, delta: dict[str, Any], reason: str | None = None, logprobs: Any = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": logprobs}
        chunk = self._head | {"object": "chat.completion.chunk", "choices": [choice]}
        return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"

    def _usage(self, ended: Ended) -> dict[str, int]:
        prompt, written = len(self._live.prepared.request.prompt), len(ended.completion.ids)
        return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}

    def _logprobs(self, ended: Ended) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        tokens = zip(ended.completion.ids, ended.completion.logprobs, strict=True)
        texts = [(self._service.text([token]), logprob) for token, logprob in tokens]
        return {
            "content": [
                {"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []}
                for text, logprob in texts
            ]
        }
