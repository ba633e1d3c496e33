"""Schema-Guided Dialogue (Rastogi et al., 2020): a dialogue becomes the log of an agent that calls its services.

A system turn with a `service_call` becomes three messages: the call, its results, the utterance. Tools are the intents
of the dialogue's services under their own names, arguments in the order of the tool's properties. Invariant: every call
names one of the trajectory's tools, and tool names are unique (an intent that two services share is one tool with the
parameters of both). Not kept: dialogue acts and states, which no agent sees.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engrain.errors import DataError
from engrain.formats.node import Node, parse_json
from engrain.trajectory import Message, ToolCall, Trajectory

TODAY = "2019-03-01"
"""What the authors of the data took relative dates to be relative to."""


@dataclass(frozen=True)
class Toolset:
    """The tools of one set of services."""

    schemas: str
    order: dict[str, list[str]]
    """Parameter names by tool, in the order of its schema."""
    transactional: frozenset[str]


@dataclass(frozen=True)
class DialogueReader:
    """A dialogue -> its trajectory. `results` is how many rows of a service's results the agent gets to see."""

    services: dict[str, dict[str, Any]]
    split: str = ""
    results: int = 3
    toolsets: dict[tuple[str, ...], Toolset] = field(default_factory=dict)

    def __call__(self, record: Node) -> Trajectory:
        id = record.child("dialogue_id").text()
        names = tuple(self._service(node) for node in record.child("services").items())
        if names not in self.toolsets:
            self.toolsets[names] = toolset([self.services[name] for name in names])
        messages = [Message(role="system", content=f"Services: {', '.join(names)}. Today is {TODAY}.")]
        for node in record.child("turns").items():
            self._turn(node, self.toolsets[names], messages)
        if not any(message.role == "assistant" for message in messages):
            raise record.child("turns").error("expected at least one SYSTEM turn, got none")
        return Trajectory(
            id=id,
            messages=messages,
            tools=self.toolsets[names].schemas,
            workflow="sgd",
            task=id,
            kind="+".join(names),
            split=self.split,
            teacher="log",
            meta={"services": ",".join(names), "source": "Schema-Guided Dialogue, CC BY-SA 4.0"},
        )

    def _service(self, node: Node) -> str:
        if node.text() not in self.services:
            raise node.error(f"service {node.text()!r} is not in the schema file; give the schema.json of this split")
        return node.text()

    def _turn(self, node: Node, tools: Toolset, messages: list[Message]) -> None:
        content, frames = node.child("utterance").text(), node.child("frames").items()
        speaker = node.child("speaker")
        if speaker.value == "USER":
            messages.append(Message(role="user", content=content))
            return
        if speaker.value != "SYSTEM":
            raise speaker.expected('"USER" or "SYSTEM"')
        phase = _phase(frames, tools)
        for frame in frames:
            if frame.has("service_call"):
                call = self._call(frame.child("service_call"), tools, sum(m.role == "tool" for m in messages) + 1)
                rows = frame.child("service_results").items() if frame.has("service_results") else []
                shown = json.dumps([row.mapping() for row in rows[: self.results]], ensure_ascii=False)
                messages += [
                    Message(role="assistant", tool_calls=[call], phase=phase),
                    Message(role="tool", content=shown, tool_call_id=call.id, name=call.name),
                ]
        messages.append(Message(role="assistant", content=content, phase=phase))

    def _call(self, node: Node, tools: Toolset, number: int) -> ToolCall:
        method, parameters = node.child("method"), node.child("parameters")
        if method.text() not in tools.order:
            raise method.error(
                f"expected an intent of the dialogue's services {sorted(tools.order)}, got {method.text()!r}"
            )
        order = tools.order[method.text()]
        for name in parameters.mapping():
            if name not in order:
                raise parameters.child(name).error(f"expected a parameter of {method.text()} {order}, got {name!r}")
        arguments = {name: parameters.child(name).text() for name in order if name in parameters.mapping()}
        return ToolCall(id=f"call_{number}", name=method.text(), arguments=json.dumps(arguments, ensure_ascii=False))


