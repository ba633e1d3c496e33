"""What the chat formats share: tool schemas, and which call a tool turn answers.

Invariant: in a trajectory from here every tool turn answers a call made before it and carries that tool's name.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from engrain.formats.node import Node, parse_json, raw_fields, raw_items
from engrain.trajectory import Message, ToolCall


@dataclass
class Conversation:
    """The messages read so far and the calls made in them."""

    messages: list[Message] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    """Tool name by call id."""
    waiting: list[str] = field(default_factory=list)
    """Ids of the calls without an answer yet, oldest first."""
    count: int = 0

    def call(self, name: str, arguments: str, id: str = "") -> ToolCall:
        self.count += 1
        call = ToolCall(id=id or f"call_{self.count}", name=name, arguments=arguments)
        self.names[call.id] = name
        self.waiting.append(call.id)
        return call

    def answer(self, node: Node, content: str, id: str = "") -> Message:
        """The tool turn for call `id`, or for the oldest call that still waits for one."""
        if not id and not self.waiting:
            raise node.error("a tool result without a call before it; put the call first or drop the result")
        id = id or self.waiting[0]
        if id not in self.names:
            raise node.error(f"answers call {id!r}, which no earlier assistant turn made; its calls: {[*self.names]}")
        if id in self.waiting:
            self.waiting.remove(id)
        return Message(role="tool", content=content, tool_call_id=id, name=self.names[id])

    def finish(self, node: Node) -> list[Message]:
        if not any(message.role == "assistant" for message in self.messages):
            raise node.error(f"expected at least one assistant turn, got {len(self.messages)} turns without one")
        return self.messages


def tool_name(node: Node) -> str:
    if not node.text():
        raise node.error("expected the name of a tool, got empty text")
    return node.text()


def arguments_text(node: Node) -> str:
    """Arguments as JSON text: given text is kept byte for byte, except that none at all becomes `{}`."""
    if node.value is None or node.value == "":
        return "{}"
    if isinstance(node.value, dict):
        return json.dumps(node.value, ensure_ascii=False)
    if not isinstance(node.parsed().value, dict):
        raise node.expected("the JSON text of an object")
    return node.text()


def call_fields(node: Node, text: str) -> list[tuple[str, str]]:
    """Name and arguments text of each call in `{"name": …, "arguments": …}` or a list of such, as ShareGPT holds."""
    parsed = Node(parse_json(node, text), node.file, node.line, node.path)
    if isinstance(parsed.value, list):
        pairs = zip(parsed.items(), raw_items(text), strict=True)
        return [call for item, raw in pairs for call in call_fields(item, raw)]
    name, arguments = tool_name(parsed.child("name")), parsed.child("arguments")
    if isinstance(arguments.value, dict):
        return [(name, raw_fields(text)["arguments"])]
    return [(name, arguments_text(arguments))]


def tools_text(node: Node) -> str:
    """JSON text of the offered function schemas, from a list or its JSON text; bare functions are wrapped."""
    if node.value is None or node.value == "":
        return "[]"
    given = node.parsed() if isinstance(node.value, str) else node
    schemas = [_schema(item) for item in given.items()]
    if isinstance(node.value, str) and schemas == given.value:
        return node.value
    return json.dumps(schemas, ensure_ascii=False)


def _schema(node: Node) -> dict[str, Any]:
    if node.has("function"):
        tool_name(node.child("function").child("name"))
        return node.mapping()
    tool_name(node.child("name"))
    return {"type": "function", "function": {key: value for key, value in node.mapping().items() if key != "type"}}
