"""What a tenant sees of its own adapters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from serving import served

from engrain.agent import load_agent
from engrain.compile import compile_workflow
from engrain.compile_config import CompileConfig
from engrain.keys import Keys, add_key
from engrain.service import Service
from engrain.workflow import load_workflow


@pytest.fixture(scope="module")
def clients(
    library: Path, runs: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, httpx.Client]]:
    """One a tenant, of an agent that makes an adapter a phase."""
    folder = tmp_path_factory.mktemp("adapters")
    config = CompileConfig(tokens=2000, to="hypernetwork", rank=2, batch_tokens=1024, contexts="step")
    compile_workflow(library, folder / "agent", config, data=runs, base=tiny_base)
    keys = {tenant: add_key(folder / "keys.json", tenant) for tenant in ("north", "south")}
    service = Service(load_agent(folder / "agent"), load_workflow(library), parallel=2)
    with served(service, Keys(folder / "keys.json")) as url:
        made = {
            tenant: httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=60)
            for tenant, key in keys.items()
        }
        yield made
        for client in made.values():
            client.close()


def kept(client: httpx.Client) -> dict[str, bool]:
    return {one["phase"]: one["kept"] for one in client.get("/adapters").json()["data"]}


def test_a_tenant_lists_and_evicts_its_own(clients: dict[str, httpx.Client]) -> None:
    north, south = clients["north"], clients["south"]
    assert not any(kept(north).values()) and len(kept(north)) > 1
    body = {"model": "library", "messages": [{"role": "user", "content": "Please lend me a book."}], "max_tokens": 1}
    for client in (north, south):
        assert client.post("/chat/completions", json=body).status_code == 200
    assert sum(kept(north).values()) == sum(kept(south).values()) == 1
    digests = [{one["digest"] for one in client.get("/adapters").json()["data"]} for client in (north, south)]
    assert not digests[0] & digests[1]
    assert south.delete("/adapters").json()["deleted"] == 1
    assert sum(kept(north).values()) == 1 and not any(kept(south).values())


def test_a_preview_is_of_any_rules_and_changes_nothing(clients: dict[str, httpx.Client]) -> None:
    before = kept(clients["north"])
    text = "- lend nothing on Sundays\n- lend for 9 days\n"
    one, two = (clients["north"].post("/adapters/preview", json={"context": text}).json() for _ in range(2))
    assert one["digest"] == two["digest"] and one["rank"] > 0 and one["bytes"] > 0
    assert [rule["text"] for rule in one["rules"]] == ["lend for 9 days", "lend nothing on Sundays"]
    assert kept(clients["north"]) == before
    refused = clients["north"].post("/adapters/preview", json={"context": "# no rules here"})
    assert refused.status_code == 400 and "rules" in refused.json()["error"]["message"]
