"""Rollout: policy x task -> trajectory, many at a time.

Each round asks the policy once for the next turn of every episode that is ready, then runs the tools that were called,
those of different episodes at the same time. Invariant: every task gives exactly one trajectory with an outcome. A
policy, tool, workflow function or goal check that fails is a reason in that outcome and touches no other episode; only
Ctrl-C, and an error of the caller's own (`tasks`, `on_step`), ends the run.

Tools of different episodes run on different threads; one episode's never do at once, unless one of them hung.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from engrain.budget import Budget
from engrain.errors import EngrainError, InputError, ToolFailure
from engrain.fault import FAILURES, disturbed, refused
from engrain.policy import Episode, Policy
from engrain.task import Fault, Task
from engrain.tool import Observation, Tool, clip, failed, in_background, storable
from engrain.trajectory import Message, Outcome, ToolCall, Trajectory
from engrain.workflow import Instructions, Phase, Workflow

GRACE = 0.05
"""Seconds that a round waits for slow tools before it goes on with the episodes that are ready."""
HUNG = 5.0
"""Seconds that a goal check may take when a tool of its episode is still running."""
OnStep = Callable[[Trajectory, Message], None]


@dataclass(frozen=True)
class Added:
    """What a prompt says of one task beside the instructions: rules that were retrieved, worked examples."""

    system: str = ""
    """A paragraph after the system prompt."""
    request: str = ""
    """A paragraph after the request."""
    seconds: float = 0.0
    """What it took to make, counted with the first turn."""
    meta: Mapping[str, str] = field(default_factory=dict)
    """Where it came from, for the trajectory's `meta`."""


@dataclass
class _Running:
    """A tool call in flight."""

    call: ToolCall
    tool: Tool
    fault: Fault | None
    future: Future[Observation]
    deadline: float


