"""From a Python function to the JSON Schema of its arguments.

Type hints give the types, the docstring the words. The schema is flat: definitions are written in place, no titles, no
unknown arguments, and what may be left out is left out and never null.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from itertools import pairwise
from typing import Annotated, Any, NotRequired, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python
from typing_extensions import TypedDict

from engrain.errors import ToolFailure, WorkflowError


@dataclass(frozen=True)
class Signature:
    """What an agent has to know to call a function, and the function made to take an agent's arguments."""

    description: str
    schema: dict[str, Any]
    function: Callable[..., Any]
    takes_state: bool


def read_signature(function: Callable[..., Any], name: str, state: type | None) -> Signature:
    """Raises `WorkflowError` if a hint or the docstring is missing or cannot be used."""
    description, documented = _docstring(function)
    if not description:
        raise WorkflowError(f"tool {name!r} has no docstring; its first paragraph is what the agent reads")
    parameters = list(inspect.signature(function).parameters.values())
    try:
        hints = get_type_hints(function, include_extras=True)
    except Exception as error:
        raise WorkflowError(f"tool {name!r}: cannot resolve its type hints: {error}; use module-level types") from error
    if unknown := set(documented) - {parameter.name for parameter in parameters}:
        raise WorkflowError(f"tool {name!r}: its docstring describes {sorted(unknown)}, which it does not take")
    takes_state = state is not None and bool(parameters) and hints.get(parameters[0].name) is state
    parameters = parameters[takes_state:]
    try:
        adapter = TypeAdapter[Any](_arguments_type(name, parameters, hints, documented))
        full = adapter.json_schema()
    except (PydanticUserError, NameError, TypeError, AttributeError) as error:  # typing raises the last two
        raise WorkflowError(f"tool {name!r}: a type hint has no JSON Schema: {str(error).splitlines()[0]}") from error
    schema = {"type": "object", "properties": {}, **flat_schema(full)}
    for parameter in parameters:
        schema["properties"][parameter.name] = _with_default(schema["properties"][parameter.name], parameter)
    return Signature(description, schema, _typed(function, adapter.validate_python), takes_state)


def _typed(function: Callable[..., Any], validate: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def call(*state: Any, **arguments: Any) -> Any:
        try:
            arguments = validate(arguments)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            path = ".".join(str(part) for part in first["loc"])
            raise ToolFailure("bad_arguments", f"{path}: {first['msg']}") from error
        return function(*state, **arguments)

    return call


def _arguments_type(
    name: str, parameters: list[inspect.Parameter], hints: dict[str, Any], documented: dict[str, str]
) -> Any:
    fields: dict[str, Any] = {}
    for parameter in parameters:
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise WorkflowError(f"tool {name!r}: '{parameter}' cannot be passed by name; use ordinary parameters")
        if parameter.name not in hints:
            raise WorkflowError(f"tool {name!r}: parameter {parameter.name!r} has no type hint; add one")
        if isinstance(parameter.default, FieldInfo):
            raise WorkflowError(f"tool {name!r}: write {parameter.name!r} as Annotated[type, Field(...)] = default")
        hint = Annotated[hints[parameter.name], object()]  # else typing gives `str | int` where `int | str` came before
        if parameter.name in documented:
            hint = Annotated[hint, Field(description=documented[parameter.name])]
        fields[parameter.name] = hint if parameter.default is parameter.empty else NotRequired[hint]
    typed: Any = TypedDict("arguments", fields)  # pyright: ignore
    typed.__pydantic_config__ = ConfigDict(extra="forbid")
    return typed


def flat_schema(root: dict[str, Any]) -> dict[str, Any]:
    """The same schema with definitions written in place, no titles and, for objects, no unknown properties.

    Raises `WorkflowError` where that is not the same: a type that contains itself, `allOf`, conditions.
    """
    return _flat(root, root, ())


_NOT_FLAT = {"allOf", "not", "if", "dependentSchemas", "patternProperties", "unevaluatedProperties", "$dynamicRef"}


def _flat(node: Any, root: dict[str, Any], path: tuple[str, ...]) -> Any:
    if isinstance(node, list):
        return [_flat(part, root, path) for part in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        target = node["$ref"]
        if target in path:
            raise WorkflowError(f"type {target!r} contains itself; give tools flat arguments")
        rest = {key: value for key, value in node.items() if key != "$ref"}
        return _flat({**_resolved(target, root), **rest}, root, (*path, target))
    if odd := _NOT_FLAT.intersection(node) or ("properties" in node and {"anyOf", "oneOf"}.intersection(node)):
        raise WorkflowError(f"schema uses {', '.join(sorted(odd))}; give tools flat arguments")
    flat: dict[str, Any] = {}
    for key, value in node.items():
        if key == "properties":
            flat[key] = {name: _flat(part, root, path) for name, part in value.items()}
        elif key == "const":
            flat["enum"] = [value]
        elif key in ("enum", "default", "examples", "required"):
            flat[key] = value
        elif key not in ("title", "$defs", "definitions", "discriminator"):
            flat[key] = _flat(value, root, path)
    if "properties" in flat:
        flat.setdefault("additionalProperties", False)
    return flat


def _resolved(reference: str, root: dict[str, Any]) -> dict[str, Any]:
    node: Any = root
    try:
        for part in reference.removeprefix("#/").split("/"):
            node = node[part]
    except (KeyError, TypeError) as error:
        raise WorkflowError(f"schema reference {reference!r} points to nothing in the schema") from error
    return node


def _with_default(schema: dict[str, Any], parameter: inspect.Parameter) -> dict[str, Any]:
    if parameter.default is parameter.empty:
        return schema
    if parameter.default is not None:
        return {**schema, "default": to_jsonable_python(parameter.default, fallback=str)}
    branches = [branch for branch in schema.get("anyOf", []) if branch != {"type": "null"}]
    if len(branches) == 1:
        return {**branches[0], **{key: value for key, value in schema.items() if key != "anyOf"}}
    return {**schema, "anyOf": branches} if branches else schema


_SECTION = re.compile(r"(Args|Arguments|Parameters|Returns?|Raises|Yields|Examples?|Notes?|Warnings?):\s*$")
_ENTRY = re.compile(r"(\s*)(\w+)\s*(?:\([^)]*\))?:\s*(.*)$")


def _docstring(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """The text before the first section, and the entries of the `Args:` section."""
    lines = (inspect.getdoc(function) or "").splitlines()
    starts = [number for number, line in enumerate(lines) if _SECTION.match(line)] + [len(lines)]
    paragraphs = "\n".join(lines[: starts[0]]).strip().split("\n\n")
    description = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
    entries: dict[str, str] = {}
    for start, end in pairwise(starts):
        if lines[start].startswith(("Args", "Arguments", "Parameters")):
            entries |= _entries(lines[start + 1 : end])
    return description, entries


def _entries(lines: list[str]) -> dict[str, str]:
    entries: dict[str, str] = {}
    indent, name = None, ""
    for line in filter(str.strip, lines):
        entry = _ENTRY.match(line)
        if entry and (indent is None or len(entry[1]) <= indent):
            indent, name = len(entry[1]), entry[2]
            entries[name] = entry[3].strip()
        elif name:
            entries[name] = f"{entries[name]} {line.strip()}".strip()
    return entries
