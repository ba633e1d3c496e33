"""The agent directory: what a compile leaves behind, and all that is needed to run it.

    engrain.json      the manifest: what it was made from, by digest
    adapter/          a PEFT adapter (kind `lora`), or
    model/            the whole model (kind `full`), or
    hypernetwork/     what makes an adapter for a tenant's rules (kind `hypernetwork`)
    base/             the base it belongs to, with `--with-base`; else the manifest names it by digest and path
    tokenizer/        with the chat template
    tools.json        the schemas that calls are constrained to
    golden.jsonl      a few trajectories with their tokens: the renderer must still give exactly these

Invariant: what loads is what was compiled. Base, template, tokens and files are checked against the manifest on
loading, and tools when a workflow is attached; a difference is a `ModelError`, never a silently worse agent.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engrain.controls import Control, own
from engrain.errors import InputError, ModelError, RenderError
from engrain.trajectory import Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from engrain.adapter import Adapter
    from engrain.adapters import Adapters
    from engrain.compiled_policy import CompiledPolicy
    from engrain.context import Context
    from engrain.engine import Engine
    from engrain.model import Base
    from engrain.policy import Episode
    from engrain.renderer import Renderer
    from engrain.task import Task
    from engrain.workflow import Workflow

FORMAT = "engrain.agent/1"
MANIFEST = "engrain.json"
GOLDEN = "golden.jsonl"
TOOLS = "tools.json"
HYPERNETWORK = "hypernetwork"
BUNDLED = Path(__file__).parent / "base"
BUNDLED_HYPERNETWORK = Path(__file__).parent / "base_hypernetwork"
"""Of the bundled base, by `recipes/hypernetwork`."""
LONGEST_CONTEXT = 32768


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BaseReference(Part):
    """Where the base is; the digest decides whether it is the right one."""

    name: str
    digest: str
    path: str
    bundled: bool = False
    """It comes with the engrain package."""
    included: bool = False
    """It is in the agent directory."""


class DataSummary(Part):
    digest: str
    trajectories: int
    rows: int
    tokens: int
    trained_tokens: int
    """Those that carry loss."""
    rejected: dict[str, int] = Field(default_factory=dict)


class Manifest(Part):
    format: Literal["engrain.agent/1"] = FORMAT
    engrain: str
    kind: Literal["lora", "full", "hypernetwork"]
    workflow: str
    source: str
    """The workflow, or the trajectories, that it was compiled from, seen from the agent's directory."""
    source_digest: str
    """Of the workflow's files."""
    tenants: list[str]
    base: BaseReference
    template: str
    """Digest of the chat template."""
    tools: dict[str, str]
    """Tool name by schema digest; logs may hold several tools of one name."""
    context_policy: str = "full@1"
    data: DataSummary
    licences: dict[str, str]
    config: dict[str, Any]
    training: dict[str, Any]
    """What the training loop reported: tokens, steps, seconds, losses."""
    seconds: float
    cpu_seconds: float | None = None
    """Of the compile, interrupted calls included; None if it was made before they were counted."""
    files: dict[str, str]
    """SHA-256 of every other file."""


