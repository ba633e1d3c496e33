"""Engrain compiles agent workflows into LoRA weights.

The names below load on first use, so that `import engrain` costs nothing and never loads torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engrain.agent import load_agent
    from engrain.compile import compile_workflow
    from engrain.errors import EngrainError, ToolFailure
    from engrain.task import Task
    from engrain.tool import Tool
    from engrain.trajectory import Message, Outcome, ToolCall, Trajectory
    from engrain.workflow import Phase, Workflow, load_workflow

__version__ = "0.1.0"

__all__ = [
    "EngrainError",
    "Message",
    "Outcome",
    "Phase",
    "Task",
    "Tool",
    "ToolCall",
    "ToolFailure",
    "Trajectory",
    "Workflow",
    "compile_workflow",
    "load_agent",
    "load_workflow",
]

_HOME = {
    "EngrainError": "errors",
    "Message": "trajectory",
    "Outcome": "trajectory",
    "Phase": "workflow",
    "Task": "task",
    "Tool": "tool",
    "ToolCall": "trajectory",
    "ToolFailure": "errors",
    "Trajectory": "trajectory",
    "Workflow": "workflow",
    "compile_workflow": "compile",
    "load_agent": "agent",
    "load_workflow": "workflow",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'engrain' has no attribute {name!r}")
    return getattr(import_module(f"engrain.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
