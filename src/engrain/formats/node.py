"""A value inside a foreign record, and where it stands.

Invariant: every complaint about a record is raised through `Node.error`, so it names file, line and field.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from engrain.errors import DataError

_decoder = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class Node:
    """`path` is the field's dotted path in the record, such as `messages.3.content`."""

    value: Any
    file: str = ""
    line: int = 0
    path: str = ""

    def error(self, problem: str) -> DataError:
        return DataError(problem, file=self.file, line=self.line, field=self.path)

    def expected(self, what: str) -> DataError:
        return self.error(f"expected {what}, got {_shown(self.value)}")

    def child(self, key: str | int) -> Node:
        """The value under `key`; one that is missing stands there as null."""
        value = self.mapping().get(key) if isinstance(key, str) else self.value[key]
        return Node(value, self.file, self.line, f"{self.path}.{key}" if self.path else str(key))

    def has(self, key: str) -> bool:
        """Whether the object holds something other than null under `key`."""
        return self.mapping().get(key) is not None

    def mapping(self) -> dict[str, Any]:
        if not isinstance(self.value, dict):
            raise self.expected("an object")
        return self.value

    def items(self) -> list[Node]:
        if not isinstance(self.value, list):
            raise self.expected("a list")
        return [self.child(index) for index in range(len(self.value))]

    def text(self) -> str:
        if not isinstance(self.value, str):
            raise self.expected("text")
        return self.value

    def parsed(self) -> Node:
        """What the JSON text here says, at the same place."""
        return Node(parse_json(self, self.text()), self.file, self.line, self.path)


def parse_json(node: Node, text: str) -> Any:
    """`json.loads` whose every failure (syntax, absurd depth, a number of 5,000 digits) is a `DataError` at `node`."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise node.error(f"not JSON: {error.msg} at character {error.pos}") from error
    except (ValueError, RecursionError) as error:
        raise node.error(f"cannot be read as JSON: {error}") from error


def raw_fields(text: str) -> dict[str, str]:
    """The top-level fields of a JSON object that is known to be valid, each as the exact text that stands there."""
    fields, position = {}, _skip(text, text.index("{") + 1)
    while text[position] != "}":
        key, position = _decoder.raw_decode(text, position)
        start = _skip(text, _skip(text, position) + 1)  # past the colon
        _, end = _decoder.raw_decode(text, start)
        fields[key] = text[start:end]
        position = _next(text, end)
    return fields


def raw_items(text: str) -> list[str]:
    """The items of a JSON list that is known to be valid, each as the exact text that stands there."""
    items, position = [], _skip(text, text.index("[") + 1)
    while text[position] != "]":
        _, end = _decoder.raw_decode(text, position)
        items.append(text[position:end])
        position = _next(text, end)
    return items


def _next(text: str, position: int) -> int:
    position = _skip(text, position)
    return _skip(text, position + 1) if text[position] == "," else position


def _skip(text: str, position: int) -> int:
    while text[position] in " \t\r\n":
        position += 1
    return position


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:40] + "…"
