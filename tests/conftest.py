"""One thread, no network, the same examples every time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from engrain.service import Service
    from engrain.workflow import Workflow

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")

settings.register_profile(
    "engrain", derandomize=True, deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("engrain")


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base directory: a random Llama of two layers with the bundled base's chat template."""
    import torch
    from templates import tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    from engrain.model import Base, save_base

    words = tokenizer("chatml")
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        eos_token_id=words.convert_tokens_to_ids("<|im_end|>"),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    path = tmp_path_factory.mktemp("base") / "tiny"
    save_base(Base(model, words), path)
    (path / "README.md").write_text("---\nlicense: apache-2.0\n---\nA random model.\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workflow that `engrain new` makes."""
    from engrain.cli import invoke

    path = tmp_path_factory.mktemp("workflow") / "library"
    assert invoke(["new", str(path)]) == 0
    return path


@pytest.fixture(scope="session")
def runs(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty runs of the library's teacher."""
    from engrain.policy import ScriptTeacher
    from engrain.record import record
    from engrain.workflow import load_workflow

    path = tmp_path_factory.mktemp("runs") / "runs.jsonl"
    workflow = load_workflow(library)
    record(workflow, ScriptTeacher(workflow), workflow.tasks("train", 0), path, 40)
    return path


@pytest.fixture(scope="session")
def agent(library: Path, runs: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library compiled on the tiny base, hardly trained."""
    from engrain.compile import compile_workflow
    from engrain.compile_config import CompileConfig

    out = tmp_path_factory.mktemp("agent") / "agent"
    compile_workflow(library, out, CompileConfig(tokens=4000, rank=4, batch_tokens=1024), data=runs, base=tiny_base)
    return out


@pytest.fixture(scope="session")
def hyper_agent(library: Path, runs: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library compiled to a hypernetwork, hardly trained."""
    from engrain.compile import compile_workflow
    from engrain.compile_config import CompileConfig

    out = tmp_path_factory.mktemp("hyper_agent") / "agent"
    config = CompileConfig(tokens=3000, to="hypernetwork", rank=2, batch_tokens=1024)
    compile_workflow(library, out, config, data=runs, base=tiny_base)
    return out


@pytest.fixture(scope="session")
def desk() -> Workflow:
    from serving import DESK

    from engrain.workflow import load_workflow

    return load_workflow(DESK)


@pytest.fixture(scope="session")
def desk_keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two tenants' keys, and under `file` where their hashes are."""
    from engrain.keys import add_key

    path = tmp_path_factory.mktemp("keys") / "keys.json"
    return {"file": str(path)} | {tenant: add_key(path, tenant, 4) for tenant in ("harbor", "kestrel")}


@pytest.fixture(scope="session")
def desk_service(desk: Workflow) -> Service:
    """The committed agent at work; closed by its server."""
    from serving import AGENT

    from engrain.agent import load_agent
    from engrain.service import Service

    return Service(load_agent(AGENT), desk, parallel=4, most_waiting=8)


@pytest.fixture(scope="session")
def desk_url(desk_service: Service, desk_keys: dict[str, str]) -> Iterator[str]:
    """That agent, served."""
    from serving import served

    from engrain.keys import Keys

    with served(desk_service, Keys(Path(desk_keys["file"]))) as url:
        yield url
