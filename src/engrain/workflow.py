"""`Workflow`: the source that Engrain compiles.

A Python module with a `workflow` object: tools, phases, tenants, and the functions that make tasks, open their state,
teach and check. The phase of a step is a pure function of the messages so far, shared by teacher and runtime, so what
is allowed at a step never depends on the model.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeVar

from engrain.context import Context, Section
from engrain.context_files import read_section
from engrain.errors import WorkflowError
from engrain.sections import phase_section, tool_section
from engrain.task import Task
from engrain.tool import Tool
from engrain.trajectory import Message, Outcome

Instructions = Literal["none", "shared", "full"]
"""What a prompt says: one line; the procedure and the tools; or these and the tenant's rules."""
_T = TypeVar("_T")


@dataclass(frozen=True)
class Phase:
    """A stretch of the workflow with its own instructions and the tools allowed in it."""

    name: str
    instructions: str
    tools: tuple[str, ...]


@dataclass(frozen=True)
class Workflow:
    name: str
    description: str
    """One line; all the instruction a compiled agent is given, beside the tenant's name."""
    procedure: str
    """The whole procedure in words: what an uncompiled agent needs in its prompt."""
    phases: tuple[Phase, ...]
    tools: tuple[Tool, ...]
    tenants: Mapping[str, Section]
    phase_of: Callable[[Sequence[Message]], str]
    """Which phase the next assistant turn is in, from the messages so far."""
    tasks: Callable[[str, int], Iterator[Task]]
    """(split, seed) -> tasks without end."""
    splits: tuple[str, ...]
    open: Callable[[Task], Any]
    """A fresh state for one task; `close()` is called on it if it has one."""
    teacher: Callable[[Task, Sequence[Message]], Message]
    """The right next turn from any state, also one that a student wandered into."""
    check: Callable[[Task, Any, Sequence[Message]], Outcome]
    """Whether the final state is the goal and nothing forbidden happened."""
    code: Callable[[str, Sequence[Message]], Message] | None = None
    """The workflow as a plain program, where there is one: (tenant, messages) -> the next turn. It reads a request's
    words, as agents do beside which it is measured; the teacher knows what was meant."""

    def __post_init__(self) -> None:
        known = {tool.name for tool in self.tools}
        for phase in self.phases:
            if unknown := set(phase.tools) - known:
                raise WorkflowError(
                    f"phase {phase.name!r} allows {sorted(unknown)}, which are not tools; tools are {sorted(known)}"
                )

    def phase(self, messages: Sequence[Message]) -> Phase:
        name = self.phase_of(messages)
        for phase in self.phases:
            if phase.name == name:
                return phase
        raise WorkflowError(f"phase_of returned {name!r}; phases are {[phase.name for phase in self.phases]}")

    def tool(self, name: str) -> Tool | None:
        return next((tool for tool in self.tools if tool.name == name), None)

    def system(self, tenant: str, instructions: Instructions) -> str:
        """The system prompt: one line for a compiled agent, the procedure with `shared`, and the profile with `full`.

        Raises `WorkflowError` for an unknown tenant.
        """
        if tenant:
            _named(tenant, self.tenants, "tenant")
        line = f"{self.description} Tenant: {tenant}." if tenant else self.description
        if instructions == "none":
            return line
        parts = [line, self.procedure]
        parts += [f"Phase {phase.name}: {phase.instructions}" for phase in self.phases]
        if tenant and instructions == "full":
            parts.append(f"Rules of {tenant}:\n{self.tenants[tenant].markdown()}")
        return "\n\n".join(parts)

    def context(self, tenant: str, phase: str = "", tool: str = "") -> Context:
        """What a compiled agent's prompt leaves out: the sections of the tenant, the phase and the tool named.

        Raises `WorkflowError` for an unknown name.
        """
        sections: list[Section] = []
        if tenant:
            sections.append(_named(tenant, self.tenants, "tenant"))
        if phase:
            found = _named(phase, {one.name: one for one in self.phases}, "phase")
            sections.append(phase_section(found.name, found.instructions, found.tools))
        if tool:
            sections.append(tool_section(_named(tool, {one.name: one for one in self.tools}, "tool").schema()))
        return Context(tuple(sections))

    def step_context(self, tenant: str, phase: str) -> Context:
        """What bears on one step: the sections of the tenant, the phase and each tool that the phase allows."""
        allowed = _named(phase, {one.name: one for one in self.phases}, "phase").tools
        tools = (self.context("", tool=tool).sections for tool in allowed)
        return Context((*self.context(tenant, phase).sections, *chain.from_iterable(tools)))

    def with_tenant(self, section: Section) -> Workflow:
        """The workflow with one more tenant, or with another profile for one that it has."""
        if section.kind != "tenant":
            raise WorkflowError(f"expected a tenant's section, got {section.kind} {section.name!r}; read a profile")
        return replace(self, tenants={**self.tenants, section.name: section})

    def schemas(self, instructions: Instructions) -> str:
        """JSON text of the tool schemas to put in the prompt: none for a compiled agent."""
        return json.dumps([] if instructions == "none" else [tool.schema() for tool in self.tools], ensure_ascii=False)


def _named(name: str, known: Mapping[str, _T], what: str) -> _T:
    if name not in known:
        raise WorkflowError(f"unknown {what} {name!r}; this workflow has {sorted(known)}")
    return known[name]


def read_tenants(directory: Path) -> dict[str, Section]:
    """Every `*.md` of a directory as a tenant profile, by name."""
    sections = [read_section(path) for path in sorted(directory.glob("*.md"))]
    return {section.name: section for section in sections}


def load_workflow(path: Path) -> Workflow:
    """The `workflow` object of `DIR/workflow.py` or of a Python file. Raises `WorkflowError`."""
    file = path / "workflow.py" if path.is_dir() else path
    if not file.is_file():
        raise WorkflowError(f"{path}: no workflow.py there; make one with `engrain new {path}`")
    name = f"engrain_workflow_{file.resolve().parent.name}"
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=[str(file.resolve().parent)])
    if spec is None or spec.loader is None:
        raise WorkflowError(f"{file}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with importing(file):
        spec.loader.exec_module(module)
    workflow = getattr(module, "workflow", None)
    if not isinstance(workflow, Workflow):
        raise WorkflowError(
            f"{file}: expected a module-level `workflow = Workflow(...)`, got {type(workflow).__name__}"
        )
    return workflow


@contextmanager
def importing(file: Path) -> Iterator[None]:
    """Whatever the user's code raises within the block is a `WorkflowError` that names the file."""
    try:
        yield
    except WorkflowError:
        raise
    except Exception as error:
        where = f"line {error.lineno}: " if isinstance(error, SyntaxError) else ""
        raise WorkflowError(f"{file}: {where}{type(error).__name__}: {error}") from error
