"""The compiler, top to bottom: workflow -> trajectories -> tokens with a loss mask -> training -> agent directory.

The instructions are left out of what is trained on, so that they move into the weights: the compiled agent's prompt is
one line and the request. Everything under way lies in `<AGENT>.work`; the agent appears whole, at the end, or not at
all, and the same command goes on where an earlier one stopped.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

import engrain
from engrain.agent import (
    BUNDLED,
    GOLDEN,
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
from engrain.dataset import content_digest
from engrain.errors import InputError, RenderError
from engrain.files import replacing, replacing_directory
from engrain.policy import ScriptTeacher
from engrain.record import RecordReport, record
from engrain.renderer import Renderer, Row, in_schema_order, render_dataset
from engrain.trajectory import Message, ToolCall, Trajectory, read_trajectories
from engrain.workflow import Workflow, load_workflow

if TYPE_CHECKING:
    from torch import nn

    from engrain.adapter import ConstantAdapter
    from engrain.model import Base
    from engrain.train import TrainResult

__all__ = ["CompileConfig", "compile_workflow", "load_agent", "work_directory"]

PROBE = 64
"""Runs recorded first, to learn how many are needed."""
SETTINGS = "compile.json"
Say = Callable[[str], None]
OnRecord = Callable[[RecordReport], None]


@dataclass(frozen=True)
class CompileConfig:
    """The main dial is `tokens`; everything else follows or has a default that works for small bases."""

    tokens: int = 3_000_000
    """Tokens to train on."""
    to: Literal["lora", "full"] = "lora"
    rank: int = 32
    lr: float | None = None
    """Learning rate; by default 2e-3 for LoRA and 5e-4 for full fine-tuning."""
    longest: int = 8192
    """Longer rows are left out and counted."""
    batch_tokens: int = 8192
    """Tokens an optimizer step, in one packed pass."""
    keep_tools: bool = False
    """When compiling from logs: leave the tool schemas in the prompt."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.to not in ("lora", "full"):
            later = "; the hypernetwork comes in a later version" if self.to == "hypernetwork" else ""
            raise InputError(f"cannot compile to {self.to!r}: expected lora or full{later}")
        for name in ("tokens", "rank", "longest", "batch_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"expected {name} of at least 1, got {getattr(self, name)}")

    @property
    def learning_rate(self) -> float:
        return self.lr if self.lr is not None else {"lora": 2e-3, "full": 5e-4}[self.to]


@dataclass(frozen=True)
class Source:
    """What is compiled: a workflow, or logs of one that exists elsewhere."""

    path: Path
    workflow: Workflow | None


@dataclass(frozen=True)
class Dataset:
    """Training rows with what is known of where they come from."""

    rows: list[Row]
    trajectories: list[Trajectory]
    schemas: list[dict[str, Any]]
    summary: DataSummary
    licence: str


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
    started = time.monotonic()
    opened = open_source(source)
    _check_target(out)
    base_path = base or bundled_base()
    work = _claim(work_directory(out), {**asdict(config), "source": source, "data": data, "base": base_path})
    before = _spent(work)

    loaded = _load_base(base_path)
    renderer = Renderer(loaded.tokenizer)
    say(f"base {base_path.name}: {sum(p.numel() for p in loaded.model.parameters()) / 1e6:.1f}M parameters")

    trajectories = _trajectories(opened, data, renderer, config, work, on_record)
    dataset = _render(opened, trajectories, renderer, config)
    say(
        f"data: {dataset.summary.rows} rows, {dataset.summary.tokens:,} tokens, "
        f"{dataset.summary.trained_tokens:,} with loss, rejected {dataset.summary.rejected or 'none'}"
    )

    try:
        adapter, result = _train(loaded, dataset.rows, config, work)
        say(f"trained on {result.tokens:,} tokens in {result.steps} steps, loss {result.loss:.3f}")
        seconds = before + time.monotonic() - started
        _save(out, opened, config, loaded, base_path, renderer, adapter, dataset, result, seconds, with_base)
    finally:
        _spend(work, before + time.monotonic() - started)
    shutil.rmtree(work, ignore_errors=True)
    return load_agent(out)


def work_directory(out: Path) -> Path:
    """Where a compile keeps what it has until the agent is whole."""
    return out.with_name(out.name + ".work")


# The source and its trajectories


def open_source(path: Path) -> Source:
    """A workflow, or a file of trajectories. Raises `InputError`."""
    return Source(path, None if path.suffix == ".jsonl" else load_workflow(path))


def _trajectories(
    source: Source, data: Path | None, renderer: Renderer, config: CompileConfig, work: Path, on_record: OnRecord | None
) -> list[Trajectory]:
    given = data or (source.path if source.workflow is None else None)
    if given is None:
        assert source.workflow is not None
        return _record(source.workflow, renderer, config, work / "runs.jsonl", on_record)
    trajectories = list(read_trajectories(given))
    if not trajectories:
        raise InputError(f"{given}: no trajectories in it; make some with `engrain record` or `engrain import`")
    if source.workflow is not None and (foreign := {t.workflow for t in trajectories} - {source.workflow.name}):
        raise InputError(f"{given}: runs of {sorted(foreign)[0]!r}, expected runs of {source.workflow.name!r}")
    return trajectories


def _record(
    workflow: Workflow, renderer: Renderer, config: CompileConfig, path: Path, on_record: OnRecord | None
) -> list[Trajectory]:
    """As many runs of the workflow's teacher as make `tokens`, so that training sees each about once."""

    def first(n: int) -> list[Trajectory]:
        report = record(workflow, ScriptTeacher(workflow), workflow.tasks("train", config.seed), path, n, 16, on_record)
        if not report.kept:
            reasons = "; ".join(f"{count} x {reason}" for reason, count in report.refused.items())
            raise InputError(f"the teacher of {workflow.name!r} reached no goal in {report.done} tasks: {reasons}")
        return list(read_trajectories(path))

    probe = [compiled_form(trajectory, workflow) for trajectory in first(PROBE)[:PROBE]]
    rows, _ = render_dataset(renderer, probe, max_tokens=config.longest)
    tokens = sum(len(row.ids) for row in rows)
    return first(max(PROBE, math.ceil(config.tokens * PROBE / tokens))) if tokens else first(PROBE)


def compiled_form(trajectory: Trajectory, workflow: Workflow | None, *, keep_tools: bool = False) -> Trajectory:
    """The trajectory as the compiled agent will meet it: no instructions, and arguments in their schema's order.

    Constrained decoding writes arguments in the schema's order, so that order is what must be trained.
    """
    schemas = json.loads(workflow.schemas("full")) if workflow is not None else trajectory.tool_schemas()
    parameters = {schema["function"]["name"]: schema["function"].get("parameters") for schema in schemas}
    messages = [_ordered(message, parameters) for message in trajectory.messages]
    if workflow is not None:
        system = Message(role="system", content=workflow.system(trajectory.tenant, "none"))
        messages = [system, *(message for message in messages if message.role != "system")]
    tools = trajectory.tools if keep_tools and workflow is None else "[]"
    return trajectory.model_copy(update={"messages": messages, "tools": tools})


def _ordered(message: Message, parameters: dict[str, Any]) -> Message:
    def ordered(call: ToolCall) -> ToolCall:
        with suppress(ValueError):
            value = in_schema_order(json.loads(call.arguments), parameters.get(call.name))
            return call.model_copy(update={"arguments": json.dumps(value, ensure_ascii=False)})
        return call

    if not message.tool_calls:
        return message
    return message.model_copy(update={"tool_calls": [ordered(call) for call in message.tool_calls]})


def _render(source: Source, trajectories: Sequence[Trajectory], renderer: Renderer, config: CompileConfig) -> Dataset:
    compiled = [compiled_form(one, source.workflow, keep_tools=config.keep_tools) for one in trajectories]
    rows, rejected = render_dataset(renderer, compiled, max_tokens=config.longest)
    if not rows:
        raise RenderError(f"no row of at most {config.longest} tokens is left ({dict(rejected)}); raise --longest")
    offered = [source.workflow.schemas("full")] if source.workflow else dict.fromkeys(one.tools for one in trajectories)
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


# Training


def _load_base(path: Path) -> Base:
    from engrain.model import load_base

    return load_base(path)


def _train(
    base: Base, rows: Sequence[Row], config: CompileConfig, work: Path
) -> tuple[ConstantAdapter | None, TrainResult]:
    import torch

    from engrain.adapter import ConstantAdapter
    from engrain.model import sites
    from engrain.train import TrainConfig, train

    source: nn.Module | None = None
    if config.to == "lora":
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            source = ConstantAdapter(sites(base.model), config.rank)
    settings = TrainConfig(
        tokens=config.tokens,
        batch_tokens=config.batch_tokens,
        accumulate=1,
        lr=config.learning_rate,
        seed=config.seed,
    )
    result = train(base, source, rows, settings, work / "train")
    return source, result


# Files


def _check_target(out: Path) -> None:
    """Only an agent may be replaced by an agent."""
    if out.exists() and not (out / MANIFEST).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not an agent; choose another place with -o")


def _claim(work: Path, settings: dict[str, Any]) -> Path:
    """The work directory of exactly this compile. Raises `InputError` if it holds another one."""
    path = work / SETTINGS
    wanted = json.loads(json.dumps(settings, default=lambda value: str(Path(value).resolve())))
    if path.exists():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read ({error}); delete {work} to start over") from error
        if changed := [key for key in wanted if found.get(key) != wanted[key]]:
            key = changed[0]
            raise InputError(
                f"{work} holds an unfinished compile with {key}={found.get(key)!r}, now {wanted[key]!r}; "
                f"repeat that command, or delete it to start over"
            )
        return work
    with replacing(path) as file:
        json.dump(wanted, file, indent=2)
    return work


def _spent(work: Path) -> float:
    """Seconds that interrupted calls of this compile took."""
    with suppress(OSError, ValueError):
        return float((work / "seconds").read_text())
    return 0.0


def _spend(work: Path, seconds: float) -> None:
    with suppress(OSError):
        (work / "seconds").write_text(f"{seconds:.1f}\n")


def _save(
    out: Path,
    source: Source,
    config: CompileConfig,
    base: Base,
    base_path: Path,
    renderer: Renderer,
    adapter: ConstantAdapter | None,
    dataset: Dataset,
    result: TrainResult,
    seconds: float,
    with_base: bool,
) -> None:
    from engrain.adapter import save_peft
    from engrain.model import save_base

    bundled = base_path == BUNDLED
    with replacing_directory(out) as aside:
        if adapter is not None:
            save_peft(adapter(()).detach(), aside / "adapter", str(base_path))
        else:
            save_base(base, aside / "model")
        if with_base:
            shutil.copytree(base_path, aside / "base")
        base.tokenizer.save_pretrained(aside / "tokenizer")
        (aside / TOOLS).write_text(json.dumps(dataset.schemas, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        (aside / GOLDEN).write_text(golden_rows(renderer, dataset.trajectories), encoding="utf-8")
        manifest = Manifest(
            engrain=engrain.__version__,
            kind=config.to,
            workflow=source.workflow.name if source.workflow else dataset.trajectories[0].workflow,
            source=str(source.path.resolve()),
            tenants=sorted(source.workflow.tenants) if source.workflow else [],
            base=BaseReference(
                name=base_path.name,
                digest=base.digest,
                path="" if bundled else str(base_path.resolve()),
                bundled=bundled,
                included=with_base,
            ),
            template=text_digest(str(base.tokenizer.chat_template)),
            tools={tool_digest(schema): schema["function"]["name"] for schema in dataset.schemas},
            data=dataset.summary,
            licences={"base": licence(base_path), "data": dataset.licence},
            config={**asdict(config), "lr": config.learning_rate},
            training=asdict(result),
            seconds=round(seconds, 1),
            files=_digests(aside),
        )
        (aside / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")


def licence(base: Path) -> str:
    """The licence that the base's card names in its front matter."""
    with suppress(OSError, ValueError, yaml.YAMLError, AttributeError, KeyError):
        _, front, _ = (base / "README.md").read_text(encoding="utf-8").split("---\n", 2)
        return str(yaml.safe_load(front)["license"])
    return "unknown"


def _digests(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): file_digest(path) for path in files}
