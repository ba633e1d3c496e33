"""Every task gives one trajectory with an outcome, whatever policy, tools, faults and workflow do."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
from desk import Desk, call, say, tasks, workflow
from hypothesis import given
from hypothesis import strategies as st

from engrain.budget import Budget
from engrain.errors import InputError, ToolFailure
from engrain.policy import Episode, ScriptTeacher
from engrain.rollout import Added, rollout
from engrain.task import Fault, FaultKind, Task
from engrain.tool import Tool, from_function
from engrain.trajectory import Message, Outcome, ToolCall, Trajectory
from engrain.workflow import Workflow

TASKS = list(islice(tasks("train", 1), 40))
TEACHER = ScriptTeacher(workflow)
REFUND = next(task for task in TASKS if task.goal["refund"])


class Each:
    """A policy from a function of one episode."""

    name = "each"

    def __init__(self, turn: Callable[[Episode], Any]) -> None:
        self.turn = turn
        self.finished: list[str] = []
        self.batches: list[int] = []

    def __call__(self, episodes: Sequence[Episode], /) -> Any:
        self.batches.append(len(episodes))
        return [self.turn(episode) for episode in episodes]

    def finish(self, episode: Episode, /) -> None:
        self.finished.append(episode.task.id)


def teach(episode: Episode) -> Message:
    return workflow.teacher(episode.task, episode.trajectory.messages)


def scripted(*turns: Any) -> Each:
    """The same turns for every episode."""
    return Each(lambda episode: turns[episode.trajectory.steps])


def one(policy: Any, task: Task = REFUND, source: Workflow = workflow, **options: Any) -> Trajectory:
    (trajectory,) = rollout(source, [task], policy, **options)
    return trajectory


def outcome(trajectory: Trajectory) -> Outcome:
    assert trajectory.outcome is not None
    return trajectory.outcome


def with_tool(function: Callable[..., Any], timeout: float = 60.0) -> Workflow:
    """The desk with another `find_order`."""
    function.__name__, function.__doc__ = "find_order", "Find."
    function.__annotations__["desk"] = Desk
    tool = from_function(function, state=Desk, timeout=timeout)
    return replace(workflow, tools=(tool, *workflow.tools[1:]))


def comparable(trajectory: Trajectory) -> dict[str, Any]:
    plain = trajectory.model_dump()
    for message in plain["messages"]:
        message.pop("seconds")
    return plain


# The record


def test_the_teacher_reaches_the_goal_of_every_task() -> None:
    done = list(rollout(workflow, TASKS, TEACHER))
    assert sorted(run.task for run in done) == sorted(task.id for task in TASKS)
    assert [run.task for run in done if not outcome(run).success] == []
    assert {bool(task.goal["refund"]) for task in TASKS} == {True, False}


def test_a_trajectory_records_the_whole_episode() -> None:
    run = one(TEACHER)
    order, amount = REFUND.goal["order"], REFUND.goal["refund"]
    assert [(turn.role, turn.phase, turn.name, turn.tool_call_id) for turn in run.messages] == [
        ("system", "", "", ""),
        ("user", "", "", ""),
        ("assistant", "look", "", ""),
        ("tool", "look", "find_order", "call_1"),
        ("assistant", "act", "", ""),
        ("tool", "act", "refund_order", "call_2"),
        ("assistant", "act", "", ""),
    ]
    assert run.messages[0].content == workflow.system(REFUND.tenant, "none")
    assert run.messages[1].content == REFUND.request
    assert run.messages[3].content == json.dumps({"id": order, "amount": amount})
    assert run.messages[4].tool_calls == [
        ToolCall(id="call_2", name="refund_order", arguments=json.dumps({"order_id": order, "amount": amount}))
    ]
    assert all((turn.seconds is None) == (turn.role in ("system", "user")) for turn in run.messages)
    assert (run.workflow, run.tenant, run.task, run.kind, run.split, run.seed, run.teacher) == (
        "desk",
        REFUND.tenant,
        REFUND.id,
        "refund",
        "train",
        1,
        "script",
    )
    assert (run.tools, run.meta) == ("[]", {})
    assert Trajectory.from_json(run.to_json()) == run


def test_full_instructions_put_the_procedure_and_the_tools_into_the_prompt() -> None:
    run = one(TEACHER, instructions="full")
    assert workflow.procedure in run.messages[0].content
    assert [schema["function"]["name"] for schema in run.tool_schemas()] == [tool.name for tool in workflow.tools]


@pytest.mark.parametrize("parallel", [1, 3, 64])
def test_trajectories_do_not_depend_on_how_many_run_at_once(parallel: int) -> None:
    def by_task(parallel: int) -> dict[str, Any]:
        return {run.task: comparable(run) for run in rollout(workflow, TASKS, TEACHER, parallel=parallel)}

    assert by_task(parallel) == by_task(16)


def test_a_round_asks_the_policy_once_for_all_ready_episodes_and_reads_tasks_as_slots_free() -> None:
    policy, read = Each(teach), []
    first = next(rollout(workflow, (read.append(task.id) or task for task in tasks("train", 1)), policy, parallel=4))
    assert set(policy.batches) == {4}
    assert len(read) == 4 and first.task in policy.finished


def test_the_policy_sees_the_phase_and_its_tools() -> None:
    seen: list[tuple[str, list[str]]] = []

    def turn(episode: Episode) -> Message:
        seen.append((episode.phase.name, [tool.name for tool in episode.tools]))
        return teach(episode)

    one(Each(turn))
    everything = [tool.name for tool in workflow.tools]
    assert seen == [("look", ["find_order"]), ("act", everything), ("act", everything)]


def test_each_message_is_announced_once_it_is_on_the_trajectory() -> None:
    told: list[Message] = []
    run = one(TEACHER, on_step=lambda trajectory, message: told.append(trajectory.messages[-1]))
    assert told == run.messages


def test_no_episode_at_a_time_is_the_users_mistake() -> None:
    with pytest.raises(InputError, match="at least 1"):
        list(rollout(workflow, TASKS, TEACHER, parallel=0))


# What the agent does


def test_several_calls_in_a_turn_run_in_order_and_get_ids_of_their_own() -> None:
    order = REFUND.goal["order"]
    first, second = call("find_order", order_id=order), call("find_order", order_id="nope")
    both = Message(role="assistant", tool_calls=[*first.tool_calls, *second.tool_calls])
    given = both.model_copy(update={"tool_calls": [ToolCall(id="mine", name="find_order", arguments="{}")] * 2})
    run = one(scripted(both, given, say("ok")))
    ids = [call.id for turn in run.messages for call in turn.tool_calls]
    assert ids == ["call_1", "call_2", "mine", "call_4"]
    answers = [turn for turn in run.messages if turn.role == "tool"]
    assert [turn.tool_call_id for turn in answers] == ids
    assert [turn.error for turn in answers] == ["", "missing_record", "bad_arguments", "bad_arguments"]


def test_a_call_that_the_phase_does_not_allow_is_observed_and_not_made() -> None:
    order = REFUND.goal["order"]
    run = one(scripted(call("refund_order", order_id=order, amount=1), call("shred", all=True), say("ok")))
    early, unknown = (turn for turn in run.messages if turn.role == "tool")
    assert (early.error, unknown.error) == ("not_allowed", "unknown_tool")
    assert "phase look; allowed now: find_order" in json.loads(early.content)["message"]
    assert outcome(run).checks["refund"] is False  # nothing was paid


def test_text_that_cannot_be_stored_is_made_storable() -> None:
    bad = "a\ud800b"
    turn = Message(
        role="assistant",
        content=bad,
        reasoning=bad,
        tool_calls=[ToolCall(id=bad, name=bad, arguments=json.dumps({"k": bad}, ensure_ascii=False))],
    )
    run = one(scripted(turn, say(bad)))
    assert run.to_json().encode("utf-8")
    assert run.messages[-1].content == "a?b"


WEIRD = st.one_of(
    st.sampled_from([None, "text", 3, Message(role="user"), ValueError("\ud800"), KeyError(), say("")]),
    st.builds(
        lambda name, arguments: Message(role="assistant", tool_calls=[ToolCall(id="", name=name, arguments=arguments)]),
        st.sampled_from(["find_order", "refund_order", "write_note", ""]) | st.text(),
        st.text() | st.dictionaries(st.sampled_from(["order_id", "amount"]), st.text() | st.integers()).map(json.dumps),
    ),
)


@given(st.lists(st.lists(WEIRD, min_size=1, max_size=5), min_size=1, max_size=4))
def test_whatever_policies_say_every_task_gets_an_outcome(turns: list[list[Any]]) -> None:
    chosen = dict(zip([task.id for task in TASKS], turns, strict=False))
    policy = Each(lambda episode: (chosen[episode.task.id] * 9)[episode.trajectory.steps])
    done = list(rollout(workflow, TASKS[: len(turns)], policy, budget=Budget(steps=6)))
    assert sorted(run.task for run in done) == sorted(chosen)
    for run in done:
        assert outcome(run).success or outcome(run).reason
        assert Trajectory.from_json(run.to_json()) == run


# Policies that fail


def test_a_failing_policy_costs_only_its_own_episode_returned_or_raised() -> None:
    def turn(episode: Episode) -> Any:
        if episode.task is TASKS[2]:
            raise InputError("no log of this task")
        return RuntimeError("lost") if episode.task is TASKS[5] else teach(episode)

    policy = Each(turn)
    done = {run.task: outcome(run) for run in rollout(workflow, TASKS, policy)}
    assert {task: (end.success, end.reason) for task, end in done.items() if not end.success} == {
        TASKS[2].id: (False, "policy: no log of this task"),
        TASKS[5].id: (False, "policy: RuntimeError: lost"),
    }
    assert done[TASKS[2].id].checks["answer"] is False
    assert sorted(policy.finished) == sorted(task.id for task in TASKS)


class Wrong:
    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def __call__(self, episodes: Sequence[Episode], /) -> Any:
        return self.answer

    def finish(self, episode: Episode, /) -> None:
        raise RuntimeError("finish fails too")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (None, "policy: TypeError"),
        ([], "policy: ValueError: expected 1 turns, got 0"),
        ([say("a"), say("b")], "policy: ValueError: expected 1 turns, got 2"),
        (["text"], "policy: expected an assistant Message, got str"),
        ([Message(role="user")], "policy: expected an assistant Message, got user"),
    ],
)
def test_a_policy_that_breaks_its_contract_is_recorded(answer: Any, reason: str) -> None:
    assert outcome(one(Wrong(answer))).reason.startswith(reason)


# Tools that fail


def test_a_tool_that_raises_or_floods_is_observed() -> None:
    def crash(desk: Desk, order_id: str) -> str:
        raise ToolFailure("http_500", "down") if order_id == "A" else SystemExit

    def flood(desk: Desk, order_id: str) -> str:
        return "x" * 10_000_000

    run = one(
        scripted(call("find_order", order_id="A"), call("find_order", order_id="B"), say("ok")), source=with_tool(crash)
    )
    assert [turn.error for turn in run.messages if turn.role == "tool"] == ["http_500", "exception"]
    run = one(scripted(call("find_order", order_id="A"), say("ok")), source=with_tool(flood))
    assert len(run.messages[3].content) < 5000


def test_a_hung_tool_is_a_timeout_and_its_episode_goes_on() -> None:
    release = threading.Event()

    def hang(desk: Desk, order_id: str) -> None:
        release.wait(60)

    run = one(scripted(call("find_order", order_id="A"), say("gave up")), source=with_tool(hang, timeout=0.05))
    assert [(turn.role, turn.error, turn.seconds) for turn in run.messages[3:4]] == [("tool", "timeout", 0.05)]
    assert run.messages[-1].content == "gave up"
    release.set()


def test_other_episodes_go_on_while_a_tool_is_slow() -> None:
    release = threading.Event()
    slow = TASKS[0]

    def find(desk: Desk, order_id: str) -> dict[str, Any]:
        if order_id == slow.goal["order"]:
            release.wait(60)
        return {"id": order_id, "amount": 1}

    running = rollout(with_tool(find, timeout=60.0), TASKS[:8], Each(teach))
    assert slow.id not in [next(running).task for _ in range(7)]
    release.set()
    assert (last := next(running)).task == slow.id
    assert [turn.error for turn in last.messages if turn.role == "tool"] == ["", ""]


def test_a_tool_that_hangs_on_the_state_does_not_hang_the_goal_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engrain.rollout.HUNG", 0.1)
    release, closed = threading.Event(), threading.Event()

    class Locked(Desk):
        def __init__(self) -> None:
            super().__init__({})
            self.lock = threading.Lock()

        def close(self) -> None:
            with self.lock:
                closed.set()

    def hang(desk: Desk, order_id: str) -> str:
        assert isinstance(desk, Locked)
        with desk.lock:
            release.wait(60)
        return "late"

    def check(task: Task, state: Locked, messages: Sequence[Message]) -> Outcome:
        with state.lock:
            return Outcome(success=True)

    source = replace(with_tool(hang, timeout=0.05), open=lambda task: Locked(), check=check)
    run = one(scripted(call("find_order", order_id="A"), say("ok")), source=source)
    assert outcome(run).success is False and "a tool is still running" in outcome(run).reason
    release.set()
    assert closed.wait(60)


def test_the_tools_of_different_episodes_run_at_the_same_time() -> None:
    meeting = threading.Barrier(6)

    def meet(desk: Desk, order_id: str) -> dict[str, Any]:
        meeting.wait(60)
        return {"id": order_id, "amount": 1}

    done = rollout(
        with_tool(meet), TASKS[:6], Each(lambda episode: say("ok") if episode.trajectory.steps else teach(episode))
    )
    assert [run.messages[3].error for run in done] == [""] * 6


# Faults


@pytest.mark.parametrize("kind", ["timeout", "http_429", "http_500", "missing_record"])
def test_a_failing_fault_hits_the_chosen_calls_and_the_tool_does_not_run(kind: FaultKind) -> None:
    ran: list[str] = []

    def find(desk: Desk, order_id: str) -> dict[str, Any]:
        ran.append(order_id)
        return {"id": order_id}

    task = REFUND.model_copy(update={"faults": (Fault(tool="find_order", kind=kind, nth=2, times=2),)})
    turns = [call("find_order", order_id=str(number)) for number in range(4)]
    wrong = call("find_order", number=1)  # not well-formed: not counted
    run = one(scripted(turns[0], wrong, *turns[1:], say("ok")), task, with_tool(find))
    answers = [turn for turn in run.messages if turn.role == "tool"]
    assert [turn.error for turn in answers] == ["", "bad_arguments", kind, kind, ""]
    assert json.loads(answers[2].content)["error"] == kind
    assert ran == ["0", "3"]
    assert run.meta["faults"] == f"find_order#2:{kind} find_order#3:{kind}"


def test_an_injected_timeout_reads_like_a_real_one() -> None:
    release = threading.Event()
    waiting = scripted(call("find_order", order_id="A"), say("ok"))

    def hang(desk: Desk, order_id: str) -> None:
        release.wait(60)

    source = with_tool(hang, timeout=0.05)
    faulty = REFUND.model_copy(update={"faults": (Fault(tool="find_order", kind="timeout"),)})
    real, injected = one(waiting, source=source).messages[3], one(waiting, faulty, source).messages[3]
    assert (real.content, real.error) == (injected.content, injected.error)
    release.set()


@pytest.mark.parametrize(
    ("fault", "result", "content"),
    [
        (
            Fault(tool="find_order", kind="renamed_field", field="b", renamed="c"),
            {"a": 1, "b": 2, "d": 3},
            '{"a": 1, "c": 2, "d": 3}',
        ),
        (Fault(tool="find_order", kind="renamed_field", field="b"), {"b": {"b": 2}}, '{"b_v2": {"b": 2}}'),
        (Fault(tool="find_order", kind="partial_result", field="b"), {"a": 1, "b": 2}, '{"a": 1}'),
        (Fault(tool="find_order", kind="partial_result"), {"a": 1, "é": 2}, '{"a": 1}'),
        (Fault(tool="find_order", kind="partial_result"), [1, 2, 3, 4], "[1, 2]"),
        (Fault(tool="find_order", kind="partial_result", field="b"), "no JSON", "no JSON"),
        (Fault(tool="find_order", kind="renamed_field", field="z"), {"a": 1}, '{"a": 1}'),
        (Fault(tool="write_note", kind="partial_result", field="a"), {"a": 1}, '{"a": 1}'),
    ],
)
def test_a_rewriting_fault_changes_the_top_level_of_the_result(fault: Fault, result: Any, content: str) -> None:
    def find(desk: Desk, order_id: str) -> Any:
        return result

    task = REFUND.model_copy(update={"faults": (fault,)})
    run = one(scripted(call("find_order", order_id="A"), say("ok")), task, with_tool(find))
    assert (run.messages[3].content, run.messages[3].error) == (content, "")


def test_the_teacher_recovers_from_faults() -> None:
    faults = (
        Fault(tool="find_order", kind="http_500", times=2),
        Fault(tool="refund_order", kind="timeout"),
        Fault(tool="find_order", kind="renamed_field", nth=3, field="amount"),
    )
    run = one(TEACHER, REFUND.model_copy(update={"faults": faults}))
    assert outcome(run).success
    assert [turn.error for turn in run.messages if turn.role == "tool"] == ["http_500", "http_500", "", "timeout", ""]


# Budgets


def test_an_episode_ends_when_its_steps_are_used_up_and_the_goal_check_still_speaks() -> None:
    forever = Each(lambda episode: call("find_order", order_id="A1"))
    run = one(forever, budget=Budget(steps=5))
    assert (run.steps, run.messages[-1].role) == (5, "tool")
    assert (outcome(run).success, outcome(run).reason) == (False, "budget: steps")
    assert outcome(run).checks == {"refund": False, "note": True, "answer": False}


def test_the_answer_may_be_the_last_step() -> None:
    assert outcome(one(TEACHER, budget=Budget(steps=3))).success


def test_an_episode_ends_when_its_tokens_or_seconds_are_used_up() -> None:
    def turn(**used: Any) -> Each:
        return Each(lambda episode: call("find_order", order_id="A1").model_copy(update=used))

    tokens = one(turn(token_ids=[1] * 10), budget=Budget(completion_tokens=25))
    assert (tokens.steps, outcome(tokens).reason) == (3, "budget: completion_tokens")
    seconds = one(turn(seconds=10.0), budget=Budget(seconds=25.0))
    assert (seconds.steps, outcome(seconds).reason) == (3, "budget: seconds")
    assert [turn.error for turn in seconds.messages if turn.role == "tool"] == [*["missing_record"] * 2, "budget"]


# Workflows that fail, and being stopped


def broken(*_: Any) -> Any:
    raise ValueError("broken")


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ({"open": broken}, "open: ValueError: broken"),
        ({"phase_of": broken}, "phase: ValueError: broken"),
        ({"phase_of": lambda messages: "limbo"}, "phase: phase_of returned 'limbo'"),
        ({"check": broken}, "check: ValueError: broken"),
        ({"check": lambda *_: True}, "check: expected an Outcome, got bool"),
        ({"tenants": {}}, "open: unknown tenant"),
    ],
)
def test_a_workflow_function_that_fails_is_a_reason(part: dict[str, Any], reason: str) -> None:
    run = one(TEACHER, source=replace(workflow, **part))
    assert outcome(run).success is False and outcome(run).reason.startswith(reason)


class Watched(Desk):
    alive = 0

    def __init__(self, orders: dict[str, int]) -> None:
        super().__init__(orders)
        Watched.alive += 1

    def close(self) -> None:
        super().close()
        Watched.alive -= 1


WATCHED = replace(workflow, open=lambda task: Watched(task.start["orders"]))


def test_every_state_is_closed_also_when_nobody_reads_on() -> None:
    Watched.alive = 0
    assert len(list(rollout(WATCHED, TASKS, TEACHER))) == len(TASKS)
    assert Watched.alive == 0
    policy = Each(teach)
    running = rollout(WATCHED, TASKS, policy, parallel=4)
    next(running)
    assert Watched.alive > 0
    running.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert Watched.alive == 0
    assert len(policy.finished) == 4


@pytest.mark.parametrize("where", ["policy", "step", "tasks"])
def test_ctrl_c_and_the_callers_own_errors_end_the_run_and_close_every_state(where: str) -> None:
    Watched.alive = 0

    def stop(here: str, error: type[BaseException]) -> None:
        if where == here:
            raise error

    def turn(episode: Episode) -> Message:
        stop("policy", KeyboardInterrupt)
        return teach(episode)

    def given() -> Any:
        yield from TASKS[:3]
        stop("tasks", LookupError)

    with pytest.raises(KeyboardInterrupt if where == "policy" else LookupError):
        list(rollout(WATCHED, given(), Each(turn), on_step=lambda *_: stop("step", LookupError)))
    assert Watched.alive == 0


def test_a_tool_without_state_is_called_without_it() -> None:
    echo = Tool("find_order", "Find.", '{"type": "object"}', lambda **arguments: arguments)
    run = one(scripted(call("find_order", a=1), say("ok")), source=replace(workflow, tools=(echo, *workflow.tools[1:])))
    assert run.messages[3].content == '{"a": 1}'


def test_a_policy_may_ask_for_the_context_in_the_prompt_and_the_trajectory_says_why() -> None:
    policy = Each(teach)
    policy.in_prompt = lambda task: "novelty 3 is over 1" if task.id == TASKS[0].id else ""  # type: ignore[attr-defined]
    asked, other = sorted(rollout(workflow, TASKS[:2], policy), key=lambda run: run.task != TASKS[0].id)
    assert asked.meta["in_prompt"] == "novelty 3 is over 1" and "in_prompt" not in other.meta
    assert asked.messages[0].content == workflow.system(TASKS[0].tenant, "full") and asked.tools != "[]"
    assert other.messages[0].content == workflow.system(TASKS[1].tenant, "none") and other.tools == "[]"


def test_what_is_added_follows_the_system_prompt_and_the_request_and_is_on_record() -> None:
    def added(task: Task) -> Added:
        if task is TASKS[1]:
            raise InputError("nothing to add")
        return Added("Rules found.", "Facts found.", meta={"from": task.tenant})

    done = {run.task: run for run in rollout(workflow, TASKS[:2], TEACHER, instructions="shared", added=added)}
    told, failed = done[TASKS[0].id], done[TASKS[1].id]
    assert told.messages[0].content == f"{workflow.system(told.tenant, 'shared')}\n\nRules found."
    assert told.messages[1].content == f"{TASKS[0].request}\n\nFacts found."
    assert told.meta == {"from": told.tenant} and told.tools == workflow.schemas("shared")
    assert outcome(told).success and TASKS[0].request in told.messages[1].content
    assert outcome(failed).reason == "open: nothing to add" and failed.messages[1].content == TASKS[1].request
