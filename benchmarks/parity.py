"""Whether the same adapters write the same tokens everywhere: our engine, PEFT, merged weights, GGUF and vLLM.

First turns of a workflow's tasks, each with the adapter that the agent's hypernetwork makes for the task's tenant,
greedy and without a grammar, in float32. For those that differ: at which token, and by how little the base preferred
the one to the other there (a tie in floating point is not an error). GGUF is run by llama.cpp, where
`llama-cpp-python` is installed.

    ENGRAIN_RANK=256 recipes/serve_vllm/start AGENT examples/support_desk/tenants --port 8001 --dtype float32
    python benchmarks/parity.py AGENT --vllm http://127.0.0.1:8001/v1
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, cast

import httpx
import torch
import typer
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from engrain.adapter import Adapter, compress, merge, save_peft
from engrain.agent import Agent, load_agent, open_engine
from engrain.gguf import FILE, save_gguf
from engrain.model import Base
from engrain.trajectory import Message, Trajectory
from engrain.turn import Request
from engrain.workflow import Workflow, load_workflow

Prompt = tuple[str, list[int]]
"""A tenant, and what it asks."""
Writer = Callable[[Prompt], list[int]]


def prompts(agent: Agent, workflow: Workflow, split: str, number: int) -> list[Prompt]:
    """The first prompts of tasks."""

    def of(tenant: str, request: str) -> list[int]:
        messages = [
            Message(role="system", content=workflow.system(tenant, "none")),
            Message(role="user", content=request),
        ]
        return agent.renderer.prompt(Trajectory(id="", messages=messages, tools="[]"))

    return [(task.tenant, of(task.tenant, task.request)) for task in islice(workflow.tasks(split, 0), number)]


def generated(model: PreTrainedModel, prompt: list[int], tokens: int, stops: list[int]) -> list[int]:
    """By transformers."""
    ids = torch.tensor([prompt])
    made = cast(Any, model).generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, eos_token_id=stops
    )
    return made[0, len(prompt) :].tolist()


def gap(model: PreTrainedModel, prompt: list[int], written: list[int], other: int) -> float:
    """By how much, in nats, the last token that was written is likelier than another in its place."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *written[:-1]]])).logits[0, -1]
    return float(logits[written[-1]] - logits[other])


def main(
    path: Annotated[Path, typer.Argument(help="an agent with a hypernetwork")],
    vllm: Annotated[str, typer.Option(help="URL of vLLM with the plug-in, up to /v1")] = "",
    number: Annotated[int, typer.Option("-n", help="prompts")] = 40,
    tokens: int = 64,
    split: str = "held_out",
    rank: Annotated[int, typer.Option(help="of the adapters; as vLLM has")] = 256,
) -> None:
    torch.set_num_threads(1)
    agent = load_agent(path)
    workflow = load_workflow(path / agent.manifest.source)
    asked, stops = prompts(agent, workflow, split, number), list(agent.renderer.stop_ids)
    base = agent.load_base()
    source = agent.adapters(base)
    own = {tenant: compress(source(workflow.context(tenant)), rank)[0] for tenant in {tenant for tenant, _ in asked}}
    engine = open_engine(base.model, agent.renderer, 1)

    def ours(prompt: Prompt) -> list[int]:
        return engine.decode([Request(prompt[1], None, tokens, adapter=own[prompt[0]])])[0].ids

    merged = {tenant: _merged(agent.load_base(), adapter) for tenant, adapter in own.items()}
    arms: dict[str, Writer] = {"merged weights": lambda one: generated(merged[one[0]], one[1], tokens, stops)}
    with tempfile.TemporaryDirectory() as folder, httpx.Client(timeout=120) as client:
        peft = {tenant: _peft(agent.load_base(), adapter, Path(folder) / tenant) for tenant, adapter in own.items()}
        arms["PEFT"] = lambda one: generated(peft[one[0]], one[1], tokens, stops)
        if find_spec("llama_cpp") is not None:
            files = {tenant: _gguf(base, merged[tenant], Path(folder) / f"{tenant}.gguf") for tenant in own}
            arms["GGUF"] = lambda one: _llama_cpp(files[one[0]], one[1], tokens, stops)
        if vllm:
            arms["vLLM"] = lambda one: _served(client, vllm, f"{workflow.name}/{one[0]}", one[1], tokens, stops)
        reference = [ours(prompt) for prompt in asked]
        title = f"{number} turns of at most {tokens} tokens, {len(own)} adapters, beside our engine"
        table = Table("arm", "same turns", "same tokens", "first differences: token, nats between the two", title=title)
        for name, write in arms.items():
            same = tokens_same = 0
            differences = []
            for prompt, expected in zip(asked, reference, strict=True):
                found = write(prompt)
                common = next((n for n, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), None)
                same += found == expected
                tokens_same += min(len(found), len(expected)) if common is None else common
                if common is not None:
                    nats = gap(merged[prompt[0]], prompt[1], expected[: common + 1], found[common])
                    differences.append(f"{common}, {nats:.2g}")
            share = tokens_same / sum(map(len, reference))
            table.add_row(name, f"{same} of {number}", f"{100 * share:.1f}%", "; ".join(differences[:5]))
    Console().print(table)


def _merged(base: Base, adapter: Adapter) -> PreTrainedModel:
    merge(base.model, adapter)
    return base.model


def _peft(base: Base, adapter: Adapter, path: Path) -> PreTrainedModel:
    save_peft(adapter, path)
    return PeftModel.from_pretrained(base.model, path)  # pyright: ignore[reportReturnType]


def _gguf(base: Base, model: PreTrainedModel, path: Path) -> Path:
    save_gguf(replace(base, model=model), path, "merged")
    return path / FILE


def _llama_cpp(file: Path, prompt: list[int], tokens: int, stops: list[int]) -> list[int]:
    from llama_cpp import Llama  # pyright: ignore[reportMissingImports]

    written = list[int]()
    for token in Llama(str(file), n_ctx=len(prompt) + tokens, verbose=False).generate(prompt, top_k=1, temp=0.0):
        written.append(token)
        if token in stops or len(written) == tokens:
            break
    return written


def _served(client: httpx.Client, url: str, model: str, prompt: list[int], tokens: int, stops: list[int]) -> list[int]:
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stop_token_ids": stops,
            "return_token_ids": True}  # fmt: skip
    answer = client.post(f"{url}/completions", json=body)
    answer.raise_for_status()
    return answer.json()["choices"][0]["token_ids"]


if __name__ == "__main__":
    typer.run(main)
