"""Commands that make and run an agent."""

from __future__ import annotations

import os
from collections.abc import Iterator
from enum import StrEnum
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engrain.cli.sources import Interrupted, Json
from engrain.errors import InputError

if TYPE_CHECKING:
    from engrain.adapter import Adapter
    from engrain.agent import Agent
    from engrain.task import Task
    from engrain.workflow import Workflow

AgentPath = Annotated[Path, typer.Argument(help="A directory made by `engrain compile`.")]
WorkflowPath = Annotated[Path | None, typer.Option("--workflow", help="The tools' code; by default where it was.")]


class Contexts(StrEnum):
    """The tenant's rules; or with them, at each step, the phase at hand and its tools; or, from logs, a run's tools."""

    tenant = "tenant"
    step = "step"
    tools = "tools"


class DType(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Target(StrEnum):
    """What a workflow is compiled to."""

    lora = "lora"
    full = "full"
    hypernetwork = "hypernetwork"


def compile_(
    source: Annotated[Path, typer.Argument(help="A workflow, or a .jsonl of trajectories.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The agent directory to make.")],
    data: Annotated[Path | None, typer.Option(help="Recorded runs; by default made here.")] = None,
    to: Annotated[Target, typer.Option(help="What to train.")] = Target.lora,
    base: Annotated[Path | None, typer.Option(help="Another base than the bundled one.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Training tokens: the main dial.", min=0)] = None,
    rank: Annotated[int, typer.Option(help="LoRA rank.", min=1)] = 32,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    longest: Annotated[int, typer.Option(help="Leave out longer trajectories, in tokens.", min=1)] = 8192,
    keep_tools: Annotated[bool, typer.Option("--keep-tools", help="From logs: keep schemas in the prompt.")] = False,
    contexts: Annotated[Contexts, typer.Option(help="What a hypernetwork reads.")] = Contexts.tenant,
    activated: Annotated[bool, typer.Option("--activated", help="The adapter acts on the agent's turns only.")] = False,
    start: Annotated[
        Path | None, typer.Option(help="A hypernetwork, or `bundled`, to go on from or, with --tokens 0, to take.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of recording and training.")] = 0,
    with_base: Annotated[bool, typer.Option("--with-base", help="Copy the base into the agent.")] = False,
    json: Json = False,
) -> None:
    """Compile a workflow into weights. Interrupted, the same command goes on."""
    from engrain.agent import named_hypernetwork
    from engrain.cli import terminal
    from engrain.compile import compile_workflow
    from engrain.compile_config import CompileConfig
    from engrain.work import work_directory

    terminal.quiet()
    chosen = {} if tokens is None else {"tokens": tokens}
    config = CompileConfig(
        to=to.value,
        rank=rank,
        lr=lr,
        longest=longest,
        keep_tools=keep_tools,
        contexts=contexts.value,
        activated=activated,
        start=named_hypernetwork(start) if start is not None else None,
        seed=seed,
        **chosen,
    )
    try:
        with terminal.recording() as on_record:
            agent = compile_workflow(
                source,
                output,
                config,
                data=data,
                base=base,
                with_base=with_base,
                say=terminal.note,
                on_record=on_record,
            )
    except KeyboardInterrupt:
        kept = f"; what is done lies in {work_directory(output)}, the same command goes on from there"
        raise Interrupted(f"interrupted{kept if work_directory(output).exists() else ''}") from None
    if json:
        terminal.print_json(agent.manifest.model_dump(mode="json", exclude={"files"}))
    else:
        made = agent.manifest
        tokens, loss = made.training["tokens"], made.training["loss"]
        trained = f"{tokens:,} training tokens, loss {loss:.3f}" if tokens else f"{start} as it is"
        typer.echo(f"{output}: {made.kind} agent of {made.workflow!r}, {trained}, {made.seconds:.0f} s")


def run(
    agent: AgentPath,
    request: Annotated[str | None, typer.Argument(help="What you ask, in words.")] = None,
    tenant: Annotated[str, typer.Option(help="Whose rules apply; or NEW.md, for a hypernetwork.")] = "",
    task: Annotated[Path | None, typer.Option(help="Tasks to run, .jsonl, in place of a request.")] = None,
    sample: Annotated[int, typer.Option(help="Run so many tasks that the workflow makes itself.", min=0)] = 0,
    split: Annotated[str, typer.Option(help="Of which split to sample.")] = "held_out",
    seed: Annotated[int, typer.Option(help="Seed of the sample.")] = 1000,
    trace: Annotated[Path | None, typer.Option(help="Write the trajectories here, .jsonl.")] = None,
    workflow: WorkflowPath = None,
    json: Json = False,
) -> None:
    """Run tasks live, each step shown as it happens."""
    from engrain.agent import load_agent
    from engrain.cli import terminal
    from engrain.rollout import rollout
    from engrain.trajectory import write_trajectories

    if (request is not None) + (task is not None) + (sample > 0) != 1:
        raise InputError("expected one of: a request in words, --task FILE, --sample N")
    loaded = load_agent(agent)
    source = attached(agent / loaded.manifest.source, workflow)
    loaded.check_workflow(source)
    terminal.quiet()
    if tenant.endswith(".md"):
        source, tenant = _with_profile(source, Path(tenant), loaded)
    tasks = list(_tasks(source, request, tenant, task, sample, split, seed))
    done = []
    for trajectory in rollout(
        source,
        tasks,
        loaded.policy(source, parallel=1),
        parallel=1,
        on_step=None if json else lambda trajectory, message: terminal.print_step(message),
    ):
        done.append(trajectory)
        if not json:
            terminal.print_outcome(trajectory)
    if trace is not None:
        write_trajectories(trace, done)
    if json:
        terminal.print_json([trajectory.model_dump(mode="json", exclude_defaults=True) for trajectory in done])


def _with_profile(workflow: Workflow, profile: Path, agent: Agent) -> tuple[Workflow, str]:
    """The workflow with a tenant whose rules are in a file, and the tenant's name."""
    from engrain.context_files import read_section

    if agent.manifest.kind != "hypernetwork":
        raise InputError(f"{agent.path} is a {agent.manifest.kind} agent and knows only the tenants that it was "
                         f"compiled with; to run {profile}, compile with --to hypernetwork")  # fmt: skip
    section = read_section(profile)
    return workflow.with_tenant(section), section.name


def attached(source: Path, workflow: Path | None) -> Workflow:
    """The workflow's code: an agent holds none."""
    from engrain.workflow import load_workflow

    path = workflow or Path(os.path.normpath(source))
    if path.suffix == ".jsonl" or not path.exists():
        raise InputError(f"an agent holds no tool code and {path} is no workflow; give its directory with --workflow")
    return load_workflow(path)


def _tasks(
    workflow: Workflow, request: str | None, tenant: str, file: Path | None, sample: int, split: str, seed: int
) -> Iterator[Task]:
    from engrain.task import Task, read_tasks

    if request is not None:
        workflow.system(tenant, "none")  # an unknown tenant is an error now, not a failed run
        yield Task(id="request", request=request, tenant=tenant)
    elif file is not None:
        yield from read_tasks(file)
    else:
        if split not in workflow.splits:
            raise InputError(f"unknown split {split!r}; {workflow.name!r} has {', '.join(workflow.splits)}")
        yield from islice(workflow.tasks(split, seed), sample)


ContextPath = Annotated[Path | None, typer.Option("--context", help="Rules, .md, that a hypernetwork reads.")]


def adapter(
    agent: AgentPath,
    output: Annotated[Path, typer.Option("-o", "--output", help="The PEFT directory to make.")],
    context: ContextPath = None,
    rank: Annotated[int | None, typer.Option(help="Compress to this rank, as vLLM may need.", min=1)] = None,
) -> None:
    """Export the adapter as a directory that PEFT and vLLM load."""
    from engrain.adapter import compress, save_peft
    from engrain.agent import load_agent
    from engrain.cli import terminal

    loaded = load_agent(agent)
    if loaded.manifest.kind == "full":
        raise InputError(f"{agent} is a full agent and has no adapter; compile with --to lora")
    _check_export(loaded, output, context)
    terminal.quiet()
    made = _adapter_of(loaded, context)
    lost = ""
    if rank is not None:
        made, share = compress(made, rank)
        lost = f", {100 * share:.2g}% of its energy lost"
    save_peft(made, output, str(loaded.base_path.resolve()))
    typer.echo(f"{output}: rank {made.rank} adapter for {loaded.manifest.base.name}{lost}")


def export(
    agent: AgentPath,
    output: Annotated[Path, typer.Option("-o", "--output", help="The model directory to make.")],
    merged: Annotated[bool, typer.Option("--merged", help="The base with the adapter in its weights.")] = False,
    as_gguf: Annotated[bool, typer.Option("--gguf", help="The same as one file for llama.cpp and Ollama.")] = False,
    context: ContextPath = None,
    dtype: Annotated[DType | None, typer.Option(help="Of the weights; by default the base's.")] = None,
) -> None:
    """Export a model directory of transformers' kind, or with a GGUF file, for engines without LoRA."""
    from dataclasses import replace

    import torch

    from engrain.adapter import merge
    from engrain.agent import load_agent
    from engrain.cli import terminal
    from engrain.model import save_base, stored_dtype

    if merged == as_gguf:
        raise InputError("expected --merged or --gguf: the base with the adapter in its weights, for transformers or "
                         "llama.cpp; an adapter by itself is made by `engrain adapter`")  # fmt: skip
    if as_gguf and find_spec("gguf") is None:
        raise InputError("--gguf needs one more package; install it with: pip install 'engrain[gguf]'")
    loaded = load_agent(agent)
    _check_export(loaded, output, context)
    terminal.quiet()
    if context is None:
        base = loaded.load()
    else:
        base = loaded.load_base()
        merge(base.model, _adapter_of(loaded, context))
    base.model.to(getattr(torch, dtype.value) if dtype is not None else stored_dtype(loaded.base_path))  # type: ignore[arg-type]
    base = replace(base, tokenizer=loaded.renderer.tokenizer)
    what = f"{loaded.manifest.workflow} in the weights of {loaded.manifest.base.name}"
    if not as_gguf:
        save_base(base, output)
        typer.echo(f"{output}: {what}")
        return
    from engrain.gguf import FILE, save_gguf

    known = save_gguf(base, output, loaded.manifest.workflow)
    ids = "" if known else "; llama.cpp splits text otherwise than its tokenizer: give it token ids, not text"
    typer.echo(f"{output / FILE}: {what}{ids}")


def _check_export(agent: Agent, output: Path, context: Path | None) -> None:
    """Raises `InputError`."""
    kind = agent.manifest.kind
    if (context is not None) != (kind == "hypernetwork"):
        fix = "give --context FILE" if kind == "hypernetwork" else "leave --context out: it is one for all"
        raise InputError(f"{agent.path} is a {kind} agent; {fix}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output} already exists and is not empty; choose another name")


def _adapter_of(agent: Agent, context: Path | None) -> Adapter:
    """The one that it has, or that its hypernetwork makes."""
    from engrain.adapter import load_peft
    from engrain.context_files import read_context

    if context is None:
        return load_peft(agent.path / "adapter")
    return agent.adapters(agent.load_base())(read_context(context))
