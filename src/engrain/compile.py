"""The compiler, top to bottom: workflow -> trajectories -> tokens with a loss mask -> training -> agent directory.

The instructions are left out of what is trained on, so that they move into the weights: the compiled agent's prompt is
one line and the request. Everything under way lies in `<AGENT>.work`; the agent appears whole, at the end, or not at
all, and the same command goes on where an earlier one stopped.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

import engrain
from engrain.activated import activated
from engrain.agent import (
    BUNDLED,
    GOLDEN,
    HYPERNETWORK,
    MANIFEST,
    TOOLS,
    Agent,
    BaseReference,
    DataSummary,
    Manifest,
    bundled_base,
    file_digest,
    golden_rows,
    load_agent,
    text_digest,
    tool_digest,
)
from engrain.compile_config import CompileConfig
from engrain.context import Context
from engrain.dataset import content_digest
from engrain.errors import InputError, RenderError
from engrain.files import replacing_directory
from engrain.policy import ScriptTeacher
from engrain.record import RecordReport, record
from engrain.renderer import Rejected, Renderer, Row, render_dataset
from engrain.sections import tool_section
from engrain.source import Source, by_phase, compiled_form, given_trajectories, open_source
from engrain.spent import Spent, stopwatch
from engrain.trajectory import Trajectory, read_trajectories
from engrain.work import Work, work_directory

if TYPE_CHECKING:
    from engrain.adapter import ConstantAdapter
    from engrain.hypernetwork import Hypernetwork
    from engrain.model import Base
    from engrain.train import TrainResult
    from engrain.workflow import Workflow


PROBE = 64
"""Runs recorded first, to learn how many are needed."""
FEWEST_CONTEXTS = 2
"""A hypernetwork that reads always the same context learns to ignore it."""
Say = Callable[[str], None]
OnRecord = Callable[[RecordReport], None]


@dataclass(frozen=True)
class Dataset:
    """Training rows with what is known of where they come from."""

    rows: list[Row]
    trajectories: list[Trajectory]
    schemas: list[dict[str, Any]]
    summary: DataSummary
    licence: str


@dataclass(frozen=True)
class Compiled:
    """All that goes into the agent directory."""

    source: Source
    config: CompileConfig
    base: Base
    base_path: Path
    renderer: Renderer
    adapter: ConstantAdapter | Hypernetwork | None
    """None after full fine-tuning, which changes the base's own weights."""
    dataset: Dataset
    result: TrainResult

    @property
    def base_place(self) -> str:
        """Where the base lies on this machine; empty for the bundled one, which comes with the package."""
        return "" if self.base_path == BUNDLED else str(self.base_path.resolve())


def compile_workflow(
    source: Path,
    out: Path,
    config: CompileConfig | None = None,
    *,
    data: Path | None = None,
    base: Path | None = None,
    with_base: bool = False,
    say: Say = lambda line: None,
    on_record: OnRecord | None = None,
) -> Agent:
    """Compile a workflow (or a `.jsonl` of trajectories) into the agent directory `out`.

    Training data are `data`, or runs of the workflow's own teacher, recorded here. Raises `InputError` for whatever the
    user can fix; a `KeyboardInterrupt` leaves everything in place for the same call to go on.
    """
    config = config or CompileConfig()
    spent = stopwatch()
    opened = open_source(source)
    base_path = base or bundled_base()
    _check_target(out)
    settings = {**config.known(), "source": source, "workflow": opened.digest, "data": data, "base": base_path}
    work = Work(work_directory(out), settings)

    loaded = _load_base(base_path)
    renderer = Renderer(loaded.tokenizer)
    say(f"base {base_path.name}: {sum(p.numel() for p in loaded.model.parameters()) / 1e6:.1f}M parameters")

    trajectories = given_trajectories(opened, data) or _record(opened, renderer, config, work, on_record)
    dataset = _render(opened, trajectories, renderer, config)
    summary = dataset.summary
    say(f"data: {summary.rows} rows, {summary.tokens:,} tokens, {summary.trained_tokens:,} of them with loss")
    if summary.rejected:
        say(f"left out: {', '.join(f'{count} {reason}' for reason, count in summary.rejected.items())}")

    with work.clocked(spent) as clock:
        invocation = renderer.invocation() if config.activated else ()
        adapter, result = _train(loaded, dataset.rows, config, invocation, work)
        if config.tokens:
            say(f"trained on {result.tokens:,} tokens in {result.steps} steps, loss {result.loss:.3f}")
        _save(out, Compiled(opened, config, loaded, base_path, renderer, adapter, dataset, result), clock(), with_base)
    work.remove()
    return load_agent(out)


# Trajectories and rows