@dataclass(frozen=True)
class Agent:
    """A compiled agent. Models load on first use, since a caller may want the base, the agent or both."""

    path: Path
    manifest: Manifest

    @cached_property
    def base_path(self) -> Path:
        return find_base(self.path, self.manifest.base)

    @cached_property
    def renderer(self) -> Renderer:
        return load_renderer(self.path, self.manifest)

    def load_base(self) -> Base:
        """The base as it was before compiling. Raises `ModelError` if it is not the one compiled for."""
        from engrain.model import load_base

        base = load_base(self.base_path)
        if base.digest != self.manifest.base.digest:
            raise ModelError(
                f"{self.base_path} is not the base this agent was compiled on: expected digest "
                f"{self.manifest.base.digest[:12]}, got {base.digest[:12]}; compile again or restore that base"
            )
        return base

    def load(self) -> Base:
        """The compiled model: the base with the adapter merged, or the fully trained model.

        Raises `InputError` for a hypernetwork, which makes another model for each context, `ModelError` for an adapter
        that acts on some tokens only.
        """
        from engrain.adapter import load_peft, merge
        from engrain.model import load_base

        if self.manifest.kind == "hypernetwork":
            raise InputError(f"{self.path} is a hypernetwork and has a model only for a context; give a tenant")
        if self.manifest.kind == "full":
            return load_base(self.path / "model")
        base = self.load_base()
        merge(base.model, load_peft(self.path / "adapter"))
        return base

    def decoding(self) -> tuple[Base, Adapter | None]:
        """The model that decodes, and the adapter to give with each request: none, but for an activated one."""
        from engrain.adapter import load_peft

        if self.manifest.kind == "lora" and (adapter := load_peft(self.path / "adapter")).invocation:
            return self.load_base(), adapter
        return self.load(), None

    def policy(
        self, workflow: Workflow, parallel: int = 16, *, compiled: bool = True, control: Control = own
    ) -> CompiledPolicy:
        """The agent, or with `compiled=False` the bare base, as a policy for so many episodes at a time.

        The workflow tells a hypernetwork its tenants' rules; it may have tenants that training never saw. Rules that
        are too far from what it learnt from go into the prompt of the bare base, and the trajectory says so. Under a
        control it reads what that gives it, and nothing goes into the prompt.
        """
        if not compiled:
            return as_policy(self.load_base().model, self.renderer, parallel)
        if self.manifest.kind != "hypernetwork":
            base, one = self.decoding()
            return as_policy(base.model, self.renderer, parallel, lambda episode: one)
        base = self.load_base()
        adapters = self.adapters(base)
        contexts = cache(partial(self.contexts, workflow, control=control))

        def in_prompt(task: Task) -> str:
            return adapters.strange(contexts(task.tenant).values()) if control is own else ""

        def adapter_of(episode: Episode) -> Adapter | None:
            read, phase = contexts(episode.task.tenant), episode.phase.name
            return None if in_prompt(episode.task) else adapters(read[phase if phase in read else ""])

        return as_policy(base.model, self.renderer, parallel, adapter_of, in_prompt)

    def contexts(self, workflow: Workflow, tenant: str, control: Control = own) -> dict[str, Context]:
        """What a hypernetwork reads for a tenant, by phase; or under "" alone, where the phase does not matter."""
        by_step = self.manifest.config.get("contexts") == "step"

        def read(phase: str, name: str) -> Context:
            return workflow.step_context(name, phase) if by_step else workflow.context(name)

        phases = [phase.name for phase in workflow.phases] if by_step else [""]
        return {phase: control(partial(read, phase), tenant, list(workflow.tenants)) for phase in phases}

    def adapters(self, base: Base) -> Adapters:
        """What makes adapters for the base as `load_base` gave it. Raises `InputError` if there is no hypernetwork."""
        from engrain.adapters import Adapters
        from engrain.hypernetwork import load_hypernetwork

        if self.manifest.kind != "hypernetwork":
            raise InputError(f"{self.path} is a {self.manifest.kind} agent and knows only the tenants that it was "
                             "compiled with; compile with --to hypernetwork")  # fmt: skip
        return Adapters(load_hypernetwork(self.path / HYPERNETWORK, base))

    def digest(self) -> str:
        """Names exactly this agent: the manifest holds the digest of everything else."""
        return file_digest(self.path / MANIFEST)

    def check_workflow(self, workflow: Workflow) -> None:
        """Raises `ModelError` if the tools are no longer those that the agent was compiled for."""
        now = {tool_digest(schema): schema["function"]["name"] for schema in json.loads(workflow.schemas("full"))}
        if changed := sorted({name for _, name in now.items() ^ self.manifest.tools.items()}):
            raise ModelError(
                f"{self.path}: compiled for other tools than {workflow.name!r} has now ({', '.join(changed)} differ); "
                f"compile again or give the right --workflow"
            )


def as_policy(
    model: PreTrainedModel,
    renderer: Renderer,
    parallel: int = 16,
    adapter_of: Callable[[Episode], Adapter | None] = lambda episode: None,
    in_prompt: Callable[[Task], str] = lambda task: "",
) -> CompiledPolicy:
    """A model as a policy for so many episodes at a time: greedy, with calls constrained to the tools' schemas."""
    from engrain.compiled_policy import CompiledPolicy

    return CompiledPolicy(open_engine(model, renderer, parallel), adapter_of=adapter_of, in_prompt=in_prompt)


