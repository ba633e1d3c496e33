"""Turns decoded elsewhere, by a stand-in for vLLM: its completions endpoint over our own engine and plug-in, so that
the tokens that come back can be held against those of the engine here."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

import openai
import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response, StreamingResponse
from openai.types.chat import ChatCompletionUserMessageParam
from serving import running, served

from engrain.adapter import load_peft
from engrain.agent import Agent, load_agent, open_engine
from engrain.budget import Budget
from engrain.errors import EngrainError, InputError, Overloaded
from engrain.keys import Everybody
from engrain.rollout import rollout
from engrain.scheduler import Scheduler
from engrain.service import Asked, Service
from engrain.task import Task
from engrain.trajectory import Message
from engrain.turn import Request, Sampling
from engrain.vllm_plugin import Emitter
from engrain.workflow import load_workflow

HELLO = Message(role="user", content="Please lend me a book.")
PROFILE = "---\nname: {name}\n---\n- lend nothing on Sundays\n- lend for {days} days\n"
PIECE = 3


@dataclass
class StandIn:
    """What vLLM would be asked, and how it fails if it is told to."""

    agent: Agent
    emit: Emitter
    asked: list[dict[str, Any]] = field(default_factory=list)
    fails: str = ""
    """`error` or `lost`, after the first tokens; `stuck` before them."""
    left: Event = field(default_factory=Event)
    """Set when a caller goes away before the end."""

    def app(self) -> FastAPI:
        app = FastAPI()
        engine = open_engine(self.agent.load_base().model, self.agent.renderer, 2)
        scheduler = Scheduler(engine)

        @app.get("/v1/models")
        async def models() -> dict[str, Any]:
            return {"data": [{"id": "base", "max_model_len": engine.max_context}, {"id": "x", "max_model_len": None}]}

        @app.post("/v1/completions", response_model=None)
        async def completions(body: dict[str, Any]) -> Response:
            self.asked.append(body)
            if (path := self.emit(body["model"])) is None:
                return JSONResponse({"error": {"message": f"The model {body['model']} does not exist."}}, 404)
            grammar = body.get("structured_outputs", {}).get("grammar")
            sampling = Sampling(body["temperature"], body["top_p"], body["seed"])
            job = scheduler.submit(
                Request(body["prompt"], grammar, body["max_tokens"], seed=str(body["seed"]), adapter=load_peft(path),
                        sampling=sampling)
            )  # fmt: skip
            done = await asyncio.to_thread(job.done.result, 60)
            ended = "length" if done.error else "stop"
            return StreamingResponse(self.events(done.ids, done.logprobs, ended), media_type="text/event-stream")

        return app

    async def events(self, ids: list[int], logprobs: list[float], ended: str) -> AsyncIterator[str]:
        try:
            if self.fails == "stuck":
                await asyncio.sleep(60)
            for place in range(0, len(ids), PIECE):
                last = place + PIECE >= len(ids)
                choice = {
                    "index": 0, "token_ids": ids[place : place + PIECE], "finish_reason": ended if last else None,
                    "logprobs": {"token_logprobs": logprobs[place : place + PIECE]},
                }  # fmt: skip
                yield f"data: {json.dumps({'choices': [choice]})}\n\n"
                if self.fails == "lost":
                    raise ConnectionError
                if self.fails == "error":
                    yield f"data: {json.dumps({'error': {'message': 'out of memory'}})}\n\n"
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.left.set()
            raise


@pytest.fixture(scope="module")
def tenants(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("remote_tenants")
    for name, days in (("east", 9), ("west", 12)):
        (folder / f"{name}.md").write_text(PROFILE.format(name=name, days=days))
    return folder


@pytest.fixture(scope="module")
def stand_in(hyper_agent: Path, tenants: Path, tmp_path_factory: pytest.TempPathFactory) -> StandIn:
    agent = load_agent(hyper_agent)
    return StandIn(agent, Emitter(agent, tenants, tmp_path_factory.mktemp("emitted"), rank=64))


@pytest.fixture(scope="module")
def address(stand_in: StandIn) -> Iterator[str]:
    with running(stand_in.app()) as url:
        yield url


@pytest.fixture
def remote(library: Path, hyper_agent: Path, tenants: Path, stand_in: StandIn, address: str) -> Iterator[Service]:
    stand_in.fails = ""
    stand_in.left.clear()
    stand_in.asked.clear()
    service = Service(load_agent(hyper_agent), load_workflow(library), tenants, upstream=address)
    yield service
    service.close()


@pytest.fixture(scope="module")
def local(library: Path, hyper_agent: Path, tenants: Path) -> Iterator[Service]:
    service = Service(load_agent(hyper_agent), load_workflow(library), tenants, parallel=2)
    yield service
    service.close()


def test_the_tokens_are_those_of_the_engine_here(remote: Service, local: Service, stand_in: StandIn) -> None:
    for asked in (Asked([HELLO], most_tokens=20), Asked([HELLO], None, "must not", 20, Sampling(0.8, 0.9, 3))):
        for tenant in ("east", "west"):
            pieces: list[int] = []
            theirs, ours = (service.prepare(tenant, asked) for service in (remote, local))
            assert theirs.request.prompt == ours.request.prompt and theirs.request.grammar == ours.request.grammar
            assert ours.request.adapter is not None and not ours.in_prompt
            found = remote.submit(theirs, pieces.extend).done.result(60)
            expected = local.submit(ours, lambda ids: None).done.result(60)
            assert found.ids == pieces == expected.ids and found.error == expected.error
            assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
            assert stand_in.asked[-1]["model"].startswith(f"library/{tenant}@")


def test_a_changed_profile_is_another_model(remote: Service, tenants: Path, stand_in: StandIn) -> None:
    (tenants / "later.md").write_text(PROFILE.format(name="later", days=3))
    for days in (3, 4):
        (tenants / "later.md").write_text(PROFILE.format(name="later", days=days))
        remote.submit(remote.prepare("later", Asked([HELLO], most_tokens=4)), lambda ids: None).done.result(60)
    assert len({body["model"] for body in stand_in.asked}) == 2


def test_a_server_over_it_answers_as_one_here(library: Path, hyper_agent: Path, tenants: Path, address: str) -> None:
    said: list[list[str]] = []
    for upstream in (address, ""):
        service = Service(load_agent(hyper_agent), load_workflow(library), tenants, upstream=upstream)
        with served(service, Everybody("east")) as url, openai.OpenAI(base_url=url, api_key="none") as client:
            hello: ChatCompletionUserMessageParam = {"role": "user", "content": HELLO.content}
            chunks = client.chat.completions.create(model="library", messages=[hello], stream=True, max_tokens=30)
            choices = [choice for chunk in chunks for choice in chunk.choices]
            said.append([choice.delta.content or "" for choice in choices] + [str(choices[-1].finish_reason)])
    assert "".join(said[0]) == "".join(said[1]) and said[0][-1] == "length"


def test_runs_of_the_whole_loop_go_through_it(library: Path, remote: Service, stand_in: StandIn) -> None:
    workflow = remote.workflow("east")
    task = Task(id="1", request=HELLO.content, tenant="east")
    policy = remote.policy("east", workflow)
    policy.max_new = 8
    (run,) = rollout(workflow, [task], policy, parallel=1, budget=Budget(steps=1))
    (turn,) = (message for message in run.messages if message.role == "assistant")
    assert turn.token_ids and stand_in.asked[0]["prompt"] and turn.prompt_tokens == len(stand_in.asked[0]["prompt"])


def test_who_goes_away_is_let_go_there_too(remote: Service, stand_in: StandIn) -> None:
    stand_in.fails = "stuck"
    job = remote.submit(remote.prepare("east", Asked([HELLO], most_tokens=8)), lambda ids: None)
    assert remote.load() == (0, 1)
    while not stand_in.asked:
        time.sleep(0.01)
    job.cancel()
    with pytest.raises(CancelledError):
        job.done.result(30)
    assert stand_in.left.wait(30) and remote.load() == (0, 0)


@pytest.mark.parametrize(("fails", "says"), [("error", "vLLM failed: out of memory"), ("lost", "was lost")])
def test_what_fails_there_is_said(remote: Service, stand_in: StandIn, fails: str, says: str) -> None:
    stand_in.fails = fails
    job = remote.submit(remote.prepare("east", Asked([HELLO], most_tokens=20)), lambda ids: None)
    with pytest.raises(EngrainError, match=says):
        job.done.result(60)


def test_a_tenant_that_only_this_side_knows_is_refused(remote: Service) -> None:
    job = remote.submit(remote.prepare("north", Asked([HELLO], most_tokens=8)), lambda ids: None)
    with pytest.raises(EngrainError, match=r"vLLM refuses library/north@.*does not exist"):
        job.done.result(60)


def test_what_cannot_be_sent_is_refused_at_once(remote: Service) -> None:
    long = Message(role="user", content="word " * 20_000)
    with pytest.raises(EngrainError, match="context full"):
        remote.check(remote.prepare("east", Asked([long])))
    with pytest.raises(InputError, match="adapters are vLLM's"):
        remote.use_adapters(lambda adapters: None)


def test_no_more_than_may_wait_are_taken_and_none_after_the_end(
    library: Path, hyper_agent: Path, tenants: Path, stand_in: StandIn, address: str
) -> None:
    service = Service(load_agent(hyper_agent), load_workflow(library), tenants, most_waiting=1, upstream=address)
    stand_in.fails = "stuck"
    prepared = service.prepare("east", Asked([HELLO], most_tokens=8))
    job = service.submit(prepared, lambda ids: None)
    assert not service.has_room()
    with pytest.raises(Overloaded, match="1 requests are under way"):
        service.submit(prepared, lambda ids: None)
    job.cancel()
    service.close()
    with pytest.raises(Overloaded, match="being closed"):
        service.submit(prepared, lambda ids: None)


def test_the_address_must_be_of_a_server_that_has_the_agent(library: Path, agent: Path, address: str) -> None:
    with pytest.raises(InputError, match="expected the address of a vLLM server"):
        Service(load_agent(agent), load_workflow(library), upstream="http://127.0.0.1:9/v1")
    with pytest.raises(InputError, match="serves base, x, expected 'library'"):
        Service(load_agent(agent), load_workflow(library), upstream=address)
