"""OpenAI chat JSONL, as its fine-tuning and stored completions use it: `{"messages": […], "tools": […]}`.

Read as well: `functions` with `function_call`, content as text parts, `developer` turns, `weight`, and reasoning under
`reasoning_content` or `reasoning`. Not held: phase, error, seconds, tokens, outcome and the trajectory's own names.
"""

from __future__ import annotations

from typing import Any

from engrain.formats.calls import Conversation, arguments_text, tool_name, tools_text
from engrain.formats.node import Node
from engrain.trajectory import Message, ToolCall, Trajectory


def from_openai(record: Node) -> Trajectory:
    conversation = read_messages(record.child("messages"))
    tools = record.child("tools" if record.has("tools") else "functions")
    metadata = record.child("metadata")
    return Trajectory(
        id=record.child("id").text() if record.has("id") else "",
        messages=conversation.finish(record.child("messages")),
        tools=tools_text(tools),
        meta={key: value for key, value in (metadata.value or {}).items() if isinstance(value, str)}
        if isinstance(metadata.value, dict)
        else {},
    )


def read_messages(node: Node) -> Conversation:
    """Also of a conversation that is still to be answered."""
    conversation = Conversation()
    for item in node.items():
        conversation.messages.append(_message(item, conversation))
    return conversation


def _message(node: Node, conversation: Conversation) -> Message:
    match node.child("role").value:
        case "system" | "developer":
            return Message(role="system", content=_content(node))
        case "user":
            return Message(role="user", content=_content(node))
        case "assistant":
            return _assistant(node, conversation)
        case "tool":
            id = node.child("tool_call_id")
            return conversation.answer(id, _content(node), id.text())
        case "function":
            return conversation.answer(node.child("name"), _content(node))
    raise node.child("role").expected("system, developer, user, assistant, tool or function")


def _assistant(node: Node, conversation: Conversation) -> Message:
    calls = [_call(item, conversation) for item in node.child("tool_calls").items()] if node.has("tool_calls") else []
    if node.has("function_call"):
        function = node.child("function_call")
        arguments = arguments_text(function.child("arguments"))
        calls.append(conversation.call(tool_name(function.child("name")), arguments))
    reasoning = node.child("reasoning_content" if node.has("reasoning_content") else "reasoning")
    return Message(
        role="assistant",
        content=_content(node) or (node.child("refusal").text() if node.has("refusal") else ""),
        reasoning=reasoning.text() if reasoning.value is not None else "",
        tool_calls=calls,
        trained=node.child("weight").value != 0,
    )


def _call(node: Node, conversation: Conversation) -> ToolCall:
    if node.has("type") and node.child("type").value != "function":
        raise node.child("type").expected('"function"')
    function = node.child("function")
    id = node.child("id").text() if node.has("id") else ""
    return conversation.call(tool_name(function.child("name")), arguments_text(function.child("arguments")), id)


def _content(node: Node) -> str:
    return content_text(node.child("content"))


def content_text(content: Node) -> str:
    """Text, or text in parts, or nothing."""
    if isinstance(content.value, list):
        return "".join(_part(part) for part in content.items())
    return content.text() if content.value is not None else ""


def _part(node: Node) -> str:
    match node.child("type").value:
        case "text" | "input_text" | "output_text":
            return node.child("text").text()
        case "refusal":
            return node.child("refusal").text()
    raise node.child("type").expected("a text part (images and sound cannot be compiled)")


def to_openai(trajectory: Trajectory) -> dict[str, Any]:
    """The record as an object. Text, calls and ids survive a round trip."""
    record: dict[str, Any] = {
        "id": trajectory.id,
        "messages": [plain_message(message) for message in trajectory.messages],
    }
    if tools := trajectory.tool_schemas():
        record["tools"] = tools
    if trajectory.meta:
        record["metadata"] = trajectory.meta
    return record


def plain_message(message: Message) -> dict[str, Any]:
    """A message as an object, its reasoning under `reasoning_content`."""
    plain: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning:
        plain["reasoning_content"] = message.reasoning
    if message.tool_calls:
        plain["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    if message.role == "tool":
        plain["tool_call_id"] = message.tool_call_id
    if message.role == "assistant" and not message.trained:
        plain["weight"] = 0
    return plain
