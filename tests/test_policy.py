"""Each policy answers for each episode in its place; endpoints fail in every way that endpoints do."""

from __future__ import annotations

import email.utils
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from typing import Any, ClassVar, cast

import pytest
from desk import call, say, tasks, workflow

from engrain.errors import EngrainError, InputError
from engrain.policy import EndpointTeacher, Episode, ReplayTeacher, Retry, ScriptTeacher
from engrain.rollout import rollout
from engrain.task import Task
from engrain.trajectory import Message, Outcome, Trajectory

TASKS = list(islice(tasks("train", 1), 6))
SECRET = "sk-very-secret"
QUICK = Retry(times=3, first=0.001)


def episode(task: Task = TASKS[0], *messages: Message) -> Episode:
    start = [Message(role="system", content="You refund."), Message(role="user", content=task.request)]
    trajectory = Trajectory(id=task.id, task=task.id, messages=[*start, *messages])
    return Episode(task, trajectory, workflow.phases[0], workflow.tools[:1], workflow)


def completion(content: Any = "", finish: str = "stop", **message: Any) -> dict[str, Any]:
    return {
        "choices": [{"message": {"role": "assistant", "content": content, **message}, "finish_reason": finish}],
        "usage": {"prompt_tokens": 11},
    }


def function_call(name: str, arguments: Any, id: str | None = "c1") -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


@dataclass
class Reply:
    body: Any = field(default_factory=dict)
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0


