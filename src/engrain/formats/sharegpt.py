"""ShareGPT: `{"conversations": [{"from": "human", "value": …}, …], "tools": "<JSON text>"}`.

Calls are turns of their own (`function_call`, answered by `observation` or `tool`) or stand inside a `gpt` turn between
`<tool_call>` marks, as Hermes writes them. The format has no call ids (they are numbered in order), and a `gpt` turn
followed by a `function_call` is one assistant message. Reasoning stands between `<think>` marks.
"""

from __future__ import annotations

import json
import re
from typing import Any

from engrain.formats.calls import Conversation, call_fields, tools_text
from engrain.formats.node import Node
from engrain.trajectory import Message, Trajectory

_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
_RESULT = re.compile(r"<tool_response>\n?(.*?)\n?</tool_response>", re.DOTALL)
_THINK = re.compile(r"\A<think>\n?(.*?)\n?</think>\n{0,2}", re.DOTALL)


def from_sharegpt(record: Node) -> Trajectory:
    conversation = Conversation()
    if record.has("system"):
        conversation.messages.append(Message(role="system", content=record.child("system").text()))
    for node in record.child("conversations").items():
        _turn(node, conversation)
    return Trajectory(
        id=str(record.child("id").value) if record.has("id") else "",
        messages=conversation.finish(record.child("conversations")),
        tools=tools_text(record.child("tools")),
    )


def _turn(node: Node, conversation: Conversation) -> None:
    """Append what one turn means."""
    value, messages = node.child("value"), conversation.messages
    match node.child("from").value:
        case "system":
            messages.append(Message(role="system", content=value.text()))
        case "human" | "user":
            messages.append(Message(role="user", content=value.text()))
        case "gpt" | "assistant":
            messages.append(_assistant(node, conversation))
        case "function_call" | "tool_call":
            _calls(node, conversation)
        case "observation" | "tool" | "function_response" | "tool_response":
            texts = _RESULT.findall(value.text()) or [value.text()]
            messages.extend(conversation.answer(node, text) for text in texts)
        case _:
            raise node.child("from").expected("system, human, gpt, function_call, observation or tool")


def _assistant(node: Node, conversation: Conversation) -> Message:
    text, reasoning = node.child("value").text(), ""
    if think := _THINK.match(text):
        text, reasoning = text[think.end() :], think[1]
    marked = _CALL.findall(text)
    calls = [conversation.call(*fields) for found in marked for fields in call_fields(node.child("value"), found)]
    content = _CALL.sub("", text).strip() if marked else text
    trained = node.child("weight").value != 0
    return Message(role="assistant", content=content, reasoning=reasoning, tool_calls=calls, trained=trained)


def _calls(node: Node, conversation: Conversation) -> None:
    """A turn of calls belongs to the assistant's text just before it, if there is one."""
    value = node.child("value")
    calls = [conversation.call(*fields) for fields in call_fields(value, value.text())]
    trained = node.child("weight").value != 0
    last = conversation.messages[-1] if conversation.messages else None
    if last is not None and last.role == "assistant" and not last.tool_calls and last.trained == trained:
        last.tool_calls.extend(calls)
    else:
        conversation.messages.append(Message(role="assistant", tool_calls=calls, trained=trained))


def to_sharegpt(trajectory: Trajectory) -> dict[str, Any]:
    """The record as an object; arguments keep their exact text."""
    turns = [turn for message in trajectory.messages for turn in _plain(message)]
    return {"id": trajectory.id, "conversations": turns, "tools": trajectory.tools}


def _plain(message: Message) -> list[dict[str, Any]]:
    names = {"system": "system", "user": "human", "tool": "observation"}
    if message.role != "assistant":
        return [{"from": names[message.role], "value": message.content}]
    weight = {} if message.trained else {"weight": 0}
    think = f"<think>\n{message.reasoning}\n</think>\n\n" if message.reasoning else ""
    turns: list[dict[str, Any]] = []
    if think or message.content or not message.tool_calls:
        turns.append({"from": "gpt", "value": think + message.content, **weight})
    if message.tool_calls:
        calls = [
            f'{{"name": {json.dumps(call.name, ensure_ascii=False)}, "arguments": {call.arguments}}}'
            for call in message.tool_calls
        ]
        value = calls[0] if len(calls) == 1 else f"[{', '.join(calls)}]"
        turns.append({"from": "function_call", "value": value, **weight})
    return turns