def open_engine(model: PreTrainedModel, renderer: Renderer, parallel: int) -> Engine:
    """Greedy decoding for so many turns at a time, as far as the model's positions reach."""
    from engrain.engine import Engine

    longest = min(LONGEST_CONTEXT, getattr(model.config, "max_position_embeddings", LONGEST_CONTEXT))
    return Engine(model, renderer, renderer.tokenizer, parallel=parallel, max_context=longest)


def load_agent(path: Path | str) -> Agent:
    """Open an agent directory and check that it is whole. Raises `ModelError`."""
    path = Path(path)
    try:
        text = (path / MANIFEST).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: no readable {MANIFEST}; expected a directory made by `engrain compile`") from error
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise ModelError(f"{path / MANIFEST}: field {field!r}: {first['msg']}; compile the agent again") from error
    for name, digest in manifest.files.items():
        try:
            found = file_digest(path / name)
        except OSError as error:
            raise ModelError(f"{path}: {name} is missing ({error.strerror}); compile the agent again") from error
        if found != digest:
            raise ModelError(f"{path}: {name} was changed after compiling; compile the agent again")
    return Agent(path, manifest)


def bundled_base() -> Path:
    """The base that comes with the package. Raises `ModelError` if this copy of the package has none."""
    if not BUNDLED.is_dir():
        raise ModelError("this copy of engrain has no bundled base; give one with --base, or make it with recipes/base")
    return BUNDLED


def named_hypernetwork(place: Path) -> Path:
    """A hypernetwork's directory; `bundled` is the one that comes with the package. Raises `ModelError` if there is
    none in this copy of it."""
    if place != Path("bundled"):
        return place
    if not BUNDLED_HYPERNETWORK.is_dir():
        raise ModelError("this copy of engrain has no bundled hypernetwork; make one with recipes/hypernetwork")
    return BUNDLED_HYPERNETWORK


def find_base(agent: Path, base: BaseReference) -> Path:
    """The base's directory: in the agent, in the package, or where it was. Raises `ModelError` if it is gone."""
    if base.included:
        return agent / "base"
    if base.bundled:
        return bundled_base()
    for place in (agent / base.path, Path(base.path)):
        if place.is_dir():
            return place
    raise ModelError(f"{agent}: its base {base.name!r} is not at {base.path}; put it back, or compile with --with-base")


def load_renderer(agent: Path, manifest: Manifest) -> Renderer:
    """The renderer, proven on the golden rows. Raises `ModelError` if it gives other tokens than at compile time."""
    from transformers import AutoTokenizer

    from engrain.renderer import Renderer

    tokenizer = AutoTokenizer.from_pretrained(agent / "tokenizer", local_files_only=True)
    if text_digest(str(tokenizer.chat_template)) != manifest.template:
        raise ModelError(f"{agent}: the chat template is not the one compiled with; compile the agent again")
    renderer = Renderer(tokenizer)
    for number, line in enumerate((agent / GOLDEN).read_text(encoding="utf-8").strip().split("\n"), 1):
        golden = json.loads(line)
        trajectory = Trajectory.model_validate(golden["trajectory"])
        try:
            rows = [[row.ids, [int(bit) for bit in row.mask]] for row in renderer.rows(trajectory)]
        except RenderError as error:
            raise ModelError(f"{agent}: {GOLDEN}:{number} no longer renders: {error}") from error
        if rows != golden["rows"]:
            raise ModelError(
                f"{agent}: {GOLDEN}:{number} gives other tokens than when compiled; install the versions in {MANIFEST}"
            )
    return renderer


def golden_rows(renderer: Renderer, trajectories: Sequence[Trajectory], count: int = 3) -> str:
    """JSONL of the shortest trajectories, of different kinds where there are any, with their exact tokens."""
    shortest: dict[str, Trajectory] = {}
    for trajectory in sorted(trajectories, key=lambda one: len(one.messages)):
        shortest.setdefault(trajectory.kind, trajectory)
    chosen = sorted(shortest.values(), key=lambda one: len(one.messages))[:count]
    lines = []
    for trajectory in chosen:
        rows = [[row.ids, [int(bit) for bit in row.mask]] for row in renderer.rows(trajectory)]
        record = {"trajectory": trajectory.model_dump(mode="json", exclude_defaults=True), "rows": rows}
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    return "".join(lines)


def tool_digest(schema: dict[str, Any]) -> str:
    return text_digest(json.dumps(schema, sort_keys=True, ensure_ascii=False))


def text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
