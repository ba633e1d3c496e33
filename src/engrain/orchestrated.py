"""The orchestrated peer: a LangGraph of planner, executor and validator over an OpenAI-compatible endpoint.

    planner -> executor -> validator -> the turn
                  ^            |  no: why (at most `AGAIN` times)
                  +------------+

The graph runs once for each turn: the planner writes a plan or mends it, the executor proposes the next call or the
answer, the validator says "ok" or sends it back. Invariant: each node's system prompt is the episode's own, with all
that the prompt arm is told; the planner and the validator see every tool, the executor those that it may call now.

A verdict that is neither "ok" nor "no" lets the step stand, so that a model too small to judge costs three calls a turn
and not seven. What the graph cost is in the trajectory's `meta`. Needs the extra `peers`.
"""

from __future__ import annotations

import json
import operator
import re
import socket
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import asdict, dataclass
from functools import partial
from threading import Thread
from typing import TYPE_CHECKING, Annotated, Any, Self, TypedDict

from engrain.context import Section
from engrain.errors import EngrainError
from engrain.policy import Episode
from engrain.tool import clip, in_background
from engrain.trajectory import Message, ToolCall
from engrain.workflow import Workflow

if TYPE_CHECKING:
    from langchain_core.messages import AIMessage, BaseMessage  # pyright: ignore[reportMissingImports]
    from langchain_openai import ChatOpenAI  # pyright: ignore[reportMissingImports]

    from engrain.agent import Agent

AGAIN = 2
"""How often the validator may send a turn back."""
LONGEST_NOTE = 512
"""Tokens of a plan or a verdict; a proposal may have as many as any agent's turn."""
META = "orchestrated"
"""Where a trajectory's `meta` says what its turns cost: JSON text of a list of `Cost`."""
PLANNER = (
    "You are the planner. Write a short plan: the steps that are left to do for the request, by the procedure, the "
    "rules and what was done so far. Do not take them."
)
EXECUTOR = (
    "You are the executor. Take the next step of the plan: one call of a tool, or the answer to the request if nothing "
    "is left to do."
)
VALIDATOR = (
    "You are the validator. Check the proposed step against the procedure, the rules and what was done so far. Say "
    '"ok" if it is right; if not, say "no: " and what is right.'
)
_TENANT = "orchestrated"


@dataclass(frozen=True)
class Cost:
    """What one turn cost, all nodes together."""

    model_calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    sent_back: int = 0
    unread: int = 0
    """Verdicts that were neither "ok" nor "no"."""


class State(TypedDict):
    episode: Episode
    plan: str
    proposal: Message
    objection: str
    """Why the last proposal was refused."""
    cost: Annotated[list[Cost], operator.add]


class Orchestrated:
    """The graph as a policy; the episodes of a batch run side by side, so that the endpoint can batch."""

    name = "orchestrated"

    def __init__(self, base_url: str, model: str) -> None:
        import httpx
        from langchain_openai import ChatOpenAI  # pyright: ignore[reportMissingImports]
        from pydantic import SecretStr

        self.base_url = base_url
        client = httpx.Client(trust_env=False)  # a proxy has no business between this machine and itself
        self._model = ChatOpenAI(
            base_url=base_url, model=model, api_key=SecretStr("none"), temperature=0, max_retries=5, timeout=86_400,
            use_responses_api=False, http_client=client,
        )  # fmt: skip
        self._graph = _graph(self._model)
        self._plans: dict[Episode, str] = {}
        self.close: Callable[[], object] = client.close

    def __call__(self, episodes: Sequence[Episode], /) -> list[Message | Exception]:
        running = [in_background(partial(self._turn, episode)) for episode in episodes]
        return [future.result() for future in running]

    def finish(self, episode: Episode, /) -> None:
        self._plans.pop(episode, None)

    def sampled(self, temperature: float, seed: int) -> Self:
        """The same over the same endpoint, its tokens drawn at a temperature."""
        other = copy(self)
        other._graph = _graph(self._model.model_copy(update={"temperature": temperature, "seed": seed}))
        other._plans = {}
        return other

    def _turn(self, episode: Episode) -> Message | Exception:
        import openai  # pyright: ignore[reportMissingImports]
        from langsmith import tracing_context  # pyright: ignore[reportMissingImports]

        started = time.perf_counter()
        start = {"episode": episode, "plan": self._plans.get(episode, ""), "objection": "", "cost": []}
        try:
            with tracing_context(enabled=False):  # whatever the environment says, nothing leaves the machine
                end = self._graph.invoke(start, {"recursion_limit": 3 + 2 * AGAIN + 1})
        except openai.APIStatusError as error:
            return EngrainError(_said(error))
        except Exception as error:
            return error
        self._plans[episode] = end["plan"]
        cost = _sum(end["cost"])
        meta = episode.trajectory.meta
        meta[META] = json.dumps([*json.loads(meta.get(META, "[]")), asdict(cost)])
        seconds = time.perf_counter() - started
        tokens = {"prompt_tokens": cost.prompt_tokens, "completion_tokens": cost.completion_tokens}
        return end["proposal"].model_copy(update={"seconds": seconds, **tokens})


