"""An initialisation that can copy: layers 0 to 2 start as induction heads (Olsson et al., 2022, arXiv:2209.11895) that
know in which line they are.

Copying identifiers is what a tool user does most, and a small model spends most of a short training on discovering how.
So it starts from a random model into which a circuit is written; training is free to change all of it.

- Layer 0: each head looks a fixed number of tokens back, by rotary position alone, and writes what it finds there into
  a subspace of its own (`seen[h]`), which the embeddings leave free.
- Layer 1: two heads look for the first and the second token of the line, such as C and 3 of "C3 go to", and write them
  into one subspace (`line`), each turned its own way. Prompts say nearly the same in many lines; without it, copying
  goes on in another.
- Layer 2: each head looks for the place whose preceding tokens, and line for two of them, are the current ones, and
  copies the token that stands there into the prediction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import LlamaForCausalLM

CONTENT = 30
"""Dimensions in which a token is recognised."""
SLOW = 6e-4
"""Rotary pairs that turn by less a token, in radians: over a thousand tokens distance hardly changes a match."""
RECENT = 0.15
"""The sum of the rotary pairs that turn by less, but are not slow, falls with the logarithm of the distance, over 6 to
1,000 tokens."""
LOOK_BACK, MATCH, WRITE, COPY = 12.0, 3.0, 0.12, 0.3
NEARNESS, NEWLINE, LINE, LINE_MATCH = 50.0, 124.0, 0.3, 0.5


def write_induction_heads(model: LlamaForCausalLM, newline: int, generator: torch.Generator) -> None:
    """Overwrite the attention of layers 0 to 2 in place. Needs three or more heads of 64 or more dimensions, and a
    rotary base large enough that many pairs turn slowly, such as 1e9. `newline` is the token before a line.
    """
    config = model.config
    width = config.hidden_size
    d_head = width // config.num_attention_heads
    with torch.no_grad():
        basis = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q.T
        constant = basis[0]
        *seen, line = basis[1 : 1 + 4 * CONTENT].view(4, CONTENT, width)
        words = basis[1 + 4 * CONTENT :]  # the directions in which embeddings differ
        known = words[:CONTENT]
        embeddings: Any = model.get_input_embeddings().weight
        size = embeddings.norm(dim=1).mean()
        # Equal norms, so that the constant part is the same for every token and cannot outweigh position.
        embeddings.copy_(size * (normalize(embeddings @ words.T @ words, dim=1) + constant))
        layers: Any = model.model.layers
        for layer in layers:
            layer.self_attn.o_proj.weight.mul_(0.1)
            layer.mlp.down_proj.weight.mul_(0.1)
        each = (width / 2) ** 0.5  # what the constant part of a normalised state is
        half = d_head // 2

        rotary: Any = config.rope_parameters
        theta = rotary["rope_theta"] ** (-torch.arange(0, d_head, 2) / d_head)
        here = torch.cat([torch.ones(half), torch.zeros(half)])
        for head in range(3):
            back = torch.cat([torch.cos((head + 1) * theta), -torch.sin((head + 1) * theta)])
            queries, keys = (LOOK_BACK / each * torch.outer(side, constant) for side in (back, here))
            _write(layers[0], head, queries, keys, known, WRITE * seen[head])

        slots = [dimension for pair in range(half) if theta[pair] < SLOW for dimension in (pair, pair + half)]
        near, asked = torch.zeros(2, d_head, width)
        near[:half][(theta >= SLOW) & (theta < RECENT)] = constant / each
        asked[slots[-1]] = constant / each
        for head in range(2):
            after_newline = torch.zeros(d_head, width)
            after_newline[slots[-1]] = normalize(embeddings[newline] @ known.T, dim=0) @ seen[head]
            turned = torch.linalg.qr(torch.randn(CONTENT, CONTENT, generator=generator)).Q @ line
            _write(layers[1], head, NEARNESS * near + NEWLINE * asked, near + after_newline, known, LINE * turned)

        tokens, before = (known, *seen[:2]), seen
        for head, (length, lined) in enumerate(((3, True), (2, True), (3, False))):
            share = min(CONTENT, len(slots) // (length + lined))
            now = [part[:share] for part in tokens[:length]] + [LINE_MATCH * line[:share]] * lined
            then = [part[:share] for part in before[:length]] + [LINE_MATCH * line[:share]] * lined
            copied = words[torch.randperm(len(words), generator=generator)[:d_head]]
            queries, keys = (_place(MATCH * torch.cat(parts), slots, d_head) for parts in (now, then))
            _write(layers[2], head, queries, keys, copied, COPY * copied)


def _write(layer: Any, head: int, queries: Tensor, keys: Tensor, reads: Tensor, writes: Tensor) -> None:
    """One head: `queries` and `keys` are (d_head, width), what it `reads` and `writes` (some rows, width)."""
    attention, d_head = layer.self_attn, len(queries)
    rows = slice(head * d_head, (head + 1) * d_head)
    attention.q_proj.weight[rows] = queries
    attention.k_proj.weight[rows] = keys
    attention.v_proj.weight[rows][: len(reads)] = reads
    attention.o_proj.weight[:, rows] = 0
    attention.o_proj.weight[:, rows][:, : len(writes)] = writes.T


def _place(rows: Tensor, slots: Sequence[int], d_head: int) -> Tensor:
    placed = torch.zeros(d_head, rows.shape[1])
    placed[list(slots[: len(rows)])] = rows
    return placed