class Server(ThreadingHTTPServer):
    """An endpoint that answers with the given replies in turn, the last one again and again, and keeps requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies: list[Reply | Callable[[dict[str, Any]], Reply]] = [Reply(completion("hello"))]
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that gave up is no news


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server = cast(Server, self.server)
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append({"path": self.path, **request})
            server.headers.append(dict(self.headers))
            server.times.append(time.monotonic())
            reply = server.replies.pop(0) if len(server.replies) > 1 else server.replies[0]
        if callable(reply):
            reply = reply(request)
        time.sleep(reply.delay)
        if reply.status == 0:
            return self.connection.close()
        body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        self.send_response(reply.status)
        for name, value in {"Content-Length": str(len(body)), **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def teacher(server: Server) -> Iterator[Callable[..., EndpointTeacher]]:
    made: list[EndpointTeacher] = []

    def make(**options: Any) -> EndpointTeacher:
        made.append(EndpointTeacher(server.url, "tiny", **{"api_key": SECRET, "retry": QUICK, **options}))
        return made[-1]

    yield make
    for teacher in made:
        teacher.close()


Make = Callable[..., EndpointTeacher]


def ask(teacher: EndpointTeacher) -> Message:
    (turn,) = teacher([episode()])
    if isinstance(turn, Exception):
        raise turn
    return turn


# Script and replay


def test_script_teacher_answers_each_episode_and_returns_what_fails() -> None:
    def fussy(task: Task, messages: Any) -> Message:
        if task is TASKS[1]:
            raise ValueError("no idea")
        return workflow.teacher(task, messages)

    turns = ScriptTeacher(replace(workflow, teacher=fussy))([episode(task) for task in TASKS[:3]])
    assert [isinstance(turn, ValueError) for turn in turns] == [False, True, False]
    assert turns[2] == workflow.teacher(TASKS[2], episode(TASKS[2]).trajectory.messages)


def test_replaying_a_log_reproduces_it() -> None:
    recorded = list(rollout(workflow, TASKS, ScriptTeacher(workflow)))
    replayed = list(rollout(workflow, TASKS, ReplayTeacher(recorded)))
    assert all(trajectory.outcome and trajectory.outcome.success for trajectory in replayed)

    def said(trajectories: list[Trajectory]) -> dict[str, list[Any]]:
        return {run.task: [(turn.role, turn.content, turn.tool_calls) for turn in run.messages] for run in trajectories}

    assert said(replayed) == said(recorded)


def test_replay_says_which_task_has_no_log_and_where_a_log_ends() -> None:
    (log,) = rollout(workflow, TASKS[:1], ScriptTeacher(workflow))
    replay = ReplayTeacher([log])
    missing, known = replay([episode(TASKS[1]), episode(TASKS[0])])
    assert isinstance(missing, InputError) and repr(TASKS[1].id) in str(missing)
    assert isinstance(known, Message)
    (late,) = replay([episode(TASKS[0], *[say("more")] * 9)])
    assert isinstance(late, InputError) and f"ends after {log.steps} turns" in str(late)


def test_replay_prefers_the_log_that_succeeded_and_drops_tokens_that_were_not_decoded_here() -> None:
    def log(text: str, success: bool) -> Trajectory:
        turn = Message(role="assistant", content=text, token_ids=[1, 2], seconds=3.0)
        return Trajectory(id=text, task=TASKS[0].id, messages=[turn], outcome=Outcome(success=success))

    (turn,) = ReplayTeacher([log("bad", False), log("good", True), log("later", False)])([episode()])
    assert turn == say("good")


# Endpoint: what is sent and what is read


def test_the_request_is_a_chat_completion_with_the_allowed_tools(server: Server, teacher: Make) -> None:
    made = call("find_order", order_id="A12")
    made.tool_calls[0].id = "call_1"
    found = Message(role="tool", name="find_order", tool_call_id="call_1", content='{"amount": 3}')
    told = teacher(options={"temperature": 0}, system=lambda episode: f"All rules of {episode.task.tenant}.")
    told([episode(TASKS[0], made, found)])
    assert server.requests == [
        {
            "path": "/v1/chat/completions",
            "model": "tiny",
            "temperature": 0,
            "tools": [workflow.tools[0].schema()],
            "messages": [
                {"role": "system", "content": f"All rules of {TASKS[0].tenant}."},
                {"role": "user", "content": TASKS[0].request},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [function_call("find_order", '{"order_id": "A12"}', "call_1")],
                },
                {"role": "tool", "content": '{"amount": 3}', "tool_call_id": "call_1"},
            ],
        }
    ]
    assert server.headers[0]["Authorization"] == f"Bearer {SECRET}"


def test_calls_reasoning_and_text_parts_are_read(server: Server, teacher: Make) -> None:
    calls = [
        function_call("find_order", '{"order_id": 1', None),
        function_call("write_note", {"order_id": "é"}),
        function_call("ping", ""),
    ]
    parts = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]
    server.replies = [Reply(completion(parts, "tool_calls", tool_calls=calls, reasoning_content="because"))]
    turn = ask(teacher())
    assert (turn.content, turn.reasoning, turn.prompt_tokens) == ("ab", "because", 11)
    assert [(call.id, call.name, call.arguments) for call in turn.tool_calls] == [
        ("", "find_order", '{"order_id": 1'),
        ("c1", "write_note", '{"order_id": "é"}'),
        ("c1", "ping", "{}"),
    ]
    assert turn.seconds is not None and turn.seconds > 0


def test_reasoning_is_sent_back_only_on_request(server: Server, teacher: Make) -> None:
    thought = Message(role="assistant", content="x", reasoning="hm")
    teacher()([episode(TASKS[0], thought)])
    teacher(send_reasoning=True)([episode(TASKS[0], thought)])
    assert ["reasoning_content" in request["messages"][2] for request in server.requests] == [False, True]


def test_a_batch_is_asked_concurrently_and_answered_in_order(server: Server, teacher: Make) -> None:
    meeting = threading.Barrier(len(TASKS))

    def echo(request: dict[str, Any]) -> Reply:
        meeting.wait(60)  # nobody is answered before everybody has asked
        return Reply(completion(request["messages"][1]["content"]))

    server.replies = [echo]
    turns = teacher()([episode(task) for task in TASKS])
    assert [turn.content for turn in turns if isinstance(turn, Message)] == [task.request for task in TASKS]


def test_a_rollout_over_http_reaches_the_goal(server: Server, teacher: Make) -> None:
    by_request = {task.request: task for task in TASKS}

    def play(request: dict[str, Any]) -> Reply:
        messages = []
        for sent in request["messages"]:
            calls = [function["function"] for function in sent.get("tool_calls") or []]
            code = json.loads(sent["content"]).get("error", "") if sent["role"] == "tool" else ""
            name = messages[-1].tool_calls[0].name if sent["role"] == "tool" else ""
            turn = (
                call(calls[0]["name"], **json.loads(calls[0]["arguments"]))
                if calls
                else Message(role=sent["role"], content=sent["content"], name=name, error=code)
            )
            messages.append(turn)
        turn = workflow.teacher(by_request[messages[1].content], messages)
        return Reply(
            completion(
                turn.content or None, tool_calls=[function_call(made.name, made.arguments) for made in turn.tool_calls]
            )
        )

    server.replies = [play]
    done = list(rollout(workflow, TASKS, teacher()))
    assert [run.outcome for run in done if not (run.outcome and run.outcome.success)] == []
    assert {run.teacher for run in done} == {"endpoint:tiny"}


# Endpoint: failures


@pytest.mark.parametrize(
    "bad",
    [
        Reply(status=500),
        Reply(status=503),
        Reply(status=429),
        Reply(status=408),
        Reply(status=0),
        Reply(b"<html>busy</html>"),
        Reply(b'{"choices": ['),
        Reply({"choices": []}),
        Reply([1]),
        Reply({"error": "x"}),
        Reply(completion(7)),
        Reply(completion(tool_calls=[{"id": "x"}])),
        Reply(b"junk", headers={"Content-Encoding": "gzip"}),
    ],
)
def test_a_passing_failure_is_tried_again(server: Server, teacher: Make, bad: Reply) -> None:
    server.replies = [bad, bad, Reply(completion("at last"))]
    assert ask(teacher()).content == "at last"
    assert len(server.requests) == 3


def test_a_reply_that_takes_too_long_is_asked_for_again(server: Server, teacher: Make) -> None:
    server.replies = [Reply(completion("late"), delay=1.0), Reply(completion("in time"))]
    assert ask(teacher(timeout=0.5, retry=Retry(times=20, first=0.001))).content == "in time"
    assert len(server.requests) >= 2


def test_giving_up_says_how_often_and_why(server: Server, teacher: Make) -> None:
    server.replies = [Reply(b"overloaded", 500)]
    with pytest.raises(EngrainError, match="gave up after 4 requests; HTTP 500: overloaded"):
        ask(teacher())
    assert len(server.requests) == 4


def test_a_server_that_is_not_there_is_an_error_for_each_episode() -> None:
    lost = EndpointTeacher("http://127.0.0.1:9/v1", "tiny", retry=Retry(times=1, first=0.001))
    turns = lost([episode(), episode()])
    assert ["gave up after 2 requests; ConnectError" in str(turn) for turn in turns] == [True, True]
    lost.close()


class Asked(Retry):
    """Remembers what servers asked for and waits for nothing."""

    heard: ClassVar[list[float | None]] = []

    def pause(self, attempt: int, asked: float | None) -> float:
        Asked.heard.append(asked)
        return 0.0


def test_retry_after_is_read_as_seconds_or_as_a_date(server: Server, teacher: Make) -> None:
    date = email.utils.formatdate(time.time() + 10_000, usegmt=True)
    asked = ["3", "0.5", date, "soon", "-1", ""]
    server.replies = [*(Reply(status=429, headers={"Retry-After": text}) for text in asked), Reply(completion("ok"))]
    Asked.heard.clear()
    assert ask(teacher(retry=Asked(times=9))).content == "ok"
    seconds, half, until, word, negative, empty = Asked.heard
    assert (seconds, half, word, negative, empty) == (3.0, 0.5, None, 0.0, None)
    assert until is not None and 5_000 < until <= 10_000


def test_a_pause_is_waited_for(server: Server, teacher: Make) -> None:
    server.replies = [Reply(status=429, headers={"Retry-After": "0.3"}), Reply(completion("ok"))]
    assert ask(teacher()).content == "ok"
    first, second = server.times
    assert second - first >= 0.3


def test_pauses_grow_are_bounded_and_obey_the_server() -> None:
    retry = Retry(first=1.0, longest=10.0)
    assert 3.0 <= retry.pause(2, None) <= 5.0
    assert retry.pause(20, None) == 10.0
    assert retry.pause(0, 2.5) == 2.5
    assert retry.pause(0, 86400.0) == 10.0


@pytest.mark.parametrize(
    ("status", "fix"), [(401, "check the API key"), (403, "rights"), (404, "model's name"), (402, "account")]
)
def test_a_refusal_stops_all_further_requests_and_keeps_the_key_secret(
    server: Server, teacher: Make, status: int, fix: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    server.replies = [Reply(f"bad key {SECRET}".encode(), status)]
    refused = teacher()
    for _ in range(3):
        with pytest.raises(EngrainError, match=fix) as error:
            ask(refused)
        assert SECRET not in str(error.value) and f"HTTP {status}: bad key ***" in str(error.value)
    assert len(server.requests) == 1
    assert SECRET not in caplog.text + repr(refused)


def test_a_refused_request_concerns_its_own_episode_only(server: Server, teacher: Make) -> None:
    def picky(request: dict[str, Any]) -> Reply:
        bad = request["messages"][1]["content"] == TASKS[1].request
        return Reply(b"context too long", 400) if bad else Reply(completion("fine"))

    server.replies = [picky]
    turns = teacher()([episode(task) for task in TASKS[:3]])
    assert [isinstance(turn, Message) for turn in turns] == [True, False, True]
    assert "context too long" in str(turns[1])
    assert len(server.requests) == 3


@pytest.mark.parametrize("finish", ["length", "content_filter"])
def test_a_reply_that_was_cut_is_no_answer(server: Server, teacher: Make, finish: str) -> None:
    server.replies = [Reply(completion("I will now", finish))]
    with pytest.raises(EngrainError, match=finish):
        ask(teacher())


# Endpoint: configuration


def test_the_key_comes_from_the_argument_or_our_variable_and_openais_goes_to_openai_only(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "openai")
    monkeypatch.delenv("ENGRAIN_API_KEY", raising=False)
    ask(EndpointTeacher(server.url, "tiny"))
    monkeypatch.setenv("ENGRAIN_API_KEY", " ours\n")
    ask(EndpointTeacher(server.url, "tiny"))
    ask(EndpointTeacher(server.url, "tiny", api_key=""))
    assert [headers.get("Authorization") for headers in server.headers] == [None, "Bearer ours", None]
    monkeypatch.delenv("ENGRAIN_API_KEY")
    assert EndpointTeacher("https://api.openai.com/v1", "m")._key == "openai"
    assert EndpointTeacher("https://api.openai.com.evil.org/v1", "m")._key == ""


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://x/v1", "http://", "http://h:port/"])
def test_a_bad_address_is_the_users_mistake(url: str) -> None:
    with pytest.raises(InputError, match="expected an address"):
        EndpointTeacher(url, "tiny")


def test_a_key_that_no_header_can_carry_is_the_users_mistake() -> None:
    with pytest.raises(InputError, match="API key"):
        EndpointTeacher("http://localhost/v1", "tiny", api_key="ключ")
