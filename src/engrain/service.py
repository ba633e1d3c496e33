"""A compiled agent at work for many callers at once: a conversation in, its next turn out. HTTP is `serve`'s business.

Prompts are rendered as in training: the agent's own system line, unless the conversation brings one, and the exact
tokens of every turn that was written here, thoughts included, though clients send back only what was said. Invariant:
the tenant alone decides the adapter, and what is remembered of one tenant is never read for another.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any, Literal, TypeVar

from engrain.adapter import Adapter
from engrain.adapters import Adapters
from engrain.agent import Agent, open_engine
from engrain.compiled_policy import CompiledPolicy
from engrain.context_files import read_section
from engrain.errors import InputError
from engrain.policy import Episode
from engrain.recent import Recent
from engrain.remote import Remote, check_servable
from engrain.renderer import Renderer
from engrain.scheduler import Job, Scheduler
from engrain.task import Task
from engrain.tool import Tool
from engrain.trajectory import Message, Trajectory
from engrain.turn import GREEDY, LONGEST_TURN, Completion, Request, Sampling
from engrain.workflow import Workflow

MOST_REMEMBERED = 100_000
"""Turns whose tokens are kept, those used last."""
Value = TypeVar("Value")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True)
class Asked:
    """One more turn of a conversation."""

    messages: Sequence[Message]
    tools: Sequence[Tool] | None = None
    """That may be called; by default the workflow's own."""
    answer: Literal["may", "must", "must not"] = "may"
    """Whether the turn is an answer in words, in place of a call."""
    most_tokens: int = LONGEST_TURN
    sampling: Sampling = GREEDY
    only: str = ""
    """The one tool that may be called, if not all of them."""
    shown: Sequence[Tool] = ()
    """What the prompt of a bare base tells of; by default those that may be called."""


@dataclass(frozen=True)
class Prepared:
    """A request for the engine, and what its answer will be remembered under."""

    request: Request
    tenant: str
    asked: Asked
    in_prompt: str = ""
    """Why the tenant's rules are in the prompt and not in an adapter, if they are."""


