"""Schemas say what the function says; calling never raises, whatever the tool or the agent does."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from engrain.errors import ToolFailure, WorkflowError
from engrain.tool import LONGEST_RESULT, Observation, Tool, from_function, in_background, mcp_tools

SERVER = [sys.executable, str(Path(__file__).with_name("mcp_server.py"))]


class Store(dict[str, Any]):
    pass


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Line(BaseModel):
    title: str
    count: int = 1


class Tree(BaseModel):
    children: list[Tree]


def search(
    store: Store,
    key: str,
    kind: Literal["order", "customer"] = "order",
    limit: Annotated[int, Field(ge=1, le=9)] = 5,
    since: date | None = None,
) -> list[str]:
    """Search the store.

    It looks at
    every record.

    Args:
        store: Not for the agent.
        key: What to look for,
            as a prefix: exact case.
        kind (str): Which table.

    Returns:
        limit: not an argument's description.
    """
    return [key, kind, str(limit), repr(since), *store]


def tool(function: Any, **options: Any) -> Tool:
    function.__doc__ = function.__doc__ or "A tool."
    return from_function(function, **options)


def plain(function: Any, timeout: float = 10.0) -> Tool:
    """A tool without arguments around any callable."""
    return Tool("plain", "A tool.", '{"type": "object", "properties": {}}', function, timeout=timeout)


# Schemas


def test_schema_is_flat_and_says_what_hints_and_docstring_say() -> None:
    assert from_function(search, state=Store).schema() == {
        "type": "function",
        "function": {
            "name": "search",
            "description": "Search the store.\n\nIt looks at every record.",
            "parameters": {
                "type": "object",
                "properties": {
                    "key": {"type": "string", "description": "What to look for, as a prefix: exact case."},
                    "kind": {
                        "type": "string",
                        "enum": ["order", "customer"],
                        "default": "order",
                        "description": "Which table.",
                    },
                    "limit": {"type": "integer", "minimum": 1, "maximum": 9, "default": 5},
                    "since": {"type": "string", "format": "date"},
                },
                "required": ["key"],
                "additionalProperties": False,
            },
        },
    }


def test_definitions_are_written_in_place_and_titles_go_but_fields_called_title_stay() -> None:
    def order(lines: list[Line], colour: Colour, one: Literal["x"], maybe: int | None) -> str:
        """Order."""
        return f"{lines[0].title} {colour.name}"

    order.__annotations__.update(lines=list[Line], colour=Colour)
    parameters = json.loads(from_function(order).parameters)
    assert parameters["properties"] == {
        "lines": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"title": {"type": "string"}, "count": {"type": "integer", "default": 1}},
                "required": ["title"],
                "additionalProperties": False,
            },
        },
        "colour": {"type": "string", "enum": ["red", "blue"]},
        "one": {"type": "string", "enum": ["x"]},
        "maybe": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
    }
    assert "$" not in json.dumps(parameters)


def test_arguments_arrive_as_the_hints_say_and_state_is_injected() -> None:
    def order(lines: list[Line], colour: Colour) -> str:
        """Order."""
        return f"{lines[0].title} {colour.name}"

    called = from_function(order).call('{"lines": [{"title": "tea"}], "colour": "red"}')
    assert called.content == "tea RED"
    found = from_function(search, state=Store).call('{"key": "A", "since": "2026-01-02"}', Store(seen=1))
    assert json.loads(found.content) == ["A", "order", "5", "datetime.date(2026, 1, 2)", "seen"]


def test_a_first_parameter_of_another_type_is_not_the_state() -> None:
    def count(words: list[str]) -> int:
        """Count."""
        return len(words)

    assert from_function(count, state=Store).call('{"words": ["a", "b"]}', Store()).content == "2"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def f(x: int): pass", "has no docstring"),
        ("def f(x): 'Doc.'", "'x' has no type hint"),
        ("def f(*x: int): 'Doc.'", "cannot be passed by name"),
        ("def f(x: int, /): 'Doc.'", "cannot be passed by name"),
        ("def f(x: 'Missing'): 'Doc.'", "cannot resolve its type hints"),
        ("def f(x: object()): 'Doc.'", "type hint"),
        ("def f(x: Tree): 'Doc.'", "contains itself"),
        ("def f(x: threading.Lock): 'Doc.'", "no JSON Schema"),
        ("def f(x: int = Field(3)): 'Doc.'", "Annotated"),
        ("def f(x: int): 'Doc.\\n\\nArgs:\\n    y: Oops.'", "describes \\['y'\\]"),
        ("f = lambda: 1; f.__doc__ = 'Doc.'", "tool name '<lambda>'"),
    ],
)
def test_a_function_that_cannot_be_a_tool_says_why(source: str, message: str) -> None:
    names: dict[str, Any] = {"Tree": Tree, "Field": Field, "threading": threading, "__name__": __name__}
    exec(source, names)
    with pytest.raises(WorkflowError, match=message):
        from_function(names["f"])


@pytest.mark.parametrize("parameters", ["{", "[]", '{"type": "string"}', '{"type": "object", "properties": 3}'])
def test_a_tool_needs_the_schema_of_an_object(parameters: str) -> None:
    with pytest.raises(WorkflowError, match="JSON Schema"):
        Tool("t", "A tool.", parameters, print)


# Calls


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "{",
        "null",
        "[]",
        '{"key": 1}',
        "{}",
        '{"key": "A", "kind": "shop"}',
        '{"key": "A", "limit": 10}',
        '{"key": "A", "more": 1}',
        '{"key": "A", "limit": NaN}',
        '{"key": "A", "since": "soon"}',
        "[" * 100_000,
    ],
)
def test_arguments_that_do_not_fit_are_observed_and_the_function_is_not_called(arguments: str) -> None:
    observation = from_function(search, state=Store).call(arguments, Store())
    assert observation.error == "bad_arguments"
    assert json.loads(observation.content)["error"] == "bad_arguments"


@given(
    st.text()
    | st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    ).map(json.dumps)
)
def test_no_argument_text_makes_a_call_raise(arguments: str) -> None:
    assert isinstance(from_function(search, state=Store).call(arguments, Store()), Observation)


@dataclass
class Point:
    x: int
    y: date


@pytest.mark.parametrize(
    ("value", "content"),
    [
        ("text, as it is", "text, as it is"),
        ({"a": [1, None, True], "é": 1.5}, '{"a": [1, null, true], "é": 1.5}'),
        ([Line(title="tea")], '[{"title": "tea", "count": 1}]'),
        (Point(1, date(2026, 1, 2)), '{"x": 1, "y": "2026-01-02"}'),
        ({"set": {1}, "nan": float("nan"), (1, 2): Colour.RED}, '{"set": [1], "nan": null, "1,2": "red"}'),
        (None, "null"),
        ("lone \ud800 surrogate", "lone ? surrogate"),
    ],
)
def test_results_become_text(value: Any, content: str) -> None:
    observation = plain(lambda: value).call("{}")
    assert (observation.content, observation.error) == (content, "")
    observation.content.encode("utf-8")


def test_a_huge_result_is_cut_and_says_by_how_much() -> None:
    observation = plain(lambda: "x" * 10_000_000).call("{}")
    assert observation.content == "x" * LONGEST_RESULT + " …[truncated 9996000 characters]"
    assert len(plain(lambda: list(range(3_000_000))).call("{}").content) < LONGEST_RESULT + 100


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError


def raising(error: BaseException) -> Any:
    raise error


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ToolFailure("http_429", "slow down"), "http_429", "slow down"),
        (ToolFailure("missing_record"), "missing_record", "missing_record"),
        (ValueError("é\ud800"), "exception", "ValueError: é?"),
        (KeyError("k" * 5000), "exception", "KeyError: 'kkkk"),
        (Unprintable(), "exception", "Unprintable: (its message cannot be read: RuntimeError)"),
        (TimeoutError("socket"), "timeout", "TimeoutError: socket"),
        (SystemExit(3), "exception", "SystemExit: 3"),
        (KeyboardInterrupt(), "exception", "KeyboardInterrupt: "),
    ],
)
def test_whatever_a_tool_raises_is_an_observation(error: BaseException, code: str, message: str) -> None:
    observation = plain(partial(raising, error)).call("{}")
    content = json.loads(observation.content)
    assert (observation.error, content["error"]) == (code, code)
    assert content["message"].startswith(message)
    assert len(observation.content) < 1200


def test_a_result_that_cannot_be_written_is_an_observation() -> None:
    circular: list[Any] = []
    circular.append(circular)
    assert plain(lambda: circular).call("{}").error == "exception"


def test_a_coroutine_function_is_run() -> None:
    async def wait() -> str:
        """Wait."""
        return "done"

    assert from_function(wait).call("{}").content == "done"


def test_a_hung_tool_is_abandoned_and_others_go_on() -> None:
    release = threading.Event()
    hung = plain(release.wait, timeout=0.05)
    observations = [hung.call("{}") for _ in range(3)]
    assert {(observation.error, observation.seconds) for observation in observations} == {("timeout", 0.05)}
    assert plain(lambda: "fine").call("{}").content == "fine"
    release.set()


def test_a_result_that_comes_after_the_timeout_is_a_timeout_even_if_nobody_was_waiting() -> None:
    late = plain(lambda: time.sleep(0.05), timeout=0.01)
    running = late.start({})
    assert running.result().error == ""
    assert late.settle(running).error == "timeout"


def test_threads_are_used_again() -> None:
    quick = plain(threading.get_ident)
    assert len({quick.call("{}").content for _ in range(50)}) <= 9


def test_an_idle_thread_holds_on_to_nothing() -> None:
    class Big:
        alive = 0

        def __init__(self) -> None:
            Big.alive += 1

        def __del__(self) -> None:
            Big.alive -= 1

    assert plain(lambda: str(Big())).call("{}").error == ""
    in_background(Big).result()
    until = time.monotonic() + 60
    while Big.alive and time.monotonic() < until:
        time.sleep(0.001)
    assert Big.alive == 0


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_calls_work_in_a_forked_process() -> None:
    quick = plain(lambda: "fine", timeout=60.0)
    quick.call("{}")
    child = os.fork()
    if child == 0:
        os._exit(0 if quick.call("{}").content == "fine" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_reference_in_a_schema_never_goes_to_the_network() -> None:
    remote = Tool("t", "T.", '{"type": "object", "properties": {"a": {"$ref": "http://127.0.0.1:9/x"}}}', lambda a: a)
    assert remote.call('{"a": 1}').error == "bad_arguments"


# MCP


@pytest.fixture(scope="module")
def served() -> Iterator[dict[str, Tool]]:
    with mcp_tools(SERVER, {"ENGRAIN_TEST": "seen"}, timeout=60.0, startup=60.0) as tools:
        yield {tool.name: tool for tool in tools}


def test_mcp_tools_have_the_servers_schema_and_give_plain_results(served: dict[str, Tool]) -> None:
    assert json.loads(served["find"].parameters) == {
        "type": "object",
        "properties": {
            "key": {"type": "string"},
            "kind": {"type": "string", "enum": ["order", "customer"], "default": "order"},
        },
        "required": ["key"],
        "additionalProperties": False,
    }
    assert served["find"].description == "Find a record."
    assert served["add"].call('{"a": 1, "b": 2}').content == "3"
    assert served["find"].call('{"key": "k1"}').content == '{"key": "k1", "kind": "order", "name": "Zoë"}'
    assert served["environment"].call('{"name": "ENGRAIN_TEST"}').content == "seen"


def test_mcp_session_stays_open_and_takes_concurrent_calls(served: dict[str, Tool]) -> None:
    keys = {f"c{number}" for number in range(20)}
    started = [served["find"].start({"key": key}) for key in keys]
    assert not any(served["find"].settle(future).error for future in started)
    assert keys <= set(json.loads(served["seen"].call("{}").content))


def test_mcp_failures_are_observations(served: dict[str, Tool]) -> None:
    assert served["add"].call('{"a": "one", "b": 2}').error == "bad_arguments"
    assert served["fail"].call("{}").error == "tool_error"
    large = served["files_read"].call('{"size": 1000000}')
    assert large.content.endswith("[truncated 996000 characters]")


def test_an_mcp_server_that_hangs_or_dies_is_an_observation() -> None:
    with mcp_tools(SERVER, timeout=0.5, startup=60.0) as tools:
        by_name = {tool.name: tool for tool in tools}
        assert by_name["sleep"].call('{"seconds": 1.5}').error == "timeout"
    with mcp_tools(SERVER, startup=60.0) as tools:
        by_name = {tool.name: tool for tool in tools}
        assert by_name["die"].call("{}").error == "server_closed"
        assert by_name["add"].call('{"a": 1, "b": 2}').error == "server_closed"
    assert by_name["add"].call('{"a": 1, "b": 2}').error == "server_closed"


@pytest.mark.parametrize(
    ("command", "startup", "message"),
    [
        ([*SERVER, "--broken"], 60.0, "its last words: no such database"),
        (["/no/such/server"], 60.0, "No such file"),
        ([*SERVER, "--mute"], 0.5, "no answer within 0.5 seconds"),
        ([], 60.0, "empty list"),
    ],
)
def test_an_mcp_server_that_does_not_start_is_the_users_mistake(
    command: list[str], startup: float, message: str
) -> None:
    with pytest.raises(WorkflowError, match=message), mcp_tools(command, startup=startup):
        pass
