"""An initialisation that can copy: layers 0 and 1 start as induction heads (Olsson et al., 2022, arXiv:2209.11895).

Copying identifiers is what a tool user does most, and a small model spends most of a short training on discovering how.
So it starts from a random model into which the known circuit is written; training is free to change all of it.

- Layer 0: each head looks a fixed number of tokens back, by rotary position alone, and writes what it finds there into
  a subspace of its own (`seen[h]`), which the embeddings leave free.
- Layer 1: each head looks for the place whose preceding tokens are the current ones (the last one, two or three tokens,
  by head) and copies the token that stands there into the prediction.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

CONTENT = 20
"""Dimensions in which a token is recognised."""
SLOW = 12
"""Rotary pairs from here on turn so slowly that distance hardly changes a match."""
LOOK_BACK, MATCH, WRITE, COPY = 8.0, (3.5, 3.0, 3.0), 0.12, 0.15


def write_induction_heads(model: LlamaForCausalLM, generator: torch.Generator) -> None:
    """Overwrite the attention of layers 0 and 1 in place. Needs three or more heads of 64 or more dimensions."""
    config = model.config
    width, heads = config.hidden_size, config.num_attention_heads
    d_head = width // heads
    with torch.no_grad():
        basis = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q.T
        constant, seen = basis[0], basis[1 : 1 + 3 * CONTENT].view(3, CONTENT, width)
        words = basis[1 + 3 * CONTENT :]  # the directions in which embeddings differ
        embeddings: Any = model.get_input_embeddings().weight
        size = embeddings.norm(dim=1).mean()
        # Equal norms, so that the constant part is the same for every token and cannot outweigh position.
        embeddings.copy_(size * (torch.nn.functional.normalize(embeddings @ words.T @ words) + constant))
        layers: Any = model.model.layers
        for layer in layers:
            layer.self_attn.o_proj.weight.mul_(0.1)
            layer.mlp.down_proj.weight.mul_(0.1)
        known = words[:CONTENT]

        first = layers[0].self_attn
        rotary: Any = config.rope_parameters
        theta = rotary["rope_theta"] ** (-torch.arange(0, d_head, 2) / d_head)
        here = torch.cat([torch.ones(d_head // 2), torch.zeros(d_head // 2)])
        for head in range(3):
            rows = slice(head * d_head, (head + 1) * d_head)
            back = torch.cat([torch.cos((head + 1) * theta), -torch.sin((head + 1) * theta)])
            scale = LOOK_BACK / (width / 2) ** 0.5
            first.q_proj.weight[rows] = scale * torch.outer(back, constant)
            first.k_proj.weight[rows] = scale * torch.outer(here, constant)
            first.v_proj.weight[rows][:CONTENT] = known
            first.o_proj.weight[:, rows][:, :CONTENT] = WRITE * seen[head].T

        second = layers[1].self_attn
        slots = _slow_dimensions(d_head)
        for head, tokens in enumerate((3, 2, 1)):
            rows = slice(head * d_head, (head + 1) * d_head)
            each = min(CONTENT, len(slots) // tokens)
            # What the query knows of the current token and those before it, what the key knows of those before it.
            queries = torch.cat([part[:each] for part in (known, seen[0], seen[1])[:tokens]])
            keys = torch.cat([part[:each] for part in seen[:tokens]])
            second.q_proj.weight[rows] = _place(MATCH[head] * queries, slots, d_head)
            second.k_proj.weight[rows] = _place(MATCH[head] * keys, slots, d_head)
            copied = words[torch.randperm(len(words), generator=generator)[:d_head]]
            second.v_proj.weight[rows] = copied
            second.o_proj.weight[:, rows] = COPY * copied.T


def _slow_dimensions(d_head: int) -> list[int]:
    half = d_head // 2
    return [dimension for pair in range(SLOW, half) for dimension in (pair, pair + half)]


def _place(rows: Tensor, slots: list[int], d_head: int) -> Tensor:
    placed = torch.zeros(d_head, rows.shape[1])
    placed[slots[: len(rows)]] = rows
    return placed