def _phase(frames: list[Node], tools: Toolset) -> str:
    """Where the agent stands in this turn, from what it calls and from its dialogue acts."""
    acts = {
        action.child("act").value
        for frame in frames
        if frame.has("actions")
        for action in frame.child("actions").items()
    }
    methods = {frame.child("service_call").child("method").value for frame in frames if frame.has("service_call")}
    if "NOTIFY_FAILURE" in acts:
        return "recover"
    if methods & tools.transactional:
        return "execute"
    return "validate" if "CONFIRM" in acts else "plan"


def toolset(services: list[dict[str, Any]]) -> Toolset:
    """One function for each intent name of the services."""
    tools: dict[str, dict[str, Any]] = {}
    for service in services:
        for intent in service["intents"]:
            function = _function(service, intent)
            name = function["name"]
            tools[name] = _joined(tools[name], function) if name in tools else function
    schemas = [{"type": "function", "function": function} for function in tools.values()]
    return Toolset(
        schemas=json.dumps(schemas, ensure_ascii=False),
        order={name: list(function["parameters"]["properties"]) for name, function in tools.items()},
        transactional=frozenset(
            intent["name"] for service in services for intent in service["intents"] if intent["is_transactional"]
        ),
    )


def _function(service: dict[str, Any], intent: dict[str, Any]) -> dict[str, Any]:
    slots = {slot["name"]: slot for slot in service["slots"]}
    properties = {}
    for name in [*intent["required_slots"], *intent["optional_slots"]]:
        properties[name] = {"type": "string", "description": slots[name]["description"]}
        if slots[name]["is_categorical"]:
            properties[name]["enum"] = slots[name]["possible_values"]
        if intent["optional_slots"] and intent["optional_slots"].get(name, "dontcare") != "dontcare":
            properties[name]["default"] = intent["optional_slots"][name]
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(intent["required_slots"]),
        "additionalProperties": False,
    }
    return {
        "name": intent["name"],
        "description": f"{service['service_name']}: {intent['description']}",
        "parameters": parameters,
    }


def _joined(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """One function that accepts what either does."""
    first, second = one["parameters"], other["parameters"]
    properties = {**first["properties"]}
    for name, value in second["properties"].items():
        known = properties.get(name)
        if known is None:
            properties[name] = value
        elif known.get("enum") != value.get("enum"):
            values = [*dict.fromkeys([*known.get("enum", []), *value.get("enum", [])])]
            both = "enum" in known and "enum" in value
            bare = {key: item for key, item in known.items() if key != "enum"}
            properties[name] = {**bare, "enum": values} if both else bare
    required = [name for name in first["required"] if name in second["required"]]
    return {
        "name": one["name"],
        "description": f"{one['description']}. {other['description']}",
        "parameters": {**first, "properties": properties, "required": required},
    }


def read_services(path: Path) -> dict[str, dict[str, Any]]:
    """Services by name from a `schema.json`. Raises `DataError` if it is missing or has another form."""
    node = Node(None, str(path))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise node.error(f"cannot read the services' schema: {error}; give the schema.json of this split") from error
    try:
        services = {service["service_name"]: service for service in parse_json(node, text)}
        toolset(list(services.values()))
    except (KeyError, TypeError, AttributeError) as error:
        raise node.error(f"expected a list of SGD services, but {type(error).__name__}: {error}") from error
    return services


def schema_beside(path: Path) -> Path:
    """The schema of a dialogue file: `schema.json` in its folder, or in the folder that bears its name."""
    named = path.parent / path.name.split(".")[0] / "schema.json"
    choices = [named, path.parent / "schema.json"]
    for choice in choices:
        if choice.is_file():
            return choice
    raise DataError(
        f"SGD dialogues need their schema; expected {choices[0]} or {choices[1]}, or give its path", file=str(path)
    )
