"""Choosing the next token: which ones a grammar allows, and which of those the model prefers.

llguidance walks the grammar; its bit masks are unpacked here (its own torch helper compiles a kernel for many seconds).
Where a grammar leaves one token only, `forced` names the whole run of such tokens, so that one pass encodes them all.
They are the tokenizer's canonical tokens (those that training saw), and exactly those that masking would have chosen.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import cast

import llguidance.hf
import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from llguidance import LLExecutor, LLMatcher
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from engrain.errors import ModelError
from engrain.recent import Recent

MOST_GRAMMARS = 512
"""That are kept; callers of a server bring tools of their own."""
LARGE = 32768
"""Vocabularies beyond this have their masks computed in parallel."""


class Grammars:
    """Compiles each grammar text once; a turn gets a cheap copy, which shares what its lexer has learned."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, stop_ids: Sequence[int]) -> None:
        size = max(vocabulary, len(tokenizer))
        try:
            fast = cast(PreTrainedTokenizerFast, tokenizer)
            self._tokenizer = llguidance.hf.from_tokenizer(fast, n_vocab=size, eos_token=list(stop_ids))
        except ValueError as error:
            raise ModelError(f"constrained decoding needs a fast tokenizer (tokenizer.json): {error}") from error
        self._vocabulary = vocabulary
        self._words = (size + 31) // 32
        # Masks of a small vocabulary take microseconds: waking other threads costs more than it saves.
        threads = min(8, torch.get_num_threads()) if size > LARGE else 1
        self._executor = LLExecutor(num_threads=threads) if threads > 1 else None
        self._compiled = Recent[LLMatcher](MOST_GRAMMARS)

    def matcher(self, grammar: str) -> LLMatcher:
        """A fresh walk of a Lark grammar. Raises `ModelError` if the grammar is malformed."""
        if grammar not in self._compiled:
            compiled = LLMatcher(self._tokenizer, LLMatcher.grammar_from_lark(grammar), log_level=0)
            if compiled.is_error():
                raise ModelError(f"llguidance refuses the grammar: {compiled.get_error()}")
            self._compiled[grammar] = compiled
            return compiled.deep_copy()
        return self._compiled[grammar].deep_copy()

    def allowed(
        self, matchers: Sequence[LLMatcher | None], device: torch.device
    ) -> Bool[Tensor, "choices vocabulary"] | None:
        """What may come next in each walk; None if all walks are free."""
        jobs = [(matcher, row) for row, matcher in enumerate(matchers) if matcher is not None]
        if not jobs:
            return None
        bits = np.full((len(matchers), self._words), -1, dtype=np.int32)
        pointer, width = bits.ctypes.data, self._words * 4
        if self._executor is not None:
            self._executor.unsafe_compute_mask_ptr(jobs, pointer, width, len(matchers))
        else:
            for matcher, row in jobs:
                matcher.unsafe_compute_mask_ptr(pointer + row * width, width)
        unpacked = np.unpackbits(bits.view(np.uint8), axis=1, bitorder="little", count=self._vocabulary)
        return torch.from_numpy(unpacked.view(np.bool_)).to(device)


def forced(matcher: LLMatcher | None) -> list[int]:
    """The run of tokens that can only come next, already consumed by the matcher."""
    tokens = matcher.compute_ff_tokens() if matcher is not None else []
    if matcher is not None and tokens:
        matcher.consume_tokens(tokens)
    return tokens


def choose(
    logits: Float[Tensor, "choices vocabulary"],
    allowed: Bool[Tensor, "choices vocabulary"] | None,
    temperature: float,
    top_p: float,
    draws: Sequence[float],
) -> Int[Tensor, " choices"]:
    """A token for each row.

    Greedy at temperature 0; else each row inverts its nucleus' cumulative distribution at its own draw in [0, 1), so
    that a row's tokens do not depend on its neighbours.
    """
    masked = logits if allowed is None else logits.masked_fill(~allowed, float("-inf"))
    return masked.argmax(dim=-1) if temperature <= 0 else _nucleus(masked / temperature, top_p, draws)


def _nucleus(
    masked: Float[Tensor, "choices vocabulary"], top_p: float, draws: Sequence[float]
) -> Int[Tensor, " choices"]:
    probabilities, order = masked.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    before = probabilities.cumsum(dim=-1) - probabilities
    kept = probabilities.masked_fill(before >= top_p, 0.0)
    kept[:, 0] = probabilities[:, 0]
    reached = kept.cumsum(dim=-1)
    target = torch.tensor(draws, device=masked.device)[:, None] * reached[:, -1:]
    rank = (reached <= target).sum(dim=-1).clamp(max=masked.shape[-1] - 1)
    return order.gather(-1, rank[:, None])[:, 0]


def draw(seed: str, position: int) -> float:
    """The uniform draw that a stream with this seed spends on its token at `position`."""
    return random.Random(f"{seed}:{position}").random()
