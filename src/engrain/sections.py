"""Sections of a context from values: tool schemas, phases, demonstrations.

Invariant: rules of a tool or phase name it, because a rule is read apart from its section. Of a schema nothing is lost:
a keyword without words of its own stays as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from engrain import markdown
from engrain.context import Section
from engrain.errors import InputError, WorkflowError
from engrain.markdown import plain, under
from engrain.signature import flat_schema
from engrain.tool import Tool
from engrain.trajectory import Message, Trajectory


def phase_section(name: str, instructions: str, tools: Sequence[str]) -> Section:
    """The instructions' rules, read as Markdown, and the tools allowed."""
    allowed = [f"call only {', '.join(sorted(tools))}"] if tools else []
    return Section("phase", name, tuple(named(name, rule) for rule in (*markdown.rules(instructions), *allowed)))


def examples_section(trajectories: Iterable[Trajectory], steps: int | None = None) -> Section:
    """A rule a run: "request -> call -> call -> answer", without what the tools said.

    `steps=1` keeps only the first action. Raises `InputError` for a run without a request or an action.
    """
    return Section("examples", "", tuple(_demonstration(one, steps) for one in trajectories))


def tool_section(schema: Mapping[str, Any]) -> Section:
    """A rule for the tool and one a parameter, nested ones too, from a schema in the form of `Tool.schema()`.

    Raises `WorkflowError` if it does not have that form.
    """
    function = schema.get("function", schema)
    if not (isinstance(function, Mapping) and isinstance(function.get("name"), str)):
        raise WorkflowError(f"expected a tool schema with name, description and parameters, got {str(schema)!r:.80}")
    parameters = next((function[key] for key in ("parameters", "inputSchema", "input_schema") if key in function), None)
    tool = Tool(  # checks the name and the schema
        name=function["name"],
        description=str(function.get("description") or ""),
        parameters=json.dumps(parameters or {"type": "object", "properties": {}}),
        function=dict,
    )
    root = json.loads(tool.parameters)
    with suppress(WorkflowError):
        root = flat_schema(root)
    rules = [_described(tool.name, {**root, "description": tool.description}), *_parameters(tool.name, root)]
    return Section("tool", tool.name, tuple(rules))


def named(name: str, rule: str) -> str:
    """A rule of a tool or phase under its name."""
    return rule if rule.startswith((f"{name}:", f"{name}.")) else under(name, rule)


# Schemas


_WRITTEN = {"type", "description", "title", "properties", "required", "$schema"}


def _parameters(path: str, schema: Mapping[str, Any]) -> Iterator[str]:
    for name, part in schema.get("properties", {}).items():
        yield from _parameter(f"{path}.{name}", part, ", required" if name in schema.get("required", ()) else "")


def _parameter(path: str, schema: Any, required: str = "") -> Iterator[str]:
    schema = schema if isinstance(schema, dict) else {} if schema else {"not": {}}
    yield _described(f"{path} ({_type(schema)}{required})", schema)
    items = schema.get("items")
    if isinstance(items, dict) and items.keys() - {"type", "title"}:
        yield from _parameter(f"{path}[]", items)
    yield from _parameters(path, schema)


def _described(head: str, schema: Mapping[str, Any]) -> str:
    facts = [plain(schema.get("description", "")).rstrip("."), *_facts(schema)]
    return under(head, "; ".join(filter(None, facts))) if any(facts) else head


def _facts(schema: Mapping[str, Any]) -> Iterator[str]:
    for key in sorted(schema.keys() - _WRITTEN):
        value = schema[key]
        if key == "enum":
            yield f"one of {', '.join(sorted(map(_value, value)))}"
        elif not (
            (key == "items" and isinstance(value, dict))
            or (key == "additionalProperties" and value is False)
            or (key in ("anyOf", "oneOf") and all(isinstance(one, dict) and one.keys() == {"type"} for one in value))
        ):
            yield f"{key} {_value(value)}"


def _type(schema: Any) -> str:
    if not isinstance(schema, dict):
        return "any"
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else sorted(kinds, key=lambda kind: (kind == "null", kind))
    kinds = kinds or [_type(branch) for branch in (*schema.get("anyOf", ()), *schema.get("oneOf", ()))]
    of = f" of {_type(schema['items'])}" if isinstance(schema.get("items"), dict) else ""
    return " or ".join(dict.fromkeys(kind + of if kind == "array" else kind for kind in kinds)) or "any"


def _value(value: Any) -> str:
    """A word as it is, anything else as JSON: the number 3 and the text "3" differ."""
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z_][\w./:@-]*", value) and value not in _CONSTANTS:
        return value
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


_CONSTANTS = ("true", "false", "null", "NaN", "Infinity")


# Demonstrations


def _demonstration(trajectory: Trajectory, steps: int | None) -> str:
    request = next((message.content for message in trajectory.messages if message.role == "user"), "")
    turns = [message for message in trajectory.messages if message.role == "assistant"][:steps]
    if not (request.strip() and turns):
        missing = "action" if request.strip() else "request"
        raise InputError(f"trajectory {trajectory.id!r} has no {missing} and shows nothing; leave it out")
    return " -> ".join([plain(request), *filter(None, map(_action, turns))])


def _action(turn: Message) -> str:
    return "; ".join(_call(call.name, call.arguments) for call in turn.tool_calls) or plain(turn.content)


def _call(name: str, arguments: str) -> str:
    with suppress(ValueError, AttributeError):
        return f"{name}({', '.join(f'{key}: {_value(value)}' for key, value in sorted(json.loads(arguments).items()))})"
    return f"{name}({plain(arguments)})"
