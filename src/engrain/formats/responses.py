"""The items of OpenAI's Responses API, as input. Thoughts, words and calls side by side are one assistant turn."""

from __future__ import annotations

from engrain.formats.calls import Conversation, arguments_text, tool_name
from engrain.formats.node import Node
from engrain.formats.openai import content_text
from engrain.trajectory import Message


def read_items(node: Node, before: list[Message]) -> Conversation:
    """What was said before and then a text of the user's, or a list of items."""
    names = {call.id: call.name for message in before for call in message.tool_calls}
    conversation = Conversation(list(before), names)
    if isinstance(node.value, str):
        conversation.messages.append(Message(role="user", content=node.value))
        return conversation
    open_turn = False  # what was said before is whole
    for item in node.items():
        kind = item.child("type").value if item.has("type") else "message"
        message = _message(item, kind, conversation)
        if open_turn and message.role == "assistant":
            last = conversation.messages[-1]
            conversation.messages[-1] = last.model_copy(
                update={
                    "content": last.content + message.content,
                    "reasoning": last.reasoning + message.reasoning,
                    "tool_calls": [*last.tool_calls, *message.tool_calls],
                }
            )
        else:
            conversation.messages.append(message)
        open_turn = message.role == "assistant"
    return conversation


def _message(item: Node, kind: object, conversation: Conversation) -> Message:
    match kind:
        case "message":
            return _words(item)
        case "reasoning":
            parts = [part.child("text").text() for part in item.child("content").items()] if item.has("content") else []
            return Message(role="assistant", reasoning="".join(parts))
        case "function_call":
            arguments = arguments_text(item.child("arguments"))
            call = conversation.call(tool_name(item.child("name")), arguments, item.child("call_id").text())
            return Message(role="assistant", tool_calls=[call])
        case "function_call_output":
            id, output = item.child("call_id"), item.child("output")
            return conversation.answer(id, content_text(output), id.text())
    raise item.child("type").expected("message, reasoning, function_call or function_call_output")


def _words(item: Node) -> Message:
    content = content_text(item.child("content"))
    match item.child("role").value:
        case "system" | "developer":
            return Message(role="system", content=content)
        case "user":
            return Message(role="user", content=content)
        case "assistant":
            return Message(role="assistant", content=content)
    raise item.child("role").expected("system, developer, user or assistant")
