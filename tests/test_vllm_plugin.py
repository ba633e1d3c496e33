"""What vLLM is given for a name, with a stand-in for vLLM itself; `recipes/serve_vllm` runs the real one."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from engrain.adapter import delta_weight, load_peft
from engrain.adapters import Adapters
from engrain.agent import load_agent
from engrain.context import Context
from engrain.context_files import read_section
from engrain.errors import InputError
from engrain.vllm_plugin import Emitter, from_environment, register

PROFILE = "- lend nothing on Sundays\n- lend for {days} days\n"


@pytest.fixture
def tenants(tmp_path: Path) -> Path:
    (tmp_path / "tenants").mkdir()
    (tmp_path / "tenants" / "east.md").write_text(PROFILE.format(days=9))
    return tmp_path / "tenants"


def test_a_name_is_the_adapter_of_the_profile_as_it_is_now(hyper_agent: Path, tenants: Path, tmp_path: Path) -> None:
    emit = Emitter(load_agent(hyper_agent), tenants, tmp_path / "out", rank=64)
    path = emit("library/east")
    assert path is not None and emit("library/east") == path
    context = Context((read_section(tenants / "east.md"),))
    made = Adapters(emit.agent.adapters(emit.agent.load_base())._source)(context)
    found = load_peft(path)
    assert found.rank == 64
    for site in made.factors:  # of full rank, so that nothing is lost
        torch.testing.assert_close(delta_weight(found, site), delta_weight(made, site), rtol=1e-3, atol=1e-6)
    digest = context.digest()
    assert emit(f"library/east@{digest[:8]}") == emit(f"library/east@{digest}") == path
    (tenants / "east.md").write_text(PROFILE.format(days=12))
    changed = emit("library/east")
    assert changed is not None and changed != path
    assert emit(f"library/east@{digest[:8]}") is None
    before = {file: file.stat().st_mtime_ns for file in changed.iterdir()}
    again = Emitter(load_agent(hyper_agent), tenants, tmp_path / "out", rank=64)("library/east")
    assert again == changed and {file: file.stat().st_mtime_ns for file in changed.iterdir()} == before


def test_activated_adapters_are_refused(hyper_agent: Path, tenants: Path, tmp_path: Path) -> None:
    agent = load_agent(hyper_agent)
    manifest = agent.manifest.model_copy(update={"config": {**agent.manifest.config, "activated": True}})
    with pytest.raises(InputError, match="act on all tokens"):
        Emitter(replace(agent, manifest=manifest), tenants, tmp_path / "out")


def test_any_other_name_means_nothing(hyper_agent: Path, tenants: Path, tmp_path: Path) -> None:
    emit = Emitter(load_agent(hyper_agent), tenants, tmp_path / "out")
    for name in (
        "library", "library/", "library/west", "other/east", "library/../tenants/east", "library/east@",
        "library/east@zz", "library/.east", "/library/east", "library/east/", "library/east\n",
        "library/east@12345678",
    ):  # fmt: skip
        assert emit(name) is None, name
    assert not (tmp_path / "out").exists()


def test_vllm_gets_a_request_or_nothing(
    hyper_agent: Path, tenants: Path, tiny_base: Path, agent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolvers: dict[str, Any] = {}
    registry = SimpleNamespace(register_resolver=resolvers.__setitem__)
    for name, members in {
        "vllm": {}, "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": lambda name, number, path: (name, path)},
        "vllm.lora.resolver": {"LoRAResolver": object, "LoRAResolverRegistry": registry},
    }.items():  # fmt: skip
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delenv("ENGRAIN_AGENT", raising=False)
    with pytest.raises(InputError, match="ENGRAIN_AGENT is not set"):
        from_environment()
    settings = {"AGENT": hyper_agent, "TENANTS": tenants, "ADAPTERS": tmp_path / "adapters"}
    for name, value in settings.items():
        monkeypatch.setenv(f"ENGRAIN_{name}", str(value))
    register()
    resolver = resolvers["engrain"]

    def ask(base: Path, name: str) -> Any:
        return asyncio.run(resolver.resolve_lora(str(base), name))

    assert ask(agent, "library/east") is None  # no base at all
    name, path = ask(tiny_base, "library/east")
    assert name == "library/east" and Path(path).parent == tmp_path / "adapters"
    assert ask(tiny_base, "library/west") is None
    (tenants / "bad.md").write_text("# tenant x\n\n# tenant x\n")
    assert ask(tiny_base, "library/bad") is None
    with pytest.raises(InputError, match="lora agent"):
        Emitter(load_agent(agent), tenants, tmp_path)
