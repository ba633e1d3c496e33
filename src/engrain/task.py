"""`Task`: a request, the state it starts from and the faults that will hit it. Plain data, so tasks travel as JSONL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError

from engrain.errors import DataError
from engrain.trajectory import Record

FaultKind = Literal["timeout", "http_429", "http_500", "missing_record", "renamed_field", "partial_result"]
Recovery = Literal["normal", "ignorable", "fatal"]


class Fault(Record):
    """From the `nth` call (counted from 1) of `tool` on, `times` calls fail in the given way."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    tool: str
    kind: FaultKind
    nth: int = 1
    times: int = 1
    field: str = ""
    """The result's field that is renamed or missing, for `renamed_field` and `partial_result`."""
    renamed: str = ""
    recovery: Recovery = "normal"
    """What is right: `normal` (retry), `ignorable` (go on without it) or `fatal` (stop and hand over)."""


class Task(Record):
    """What is asked. `goal` is the generator's own structured knowledge, which no policy but the teacher may read."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    id: str
    request: str
    tenant: str = ""
    kind: str = ""
    split: str = ""
    seed: int = 0
    goal: dict[str, Any] = Field(default_factory=dict)
    start: dict[str, Any] = Field(default_factory=dict)
    """Rows of the store before the first step."""
    faults: tuple[Fault, ...] = ()


def read_tasks(path: Path) -> Iterator[Task]:
    """Tasks of a JSONL file. Raises `DataError` naming file, line and field."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read tasks: {error}", file=str(path)) from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield Task.model_validate_json(line)
            except ValidationError as error:
                first = error.errors()[0]
                field = ".".join(str(part) for part in first["loc"])
                raise DataError(first["msg"], file=str(path), line=number, field=field) from error
