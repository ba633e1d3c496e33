"""Decoding: many turns together, one forward pass a step, each joining and leaving between two passes.

A stream keeps its line in the KV cache from turn to turn: a turn encodes only what its prompt adds to it. Greedy
decoding drafts what comes next from what followed the same tokens before, and keeps what the model would have chosen.
Invariant: a line's tokens depend on its own prompt, adapter, grammar and seed, never on its neighbours nor on drafts.

What is not covered: recurrent or chunked attention layers, and rotary embeddings whose frequencies change with the
length (`dynamic`, `longrope`); such bases are refused. Keys and values outside a sliding window are kept in memory.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from engrain.adapter import Adapter, merge, stack
from engrain.constrain import Grammars, choose, draw, forced
from engrain.errors import EngrainError, ModelError
from engrain.kv_cache import WIDEST_TOGETHER, KVCache, Line, Step, attending
from engrain.model import adapted
from engrain.renderer import Renderer
from engrain.turn import GREEDY, LONGEST_TURN, Completion, Lookup, Request, Sampling, Turn

SHORTEST_SHARED = 32
"""Prefixes at least this long are copied from another line rather than encoded."""
LONGEST_DRAFT = 7
"""Tokens that are guessed ahead; `benchmarks/drafts.py` compares lengths."""
MOST_AT_ONCE = 8192
"""New tokens in one pass; longer extensions take several."""


class Engine:
    """Decodes many streams with one model. `encoded_tokens` counts tokens that went through it, in `passes` passes.

    An `adapter` is merged into a copy of the weights, for speed; with `hooked=True` it runs beside the caller's own
    weights, which then must not be trained or adapted elsewhere until `close`. An activated one cannot be either: give
    it with each request. Then all before a turn is the base's, which streams under any activated adapter share.
    """

    def __init__(
        self,
        base_model: PreTrainedModel,
        renderer: Renderer,
        tokenizer: PreTrainedTokenizerBase,
        *,
        adapter: Adapter | None = None,
        hooked: bool = False,
        parallel: int = 16,
        max_context: int = 4096,
        sampling: Sampling = GREEDY,
        draft: int = LONGEST_DRAFT,
    ) -> None:
        _require_supported(base_model)
        self.model, self._adapted = _with_adapter(base_model, adapter, hooked)
        self._adapted.__enter__()
        self.model.eval()
        self.renderer, self.tokenizer, self.sampling = renderer, tokenizer, sampling
        self.parallel, self.draft = parallel, draft
        self.max_context = min(max_context, getattr(self.model.config, "max_position_embeddings", max_context))
        self.stops = frozenset(renderer.stop_ids)
        self.vocabulary = cast(nn.Linear, self.model.get_output_embeddings()).out_features
        self.grammars = Grammars(tokenizer, self.vocabulary, renderer.stop_ids)
        self.device = self.model.device
        self.cache = KVCache(self.device)
        self.encoded_tokens = self.passes = 0
        self._clock = 0
        self._mixed: tuple[list[Adapter | None], Adapter] = ([], Adapter({}, 1.0, 1))
        self._self_check()
        self.cache = KVCache(self.device)
        self.encoded_tokens = self.passes = 0

    @torch.inference_mode()
    def _self_check(self) -> None:
        """Raises `ModelError` if the cache does not reproduce what the model says without it."""
        ids = [(7919 * n + 1) % self.vocabulary for n in range(6)]
        own = self.model(input_ids=torch.tensor([ids], device=self.device), use_cache=False).logits[0, -1]
        line = self.cache.add_line()
        self._encode([line], [ids[:4]], [3])
        error = (self._encode([line], [ids[4:]], [1])[0] - own).abs().max() / own.abs().max()
        if not error < (1e-1 if own.dtype in (torch.bfloat16, torch.float16) else 1e-3):
            raise ModelError(f"cannot decode with {self.model.config.model_type!r}: expected cached logits equal to "
                             f"the model's own, got a relative error of {error:.1g}; choose another base")  # fmt: skip

    def close(self) -> None:
        """Take the hooks of a hooked adapter off the base."""
        self._adapted.__exit__(None, None, None)
        self._adapted = nullcontext()

    def generate(
        self, prompts: Sequence[Sequence[int]], grammar: str | None = None, max_new: int = LONGEST_TURN
    ) -> list[list[int]]:
        """Completions of token prompts, without episodes. Stop tokens are included."""
        requests = [Request(prompt, grammar, max_new, seed=str(number)) for number, prompt in enumerate(prompts)]
        for request in requests:
            self.check(request)
        return [completion.ids for completion in self.decode(requests)]

    def decode(self, requests: Sequence[Request]) -> list[Completion]:
        """Complete every request, at most `parallel` at a time. Each must pass `check`."""
        turns: list[Turn] = []
        for first in range(0, len(requests), self.parallel):
            active = self.begin(requests[first : first + self.parallel])
            turns += active
            while active:
                active = self.advance(active)
        return [turn.completion for turn in turns]

    @torch.inference_mode()
    def begin(self, requests: Sequence[Request], beside: Sequence[Turn] = ()) -> list[Turn]:
        """Turns to `advance` from now on, together with those beside which they begin; at most `parallel` in all."""
        owners = [object() if request.owner is None else request.owner for request in requests]
        taken = [*owners, *(turn.line.owner for turn in beside)]
        turns = [self._begin(request, owner, taken) for request, owner in zip(requests, owners, strict=True)]
        self._share_prefixes(turns)
        self._encode_long_prompts(turns)
        return turns

    @torch.inference_mode()
    def advance(self, turns: Sequence[Turn]) -> list[Turn]:
        """One pass for all of them; those that go on. One that is left out from now on is to be dropped with `drop`."""
        active = sorted(turns, key=lambda turn: id(turn.line.adapter))  # lines of one adapter side by side
        self.cache.to_front([turn.line for turn in active])
        self._advance(active)
        for turn in active:
            if turn.over:
                turn.seconds = time.perf_counter() - turn.started
                self.drop(turn)
        return [turn for turn in active if not turn.over]

    def drop(self, turn: Turn) -> None:
        """The turn is over, or is given up: its line is free, unless its owner goes on with it."""
        if not turn.kept:
            self.release(turn.line.owner)

    def check(self, request: Request) -> None:
        """Raises `EngrainError` if the prompt does not fit or the grammar does not compile."""
        if not 0 < len(request.prompt) < self.max_context:
            raise EngrainError(f"context full: the prompt has {len(request.prompt)} tokens, expected 1 to "
                               f"{self.max_context - 1}; raise max_context or shorten the task")  # fmt: skip
        if request.grammar is not None:
            self.grammars.matcher(request.grammar)
        if request.adapter is not None:
            active_from(request.adapter, request.prompt)

    def release(self, owner: object) -> None:
        """The owner's stream is over. Its line is kept for its prefix until another stream needs the place."""
        for line in self.cache.lines:
            if line.owner == owner:
                line.owner = None

    def _begin(self, request: Request, owner: object, owners: Sequence[object]) -> Turn:
        prompt = list(request.prompt)
        line = next((line for line in self.cache.lines if line.owner == owner), None)
        fresh = line is None
        active = active_from(request.adapter, prompt)
        line = line or self._free_line(prompt, request.adapter, active, owners)
        self._clock += 1
        # A template that rewrote history: crop. The last token is encoded again if need be: it predicts the first new.
        del line.ids[min(line.common(prompt, request.adapter, active), len(prompt) - 1) :]
        line.owner, line.used, line.adapter, line.active = owner, self._clock, request.adapter, active
        matcher = self.grammars.matcher(request.grammar) if request.grammar is not None else None
        limit = min(request.max_new, self.max_context - len(prompt))
        sampling, kept = request.sampling or self.sampling, request.owner is not None
        seed = f"{sampling.seed}:{request.seed}"
        turn = Turn(prompt, line, matcher, limit, sampling, seed, kept, fresh, time.perf_counter())
        turn.lookup = Lookup(prompt) if self.draft and sampling.temperature <= 0 else None
        turn.append(forced(matcher), self.stops)
        return turn

    def _free_line(self, prompt: Sequence[int], adapter: Adapter | None, active: int, owners: Sequence[object]) -> Line:
        """A line that nobody in this call needs: the one that shares most with the prompt, or else a new one."""
        lines = self.cache.lines
        full = len(lines) >= max(self.parallel, len(owners))
        free = [line for line in lines if line.owner is None]
        if full and not free:
            free = [min((line for line in lines if line.owner not in owners), key=lambda line: line.used)]
        best = max(free, key=lambda line: line.common(prompt, adapter, active), default=None)
        if best is not None and (full or not best.ids or best.common(prompt, adapter, active) >= SHORTEST_SHARED):
            return best
        return self.cache.add_line()

    def _share_prefixes(self, turns: Sequence[Turn]) -> None:
        """Streams that are new and begin alike, with one another or with any line: encode that once, and copy it."""
        for number, turn in enumerate(turns):
            if not turn.fresh:
                continue
            longest = len(turn.prompt) - 1
            own = replace(turn.line, ids=turn.prompt)
            source = max(self.cache.lines, key=lambda line: line.common(own.ids, own.adapter, own.active))
            shared = min(source.common(own.ids, own.adapter, own.active), longest)
            if shared - len(turn.line.ids) >= SHORTEST_SHARED:
                self.cache.copy_prefix(source, turn.line, shared)
            fresh = ((other.prompt, other.line) for other in turns[number + 1 :] if other.fresh)
            later = (own.common(prompt, line.adapter, line.active) for prompt, line in fresh)
            common = min(max(later, default=0), longest)
            if common - len(turn.line.ids) >= SHORTEST_SHARED:
                self._encode([turn.line], [turn.prompt[len(turn.line.ids) : common]], [0])

    def _encode_long_prompts(self, turns: Sequence[Turn]) -> None:
        """Bring the next pass down to `MOST_AT_ONCE` tokens."""
        pending = sum(len(turn.feed()) for turn in turns)
        for turn in turns:
            while pending > MOST_AT_ONCE and (part := turn.prompt[len(turn.line.ids) : -1][:MOST_AT_ONCE]):
                self._encode([turn.line], [part], [0])
                pending -= len(part)

    def _advance(self, turns: Sequence[Turn]) -> None:
        """One pass: encode what each turn lacks and a draft of what follows, then choose for those that go on."""
        feeds = [turn.feed() for turn in turns]
        drafts = [self._draft(turn, len(feed)) for turn, feed in zip(turns, feeds, strict=True)]
        keep: list[int] = []  # positions in the flat stream whose logits we want ...
        tokens: list[int] = []  # ... and the token that follows each, where it is known already, or guessed
        starts: list[int] = []
        total = 0
        for turn, feed, draft in zip(turns, feeds, drafts, strict=True):
            waiting = turn.ids[len(turn.logprobs) :]
            starts.append(len(tokens))
            total += len(feed)
            keep += range(total - len(waiting) - turn.open, total + len(draft))
            tokens += waiting + draft + [0] * turn.open
            total += len(draft)
            feed += draft
        logits = self._encode([turn.line for turn in turns], feeds, keep).float()
        preferred = logits.argmax(dim=-1).tolist() if any(drafts) else []
        ends: list[int] = []
        choosing: dict[int, Turn] = {}  # by the row of its logits
        for turn, start, draft in zip(turns, starts, drafts, strict=True):
            row = start + len(turn.ids) - len(turn.logprobs)
            taken, free = self._accept(turn, draft, preferred[row : row + len(draft)])
            if free:
                choosing[row + taken] = turn
            ends.append(row + taken + free)
        after = torch.tensor(tokens, device=logits.device)
        if choosing:
            allowed = self.grammars.allowed([turn.matcher for turn in choosing.values()], self.device)
            after[list(choosing)] = self._choose(logits[list(choosing)], allowed, list(choosing.values()))
        logprobs = (logits.gather(-1, after[:, None])[:, 0] - logits.logsumexp(dim=-1)).tolist()
        for turn, start, end in zip(turns, starts, ends, strict=True):
            turn.logprobs += logprobs[start:end]
            del turn.line.ids[len(turn.prompt) + len(turn.logprobs) - 1 :]  # what was refused
        for row, turn in choosing.items():
            self._take(turn, int(after[row]))

    def _draft(self, turn: Turn, feed: int) -> list[int]:
        """A guess for a turn that feeds so many tokens; none beside a long feed, which is a pass of its own kind."""
        return turn.draft(min(self.draft, WIDEST_TOGETHER - feed), self.stops) if feed < WIDEST_TOGETHER else []

    def _accept(self, turn: Turn, draft: Sequence[int], preferred: Sequence[int]) -> tuple[int, bool]:
        """Take a draft's first tokens as long as they are `preferred` or forced: how many, and whether one is to be
        chosen after them."""
        taken = 0
        while taken < len(draft) and draft[taken] == preferred[taken]:
            run = [draft[taken]]
            if turn.matcher is not None:
                turn.matcher.consume_token(draft[taken])
                run += forced(turn.matcher)
            turn.append(run, self.stops)
            if run != draft[taken : taken + len(run)]:
                return taken + 1, False
            taken += len(run)
        return taken, turn.open

    def _choose(
        self, logits: Float[Tensor, "turns vocabulary"], allowed: Bool[Tensor, "turns vocabulary"] | None,
        turns: Sequence[Turn],
    ) -> Int[Tensor, " turns"]:  # fmt: skip
        chosen = torch.empty(len(turns), dtype=torch.long, device=logits.device)
        for sampling in {turn.sampling for turn in turns}:
            rows = [row for row, turn in enumerate(turns) if turn.sampling == sampling]
            own = None if allowed is None else allowed[rows]
            draws = [draw(turns[row].seed, len(turns[row].ids)) for row in rows] if sampling.temperature > 0 else []
            chosen[rows] = choose(logits[rows], own, sampling.temperature, sampling.top_p, draws)
        return chosen

    def _take(self, turn: Turn, token: int) -> None:
        turn.append([token], self.stops)
        if turn.open and turn.matcher is not None:
            turn.matcher.consume_token(token)
            turn.open = not turn.matcher.is_error()
            turn.append(forced(turn.matcher), self.stops)

    def _encode(
        self, lines: Sequence[Line], feeds: Sequence[Sequence[int]], keep: Sequence[int]
    ) -> Float[Tensor, "kept vocabulary"]:
        """Extend lines by new tokens in one pass; logits at the kept positions of the flat stream."""
        step = Step(self.cache, lines, feeds)
        with attending(self.model.config), self._adapting(lines, step.counts):
            logits = self.model(
                input_ids=step.ids, position_ids=step.positions, use_cache=False, lines_step=step,
                logits_to_keep=torch.tensor(keep, device=self.device),
            ).logits[0]  # fmt: skip
        step.commit()
        self.passes += 1
        self.encoded_tokens += sum(step.counts)
        return logits

    def _adapting(self, lines: Sequence[Line], counts: Sequence[int]) -> AbstractContextManager[Any]:
        """The adapter of each line on its own tokens; an activated one on those of its turn."""
        own: list[Adapter | None] = []
        spans: list[int] = []
        for line, count in zip(lines, counts, strict=True):
            if own and own[-1] is line.adapter:
                spans[-1] += count
            else:
                own.append(line.adapter)
                spans.append(count)
        if not any(own):
            return nullcontext()
        if list(map(id, own)) != list(map(id, self._mixed[0])):
            self._mixed = (own, stack(own))
        acting = None
        if any(len(line.ids) < line.active for line in lines):
            cells = [(line, len(line.ids) + n) for line, count in zip(lines, counts, strict=True) for n in range(count)]
            acting = torch.tensor([cell >= line.active for line, cell in cells], device=self.device)
        return adapted(self.model, self._mixed[1], spans, acting)


