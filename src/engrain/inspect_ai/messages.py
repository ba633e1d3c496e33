"""Messages of Inspect and of Engrain, both ways. Images and sound are refused."""

from __future__ import annotations

import json
from collections.abc import Sequence

from inspect_ai.model import (
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageTool,
    ChatMessageUser,
    Content,
    ContentReasoning,
    ContentText,
)
from inspect_ai.tool import ToolCall as InspectCall
from inspect_ai.tool import ToolCallError

from engrain.errors import InputError
from engrain.trajectory import Message, ToolCall


def from_inspect(message: ChatMessage) -> Message:
    """Raises `InputError`."""
    if isinstance(message, ChatMessageTool):
        said = message.error.message if message.error is not None and not message.text else _text(message.content)
        return Message(role="tool", content=said, tool_call_id=message.tool_call_id or "", name=message.function or "")
    if not isinstance(message, ChatMessageAssistant):
        return Message(role=message.role, content=_text(message.content))
    parts = [] if isinstance(message.content, str) else message.content
    calls = [
        ToolCall(id=call.id, name=call.function, arguments=json.dumps(call.arguments, ensure_ascii=False))
        for call in message.tool_calls or []
    ]
    thoughts = "".join(part.reasoning for part in parts if isinstance(part, ContentReasoning))
    return Message(role="assistant", content=_text(message.content), reasoning=thoughts, tool_calls=calls)


def to_inspect(message: Message) -> ChatMessage:
    match message.role:
        case "system":
            return ChatMessageSystem(content=message.content)
        case "user":
            return ChatMessageUser(content=message.content)
        case "tool":
            error = ToolCallError("unknown", message.content) if message.error else None
            return ChatMessageTool(
                content=message.content, tool_call_id=message.tool_call_id, function=message.name, error=error
            )
    thoughts: list[Content] = [ContentReasoning(reasoning=message.reasoning)] if message.reasoning else []
    words: list[Content] = [ContentText(text=message.content)] if message.content else []
    calls = [_call(call) for call in message.tool_calls]
    return ChatMessageAssistant(content=[*thoughts, *words] if thoughts else message.content, tool_calls=calls or None)


def _call(call: ToolCall) -> InspectCall:
    try:
        arguments = json.loads(call.arguments)
    except ValueError as error:
        return InspectCall(call.id, call.name, {}, parse_error=f"arguments are not JSON: {error}")
    return InspectCall(call.id, call.name, arguments)


def _text(content: str | Sequence[Content]) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for part in content:
        if isinstance(part, ContentText):
            texts.append(part.text)
        elif not isinstance(part, ContentReasoning):
            raise InputError(f"expected text, got content of type {part.type!r}; an agent reads nothing else")
    return "".join(texts)