class Service:
    """Opens an agent and decodes for everybody until `close`. Raises `InputError` if it cannot be opened.

    With `compiled=False` it is the bare base, which is told its tools in the prompt. With `upstream`, the address of a
    vLLM server, that decodes and makes the adapters.
    """

    def __init__(
        self,
        agent: Agent,
        workflow: Workflow,
        tenants: Path | None = None,
        parallel: int = 16,
        most_waiting: int = 256,
        *,
        compiled: bool = True,
        upstream: str = "",
    ) -> None:
        self.agent, self._workflow, self._tenants, self._compiled = agent, workflow, tenants, compiled
        self._hypernetwork = compiled and agent.manifest.kind == "hypernetwork"
        self._own: Adapter | None = None
        self._adapters: Adapters | None = None
        self.renderer = agent.renderer
        self._turns: Scheduler | Remote
        if upstream:
            self._turns = self._remote(upstream, most_waiting)
        else:
            base, self._own = agent.decoding() if compiled and not self._hypernetwork else (agent.load_base(), None)
            self._adapters = agent.adapters(base) if self._hypernetwork else None
            self._turns = Scheduler(open_engine(base.model, self.renderer, parallel), most_waiting)
        self._written = Recent[Message](MOST_REMEMBERED)
        self._lock = Lock()

    @property
    def name(self) -> str:
        return self.agent.manifest.workflow

    def knows(self, tenant: str) -> bool:
        """Whether it has the tenant's profile at this time."""
        return self._profile(tenant) is not None or tenant in self._workflow.tenants

    def prepare(self, tenant: str, asked: Asked) -> Prepared:
        """May take the time of making an adapter. Raises `InputError` for an unknown tenant or a call without tools."""
        with self._lock:
            workflow = self.workflow(tenant)
            messages = [self._as_written(tenant, asked.messages, at) for at in range(len(asked.messages))]
            adapter, in_prompt = self._adapter(workflow, tenant, messages)
        instructions = "full" if in_prompt else "none"
        if not messages or messages[0].role != "system":
            messages.insert(0, Message(role="system", content=workflow.system(tenant, instructions)))
        tools = workflow.tools if asked.tools is None else asked.tools
        shown = workflow.schemas(instructions)
        if not self._compiled:
            shown = json.dumps([tool.schema() for tool in asked.shown or tools], ensure_ascii=False)
        trajectory = Trajectory(id="", messages=messages, tools=shown, workflow=workflow.name, tenant=tenant)
        if asked.answer == "must":
            tools = ()
        elif asked.only:
            tools = [tool for tool in tools if tool.name == asked.only]
        if asked.answer == "must not" and not tools:
            what = f"of {asked.only!r} " if asked.only else ""
            raise InputError(f"a call {what}is required and no such tool is given; give it, or allow an answer")
        grammar = self.renderer.grammar(tools, answer=asked.answer != "must not")
        request = Request(
            self.renderer.prompt(trajectory), grammar, asked.most_tokens,
            seed=str(asked.sampling.seed), sampling=asked.sampling, adapter=adapter,
        )  # fmt: skip
        return Prepared(request, tenant, asked, in_prompt)

    def check(self, prepared: Prepared) -> None:
        """Raises `EngrainError` if the prompt is too long, or the grammar of its tools cannot be compiled."""
        self._turns.check(prepared.request)

    def text(self, ids: Sequence[int]) -> str:
        return str(self.renderer.tokenizer.decode(list(ids)))

    def submit(self, prepared: Prepared, on_tokens: Callable[[list[int]], None]) -> Job:
        """Raises `Overloaded`."""
        return self._turns.submit(prepared.request, prepared.tenant, on_tokens)

    def message(self, prepared: Prepared, completion: Completion) -> Message:
        """The turn that was written, its calls with ids of their own; remembered for when it comes back."""
        message = self.renderer.parse(completion.ids)
        calls = [call.model_copy(update={"id": f"call_{uuid.uuid4().hex[:24]}"}) for call in message.tool_calls]
        update = {"tool_calls": calls, "error": completion.error or message.error}
        message = message.model_copy(update=update)
        if not message.error:
            kept = message.model_copy(update={"token_ids": completion.ids})
            with self._lock:
                self._written[_name(prepared.tenant, prepared.asked.messages, message)] = kept
        return message

    def policy(self, tenant: str, workflow: Workflow) -> CompiledPolicy:
        """The agent as a policy for this tenant's episodes, decoded beside everybody's turns."""

        def adapter_of(episode: Episode) -> Adapter | None:
            with self._lock:
                return self._adapter(workflow, tenant, episode.trajectory.messages)[0]

        def in_prompt(task: Task) -> str:
            with self._lock:
                return self._strange(workflow, tenant)

        return CompiledPolicy(_Shared(self._turns, self.renderer, tenant), adapter_of=adapter_of, in_prompt=in_prompt)

    def load(self) -> tuple[int, int]:
        """How many turns are being decoded, and how many wait."""
        return self._turns.load()

    def has_room(self) -> bool:
        """Whether another turn would be taken now."""
        return self._turns.has_room()

    def adapters_kept(self) -> tuple[int, int]:
        """How many adapters are in memory, and their bytes."""
        return self._adapters.kept() if self._adapters is not None else (0, 0)

    def use_adapters(self, use: Callable[[Adapters], Value]) -> Value:
        """While nobody else uses them. Raises `InputError` if there is no hypernetwork here."""
        if self._adapters is None and self._hypernetwork:
            raise InputError("the adapters are vLLM's; ask it at /v1/models, or serve the agent without --upstream")
        if self._adapters is None:
            raise InputError(f"{self.name} is a {self.agent.manifest.kind} agent: it makes no adapters")
        with self._lock:
            return use(self._adapters)

    def close(self) -> None:
        """Refuse what comes, finish what was accepted."""
        self._turns.close()

    def workflow(self, tenant: str) -> Workflow:
        """The workflow with this tenant as its profile says now. Raises `InputError` for one without."""
        path = self._profile(tenant)
        if path is not None:
            return self._workflow.with_tenant(replace(read_section(path), name=tenant))
        if tenant not in self._workflow.tenants and (tenant or self._workflow.tenants):
            raise InputError(f"unknown tenant {tenant!r}; add its profile to the directory given with --tenants")
        return self._workflow

    def _remote(self, address: str, most_waiting: int) -> Remote:
        check_servable(self.agent)
        remote = Remote(address, self._model, self.renderer, most_waiting)
        if not self._hypernetwork and self.name not in remote.models:
            remote.close()
            raise InputError(f"{address} serves {', '.join(remote.models)}, expected {self.name!r}; export the agent "
                             f"with --merged and start vLLM with --served-model-name {self.name}")  # fmt: skip
        return remote

    def _model(self, tenant: str) -> str:
        """What vLLM knows the tenant's adapter by, as its profile says now."""
        if not self._hypernetwork:
            return self.name
        (context,) = self.agent.contexts(self.workflow(tenant), tenant).values()
        return f"{self.name}/{tenant}@{context.digest()[:8]}"

    def _profile(self, tenant: str) -> Path | None:
        path = self._tenants / f"{tenant}.md" if self._tenants is not None and _NAME.fullmatch(tenant) else None
        return path if path is not None and path.is_file() else None

    def _adapter(self, workflow: Workflow, tenant: str, messages: Sequence[Message]) -> tuple[Adapter | None, str]:
        if self._adapters is None:
            return self._own, ""
        if strange := self._strange(workflow, tenant):
            return None, strange
        contexts = self.agent.contexts(workflow, tenant)
        return self._adapters(contexts["" if "" in contexts else workflow.phase(messages).name]), ""

    def _strange(self, workflow: Workflow, tenant: str) -> str:
        if self._adapters is None:
            return ""
        return self._adapters.strange(self.agent.contexts(workflow, tenant).values())

    def _as_written(self, tenant: str, messages: Sequence[Message], at: int) -> Message:
        """A turn that comes back, with its thoughts and its tokens."""
        message = messages[at]
        if message.role != "assistant":
            return message
        name = _name(tenant, messages[:at], message)
        return self._written.get(name, message)


