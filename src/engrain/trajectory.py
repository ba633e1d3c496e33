"""`Trajectory`: the one record.

Teachers write it, logs import to it, the renderer reads it, the runtime appends to it, evaluation scores it. Messages
are OpenAI-style. Tool schemas and arguments are JSON *text*, so that no columnar store can pad them with nulls and a
round trip is the identity.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engrain.errors import DataError
from engrain.files import replacing

SCHEMA = "engrain.trajectory/1"


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ToolCall(Record):
    """One call: `arguments` is the JSON text exactly as written."""

    id: str
    name: str
    arguments: str = "{}"


class Message(Record):
    """One turn. For `role="tool"`, `name` is the tool and `tool_call_id` the call that it answers."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = Field(default_factory=list)
    tool_call_id: str = ""
    name: str = ""
    trained: bool = True
    """Whether an assistant turn carries loss; other roles never do."""
    phase: str = ""
    error: str = ""
    """For a tool turn that failed: its code, such as `timeout` or `http_429`."""
    seconds: float | None = None
    """Wall-clock time to produce the message: decoding for an assistant turn, the call for a tool turn."""
    prompt_tokens: int | None = None
    """Tokens in the context when this assistant turn was decoded."""
    completion_tokens: int | None = None
    """Tokens that were decoded for it, where that is more than `token_ids` say, or these are not known."""
    token_ids: list[int] | None = None
    """The exact tokens that a model produced, stop token included."""
    logprobs: list[float] | None = None


class Outcome(Record):
    """What the goal check said."""

    success: bool
    checks: dict[str, bool] = Field(default_factory=dict)
    reason: str = ""


class Trajectory(Record):
    """Messages of one task from request to answer, with the tools that were offered."""

    id: str
    messages: list[Message]
    tools: str = "[]"
    """JSON text of the list of OpenAI-style function schemas."""
    workflow: str = ""
    tenant: str = ""
    task: str = ""
    kind: str = ""
    split: str = ""
    seed: int = 0
    teacher: str = ""
    context_policy: str = "full@1"
    outcome: Outcome | None = None
    meta: dict[str, str] = Field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Number of assistant turns."""
        return sum(message.role == "assistant" for message in self.messages)

    def tool_schemas(self) -> list[dict[str, Any]]:
        return json.loads(self.tools)

    def to_json(self) -> str:
        return json.dumps({"schema": SCHEMA, **self.model_dump(mode="json", exclude_defaults=True)}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str, *, file: str = "", line: int = 0) -> Trajectory:
        """Parse one line. Raises `DataError` naming file, line and field."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"not JSON ({error.msg}); write one trajectory a line", file=file, line=line) from error
        if not isinstance(data, dict) or data.pop("schema", None) != SCHEMA:
            raise DataError(
                f"expected {SCHEMA!r}; for other formats use `engrain import`", file=file, line=line, field="schema"
            )
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            raise DataError(first["msg"], file=file, line=line, field=field) from error


def read_trajectories(path: Path) -> Iterator[Trajectory]:
    """Trajectories of a JSONL file. Raises `DataError` if the file or a line of it cannot be read."""
    try:
        lines = path.open(encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"cannot read trajectories: {error.strerror}; make them with `engrain record`", file=str(path)
        ) from error
    with lines:
        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield Trajectory.from_json(line, file=str(path), line=number)
        except UnicodeDecodeError as error:
            raise DataError(f"not UTF-8 text: {error.reason}", file=str(path)) from error


def write_trajectories(path: Path, trajectories: Iterable[Trajectory]) -> int:
    """Write a JSONL file, whole or not at all; returns how many."""
    count = 0
    with replacing(path) as file:
        for trajectory in trajectories:
            file.write(trajectory.to_json() + "\n")
            count += 1
    return count