def _record(
    source: Source, renderer: Renderer, config: CompileConfig, work: Work, on_record: OnRecord | None
) -> list[Trajectory]:
    """As many runs of the workflow's teacher as make `tokens`, so that training sees each about once."""
    workflow, path = source.workflow, work.claim() / "runs.jsonl"
    assert workflow is not None

    def first(n: int) -> list[Trajectory]:
        report = record(workflow, ScriptTeacher(workflow), workflow.tasks("train", config.seed), path, n, 16, on_record)
        if not report.kept:
            work.remove()  # the same tasks are to be tried again once the teacher is mended
            reasons = "; ".join(f"{count} x {reason}" for reason, count in report.refused.items())
            raise InputError(f"the teacher of {workflow.name!r} reached no goal in {report.done} tasks: {reasons}")
        return list(read_trajectories(path))

    probe = [compiled_form(trajectory, workflow) for trajectory in first(PROBE)[:PROBE]]
    rows, _ = render_dataset(renderer, probe, max_tokens=config.longest)
    tokens = sum(len(row.ids) for row in rows)
    return first(max(PROBE, math.ceil(config.tokens * PROBE / tokens))) if tokens else first(PROBE)


def _render(source: Source, trajectories: Sequence[Trajectory], renderer: Renderer, config: CompileConfig) -> Dataset:
    compiled = [compiled_form(one, source.workflow, keep_tools=config.keep_tools) for one in trajectories]
    workflow = source.workflow
    if config.to == "hypernetwork":
        by_context = _by_context(trajectories, compiled, workflow, config)
        rows, rejected = _with_contexts(renderer, by_context, config)
    else:
        rows, rejected = render_dataset(renderer, compiled, max_tokens=config.longest)
    if not rows:
        raise RenderError(f"no row of at most {config.longest} tokens is left ({dict(rejected)}); raise --longest")
    offered = [workflow.schemas("full")] if workflow else dict.fromkeys(one.tools for one in trajectories)
    schemas = {tool_digest(schema): schema for text in offered for schema in json.loads(text)}
    digest = hashlib.sha256("\n".join(content_digest(trajectory) for trajectory in compiled).encode()).hexdigest()
    summary = DataSummary(
        digest=digest,
        trajectories=len(trajectories),
        rows=len(rows),
        tokens=sum(len(row.ids) for row in rows),
        trained_tokens=sum(sum(row.mask) for row in rows),
        rejected=dict(rejected),
    )
    sources = sorted({one.meta.get("source", f"runs by {one.teacher or 'an unknown teacher'}") for one in trajectories})
    return Dataset(rows, compiled, list(schemas.values()), summary, "; ".join(sources))


def _by_context(
    trajectories: Sequence[Trajectory], compiled: Sequence[Trajectory], workflow: Workflow | None, config: CompileConfig
) -> Mapping[Context, Sequence[Trajectory]]:
    """What is trained on, by what a hypernetwork reads. Raises `InputError` if it could not learn from that."""
    by_context: dict[Context, list[Trajectory]] = defaultdict(list)
    if config.contexts == "tools":
        by_tools: dict[str, list[Trajectory]] = defaultdict(list)
        for before, one in zip(trajectories, compiled, strict=True):
            by_tools[before.tools].append(one)
        for tools, parts in by_tools.items():
            by_context[Context(tuple(map(tool_section, json.loads(tools))))] += parts
        if len(by_context) < FEWEST_CONTEXTS:
            raise InputError(f"a hypernetwork of tools needs runs with {FEWEST_CONTEXTS} sets of tools or more and "
                             f"learns from how they differ, got {len(by_context)}; or compile to lora")  # fmt: skip
        return by_context
    if workflow is None or len({one.tenant for one in compiled}) < FEWEST_CONTEXTS:
        raise InputError(f"a hypernetwork needs runs of a workflow with {FEWEST_CONTEXTS} tenants or more, since it "
                         "learns from how their rules differ; compile to lora instead")  # fmt: skip
    for one in compiled:
        if config.contexts == "tenant":
            by_context[workflow.context(one.tenant)].append(one)
            continue
        for phase, part in by_phase(one, workflow):
            by_context[workflow.step_context(one.tenant, phase)].append(part)
    return by_context


def _with_contexts(
    renderer: Renderer, by_context: Mapping[Context, Sequence[Trajectory]], config: CompileConfig
) -> tuple[list[Row], Rejected]:
    rows, rejected = list[Row](), Rejected()
    for context, parts in by_context.items():
        made, left_out = render_dataset(
            renderer, parts, max_tokens=config.longest, context_of=lambda _, context=context: context
        )
        rows += made
        rejected += left_out
    return rows, rejected


# Training


def _load_base(path: Path) -> Base:
    from engrain.model import load_base

    return load_base(path)