def orchestrated(agent: Agent, workflow: Workflow, parallel: int) -> Orchestrated:
    """The peer over the agent's bare base, which is served until the policy is closed or no longer used."""
    stack = ExitStack()
    policy = Orchestrated(stack.enter_context(served(agent, workflow, parallel)), agent.manifest.workflow)
    stack.callback(policy.close)
    policy.close = weakref.finalize(policy, stack.close)
    return policy


@contextmanager
def served(agent: Agent, workflow: Workflow, parallel: int) -> Iterator[str]:
    """The agent's bare base on a free port of this machine; its address, up to `/v1`.

    There is one caller: rules come with its prompts, and the workflow's own tenants have no part in it.
    """
    import uvicorn

    from engrain.keys import Everybody
    from engrain.serve import create_app
    from engrain.service import Service

    own = workflow.with_tenant(Section("tenant", _TENANT, ("Rules come with the prompt.",)))
    service = Service(agent, own, parallel=parallel, compiled=False)
    config = uvicorn.Config(create_app(service, Everybody(_TENANT)), log_level="error", timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        thread = Thread(target=server.run, args=([listening],), name="engrain-orchestrated", daemon=True)
        thread.start()
        try:
            while not server.started:
                if not thread.is_alive():
                    raise EngrainError("the server of arm orchestrated did not start")
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        finally:
            server.should_exit = True
            thread.join(30)


def transcript(messages: Sequence[Message]) -> str:
    """A conversation as text, a line a turn: request, calls, results, answer; without its system prompt."""
    return "\n".join(line for message in messages for line in _lines(message))


def _lines(message: Message) -> Iterator[str]:
    match message.role:
        case "user":
            yield f"Request: {message.content}"
        case "assistant":
            said = (("Note", message.reasoning), ("Answer", message.content))
            yield from (f"{what}: {text}" for what, text in said if text)
            yield from (f"Call: {call.name} {call.arguments}" for call in message.tool_calls)
        case "tool":
            yield f"Result of {message.name}: {message.content}"


# The graph


def _graph(model: ChatOpenAI) -> Any:
    from langgraph.graph import END, START, StateGraph  # pyright: ignore[reportMissingImports]

    graph: Any = StateGraph(State)
    for node in (_planner, _executor, _validator):
        graph.add_node(node.__name__.strip("_"), partial(node, model))
    graph.add_edge(START, "planner")
    graph.add_edge("planner", "executor")
    graph.add_edge("executor", "validator")
    graph.add_conditional_edges("validator", lambda state: "executor" if state["objection"] else END)
    return graph.compile()


def _planner(model: ChatOpenAI, state: State) -> Mapping[str, Any]:
    text = f"{transcript(state['episode'].trajectory.messages)}\n\nEarlier plan: {state['plan'] or 'none'}"
    reply, cost = _words(model, state, PLANNER, text)
    return {"plan": reply, "cost": [cost]}


def _executor(model: ChatOpenAI, state: State) -> Mapping[str, Any]:
    from engrain.turn import LONGEST_TURN

    episode = state["episode"]
    told = f"{EXECUTOR}\nPlan: {state['plan'] or 'none'}"
    if state["objection"]:
        told += f"\nThis proposal was refused:\n{transcript([state['proposal']])}\nWhy: {state['objection']}"
    messages = [_system(episode, told), *map(_to_langchain, episode.trajectory.messages[1:])]
    reply, cost = _ask(model, messages, episode, "auto", LONGEST_TURN)
    return {"proposal": _from_langchain(reply), "cost": [cost]}


def _validator(model: ChatOpenAI, state: State) -> Mapping[str, Any]:
    proposal = clip(transcript([state["proposal"]]), 4000) or "nothing"
    text = f"{transcript(state['episode'].trajectory.messages)}\n\nProposed step:\n{proposal}"
    reply, cost = _words(model, state, VALIDATOR, text)
    verdict = re.match(r"\W*(ok|no)\b[\s:.,]*(.*)", reply, re.IGNORECASE | re.DOTALL)
    refused = verdict is not None and verdict[1].lower() == "no"
    again = refused and sum(one.sent_back for one in state["cost"]) < AGAIN
    objection = (verdict[2] or "it is not right") if again and verdict is not None else ""
    return {"objection": objection, "cost": [cost, Cost(sent_back=int(again), unread=int(verdict is None))]}


def _words(model: ChatOpenAI, state: State, role: str, text: str) -> tuple[str, Cost]:
    """What a node that calls no tool says."""
    messages = [_system(state["episode"], role), _human(text)]
    reply, cost = _ask(model, messages, state["episode"], "none", LONGEST_NOTE)
    return str(reply.text).strip(), cost


def _ask(
    model: ChatOpenAI, messages: Sequence[BaseMessage], episode: Episode, choice: str, most: int
) -> tuple[AIMessage, Cost]:
    callable_now = episode.tools if choice == "auto" else ()
    shown = [tool.schema() for tool in callable_now or episode.workflow.tools]
    asked = model.bind_tools(shown, tool_choice="auto" if callable_now else "none") if shown else model
    reply = asked.invoke(list(messages), max_tokens=most)
    used = reply.usage_metadata
    return reply, Cost(1, used["input_tokens"] if used else 0, used["output_tokens"] if used else 0)


def _sum(costs: Sequence[Cost]) -> Cost:
    return Cost(*(sum(column) for column in zip(*(asdict(cost).values() for cost in costs), strict=True)))


# Messages


def _system(episode: Episode, role: str) -> BaseMessage:
    from langchain_core.messages import SystemMessage  # pyright: ignore[reportMissingImports]

    return SystemMessage(f"{episode.trajectory.messages[0].content}\n\n{role}")


def _human(text: str) -> BaseMessage:
    from langchain_core.messages import HumanMessage  # pyright: ignore[reportMissingImports]

    return HumanMessage(text)


def _to_langchain(message: Message) -> BaseMessage:
    from langchain_core.messages import AIMessage, ToolMessage  # pyright: ignore[reportMissingImports]

    if message.role == "tool":
        return ToolMessage(message.content, tool_call_id=message.tool_call_id, name=message.name)
    if message.role == "user":
        return _human(message.content)
    read: list[Any] = []
    unread: list[Any] = []
    for call in message.tool_calls:
        try:
            arguments = json.loads(call.arguments)
        except ValueError:
            arguments = None
        if isinstance(arguments, dict):
            read.append({"name": call.name, "args": arguments, "id": call.id})
        else:
            unread.append({"name": call.name, "args": call.arguments, "id": call.id, "error": None})
    return AIMessage(message.content, tool_calls=read, invalid_tool_calls=unread)


def _from_langchain(reply: AIMessage) -> Message:
    calls = [
        ToolCall(id=call["id"] or "", name=call["name"], arguments=json.dumps(call["args"], ensure_ascii=False))
        for call in reply.tool_calls
    ]
    calls += (
        ToolCall(id=call["id"] or "", name=call["name"] or "", arguments=call["args"] or "")
        for call in reply.invalid_tool_calls
    )
    cut = reply.response_metadata.get("finish_reason") == "length"
    return Message(role="assistant", content=str(reply.text), tool_calls=calls, error="truncated" if cut else "")


def _said(error: Any) -> str:
    """The endpoint's own words, such as "context full: ..."."""
    body = error.body if isinstance(error.body, dict) else {}
    return str(body.get("message") or error)
