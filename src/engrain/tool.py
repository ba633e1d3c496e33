"""`Tool`: a name, a description, a JSON Schema, a function; and `Observation`: what the agent reads of a call.

Invariant: calling a tool never raises and never takes longer than its timeout. Arguments that are not JSON or do not
fit the schema, an exception, a hang, a result of 10 MB: each is an observation.

What is not covered: a call runs on a daemon thread, which Python cannot kill. A tool that hangs is abandoned: its
thread stays until the function returns, and until then it can still touch its state and use a processor.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from queue import SimpleQueue
from typing import Any, TypeVar

from jsonschema.exceptions import SchemaError
from jsonschema.protocols import Validator
from jsonschema.validators import Draft202012Validator, validator_for
from pydantic_core import to_jsonable_python
from referencing import Registry

from engrain.errors import ToolFailure, WorkflowError
from engrain.signature import flat_schema, read_signature

LONGEST_RESULT = 4000
LONGEST_MESSAGE = 1000
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Observation:
    """The result of one call: `content` is what the agent reads, `error` the code if it failed."""

    content: str
    error: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Tool:
    """Something an agent can call. Make one with `from_function` or `mcp_tools`."""

    name: str
    description: str
    parameters: str
    """JSON text of a JSON Schema of an object."""
    function: Callable[..., Any]
    """Called as `function(**arguments)`, or `function(state, **arguments)` if `takes_state`."""
    takes_state: bool = False
    timeout: float = 10.0
    """Seconds after which a call is abandoned."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise WorkflowError(f"tool name {self.name!r}: expected 1 to 64 letters, digits, '_' or '-'; rename it")
        try:
            kind = json.loads(self.parameters).get("type")
            _validator(self.parameters)
        except (ValueError, AttributeError, SchemaError) as error:
            raise WorkflowError(f"tool {self.name!r}: parameters are not a JSON Schema: {clip(str(error))}") from error
        if kind != "object":
            raise WorkflowError(f"tool {self.name!r}: expected a JSON Schema of type 'object', got {kind!r}")

    def schema(self) -> dict[str, Any]:
        """The OpenAI-style function schema."""
        function = {"name": self.name, "description": self.description, "parameters": json.loads(self.parameters)}
        return {"type": "function", "function": function}

    def check(self, arguments: str) -> dict[str, Any]:
        """The arguments as an object. Raises `ToolFailure("bad_arguments")` if they are not JSON or do not fit."""
        try:
            given = json.loads(arguments, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise ToolFailure("bad_arguments", f"the arguments are not JSON: {clip(str(error))}") from error
        try:
            problem = next(_validator(self.parameters).iter_errors(given), None)
        except Exception as error:  # a schema from elsewhere can hold a bad reference or pattern
            raise ToolFailure("bad_arguments", f"the schema cannot be applied: {clip(str(error))}") from error
        if problem is not None:
            raise ToolFailure("bad_arguments", clip(f"{problem.json_path}: {problem.message}"))
        return given

    def start(self, arguments: dict[str, Any], state: Any = None) -> Future[Observation]:
        """Begin a call with checked arguments on a thread of its own; `settle` waits for it."""
        try:
            return in_background(lambda: self._observe(arguments, state))
        except Exception as error:  # no more threads
            future: Future[Observation] = Future()
            future.set_result(_explained(error))
            return future

    def settle(self, running: Future[Observation], seconds: float | None = None) -> Observation:
        """The observation of a started call, or of its timeout if it is not there within `seconds` from now."""
        try:
            observation = running.result(self.timeout if seconds is None else seconds)
        except TimeoutError:
            return self.timed_out()
        return self.timed_out() if observation.seconds > self.timeout else observation

    def timed_out(self) -> Observation:
        return failed("timeout", f"{self.name} gave no result within {self.timeout:g} seconds", self.timeout)

    def call(self, arguments: str, state: Any = None) -> Observation:
        """Check, run, observe. Never raises (except Ctrl-C) and never takes longer than `timeout`."""
        try:
            given = self.check(arguments)
        except ToolFailure as failure:
            return failed(failure.code, str(failure))
        return self.settle(self.start(given, state))

    def _observe(self, arguments: dict[str, Any], state: Any) -> Observation:
        started = time.perf_counter()
        try:
            value = self.function(state, **arguments) if self.takes_state else self.function(**arguments)
            if inspect.iscoroutine(value):
                value = asyncio.run(value)
            content = clip(_as_text(value), LONGEST_RESULT)
        except BaseException as error:  # SystemExit too: a tool may not stop the run
            return _explained(error, time.perf_counter() - started)
        return Observation(content, seconds=time.perf_counter() - started)


def failed(code: str, message: str, seconds: float = 0.0) -> Observation:
    """The observation of a failure: `{"error": code, "message": ...}`."""
    content = json.dumps({"error": code, "message": clip(message)}, ensure_ascii=False)
    return Observation(content, code, seconds)


def _explained(error: BaseException, seconds: float = 0.0) -> Observation:
    try:
        text = str(error)
    except Exception as unreadable:  # a tool's error may fail to describe itself
        text = f"(its message cannot be read: {type(unreadable).__name__})"
    if isinstance(error, ToolFailure):
        return failed(str(error.code), text, seconds)
    kind = type(error).__name__
    return failed("timeout" if isinstance(error, TimeoutError) else "exception", f"{kind}: {text}", seconds)


def clip(text: str, longest: int = LONGEST_MESSAGE) -> str:
    """Text of bounded length that can be stored as UTF-8."""
    if len(text) > longest:
        text = f"{text[:longest]} …[truncated {len(text) - longest} characters]"
    return storable(text)


def storable(text: str) -> str:
    """The text without lone surrogates, which can be neither stored as UTF-8 nor tokenised."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=partial(to_jsonable_python, fallback=str))
    except (TypeError, ValueError):  # keys that are not strings; NaN
        plain = to_jsonable_python(value, fallback=str, serialize_unknown=True, inf_nan_mode="null")
        return json.dumps(plain, ensure_ascii=False)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


@lru_cache(maxsize=4096)
def _validator(parameters: str) -> Validator:
    schema = json.loads(parameters)
    kind = validator_for(schema, default=Draft202012Validator)
    kind.check_schema(schema)
    return kind(schema, registry=Registry())  # an empty registry: a reference never goes to the network


_idle: deque[SimpleQueue[Any]] = deque()
os.register_at_fork(after_in_child=_idle.clear)


def in_background(function: Callable[[], _T]) -> Future[_T]:
    """Run `function` on an idle daemon thread, or a new one. One that never returns keeps its thread, nothing else."""
    future: Future[_T] = Future()
    try:
        inbox = _idle.pop()
    except IndexError:
        inbox = SimpleQueue()
        threading.Thread(target=_work, args=(inbox,), name="engrain-background", daemon=True).start()
    inbox.put((function, future))
    return future


def _work(inbox: SimpleQueue[Any]) -> None:
    while True:
        function, future = inbox.get()
        try:
            value = function()
        except BaseException as error:
            _idle.append(inbox)
            future.set_exception(error)
        else:
            _idle.append(inbox)
            future.set_result(value)
        del function, future  # an idle thread holds on to nothing
        value = None


def from_function(function: Callable[..., Any], *, state: type | None = None, timeout: float = 10.0) -> Tool:
    """A tool whose schema comes from type hints and whose descriptions come from a Google-style docstring.

    A first parameter annotated with the type `state` receives the workflow's state and is not part of the schema.
    Arguments reach the function as its hints say (an `Enum`, a `date`, a pydantic model), not as bare JSON. A coroutine
    function is run to its end. Raises `WorkflowError` for a missing hint or docstring.
    """
    name = getattr(function, "__name__", type(function).__name__)
    read = read_signature(function, name, state)
    return Tool(
        name, read.description, json.dumps(read.schema, ensure_ascii=False), read.function, read.takes_state, timeout
    )


@contextmanager
def mcp_tools(
    command: list[str], env: dict[str, str] | None = None, *, timeout: float = 10.0, startup: float = 30.0
) -> Iterator[list[Tool]]:
    """The tools of an MCP server that speaks over standard input and output; one session stays open in the block.

    The server sees a minimal environment (`PATH`, `HOME` and the like) plus `env`. One that dies or hangs after its
    start is an observation (`server_closed`, `timeout`). Raises `WorkflowError` if it cannot be started.
    """
    try:
        from engrain.mcp import Session
    except ImportError as error:
        raise WorkflowError("MCP servers need the mcp package, version 2; pip install 'engrain[mcp]'") from error
    with Session(command, env, startup) as session:
        tools = [
            Tool(
                name=re.sub(r"[^a-zA-Z0-9_-]", "_", listed.name)[:64],
                description=listed.description or listed.name,
                parameters=json.dumps(_simplest(listed.input_schema), ensure_ascii=False),
                function=partial(session.call, listed.name, timeout),
                timeout=timeout,
            )
            for listed in session.tools
        ]
        if len({tool.name for tool in tools}) < len(tools):
            raise WorkflowError(f"MCP server {command}: two tools have one name: {[tool.name for tool in tools]}")
        yield tools


def _simplest(schema: dict[str, Any]) -> dict[str, Any]:
    """A server's schema, flat where that means the same."""
    with suppress(WorkflowError):
        return flat_schema(schema)
    return schema
