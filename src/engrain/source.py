"""What is compiled: a workflow, or logs of one that exists elsewhere; and the form in which it is trained.

Invariant: `compiled_form` is what the agent will meet when it runs, so the instructions have to move into the weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engrain.agent import file_digest, text_digest
from engrain.errors import InputError
from engrain.renderer import in_schema_order
from engrain.trajectory import Message, ToolCall, Trajectory, read_trajectories
from engrain.workflow import Workflow, load_workflow


@dataclass(frozen=True)
class Source:
    """A workflow, or None for logs, with where it lies."""

    path: Path
    workflow: Workflow | None
    digest: str
    """Of the workflow's files."""


def open_source(path: Path) -> Source:
    """A workflow, or a file of trajectories. Raises `InputError`."""
    if path.suffix == ".jsonl":
        return Source(path, None, "")
    return Source(path, load_workflow(path), code_digest(path))


def code_digest(path: Path) -> str:
    """Of a file, or of a directory's Python and Markdown."""
    files = sorted(file for file in path.rglob("*") if file.suffix in (".py", ".md")) if path.is_dir() else [path]
    return text_digest("".join(f"{file.relative_to(path)} {file_digest(file)}\n" for file in files))


def given_trajectories(source: Source, data: Path | None) -> list[Trajectory]:
    """The trajectories that the user has, if any."""
    path = data or (source.path if source.workflow is None else None)
    if path is None:
        return []
    trajectories = list(read_trajectories(path))
    if not trajectories:
        raise InputError(f"{path}: no trajectories in it; make some with `engrain record` or `engrain import`")
    if source.workflow is not None and (foreign := {t.workflow for t in trajectories} - {source.workflow.name}):
        raise InputError(f"{path}: runs of {min(foreign)!r}, expected runs of {source.workflow.name!r}")
    return trajectories


def compiled_form(trajectory: Trajectory, workflow: Workflow | None, *, keep_tools: bool = False) -> Trajectory:
    """The trajectory as the compiled agent will meet it: no instructions, and arguments in their schema's order.

    Constrained decoding writes arguments in the schema's order, so that order is what must be trained.
    """
    schemas = json.loads(workflow.schemas("full")) if workflow is not None else trajectory.tool_schemas()
    parameters = {schema["function"]["name"]: schema["function"].get("parameters") for schema in schemas}
    messages = [_ordered(message, parameters) for message in trajectory.messages]
    if workflow is not None:
        system = Message(role="system", content=workflow.system(trajectory.tenant, "none"))
        messages = [system, *(message for message in messages if message.role != "system")]
    tools = trajectory.tools if keep_tools and workflow is None else "[]"
    return trajectory.model_copy(update={"messages": messages, "tools": tools})


def by_phase(trajectory: Trajectory, workflow: Workflow) -> Iterator[tuple[str, Trajectory]]:
    """For each phase that it goes through, the trajectory with loss on that phase's turns only, up to the last."""
    messages = trajectory.messages
    turns = [n for n, message in enumerate(messages) if message.role == "assistant"]
    phases = {n: workflow.phase(messages[:n]).name for n in turns}
    for phase in dict.fromkeys(phases.values()):
        kept = [
            message if phases.get(n, phase) == phase else message.model_copy(update={"trained": False})
            for n, message in enumerate(messages)
        ]
        last = max(n for n in turns if phases[n] == phase)
        yield phase, trajectory.model_copy(update={"messages": kept[: last + 1]})


def _ordered(message: Message, parameters: dict[str, Any]) -> Message:
    def ordered(call: ToolCall) -> ToolCall:
        with suppress(ValueError):
            value = in_schema_order(json.loads(call.arguments), parameters.get(call.name))
            return call.model_copy(update={"arguments": json.dumps(value, ensure_ascii=False)})
        return call

    if not message.tool_calls:
        return message
    return message.model_copy(update={"tool_calls": [ordered(call) for call in message.tool_calls]})
