"""Tiny random models of the three architectures that we claim, with grouped-query attention."""

from __future__ import annotations

import random
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from engrain.adapter import Adapter, Factors
from engrain.model import sites
from engrain.renderer import Row

ARCHITECTURES = ("llama", "qwen3", "mistral")
VOCABULARY = 64
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}


def tiny(architecture: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model in evaluation mode. Qwen3's heads are wider than hidden_size / heads; Mistral's window is 8."""
    own: dict[str, dict[str, Any]] = {
        "llama": {"tie_word_embeddings": True},
        "qwen3": {"head_dim": 16},
        "mistral": {"sliding_window": 8},
    }
    shape: dict[str, Any] = {**_SHAPE, **own[architecture], **changes}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if architecture == "llama":
            return LlamaForCausalLM(LlamaConfig(**shape)).eval()
        if architecture == "qwen3":
            return Qwen3ForCausalLM(Qwen3Config(**shape)).eval()
        return MistralForCausalLM(MistralConfig(**shape)).eval()


def trained_like(model: PreTrainedModel, rank: int = 4, seed: int = 1) -> Adapter:
    """An adapter at every site with both factors away from zero, so that each has an effect."""
    chance = torch.Generator().manual_seed(seed)
    factors = {
        site: Factors(
            torch.randn(rank, d_in, generator=chance) * d_in**-0.5, torch.randn(d_out, rank, generator=chance) * 0.2
        )
        for site, (d_in, d_out) in sites(model).items()
    }
    return Adapter(factors, alpha=2.0 * rank, rank=rank)


def random_rows(count: int, seed: int = 0, longest: int = 24) -> list[Row]:
    """Rows with something to learn (a fixed step between tokens) and a mask over their second half."""
    chance = random.Random(seed)
    rows = []
    for _ in range(count):
        length, start = chance.randint(4, longest), chance.randrange(VOCABULARY)
        ids = [(start + 5 * i) % VOCABULARY for i in range(length)]
        rows.append(Row(ids, [i >= length // 2 for i in range(length)]))
    return rows
