"""Keys and values of many token streams, extended in place and never encoded again.

A *line* is one stream. The new tokens of all lines run through the model as one flat stream `[1, tokens]`, so that the
linear layers see no padding, and `attend`, registered with transformers, writes each token's key and value at the end
of its own line and lets it see that line only. Invariant: `line.ids` names exactly the cells that may be attended;
whatever lies beyond (of a cropped history, of a refused draft) is never read and is overwritten by the next tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig

from engrain.adapter import Adapter

ATTENTION = "engrain_lines"
FIRST_CAPACITY = 256
WIDEST_TOGETHER = 16
"""Up to this many new tokens a line, all lines may attend in one call (padded); beyond, each line in its own."""


@dataclass(eq=False)
class Line:
    """One stream: `ids` are encoded in cells `0 .. len(ids)` of row `index` of the cache."""

    index: int
    ids: list[int] = field(default_factory=list)
    owner: object = None
    used: int = 0
    adapter: Adapter | None = None
    """What the model was adapted with as it encoded them."""
    active: int = 0
    """The first cell on which an activated adapter acts; those before are the base's, whoever asks for them."""

    def common(self, prompt: Sequence[int], adapter: Adapter | None, active: int = 0) -> int:
        """How many of a prompt's first tokens this line holds as an adapter encodes them that acts from a cell on."""
        most = len(self.ids)
        if self.adapter is not adapter or (adapter is not None and self.active != active):
            most = min(place for by, place in ((self.adapter, self.active), (adapter, active)) if by is not None)
        return min(most, common_prefix(self.ids, prompt)) if most else 0


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many first tokens two sequences share. Bisects on slices, which compare at C speed."""
    low, high = 0, min(len(left), len(right))
    if left[:high] == right[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle
    return low


class KVCache:
    """Per layer `keys` and `values` of shape `lines heads capacity dim`; both lines and capacity grow by doubling.

    A head's cells lie side by side: attention over a long line is bounded by reading them.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.lines: list[Line] = []
        self.capacity = FIRST_CAPACITY
        self.rows = 0
        self.together = device.type != "cpu"
        """Whether short extensions attend in one call: fewer launches, but every line pays for the longest one."""
        self.keys: dict[int, Float[Tensor, "lines heads capacity dim"]] = {}
        self.values: dict[int, Float[Tensor, "lines heads capacity dim"]] = {}

    def add_line(self) -> Line:
        self.lines.append(Line(index=len(self.lines)))
        if len(self.lines) > self.rows:
            self._resize(max(1, 2 * self.rows), self.capacity)
        return self.lines[-1]

    def _resize(self, rows: int, capacity: int) -> None:
        for store in (self.keys, self.values):
            for layer, old in store.items():
                store[layer] = old.new_zeros(rows, old.shape[1], capacity, old.shape[3])
                store[layer][: old.shape[0], :, : old.shape[2]] = old
        self.rows, self.capacity = rows, capacity

    def reserve(self, tokens: int) -> None:
        capacity = self.capacity
        while capacity < tokens:
            capacity *= 2
        if capacity > self.capacity:
            self._resize(self.rows, capacity)

    def copy_prefix(self, source: Line, target: Line, tokens: int) -> None:
        """Make `target` start as `source` does, without encoding."""
        for store in (self.keys, self.values):
            for kept in store.values():
                kept[target.index, :, :tokens] = kept[source.index, :, :tokens]
        target.ids = source.ids[:tokens]

    def to_front(self, lines: Sequence[Line]) -> None:
        """Move lines to the first rows (in any order), so that a step over them is a view and not a copy."""
        wanted = {line.index for line in lines}
        vacant = [row for row in range(len(lines)) if row not in wanted]
        for line in lines:
            if line.index >= len(lines):
                self._swap(line, self.lines[vacant.pop()])

    def _swap(self, left: Line, right: Line) -> None:
        tokens = max(len(left.ids), len(right.ids))
        pair, turned = [left.index, right.index], [right.index, left.index]
        for store in (self.keys, self.values):
            for kept in store.values():
                kept[pair, :, :tokens] = kept[turned, :, :tokens]
        left.index, right.index = right.index, left.index
        self.lines[left.index], self.lines[right.index] = left, right

    def write(
        self,
        layer: int,
        keys: Float[Tensor, "tokens heads dim"],
        values: Float[Tensor, "tokens heads dim"],
        step: Step,
    ) -> tuple[Float[Tensor, "lines heads capacity dim"], Float[Tensor, "lines heads capacity dim"]]:
        """Put a layer's new keys and values into the step's cells; returns the whole layer.

        Storage starts as zeros: a masked cell still multiplies a weight of 0, and 0 times uninitialised NaN is NaN.
        """
        for store, new in ((self.keys, keys), (self.values, values)):
            if layer not in store:
                store[layer] = new.new_zeros(self.rows, new.shape[1], self.capacity, new.shape[2])
            store[layer][step.rows, :, step.positions[0]] = new
        return self.keys[layer], self.values[layer]


