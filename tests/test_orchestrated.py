"""The graph does a task, mends a wrong step, ends when it never agrees, and says what it cost."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from desk import LIMITS, call, say, tasks, workflow

from engrain.agent import load_agent
from engrain.arms import agent_arms
from engrain.budget import Budget
from engrain.orchestrated import EXECUTOR, META, PLANNER, VALIDATOR, Orchestrated, transcript
from engrain.policy import ScriptTeacher
from engrain.rollout import rollout
from engrain.score import succeeded
from engrain.task import Task
from engrain.trajectory import Message, ToolCall, Trajectory
from engrain.workflow import load_workflow

pytest.importorskip("langgraph")
pytest.importorskip("langchain_openai")

TASKS = list(islice(tasks("train", 1), 6))
OVER = next(task for task in tasks("train", 1) if not task.goal["refund"])


@dataclass
class Script:
    """What the model says as each node, and what it was asked."""

    verdict: Callable[[dict[str, Any]], str] = lambda asked: "ok"
    act: Callable[[Task, list[Message], str], Message] = lambda task, messages, told: workflow.teacher(task, messages)
    status: int = 200
    asked: list[dict[str, Any]] = field(default_factory=list)

    def answer(self, asked: dict[str, Any]) -> Message:
        self.asked.append(asked)
        told = asked["messages"][0]["content"]
        if PLANNER in told:
            return say(f"1. look 2. act ({len(self.asked)})")
        if VALIDATOR in told:
            return say(self.verdict(asked))
        task = next(task for task in [*TASKS, OVER] if task.request == asked["messages"][1]["content"])
        return self.act(task, [_read(message, asked["messages"]) for message in asked["messages"]], told)

    def of(self, role: str) -> list[dict[str, Any]]:
        return [asked for asked in self.asked if role in asked["messages"][0]["content"]]


def _read(sent: dict[str, Any], every: list[dict[str, Any]]) -> Message:
    calls = [
        ToolCall(id=one["id"], name=one["function"]["name"], arguments=one["function"]["arguments"])
        for one in sent.get("tool_calls") or []
    ]
    made = {one["id"]: one["function"]["name"] for message in every for one in message.get("tool_calls") or []}
    failed = sent["role"] == "tool" and "error" in json.loads(sent["content"])
    return Message(
        role=sent["role"], content=sent.get("content") or "", tool_calls=calls,
        name=made.get(sent.get("tool_call_id", ""), ""), error="missing_record" if failed else "",
    )  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    script: Script

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.script.status == 200:
            said = self.script.answer(asked)
            calls = [
                {"id": f"c{len(self.script.asked)}", "type": "function",
                 "function": {"name": one.name, "arguments": one.arguments}} for one in said.tool_calls
            ]  # fmt: skip
            message = {"role": "assistant", "content": said.content, **({"tool_calls": calls} if calls else {})}
            body: dict[str, Any] = {
                "id": "x", "object": "chat.completion", "created": 0, "model": "tiny",
                "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls" if calls else "stop"}],
                "usage": {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107},
            }  # fmt: skip
        else:
            body = {"error": {"message": "context full: 9000 tokens", "type": "invalid_request_error"}}
        sent = json.dumps(body).encode()
        self.send_response(self.script.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent)

    def log_message(self, format: str, *args: Any) -> None:
        pass


Peer = Callable[[Script], Orchestrated]


@pytest.fixture
def peer() -> Iterator[Peer]:
    open_ones: list[Callable[[], object]] = []

    def make(script: Script) -> Orchestrated:
        handler = type("Scripted", (Handler,), {"script": script})
        server = ThreadingHTTPServer(("127.0.0.1", 0), cast(Any, handler))
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        policy = Orchestrated(f"http://127.0.0.1:{server.server_address[1]}/v1", "tiny")
        open_ones.extend((policy.close, server.shutdown, server.server_close))
        return policy

    yield make
    for end in open_ones:
        end()


def run(policy: Orchestrated, *asked: Task) -> list[Trajectory]:
    return list(rollout(workflow, asked, policy, instructions="full"))


def costs(trajectory: Trajectory, what: str) -> list[int]:
    return [turn[what] for turn in json.loads(trajectory.meta[META])]


def test_tasks_are_done_with_three_calls_of_the_model_a_turn(peer: Peer) -> None:
    script = Script()
    policy = peer(script)
    done = run(policy, *TASKS)
    assert len(done) == len(TASKS) and all(map(succeeded, done))
    for trajectory in done:
        turns = [message for message in trajectory.messages if message.role == "assistant"]
        assert costs(trajectory, "model_calls") == [3] * len(turns)
        assert costs(trajectory, "completion_tokens") == [21] * len(turns)
        assert [turn.prompt_tokens for turn in turns] == costs(trajectory, "prompt_tokens") == [300] * len(turns)
        assert all(turn.seconds is not None and turn.seconds > 0 and turn.token_ids is None for turn in turns)
        assert costs(trajectory, "sent_back") == costs(trajectory, "unread") == [0] * len(turns)
    assert {name for one in script.asked for name in one} >= {"model", "messages", "tools", "temperature"}
    assert {one["temperature"] for one in script.asked} == {0} and not policy._plans


def test_every_node_is_told_what_the_prompt_arm_is_told(peer: Peer) -> None:
    script = Script()
    run(peer(script), OVER)
    schemas = [tool.schema() for tool in workflow.tools]
    for one in script.asked:
        assert one["messages"][0]["content"].startswith(workflow.system(OVER.tenant, "full"))
    for one in [*script.of(PLANNER), *script.of(VALIDATOR)]:
        assert one["tools"] == schemas and one["tool_choice"] == "none"
        assert one["messages"][1]["content"].startswith(f"Request: {OVER.request}")
    offered = [[tool["function"]["name"] for tool in one["tools"]] for one in script.of(EXECUTOR)]
    assert offered == [list(workflow.phases[0].tools), *[list(workflow.phases[1].tools)] * 2]
    last = script.of(EXECUTOR)[-1]["messages"]
    assert [message["role"] for message in last] == ["system", "user", "assistant", "tool", "assistant", "tool"]
    assert last[2]["tool_calls"][0]["id"] == last[3]["tool_call_id"]
    assert "Plan: 1. look" in last[0]["content"]
    plans = [one["messages"][1]["content"].partition("Earlier plan: ")[2] for one in script.of(PLANNER)]
    assert plans == ["none", "1. look 2. act (1)", "1. look 2. act (4)"]
    assert "Result of find_order" in script.of(VALIDATOR)[-1]["messages"][1]["content"]


def test_a_wrong_step_is_sent_back_and_mended(peer: Peer) -> None:
    def act(task: Task, messages: list[Message], told: str) -> Message:
        right = workflow.teacher(task, messages)
        hasty = right.tool_calls and right.tool_calls[0].name == "write_note" and "refused" not in told
        return call("refund_order", order_id=task.goal["order"], amount=150) if hasty else right

    def verdict(asked: dict[str, Any]) -> str:
        proposed = asked["messages"][1]["content"].partition("Proposed step:")[2]
        return f"No: the limit is {LIMITS[OVER.tenant]}." if "refund_order" in proposed else "OK."

    script = Script(verdict, act)
    (done,) = run(peer(script), OVER)
    assert succeeded(done) and costs(done, "sent_back") == [0, 1, 0] and costs(done, "model_calls") == [3, 5, 3]
    assert not any("refund_order" in call.name for turn in done.messages for call in turn.tool_calls)
    (mended,) = [one for one in script.of(EXECUTOR) if "was refused" in one["messages"][0]["content"]]
    assert "Call: refund_order" in mended["messages"][0]["content"]
    assert f"Why: the limit is {LIMITS[OVER.tenant]}." in mended["messages"][0]["content"]


def test_a_validator_that_never_agrees_is_overruled(peer: Peer) -> None:
    (done,) = run(peer(Script(lambda asked: "no")), TASKS[0])
    assert succeeded(done) and set(costs(done, "sent_back")) == {2} and set(costs(done, "model_calls")) == {7}


@pytest.mark.parametrize("said", ["", "hm, well", "okra", "nothing"])
def test_a_verdict_that_cannot_be_read_lets_the_step_stand(peer: Peer, said: str) -> None:
    (done,) = run(peer(Script(lambda asked: said)), TASKS[0])
    assert succeeded(done) and set(costs(done, "unread")) == {1} and set(costs(done, "model_calls")) == {3}


def test_nonsense_is_a_failed_run(peer: Peer) -> None:
    def broken(task: Task, messages: list[Message], told: str) -> Message:
        return Message(role="assistant", tool_calls=[ToolCall(id="", name="find_order", arguments='{"order_id": ')])

    policy = peer(Script(act=broken))
    (done,) = rollout(workflow, TASKS[:1], policy, instructions="full", budget=Budget(steps=3))
    assert done.outcome is not None and done.outcome.reason == "budget: steps" and not done.outcome.success
    assert [turn.error for turn in done.messages if turn.role == "tool"] == ["bad_arguments"] * 3
    (silent,) = run(peer(Script(act=lambda task, messages, told: say(""))), TASKS[0])
    assert not succeeded(silent) and silent.steps == 1


def test_what_the_endpoint_refuses_is_the_reason(peer: Peer) -> None:
    (done,) = run(peer(Script(status=400)), TASKS[0])
    assert done.outcome is not None and done.outcome.reason == "policy: context full: 9000 tokens"


def test_a_transcript_has_every_turn_in_words() -> None:
    (done,) = rollout(workflow, [OVER], ScriptTeacher(workflow), instructions="full")
    done.messages[2].reasoning = "First the order."
    lines = transcript(done.messages).splitlines()
    order = OVER.goal["order"]
    assert lines[:3] == [
        f"Request: {OVER.request}",
        "Note: First the order.",
        f'Call: find_order {{"order_id": "{order}"}}',
    ]
    assert lines[3].startswith("Result of find_order: {") and lines[-1] == "Answer: It is over the limit."


def test_our_own_server_with_a_model_that_knows_nothing(
    agent: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engrain.orchestrated.LONGEST_NOTE", 8)
    monkeypatch.setattr("engrain.turn.LONGEST_TURN", 48)
    source = load_workflow(library)
    (arm,) = agent_arms(["orchestrated"], [load_agent(agent)], source)
    policy = cast(Orchestrated, arm.policy(2))
    with closing(cast(Any, policy)):
        asked = list(islice(source.tasks("held_out", 3), 2))
        options = {"parallel": 2, "budget": Budget(steps=2), "instructions": arm.instructions}
        done = list(rollout(source, asked, policy, **options))
    assert len(done) == 2 and all(run.outcome is not None for run in done)
    assert all(3 <= calls <= 7 for run in done for calls in costs(run, "model_calls"))
    assert all(read > 300 for run in done for read in costs(run, "prompt_tokens"))
    assert not [thread for thread in threading.enumerate() if thread.name == "engrain-orchestrated"]
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{policy.base_url}/models", trust_env=False)


def test_the_server_ends_with_the_policy(agent: Path, library: Path) -> None:
    (arm,) = agent_arms(["orchestrated"], [load_agent(agent)], load_workflow(library))
    policy = arm.policy(1)
    assert [thread for thread in threading.enumerate() if thread.name == "engrain-orchestrated"]
    del policy
    assert not [thread for thread in threading.enumerate() if thread.name == "engrain-orchestrated"]