@dataclass(eq=False)
class _Run:
    """One episode with what no policy may see."""

    workflow: Workflow
    episode: Episode
    system: str = ""
    added: Added = Added()
    state: Any = None
    opened: bool = False
    calls: deque[ToolCall] = field(default_factory=deque)
    running: _Running | None = None
    abandoned: list[Future[Observation]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    reason: str = ""
    over: bool = False
    closed: bool = False

    def end(self, reason: str = "") -> None:
        self.reason = self.reason or reason
        self.over = True


def rollout(
    workflow: Workflow,
    tasks: Iterable[Task],
    policy: Policy,
    *,
    parallel: int = 16,
    budget: Budget | None = None,
    instructions: Instructions = "none",
    added: Callable[[Task], Added] | None = None,
    on_step: OnStep | None = None,
) -> Iterator[Trajectory]:
    """One trajectory a task, in the order in which they end. `tasks` is read as slots become free."""
    pairs = ((workflow, task) for task in tasks)
    return rollouts(
        pairs, policy, parallel=parallel, budget=budget, instructions=instructions, added=added, on_step=on_step
    )


def rollouts(
    tasks: Iterable[tuple[Workflow, Task]],
    policy: Policy,
    *,
    parallel: int = 16,
    budget: Budget | None = None,
    instructions: Instructions = "none",
    added: Callable[[Task], Added] | None = None,
    on_step: OnStep | None = None,
) -> Iterator[Trajectory]:
    """As `rollout`; tasks of different workflows are done side by side."""
    if parallel < 1:
        raise InputError(f"parallel: expected at least 1 episode at a time, got {parallel}")
    nothing, unseen = (lambda task: Added()), (lambda trajectory, message: None)
    loop = _Loop(policy, budget or Budget(), instructions, added or nothing, on_step or unseen)
    waiting = iter(tasks)
    active: list[_Run] = []
    try:
        while True:
            for workflow, task in islice(waiting, parallel - len(active)):
                active.append(loop.begin(workflow, task))
                loop.introduce(active[-1])
            if not active:
                return
            loop.decide([run for run in active if not run.over and run.running is None])
            loop.act(active)
            for run in [run for run in active if run.over]:
                trajectory = loop.finish(run)
                active.remove(run)
                yield trajectory
    finally:
        for run in active:
            loop.close(run)


@dataclass(frozen=True)
class _Loop:
    policy: Policy
    budget: Budget
    instructions: Instructions
    added: Callable[[Task], Added]
    on_step: OnStep

    def begin(self, workflow: Workflow, task: Task) -> _Run:
        name = getattr(self.policy, "name", type(self.policy).__name__)
        trajectory = Trajectory(
            id=f"{task.id}:{name}",
            messages=[],
            workflow=workflow.name,
            tenant=task.tenant,
            task=task.id,
            kind=task.kind,
            split=task.split,
            seed=task.seed,
            teacher=name,
        )
        run = _Run(workflow, Episode(task, trajectory, Phase("", "", ()), (), workflow))
        try:
            instructions = self.instructions
            if reason := getattr(self.policy, "in_prompt", lambda task: "")(task):
                instructions, trajectory.meta["in_prompt"] = "full", reason
            run.system = workflow.system(task.tenant, instructions)
            trajectory.tools = workflow.schemas(instructions)
            run.added = self.added(task)
            trajectory.meta.update(run.added.meta)
            run.state = workflow.open(task)
            run.opened = True
        except Exception as error:
            run.end(f"open: {_named(error)}")
        return run

    def introduce(self, run: _Run) -> None:
        request, added = run.episode.task.request, run.added
        self.add(run, Message(role="system", content="\n\n".join(filter(None, (run.system, added.system)))))
        self.add(run, Message(role="user", content="\n\n".join(filter(None, (request, added.request)))))

    def add(self, run: _Run, message: Message) -> None:
        run.episode.trajectory.messages.append(message)
        self.on_step(run.episode.trajectory, message)

    def decide(self, runs: Sequence[_Run]) -> None:
        """One turn of the policy for every episode that is ready and has budget left."""
        for run in runs:
            if limit := self.budget.exhausted(run.episode.trajectory):
                run.end(f"budget: {limit}")
                continue
            try:
                phase = run.workflow.phase(run.episode.trajectory.messages)
            except Exception as error:
                run.end(f"phase: {_named(error)}")
                continue
            if phase is not run.episode.phase:
                run.episode.phase = phase
                run.episode.tools = tuple(tool for tool in run.workflow.tools if tool.name in phase.tools)
        runs = [run for run in runs if not run.over]
        if not runs:
            return
        started = time.perf_counter()
        turns = self.ask([run.episode for run in runs])
        seconds = time.perf_counter() - started
        for run, turn in zip(runs, turns, strict=True):
            self.take(run, turn, seconds)

    def ask(self, episodes: list[Episode]) -> list[object]:
        """A policy that raises for a batch is asked again for each episode alone, to find whose fault it is."""
        try:
            turns: list[object] = list(self.policy(episodes))
        except Exception as error:
            if len(episodes) == 1:
                return [error]
            return [turn for episode in episodes for turn in self.ask([episode])]
        if len(turns) != len(episodes):
            return [ValueError(f"expected {len(episodes)} turns, got {len(turns)}")] * len(episodes)
        return turns

    def take(self, run: _Run, turn: object, seconds: float) -> None:
        if not isinstance(turn, Message) or turn.role != "assistant":
            wrong = f"expected an assistant Message, got {getattr(turn, 'role', type(turn).__name__)}"
            run.end(f"policy: {_named(turn) if isinstance(turn, Exception) else wrong}")
            return
        seen = {call.id for message in run.episode.trajectory.messages for call in message.tool_calls}
        own = seconds if turn.seconds is None else turn.seconds
        before = 0.0 if run.episode.trajectory.steps else run.added.seconds
        turn = turn.model_copy(
            update={
                "content": storable(turn.content),
                "reasoning": storable(turn.reasoning),
                "phase": run.episode.phase.name,
                "seconds": own + before,
                "tool_calls": _well_formed(turn.tool_calls, seen),
            }
        )
        self.add(run, turn)
        run.calls.extend(turn.tool_calls)
        if not turn.tool_calls:
            run.end()

    def act(self, runs: Sequence[_Run]) -> None:
        """Run calls until no episode waits for a tool, or one is ready and the others are slow."""
        patience = time.perf_counter() + GRACE
        while True:
            for run in runs:
                self.advance(run)
            running = [run.running for run in runs if run.running is not None]
            now = time.perf_counter()
            if not running or (now >= patience and len(running) < len(runs)):
                return
            until = min(call.deadline for call in running)
            if now < patience:
                wait([call.future for call in running], min(until, patience) - now)
            else:
                wait([call.future for call in running], until - now, FIRST_COMPLETED)

    def advance(self, run: _Run) -> None:
        """Take in the observation that is there and start the next call, until one has to be waited for."""
        while run.running is not None or run.calls:
            if run.running is None:
                self.start(run, run.calls.popleft())
            if (running := run.running) is not None:
                late = time.perf_counter() >= running.deadline
                if not running.future.done() and not late:
                    return
                run.running = None
                if not running.future.done():
                    run.abandoned.append(running.future)
                observation = running.tool.settle(running.future, 0.0)
                self.observe(run, running.call, disturbed(observation, running.fault))

    def start(self, run: _Run, call: ToolCall) -> None:
        """Begin a call, or observe at once why it cannot be made."""
        phase, tool = run.episode.phase, run.workflow.tool(call.name)
        if self.budget.out_of_time(run.episode.trajectory):
            return self.observe(run, call, failed("budget", "no time left for this call"))
        if tool is None:
            return self.observe(run, call, failed("unknown_tool", f"no tool {call.name!r}; {_offer(phase)}"))
        if call.name not in phase.tools:
            problem = f"{call.name} is not allowed in phase {phase.name}; {_offer(phase)}"
            return self.observe(run, call, failed("not_allowed", problem))
        try:
            arguments = tool.check(call.arguments)
        except ToolFailure as failure:
            return self.observe(run, call, failed(failure.code, str(failure)))
        fault = self.fault(run, call.name)
        if fault is not None and fault.kind in FAILURES:
            return self.observe(run, call, refused(tool, fault.kind))
        deadline = time.perf_counter() + tool.timeout
        run.running = _Running(call, tool, fault, tool.start(arguments, run.state), deadline)

    def fault(self, run: _Run, name: str) -> Fault | None:
        """The fault that hits this call of the tool. Calls are counted when they are well-formed and allowed."""
        run.counts[name] += 1
        count = run.counts[name]
        for fault in run.episode.task.faults:
            if fault.tool == name and fault.nth <= count < fault.nth + fault.times:
                run.faults.append(f"{name}#{count}:{fault.kind}")
                return fault
        return None

    def observe(self, run: _Run, call: ToolCall, observation: Observation) -> None:
        self.add(
            run,
            Message(
                role="tool",
                name=call.name,
                tool_call_id=call.id,
                content=observation.content,
                error=observation.error,
                seconds=observation.seconds,
                phase=run.episode.phase.name,
            ),
        )

    def finish(self, run: _Run) -> Trajectory:
        trajectory = run.episode.trajectory
        if run.faults:
            trajectory.meta["faults"] = " ".join(run.faults)
        outcome = self.judge(run) if run.opened else Outcome(success=False)
        if run.reason:
            outcome = outcome.model_copy(update={"success": False, "reason": run.reason})
        trajectory.outcome = outcome
        self.close(run)
        return trajectory

    def judge(self, run: _Run) -> Outcome:
        task, messages = run.episode.task, run.episode.trajectory.messages
        try:
            if not _hung(run):
                outcome = run.workflow.check(task, run.state, messages)
            else:  # the tool may hold a lock of the state
                outcome = in_background(lambda: run.workflow.check(task, run.state, messages)).result(HUNG)
        except TimeoutError:
            return Outcome(success=False, reason=f"check: no result within {HUNG:g} seconds; a tool is still running")
        except Exception as error:
            return Outcome(success=False, reason=f"check: {_named(error)}")
        if not isinstance(outcome, Outcome):
            return Outcome(success=False, reason=f"check: expected an Outcome, got {type(outcome).__name__}")
        return outcome

    def close(self, run: _Run) -> None:
        if run.closed:
            return
        run.closed = True
        with suppress(Exception):
            self.policy.finish(run.episode)
        close = getattr(run.state, "close", None)
        if close is not None:
            with suppress(Exception):
                in_background(close) if _hung(run) else close()


def _well_formed(calls: Sequence[ToolCall], seen: set[str]) -> list[ToolCall]:
    """The calls with ids that are unique in the trajectory: a missing or repeated one becomes `call_<n>`."""
    given: list[ToolCall] = []
    for call in calls:
        name, number = call.id, len(seen)
        while not name or name in seen:
            number += 1
            name = f"call_{number}"
        seen.add(name)
        given.append(ToolCall(id=storable(name), name=storable(call.name), arguments=storable(call.arguments)))
    return given


def _offer(phase: Phase) -> str:
    return f"allowed now: {', '.join(phase.tools)}" if phase.tools else "no tool is allowed now"


def _hung(run: _Run) -> bool:
    running = [run.running.future] if run.running is not None else []
    return any(not future.done() for future in [*run.abandoned, *running])


def _named(error: Exception) -> str:
    with suppress(Exception):
        return clip(str(error) if isinstance(error, EngrainError) else f"{type(error).__name__}: {error}")
    return type(error).__name__