class Step:
    """New tokens of some lines, laid out for one pass; `commit` afterwards, so that a failed pass leaves no trace."""

    def __init__(self, cache: KVCache, lines: Sequence[Line], feeds: Sequence[Sequence[int]]) -> None:
        self.cache = cache
        self._new = list(zip(lines, feeds, strict=True))
        self.lines = [line.index for line in lines]
        starts = [len(line.ids) for line in lines]
        self.counts = [len(feed) for feed in feeds]
        self.ends = [start + count for start, count in zip(starts, self.counts, strict=True)]
        cache.reserve(max(self.ends))
        positions, rows, ids = [], [], []
        for line, feed, start, end in zip(lines, feeds, starts, self.ends, strict=True):
            ids.extend(feed)
            positions.extend(range(start, end))
            rows.extend([line.index] * len(feed))
        packed = torch.tensor([ids, positions, rows], device=cache.device)
        self.ids: Int[Tensor, "1 tokens"] = packed[0:1]
        self.positions: Int[Tensor, "1 tokens"] = packed[1:2]
        self.rows: Int[Tensor, " tokens"] = packed[2]
        self.widest = max(self.counts)
        self.together = cache.together and self.widest <= WIDEST_TOGETHER
        self._masks: dict[Any, Tensor | None] = {}
        self.spread: Int[Tensor, "lines widest"] | None = None
        self.gather: Int[Tensor, " tokens"] | None = None
        if self.together and self.widest > 1:
            self._lay_out_padding()

    def commit(self) -> None:
        for line, feed in self._new:
            line.ids.extend(feed)

    def _lay_out_padding(self) -> None:
        """A line's padding repeats its last token, which sees what that token sees and whose result is dropped."""
        spread, gather, offset = [], [], 0
        for row, count in enumerate(self.counts):
            spread.extend(offset + min(column, count - 1) for column in range(self.widest))
            gather.extend(range(row * self.widest, row * self.widest + count))
            offset += count
        self.spread = torch.tensor(spread, device=self.cache.device)
        self.gather = torch.tensor(gather, device=self.cache.device)

    def mask(
        self, window: int | None, copies: int, dtype: torch.dtype
    ) -> Float[Tensor, "lines 1 queries cells"] | None:
        """What each token may see, for the padded layout, repeated for `copies` query heads; None if everything."""
        key = (window, copies, dtype)
        if key not in self._masks:
            self._masks[key] = self._build_mask(window, copies, dtype)
        return self._masks[key]

    def own_mask(
        self, offset: int, count: int, end: int, window: int | None, dtype: torch.dtype
    ) -> Float[Tensor, "queries cells"] | None:
        """What each new token of one line may see; None if everything up to itself, from the line's first token."""
        if (count == end or count == 1) and (window is None or end <= window):
            return None
        key = ("own", offset, window, dtype)
        if key not in self._masks:
            self._masks[key] = causal_mask(self.positions[0, offset : offset + count], end, window, dtype)
        return self._masks[key]

    def _build_mask(self, window: int | None, copies: int, dtype: torch.dtype) -> Tensor | None:
        end = max(self.ends)
        if self.widest == 1 and min(self.ends) == end and (window is None or end <= window):
            return None
        positions = self.positions[0] if self.spread is None else self.positions[0][self.spread]
        mask = causal_mask(positions, end, window, dtype).view(len(self.counts), 1, 1, self.widest, end)
        return mask.expand(-1, -1, copies, -1, -1).flatten(2, 3)


