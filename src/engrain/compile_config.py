"""What a compile is asked for. Invariant: settings that contradict one another are refused before anything is done."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from engrain.agent import file_digest
from engrain.errors import InputError

Target = Literal["lora", "full", "hypernetwork"]
LEARNING_RATES: dict[Target, float] = {"lora": 2e-3, "full": 5e-4, "hypernetwork": 1e-3}
WEIGHTS = "hypernetwork.safetensors"
"""Of a hypernetwork's directory; `hypernetwork.WEIGHTS`, which would load torch."""


@dataclass(frozen=True)
class CompileConfig:
    """The main dial is `tokens`; everything else follows or has a default that works for small bases."""

    tokens: int = 10_000_000
    """Tokens to train on."""
    to: Target = "lora"
    rank: int = 32
    """Of the adapter; of a hypernetwork's shared term, beside which each token of a rule has a term of rank 1."""
    lr: float | None = None
    """Learning rate; by default 2e-3 for LoRA, 5e-4 for full fine-tuning and 1e-3 for a hypernetwork."""
    longest: int = 8192
    """Longer rows are left out and counted."""
    batch_tokens: int | None = None
    """Tokens an optimizer step, in one packed pass; by default 4,096, or fewer (512 at
    least) for about 500 steps."""
    keep_tools: bool = False
    """When compiling from logs: leave the tool schemas in the prompt."""
    contexts: Literal["tenant", "step", "tools"] = "tenant"
    """What a hypernetwork reads: the tenant's rules; or with these the phase at hand and the tools that it allows, so
    that each phase has an adapter of its own, and a row; or, from logs, the schemas of each run's tools."""
    activated: bool = False
    """The adapter acts on the agent's own turns only: what came before, the base has encoded for all adapters."""
    start: Path | None = None
    """A hypernetwork of this base to go on from, with its rank; with no `tokens` it is taken as it is."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.to not in LEARNING_RATES:
            raise InputError(f"cannot compile to {self.to!r}: expected {', '.join(LEARNING_RATES)}")
        if self.contexts not in ("tenant", "step", "tools"):
            raise InputError(f"contexts are of a tenant, of a step or of tools, got {self.contexts!r}")
        if self.activated and self.to == "full":
            raise InputError(
                "all weights act on all tokens; activation is for adapters: compile to lora or hypernetwork"
            )
        if self.start is not None and (self.to != "hypernetwork" or self.activated):
            raise InputError("only a hypernetwork that is not activated goes on from another; leave --start out")
        if self.start is not None and not (self.start / WEIGHTS).is_file():
            raise InputError(f"{self.start} has no {WEIGHTS}; give the directory of a hypernetwork")
        if not self.tokens and self.start is None:
            raise InputError("there is nothing without training tokens; give some, or a hypernetwork to start from")
        if self.tokens < 0:
            raise InputError(f"expected tokens of at least 0, got {self.tokens}")
        for name in ("rank", "longest", "batch_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"expected {name} of at least 1, got {value}")

    @property
    def learning_rate(self) -> float:
        return self.lr if self.lr is not None else LEARNING_RATES[self.to]

    @property
    def step_tokens(self) -> int:
        return self.batch_tokens or min(4096, max(512, self.tokens // 500))

    def known(self) -> dict[str, Any]:
        """All settings, and the start by its weights."""
        start = self.start and file_digest(self.start / WEIGHTS)
        return {**asdict(self), "lr": self.learning_rate, "batch_tokens": self.step_tokens, "start": start}
