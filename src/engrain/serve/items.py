"""A turn as the Responses API's items: thoughts, words, calls; and the events that tell of them as they come about."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

from engrain.serve.live import added
from engrain.trajectory import Message

Told = tuple[str, dict[str, Any]]
"""An event's type, and its fields."""


class Written:
    """The items of a turn as they come about, and the events that tell of them."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._sent = Message(role="assistant")
        self._open = False

    def more(self, message: Message) -> Iterator[Told]:
        delta = added(self._sent, message)
        if delta:
            self._sent = message
        for name, kind in (("reasoning_content", "reasoning"), ("content", "message")):
            if text := delta.get(name):
                if not self._open or self.items[-1]["type"] != kind:
                    yield from self._close()
                    yield from self._start(_thoughts("") if kind == "reasoning" else _said(""))
                yield from self._extend(text)

    def finish(self, message: Message) -> Iterator[Told]:
        yield from self._close()
        for item in _calls(message):
            self.items.append(item)
            place: dict[str, Any] = {"output_index": len(self.items) - 1}
            named = place | {"item_id": item["id"]}
            yield "response.output_item.added", place | {"item": item | {"arguments": "", "status": "in_progress"}}
            yield "response.function_call_arguments.delta", named | {"delta": item["arguments"]}
            yield "response.function_call_arguments.done", named | {
                "name": item["name"], "arguments": item["arguments"]
            }  # fmt: skip
            yield "response.output_item.done", place | {"item": item}

    def _start(self, item: dict[str, Any]) -> Iterator[Told]:
        self.items.append(item)
        self._open = True
        empty = item | {"content": [], "status": "in_progress"}
        yield "response.output_item.added", {"output_index": len(self.items) - 1, "item": empty}
        yield "response.content_part.added", self._place() | {"part": dict(item["content"][0])}

    def _extend(self, text: str) -> Iterator[Told]:
        self.items[-1]["content"][0]["text"] += text
        yield f"{self._kind()}.delta", self._place() | {"delta": text} | self._logprobs()

    def _close(self) -> Iterator[Told]:
        if self._open:
            self._open = False
            part = dict(self.items[-1]["content"][0])
            yield f"{self._kind()}.done", self._place() | {"text": part["text"]} | self._logprobs()
            yield "response.content_part.done", self._place() | {"part": part}
            yield "response.output_item.done", {"output_index": len(self.items) - 1, "item": dict(self.items[-1])}

    def _kind(self) -> str:
        return "response.reasoning_text" if self.items[-1]["type"] == "reasoning" else "response.output_text"

    def _logprobs(self) -> dict[str, Any]:
        return {"logprobs": []} if self.items[-1]["type"] == "message" else {}

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, "content_index": 0}


def items_of(message: Message) -> list[dict[str, Any]]:
    thoughts = [_thoughts(message.reasoning)] if message.reasoning else []
    words = [_said(message.content)] if message.content else []
    return [*thoughts, *words, *_calls(message)]


def _thoughts(text: str) -> dict[str, Any]:
    part = {"type": "reasoning_text", "text": text}
    return {
        "id": f"rs_{uuid.uuid4().hex}",
        "type": "reasoning",
        "summary": [],
        "content": [part],
        "status": "completed",
    }


def _said(text: str) -> dict[str, Any]:
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    id = f"msg_{uuid.uuid4().hex}"
    return {"id": id, "type": "message", "role": "assistant", "content": [part], "status": "completed"}


def _calls(message: Message) -> list[dict[str, Any]]:
    return [
        {"id": f"fc_{uuid.uuid4().hex}", "type": "function_call", "call_id": call.id, "name": call.name,
         "arguments": call.arguments, "status": "completed"}
        for call in message.tool_calls
    ]  # fmt: skip