def causal_mask(
    positions: Int[Tensor, " queries"], cells: int, window: int | None, dtype: torch.dtype
) -> Float[Tensor, "queries cells"]:
    """0 where a query at `positions` may look, -inf elsewhere; `window` counts the query itself, as in transformers."""
    offset = positions[:, None] - torch.arange(cells, device=positions.device)
    hidden = offset < 0 if window is None else (offset < 0) | (offset >= window)
    return torch.zeros(hidden.shape, dtype=dtype, device=positions.device).masked_fill_(hidden, float("-inf"))


def attend(
    module: nn.Module,
    query: Float[Tensor, "1 heads tokens dim"],
    key: Float[Tensor, "1 kv_heads tokens dim"],
    value: Float[Tensor, "1 kv_heads tokens dim"],
    attention_mask: None,
    *,
    lines_step: Step,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: object,
) -> tuple[Float[Tensor, "1 tokens heads dim"], None]:
    """transformers' attention interface over the cache that `lines_step` (passed to the model's forward) extends."""
    new_keys, new_values = key[0].transpose(0, 1), value[0].transpose(0, 1)
    keys, values = lines_step.cache.write(cast(int, module.layer_idx), new_keys, new_values, lines_step)
    scheme = _together if lines_step.together else _apart
    return scheme(lines_step, query[0].transpose(0, 1), keys, values, scaling, sliding_window)[None], None


def _together(
    step: Step, query: Tensor, keys: Tensor, values: Tensor, scaling: float | None, window: int | None
) -> Float[Tensor, "tokens heads dim"]:
    """One call for all lines. Query heads that share a key head are stacked as further queries: keys are not copied."""
    batch, width, end = len(step.counts), step.widest, max(step.ends)
    heads, dim, kv_heads = query.shape[1], query.shape[2], keys.shape[1]
    copies = heads // kv_heads
    rows = slice(0, batch) if step.lines == list(range(batch)) else step.lines
    if step.spread is not None:
        query = query[step.spread]
    query = query.view(batch, width, kv_heads, copies, dim).permute(0, 2, 3, 1, 4)
    seen = F.scaled_dot_product_attention(
        query.reshape(batch, kv_heads, copies * width, dim),
        keys[rows, :, :end],
        values[rows, :, :end],
        attn_mask=step.mask(window, copies, query.dtype),
        scale=scaling,
    )
    seen = seen.view(batch, kv_heads, copies, width, -1).permute(0, 3, 1, 2, 4).reshape(batch * width, heads, -1)
    return seen if step.gather is None else seen[step.gather]


def _apart(
    step: Step, query: Tensor, keys: Tensor, values: Tensor, scaling: float | None, window: int | None
) -> Float[Tensor, "tokens heads dim"]:
    """One call a line: no line pays for its neighbours' length."""
    parts, offset = [], 0
    for line, end, count in zip(step.lines, step.ends, step.counts, strict=True):
        mask = step.own_mask(offset, count, end, window, query.dtype)
        seen = F.scaled_dot_product_attention(
            query[None, offset : offset + count].transpose(1, 2),
            keys[line, None, :, :end],
            values[line, None, :, :end],
            attn_mask=mask,
            is_causal=mask is None and count > 1,
            scale=scaling,
            enable_gqa=True,
        )
        parts.append(seen[0].transpose(0, 1))
        offset += count
    return torch.cat(parts)


@contextmanager
def attending(config: PretrainedConfig) -> Iterator[None]:
    """Inside, models of this config attend through the cache."""
    before = config._attn_implementation
    config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before


AttentionInterface.register(ATTENTION, attend)
