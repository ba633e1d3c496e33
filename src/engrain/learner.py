"""The learner: the parts of a training run that have state, which are the parameters, their optimizer and their device.

Invariant: a step either happens whole or changes nothing, and `checkpoint` holds all that a later step depends on.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers import PreTrainedModel

from engrain.batch import Packed
from engrain.checkpoint import Checkpoint
from engrain.errors import InputError
from engrain.gradients import NEVER, UNEVEN, Gradients, Sum, accumulate, keep_freed_memory, shared
from engrain.learned import LearnedSource
from engrain.model import PACKED, Base, adapted, attention, sites
from engrain.objective import Objective

if TYPE_CHECKING:
    from engrain.renderer import Row

Probe = Callable[[int, PreTrainedModel], Mapping[str, Any]]
"""Called between steps with (step, model), in eval mode with plain attention; what it returns is logged."""


@dataclass(frozen=True)
class TrainConfig:
    """The main dial is `tokens`; the rest has defaults that work for small models."""

    tokens: int
    """Tokens to train on in all, prompts included; rows come again in new order as often as needed."""
    batch_tokens: int = 8192
    """Capacity of one packed batch."""
    accumulate: int = 1
    """Batches an optimizer step."""
    lr: float = 1e-3
    embedding_lr: float = 1.0
    """Learning rate of input embeddings, as a share of `lr`."""
    warmup: float = 0.03
    """Share of the tokens during which the learning rate rises; then it falls as a cosine."""
    final: float = 0.1
    """What the learning rate falls to, as a share of `lr`."""
    weight_decay: float = 0.1
    """On matrices that are not embeddings; never on norms and biases."""
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    seed: int = 0
    precision: Literal["bf16", "fp32"] = "bf16"
    """Trained parameters are fp32 either way."""
    gradient_checkpointing: bool = False
    compiled: bool = False
    """Decoder layers through `torch.compile`, which rounds otherwise; for the base's own weights only.

    On CPU it needs a C++ compiler and a minute, then saves a fifth of a step.
    """
    checkpoint_every_s: float = 120.0
    checkpoint_every_steps: int | None = None
    probe_every_s: float | None = None
    probe_every_steps: int | None = None
    threads: int | None = None
    """On CPU, rows are shared among so many processes (on Linux; elsewhere these are torch's threads).

    None takes torch's number. Another number rounds otherwise.
    """

    def __post_init__(self) -> None:
        for name in ("tokens", "batch_tokens", "accumulate", "lr", "embedding_lr"):
            if getattr(self, name) <= 0:
                raise InputError(f"training needs {name} > 0, got {getattr(self, name)}")
        if self.precision not in ("bf16", "fp32"):
            raise InputError(f"precision must be bf16 or fp32, got {self.precision!r}")

    def lr_at(self, tokens: int) -> float:
        """Learning rate when `tokens` have been seen."""
        done = min(1.0, tokens / self.tokens)
        if done < self.warmup:
            return self.lr * done / self.warmup
        fallen = (1 - math.cos(math.pi * (done - self.warmup) / (1 - self.warmup))) / 2
        return self.lr * (1 - (1 - self.final) * fallen)


@dataclass
class Position:
    """Where a run stands between two steps; `bin` is the next batch of `epoch`."""

    step: int = 0
    tokens: int = 0
    epoch: int = 0
    bin: int = 0
    loss: float = 0.0
    seconds: float = 0.0


class Learner:
    """The parts of a run that have state: device, parameters, optimizer."""

    def __init__(self, base: Base, source: nn.Module | None, config: TrainConfig, objective: Objective) -> None:
        keep_freed_memory()
        AcceleratorState._reset_state(reset_partial_state=True)  # else an earlier run in this process fixes precision
        self.accelerator = Accelerator(
            mixed_precision="bf16" if config.precision == "bf16" else "no",
            cpu=not torch.cuda.is_available(),
        )
        self.device = self.accelerator.device
        self.model, self.source, self.config, self.objective = base.model, source, config, objective
        if source is not None and config.compiled:
            raise InputError("compiled layers cannot change their adapter at each step; train with compiled=False")
        self.model.to(self.device)  # type: ignore[arg-type]
        module = base.model
        if source is not None:
            base.model.requires_grad_(False)
            module = source.to(self.device)
        module.float().requires_grad_(True)
        self.trained = dict(module.named_parameters())
        embeddings = base.model.get_input_embeddings().weight
        groups: list[dict[str, Any]] = [
            {"params": [], "share": 1.0, "weight_decay": config.weight_decay},
            {"params": [], "share": 1.0, "weight_decay": 0.0},
            {"params": [], "share": config.embedding_lr, "weight_decay": 0.0},
        ]
        for parameter in self.trained.values():
            groups[2 if parameter is embeddings else parameter.dim() < 2]["params"].append(parameter)
        threads = config.threads or torch.get_num_threads()
        alone = self.device.type != "cpu" or sys.platform != "linux" or _has_dropout(base.model)
        workers = 1 if alone else threads
        for parameter in self.trained.values() if workers > 1 else ():
            parameter.data = shared(parameter.data)
        self.pass_tokens = math.ceil(config.batch_tokens / workers)
        uneven = NEVER if config.compiled else UNEVEN
        twice = attention_length(base.model)
        self.gradients = Gradients(self._gradients, list(self.trained.values()), workers, threads, uneven, twice)
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)

    def step(self, rows: Sequence[Row], lr: float, stopping: threading.Event) -> tuple[float, float] | None:
        """One optimizer step over rows: mean loss and gradient norm, or None if asked to stop before its end."""
        found = self.gradients(rows, stopping)
        if found is None:
            return None
        self.optimizer.zero_grad(set_to_none=True)
        mean, count = found.loss / max(found.terms, 1), float(max(found.terms, 1))
        parameters = list(self.trained.values())
        for parameter, gradient in zip(parameters, found.gradients, strict=True):
            parameter.grad = gradient / count
        self._leave_absent_tokens(rows)
        norms = [nn.utils.clip_grad_norm_(group, self.config.clip) for group in self._clipped()]
        norm = float(torch.stack(norms).norm())
        if not math.isfinite(mean) or not math.isfinite(norm):
            raise InputError(f"loss {mean} with gradient norm {norm}; lower lr (now {lr:.2g}) and resume")
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["share"]
        self.optimizer.step()
        return mean, norm

    def _clipped(self) -> list[list[nn.Parameter]]:
        """What is clipped together: the heads of a hypernetwork must not drown its trunk, nor the other way round."""
        if isinstance(self.source, LearnedSource):
            return [group for group in self.source.parameter_groups().values() if group]
        return [list(self.trained.values())]

    def _leave_absent_tokens(self, rows: Sequence[Row]) -> None:
        """Only tokens of the batch have a gradient in a tied embedding.

        As outputs, all others are pushed away a little from every state, and Adam makes much of any steady little: rare
        tokens end up as one and the same (Gao et al., 2019, arXiv:1907.12009), and none of them can be copied.
        """
        gradient = cast(Tensor, self.model.get_input_embeddings().weight).grad
        if self.model.config.tie_word_embeddings and gradient is not None:
            absent = torch.ones(len(gradient), dtype=torch.bool)
            absent[torch.tensor([token for row in rows for token in row.ids])] = False
            gradient[absent.to(gradient.device)] = 0

    def _gradients(self, rows: Sequence[Row], stopping: threading.Event) -> Sum | None:
        """Of the loss over rows, with respect to the trained weights."""
        return accumulate(self._loss, rows, list(self.trained.values()), self.pass_tokens, stopping)

    @contextmanager
    def _loss(self, batch: Packed) -> Iterator[tuple[Tensor, int]]:
        adapter = self.source(batch.contexts) if self.source is not None else None
        # backward runs inside `adapted`: gradient checkpointing replays the forward
        with adapted(self.model, adapter, batch.spans, batch.acting) if adapter is not None else nullcontext():
            with self.accelerator.autocast():
                found = self.objective(self.model, adapter, batch)
            yield found

    @contextmanager
    def training(self) -> Iterator[None]:
        """Train mode, packed attention, processes and gradient checkpointing within the block."""
        before = self.model.training
        self.model.train()
        if self.config.gradient_checkpointing:
            _checkpointing(self.model, "enable")({"use_reentrant": False})
        layers = _layers(self.model) if self.config.compiled else []
        for layer in layers:
            layer.compile(dynamic=True)
        try:
            with attention(self.model, PACKED), self.gradients:
                yield
        finally:
            for layer in layers:
                layer._compiled_call_impl = None
            if self.config.gradient_checkpointing:
                _checkpointing(self.model, "disable")()
            self.model.train(before)
            self.optimizer.zero_grad(set_to_none=True)

    def look(self, probe: Probe, step: int) -> dict[str, Any]:
        """What a probe returns; it cannot disturb the run's random numbers."""
        self.model.eval()
        eager = torch.compiler.set_stance("force_eager")
        with torch.random.fork_rng(), torch.no_grad(), attention(self.model, "sdpa"), eager:
            values = dict(probe(step, self.model))
        self.model.train()
        return values

    def checkpoint(self, at: Position, digest: str) -> Checkpoint:
        tensors = {"random/cpu": torch.get_rng_state()}
        if self.accelerator.device.type == "cuda":
            tensors["random/cuda"] = torch.cuda.get_rng_state()
        for name, parameter in self.trained.items():
            tensors[f"parameter/{name}"] = parameter
            tensors |= {f"{key}/{name}": value for key, value in self.optimizer.state[parameter].items()}
        return Checkpoint(at.step, digest, tensors, asdict(at))

    def restore(self, checkpoint: Checkpoint) -> Position:
        tensors = dict(checkpoint.tensors)
        torch.set_rng_state(tensors["random/cpu"])
        if self.accelerator.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["random/cuda"])
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(tensors[f"parameter/{name}"])
                keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}/{name}" in tensors]
                self.optimizer.state[parameter] = {
                    key: tensors[f"{key}/{name}"].to(parameter.device, copy=True) for key in keys
                }
        return Position(**checkpoint.state)


def _checkpointing(model: PreTrainedModel, action: Literal["enable", "disable"]) -> Callable[..., None]:
    """transformers 5.23 renamed these methods."""
    new, old = f"activation_checkpointing_{action}", f"gradient_checkpointing_{action}"
    return getattr(model, new if hasattr(model, new) else old)


def attention_length(model: PreTrainedModel) -> float:
    """The row length, in tokens, at which causal attention takes as many multiplications as the linear layers."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    linear = sum(d_in * d_out for d_in, d_out in sites(model).values())
    return linear / (config.num_hidden_layers * width)


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder's blocks: compiled one by one, they share what was compiled."""
    return [layer for child in model.get_decoder().children() if isinstance(child, nn.ModuleList) for layer in child]


def _has_dropout(model: PreTrainedModel) -> bool:
    """Whether a forward draws random numbers, which processes would draw apart."""
    return any(value for name, value in model.config.to_dict().items() if "drop" in name and isinstance(value, float))
