"""What a task's faults do to a call: some fail it before the tool runs, some rewrite the result it gives."""

from __future__ import annotations

import json
from dataclasses import replace

from engrain.task import Fault, FaultKind
from engrain.tool import Observation, Tool, failed

FAILURES: dict[FaultKind, str] = {
    "timeout": "",
    "http_429": "Too Many Requests: try again",
    "http_500": "Internal Server Error",
    "missing_record": "no such record",
}
"""The message of each kind that fails a call; the tool does not run."""


def refused(tool: Tool, kind: FaultKind) -> Observation:
    """What a fault shows that hits before the tool runs. A timeout looks just like a real one, but takes no time."""
    if kind == "timeout":
        return replace(tool.timed_out(), seconds=0.0)
    return failed(kind, FAILURES[kind])


def disturbed(observation: Observation, fault: Fault | None) -> Observation:
    """The observation after a fault that rewrites the top level of a JSON result; anything else passes unchanged."""
    if fault is None or observation.error:
        return observation
    try:
        value = json.loads(observation.content)
    except ValueError:
        return observation
    if isinstance(value, dict) and value:
        name = fault.field or next(reversed(value))
        renamed = fault.renamed or f"{name}_v2"
        if fault.kind == "renamed_field":
            value = {renamed if key == name else key: part for key, part in value.items()}
        else:
            value.pop(name, None)
    elif isinstance(value, list) and fault.kind == "partial_result":
        value = value[: len(value) // 2]
    return replace(observation, content=json.dumps(value, ensure_ascii=False))