def active_from(adapter: Adapter | None, prompt: Sequence[int]) -> int:
    """The token of a prompt from which on an adapter acts: the first, or that at which its last turn opens.

    Raises `EngrainError` if an activated adapter's invocation tokens are not there.
    """
    if adapter is None or not adapter.invocation:
        return 0
    opening = list(adapter.invocation)
    for start in range(len(prompt) - len(opening), -1, -1):
        if list(prompt[start : start + len(opening)]) == opening:
            return start
    raise EngrainError(f"an activated adapter acts from the tokens {opening} on, which the prompt does not have; end "
                       "it with the opening of the agent's turn")  # fmt: skip


def _with_adapter(
    model: PreTrainedModel, adapter: Adapter | None, hooked: bool
) -> tuple[PreTrainedModel, AbstractContextManager[Any]]:
    if adapter is None:
        return model, nullcontext()
    if adapter.invocation:
        raise ModelError("an activated adapter acts on the agent's turns only; give it with each request")
    if hooked:
        return model, adapted(model, adapter)
    model = copy.deepcopy(model)
    merge(model, adapter)
    return model, nullcontext()


def _require_supported(model: PreTrainedModel) -> None:
    """Raises `ModelError` for a base whose attention the cache cannot reproduce."""
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    problem = (
        f"layers of type {min(kinds)!r}" if kinds
        else f"rotary embeddings of type {rope!r}" if rope in ("dynamic", "longrope")
        else "an encoder" if config.is_encoder_decoder
        else ""
    )  # fmt: skip
    if problem:
        raise ModelError(f"cannot decode with {config.model_type!r}: expected a causal decoder with full or "
                         f"sliding-window attention, got {problem}; choose another base")  # fmt: skip
