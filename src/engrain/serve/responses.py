"""`/v1/responses`. A conversation goes on with `previous_response_id`: the last `MOST_STORED` responses are kept, in
memory, each for its own tenant; with `store: false` it is not. Not taken, and refused: tools of other kinds than
functions, running in the background, structured output. Not counted, and told as 0: cached and reasoning tokens."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Literal

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from engrain.formats.calls import tools_text
from engrain.formats.node import Node
from engrain.formats.responses import read_items
from engrain.keys import Caller
from engrain.recent import Recent
from engrain.serve.chat import answer_under
from engrain.serve.items import Written, items_of
from engrain.serve.live import Ended, Live
from engrain.serve.refused import Refused
from engrain.serve.server import Server
from engrain.service import Asked, as_tool
from engrain.trajectory import Message
from engrain.turn import LONGEST_TURN, Sampling

MOST_STORED = 10_000
Done = Callable[[dict[str, Any], Message], None]
"""Told of a response and its turn once they are whole."""


class OneFunction(BaseModel):
    type: Literal["function"]
    name: str


class Format(BaseModel):
    type: Literal["text"] = "text"


class Text(BaseModel):
    format: Format = Format()


class ResponsesRequest(BaseModel):
    """What is understood of a request; unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore")
    model: str
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none", "required"] | OneFunction = "auto"
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    metadata: dict[str, str] | None = None
    background: Literal[False] | None = None
    text: Text | None = None

    def messages(self, before: list[Message]) -> list[Message]:
        """The conversation, without instructions. Raises `InputError`."""
        return read_items(Node(self.input, path="input"), before).messages

    def asked(self, messages: list[Message]) -> Asked:
        """Raises `InputError` for tools that cannot be read."""
        given = Node(self.tools or [], path="tools")
        for tool in given.items():
            if tool.child("type").value != "function":
                raise tool.child("type").expected('"function"')
        schemas = json.loads(tools_text(Node([{"type": "function", "function": one} for one in given.value])))
        one = self.tool_choice.name if isinstance(self.tool_choice, OneFunction) else ""
        system = [Message(role="system", content=self.instructions)] if self.instructions else []
        return Asked(
            [*system, *messages],
            None if self.tools is None else [as_tool(schema["function"]) for schema in schemas],
            answer_under("required" if isinstance(self.tool_choice, OneFunction) else self.tool_choice),
            self.max_output_tokens or LONGEST_TURN,
            Sampling(self.temperature or 0.0, self.top_p or 1.0),
            one,
        )


@dataclass(frozen=True)
class _Kept:
    tenant: str
    messages: list[Message]
    """All that was said, the answer last."""
    response: dict[str, Any]


def routes(server: Server) -> APIRouter:
    router, stored = APIRouter(), Recent[_Kept](MOST_STORED)
    known = Depends(server.caller)

    def own(caller: Caller, id: str) -> _Kept:
        """Raises `Refused`; another tenant's does not exist."""
        if id not in stored or stored[id].tenant != caller.tenant:
            raise Refused(404, f"no response {id!r} is stored here", code="response_not_found")
        return stored[id]

    @router.post("/v1/responses", response_model=None)
    async def create(body: ResponsesRequest, request: Request, caller: Caller = known) -> Response:
        previous = body.previous_response_id
        before = own(caller, previous).messages if previous else []
        said: list[Message] = []

        def asked() -> Asked:
            said.extend(body.messages(before))
            return body.asked(said)

        live = await server.begin(request, caller, body.model, asked)
        answer = _Answer(live, body)

        def ended(response: dict[str, Any], message: Message) -> None:
            if body.store is not False:
                stored[answer.id] = _Kept(caller.tenant, [*said, message], response)

        if body.stream:
            events = answer.events(ended)
            return StreamingResponse(events, media_type="text/event-stream", headers=live.headers)
        found = await live.ended_unless_gone(request)
        response = answer.whole(found)
        ended(response, found.message)
        return JSONResponse(response, headers=live.headers)

    @router.get("/v1/responses/{id}")
    async def retrieve(id: str, caller: Caller = known) -> dict[str, Any]:
        return own(caller, id).response

    @router.delete("/v1/responses/{id}")
    async def delete(id: str, caller: Caller = known) -> dict[str, Any]:
        own(caller, id)
        stored.pop(id)
        return {"id": id, "object": "response", "deleted": True}

    return router


class _Answer:
    def __init__(self, live: Live, body: ResponsesRequest) -> None:
        self._live, self._body = live, body
        self.id = f"resp_{uuid.uuid4().hex}"
        self._created, self._events_sent = int(time.time()), 0

    def whole(self, ended: Ended) -> dict[str, Any]:
        return self._response(items_of(ended.message), ended)

    async def events(self, done: Done) -> AsyncIterator[str]:
        """Server-sent events, as OpenAI numbers and names them."""
        try:
            async for event in self._events(done):
                yield event
        finally:
            self._live.job.cancel()  # if nobody listens any more

    async def _events(self, done: Done) -> AsyncIterator[str]:
        begun = self._response([], None)
        yield self._event("response.created", response=begun)
        yield self._event("response.in_progress", response=begun)
        written = Written()
        async for message in self._live.begun():
            for kind, fields in written.more(message):
                yield self._event(kind, **fields)
        try:
            ended = await self._live.ended()
        except Refused as error:
            problem = error.body["error"]
            failed = begun | {"status": "failed", "error": {"code": "server_error", "message": problem["message"]}}
            yield self._event("response.failed", response=failed)
            return
        for kind, fields in (*written.more(ended.message), *written.finish(ended.message)):
            yield self._event(kind, **fields)
        response = self._response(written.items, ended)
        done(response, ended.message)
        kind = "response.completed" if response["status"] == "completed" else "response.incomplete"
        yield self._event(kind, response=response)

    def _event(self, kind: str, **fields: Any) -> str:
        event = {"type": kind, "sequence_number": self._events_sent, **fields}
        self._events_sent += 1
        return f"event: {kind}\ndata: {json.dumps(event, ensure_ascii=False)}\n\n"

    def _response(self, items: list[dict[str, Any]], ended: Ended | None) -> dict[str, Any]:
        body, cut = self._body, ended is not None and ended.reason == "length"
        choice = body.tool_choice
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": "in_progress" if ended is None else "incomplete" if cut else "completed",
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": body.model,
            "output": items,
            "parallel_tool_calls": False,
            "previous_response_id": body.previous_response_id,
            "store": body.store is not False,
            "temperature": body.temperature or 0.0,
            "text": {"format": {"type": "text"}},
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": body.tools or [],
            "top_p": body.top_p or 1.0,
            "truncation": "disabled",
            "usage": self._usage(ended) if ended is not None else None,
        }

    def _usage(self, ended: Ended) -> dict[str, Any]:
        read, written = len(self._live.prepared.request.prompt), len(ended.completion.ids)
        return {
            "input_tokens": read,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": written,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": read + written,
        }
