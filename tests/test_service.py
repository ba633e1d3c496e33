"""Tenants that come after the start, and what is remembered of whom."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor

from engrain.agent import load_agent
from engrain.errors import InputError, Overloaded
from engrain.policy import Episode
from engrain.scheduler import Scheduler
from engrain.service import Asked, Prepared, Service
from engrain.trajectory import Message, Trajectory
from engrain.turn import Completion, Request
from engrain.workflow import load_workflow

HELLO = Message(role="user", content="Please lend me a book.")
PROFILE = "---\nname: {name}\n---\n- lend nothing on Sundays\n- lend for {days} days\n"


@pytest.fixture(scope="module")
def tenants(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tenants")


@pytest.fixture(scope="module")
def service(library: Path, hyper_agent: Path, tenants: Path) -> Iterator[Service]:
    service = Service(load_agent(hyper_agent), load_workflow(library), tenants, parallel=2)
    yield service
    service.close()


def done(service: Service, prepared: Prepared) -> Completion:
    return service.submit(prepared, lambda ids: None).done.result(60)


def test_a_tenant_may_come_after_the_start_and_change(service: Service, tenants: Path) -> None:
    with pytest.raises(InputError, match="unknown tenant 'east'"):
        service.prepare("east", Asked([HELLO]))
    (tenants / "east.md").write_text(PROFILE.format(name="anything", days=9))
    first = service.prepare("east", Asked([HELLO], most_tokens=8))
    assert first.request.adapter is not None and not first.in_prompt
    assert service.prepare("east", Asked([HELLO])).request.adapter is first.request.adapter
    assert "Tenant: east." in service.text(first.request.prompt)
    assert len(done(service, first).ids) <= 8
    (tenants / "east.md").write_text(PROFILE.format(name="anything", days=12))
    assert service.prepare("east", Asked([HELLO])).request.adapter is not first.request.adapter
    for name in ("../east", "", "east/../east"):
        with pytest.raises(InputError):
            service.prepare(name, Asked([HELLO]))


def test_each_tenant_is_decoded_with_its_own_adapter(service: Service, library: Path) -> None:
    """Through the server's way and through the policy's: neither may give one tenant another's."""
    workflow, agent = load_workflow(library), service.agent
    made = agent.adapters(agent.load_base())
    own = {name: made(workflow.context(name)).tensors() for name in ("north", "south")}
    policy, task = agent.policy(workflow, parallel=2), next(workflow.tasks("train", 0))

    def same(one: list[Tensor], two: list[Tensor]) -> bool:
        return all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(one, two, strict=True))

    assert not same(own["north"], own["south"])
    for name in ("north", "south"):
        trajectory, mine = Trajectory(id=name, messages=[HELLO]), task.model_copy(update={"tenant": name})
        asked = policy._request(Episode(mine, trajectory, workflow.phases[0], workflow.tools, workflow))
        assert isinstance(asked, Request)
        for request in (service.prepare(name, Asked([HELLO])).request, asked):
            assert request.adapter is not None and same(request.adapter.tensors(), own[name])


def test_rules_that_are_too_strange_go_into_the_prompt(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service._adapters, "strange", lambda contexts: "novelty 9 is over 1")
    prepared = service.prepare("north", Asked([HELLO]))
    assert prepared.request.adapter is None and prepared.in_prompt == "novelty 9 is over 1"
    assert "Rules of north:" in service.text(prepared.request.prompt)


def test_turns_that_come_back_have_their_tokens_again_for_their_own_tenant_only(service: Service) -> None:
    asked = Asked([HELLO])
    prepared = service.prepare("north", asked)
    text = "<think>secret</think>Done."
    ids = [*service.renderer.tokenizer.encode(text, add_special_tokens=False), service.renderer.stop_ids[0]]
    message = service.message(prepared, Completion(ids, [0.0] * len(ids), 0.1))
    back = Message(role="assistant", content=message.content)
    again = Asked([HELLO, back, Message(role="user", content="And now?")])
    north, south = (service.text(service.prepare(name, again).request.prompt) for name in ("north", "south"))
    assert "secret" in north and "secret" not in south
    other = Asked([Message(role="user", content="Something else."), back, HELLO])
    assert "secret" not in service.text(service.prepare("north", other).request.prompt)


def test_a_bare_base_is_told_its_tools(library: Path, agent: Path) -> None:
    workflow = load_workflow(library)
    first, *others = workflow.tools
    every = [tool.name for tool in workflow.tools]
    bare, compiled = (Service(load_agent(agent), workflow, parallel=1, compiled=of) for of in (False, True))
    asks = [
        (Asked([HELLO]), every),
        (Asked([HELLO], [first]), [first.name]),
        (Asked([HELLO], [first], shown=workflow.tools), every),
    ]
    for asked, names in asks:
        told, plain = (service.text(service.prepare("north", asked).request.prompt) for service in (bare, compiled))
        assert [name for name in every if name in told] == names and not [name for name in every if name in plain]
    assert others
    schedulers = [cast(Scheduler, service._turns) for service in (bare, compiled)]
    weights = [scheduler._engine.model.state_dict() for scheduler in schedulers]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    bare.close()
    compiled.close()


def test_after_close_nothing_is_taken(library: Path, agent: Path) -> None:
    service = Service(load_agent(agent), load_workflow(library), parallel=1)
    prepared = service.prepare("north", Asked([HELLO], most_tokens=4))
    service.close()
    with pytest.raises(Overloaded):
        service.submit(prepared, lambda ids: None)