class _Shared:
    """The engine as one caller among others uses it: a turn waits for its place, and is never refused."""

    def __init__(self, turns: Scheduler | Remote, renderer: Renderer, tenant: str) -> None:
        self._turns, self._tenant = turns, tenant
        self.renderer, self.tokenizer, self.check = renderer, renderer.tokenizer, turns.check

    def decode(self, requests: Sequence[Request]) -> list[Completion]:
        # Without an owner: lines belong to the engine's thread, which finds this stream's again by its tokens.
        own = (replace(request, owner=None) for request in requests)
        jobs = [self._turns.submit(request, self._tenant, goes_on=True) for request in own]
        return [job.done.result() for job in jobs]

    def release(self, owner: object) -> None:
        pass


def as_tool(function: dict[str, Any]) -> Tool:
    """A caller's tool, as OpenAI describes functions, to be called by the caller."""
    parameters = json.dumps(function.get("parameters") or {"type": "object", "properties": {}}, ensure_ascii=False)
    return Tool(function["name"], function.get("description") or "", parameters, _not_here)


def _not_here(**arguments: object) -> None:
    raise AssertionError("a caller's tools are called by the caller")


def _name(tenant: str, before: Sequence[Message], message: Message) -> str:
    """What a turn is remembered under: its calls' ids, which are nobody else's, or all that was said up to it."""
    if message.tool_calls:
        said: list[object] = [call.id for call in message.tool_calls]
    else:
        said = [[one.role, one.content, [call.id for call in one.tool_calls]] for one in (*before, message)]
    return hashlib.sha256(json.dumps([tenant, said]).encode()).hexdigest()