def _train(
    base: Base, rows: Sequence[Row], config: CompileConfig, invocation: tuple[int, ...], work: Work
) -> tuple[ConstantAdapter | Hypernetwork | None, TrainResult]:
    import torch

    from engrain.adapter import ConstantAdapter
    from engrain.hypernetwork import Hypernetwork
    from engrain.model import sites
    from engrain.train import TrainConfig, TrainResult, train

    source: ConstantAdapter | Hypernetwork | None = None
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        contexts = [row.context for row in rows if row.context is not None]
        if config.to == "lora":
            source = ConstantAdapter(sites(base.model), config.rank, invocation=invocation)
        elif config.to == "hypernetwork":
            source = _started(base, config, invocation)
            if config.start is None:
                source.prepare(contexts)
    if not config.tokens:
        return source, TrainResult(steps=0, tokens=0, loss=0.0, seconds=0.0)
    training = TrainConfig(
        tokens=config.tokens,
        batch_tokens=config.step_tokens,
        accumulate=1,
        lr=config.learning_rate,
        seed=config.seed,
    )
    if invocation:
        rows = [activated(row, invocation) for row in rows]
    result = train(base, source, rows, training, work.claim() / "train")
    if isinstance(source, Hypernetwork):
        source.learnt_from(contexts)
    return source, result


def _started(base: Base, config: CompileConfig, invocation: tuple[int, ...]) -> Hypernetwork:
    """A hypernetwork that knows nothing, or the one to go on from."""
    from engrain.encoder import BaseEncoder, Cached
    from engrain.hypernetwork import Hypernetwork, load_hypernetwork
    from engrain.learned import Settings
    from engrain.model import sites

    if config.start is None:
        settings = Settings(shared_rank=config.rank, invocation=invocation)
        return Hypernetwork(Cached(BaseEncoder(base)), sites(base.model), settings)
    found = load_hypernetwork(config.start, base)
    if not isinstance(found, Hypernetwork):
        raise InputError(f"{config.start}: agents have a rule-wise hypernetwork, and this is of another kind")
    return found.train()


# Files


def _check_target(out: Path) -> None:
    """Only an agent may be replaced by an agent."""
    if out.exists() and not (out / MANIFEST).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not an agent; choose another place with -o")


def _save(out: Path, made: Compiled, spent: Spent, with_base: bool) -> None:
    from engrain.adapter import save_peft
    from engrain.hypernetwork import Hypernetwork, save_hypernetwork
    from engrain.model import save_base

    with replacing_directory(out) as aside:
        if isinstance(made.adapter, Hypernetwork):
            save_hypernetwork(aside / HYPERNETWORK, made.adapter, made.base)
        elif made.adapter is not None:
            save_peft(made.adapter(()).detach(), aside / "adapter", made.base_place)
        else:
            save_base(made.base, aside / "model")
        if with_base:
            shutil.copytree(made.base_path, aside / "base")
        made.base.tokenizer.save_pretrained(aside / "tokenizer")
        tools = json.dumps(made.dataset.schemas, ensure_ascii=False, indent=2)
        (aside / TOOLS).write_text(tools + "\n", encoding="utf-8")
        (aside / GOLDEN).write_text(golden_rows(made.renderer, made.dataset.trajectories), encoding="utf-8")
        manifest = _manifest(out, made, spent, with_base, _digests(aside))
        (aside / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")


def _manifest(out: Path, made: Compiled, spent: Spent, with_base: bool, files: dict[str, str]) -> Manifest:
    workflow = made.source.workflow
    return Manifest(
        engrain=engrain.__version__,
        kind=made.config.to,
        workflow=workflow.name if workflow else made.dataset.trajectories[0].workflow,
        source=os.path.relpath(made.source.path, out),
        source_digest=made.source.digest,
        tenants=sorted(workflow.tenants) if workflow else [],
        base=BaseReference(
            name=made.base_path.name,
            digest=made.base.digest,
            path=made.base_place,
            bundled=not made.base_place,
            included=with_base,
        ),
        template=text_digest(str(made.base.tokenizer.chat_template)),
        tools={tool_digest(schema): schema["function"]["name"] for schema in made.dataset.schemas},
        data=made.dataset.summary,
        licences={"base": licence(made.base_path), "data": made.dataset.licence},
        config=made.config.known(),
        training=asdict(made.result),
        seconds=round(spent.seconds, 1),
        cpu_seconds=None if spent.cpu_seconds is None else round(spent.cpu_seconds, 1),
        files=files,
    )


def licence(base: Path) -> str:
    """The licence that the base's card names in its front matter."""
    with suppress(OSError, ValueError, yaml.YAMLError, AttributeError, KeyError):
        _, front, _ = (base / "README.md").read_text(encoding="utf-8").split("---\n", 2)
        return str(yaml.safe_load(front)["license"])
    return "unknown"


def _digests(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): file_digest(path) for path in files}
