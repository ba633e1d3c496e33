"""A frozen base: loaded from a local directory, adapted at its linear sites, run over packed streams.

Invariants: a base is read from safetensors and never runs code from its directory; `adapted` leaves the base's weights
untouched; packed attention over a stream of rows gives what each row gives alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from engrain.adapter import Adapter, lora_delta
from engrain.batch import Packed
from engrain.errors import ModelError
from engrain.files import replacing_directory

PACKED = "engrain_packed"
"""Name of the packed attention in transformers. It has no mask function there, so no mask is ever built."""
WIDEST_PADDED = 16
"""Spans of up to so many tokens are padded to one batch of matrices: fewer and larger products."""


@dataclass(frozen=True)
class Base:
    """A causal language model with its tokenizer. `digest` names its config and weights."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    digest: str = ""
    path: Path | None = None


def load_base(path: Path, dtype: torch.dtype = torch.float32) -> Base:
    """Load a base from a local directory. Raises `ModelError` if it is missing or malformed."""
    digest = base_digest(path)
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
        model, loading = loaded
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
    except Exception as error:  # transformers raises anything from KeyError to SafetensorError on a malformed directory
        reason = str(error).strip().split("\n")[0][:200]
        raise ModelError(f"{path}: cannot load the base ({type(error).__name__}: {reason}); check its files") from error
    wrong = [*loading["missing_keys"], *loading["unexpected_keys"], *loading["mismatched_keys"]]
    if wrong:
        raise ModelError(f"{path}: weights do not fit config.json, first at {wrong[0]}; fetch or save the base again")
    return Base(model.eval(), tokenizer, digest, path)


def stored_dtype(path: Path) -> torch.dtype:
    """Of most of the weights of a base's directory."""
    config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


def save_base(base: Base, path: Path) -> str:
    """Write model and tokenizer as a local directory, whole or not at all; returns its digest."""
    with replacing_directory(path) as aside:
        base.model.save_pretrained(aside)
        base.tokenizer.save_pretrained(aside)
        return base_digest(aside)


def base_digest(path: Path) -> str:
    """sha256 over the names and contents of config.json and the weights. Raises `ModelError` if one is missing."""
    if not (path / "config.json").is_file():
        raise ModelError(f"{path}: no config.json; give a local directory with a base in safetensors")
    if not any(path.glob("*.safetensors")):
        raise ModelError(f"{path}: no *.safetensors weights; convert the base to safetensors (pickles are not read)")
    total = hashlib.sha256()
    for file in sorted([path / "config.json", *path.glob("*.safetensors")]):
        with file.open("rb") as content:
            total.update(f"{file.name}\0{hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def sites(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """The decoder's linear layers by qualified name, as (d_in, d_out). Not the output head."""
    head = model.get_output_embeddings()
    return {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }


def feeding(model: PreTrainedModel) -> list[str]:
    """The sites that write into the residual stream: those that end an attention or an MLP.

    Raises `ModelError` if none has a name that Llama, Qwen, Mistral and their kin use.
    """
    found = [site for site in sites(model) if site.endswith((".o_proj", ".down_proj"))]
    if not found:
        raise ModelError(f"{type(model).__name__} has no linear layers named o_proj or down_proj; name sites yourself")
    return found


@contextmanager
def taken_in(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Within the block, what each of these sites took in at the last forward."""
    inputs: dict[str, Tensor] = {}

    def keep(site: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, taken: inputs.__setitem__(site, taken[0])

    handles = [linear(model, site).register_forward_pre_hook(keep(site)) for site in names]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def adapted(
    model: nn.Module,
    adapter: Adapter,
    spans: Sequence[int] = (),
    acting: Bool[Tensor, " tokens"] | None = None,
) -> Iterator[None]:
    """Within the block, every forward of the model has the adapter's term added at its sites.

    A batch of adapters over a packed stream has each of them act on its own `spans`, in tokens: the stream is folded
    where all spans are alike, padded where all are short, and else cut; the factors are not copied. An activated one
    leaves tokens on which it is not `acting` alone. Run `backward` inside the block too: gradient checkpointing replays
    the forward.
    """
    handles = []
    short = spans and max(spans) <= WIDEST_PADDED
    padding = _padding(spans, adapter.tensors()[0].device) if short and adapter.factors else None
    try:
        for site, (a, b) in adapter.factors.items():
            layer = _fitting(model, site, (a.shape[-1], b.shape[-2]))
            delta = partial(lora_delta, a=a, b=b, alpha=adapter.alpha, rank=adapter.rank)
            if a.dim() == 3 and len(set(spans)) == 1:
                delta = partial(_folded_delta, delta, len(spans))
            elif a.dim() == 3 and padding is not None:
                delta = partial(_padded_delta, delta, *padding)
            elif a.dim() == 3 and spans:
                deltas = [partial(delta, a=own_a, b=own_b) for own_a, own_b in zip(a, b, strict=True)]
                delta = partial(_cut_delta, deltas, spans)
            if acting is not None:
                delta = partial(_gated_delta, delta, acting)
            handles.append(layer.register_forward_hook(partial(_add, delta)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def attention(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """Within the block, the model uses another attention implementation, such as `PACKED` or `sdpa`."""
    before = model.config._attn_implementation or "eager"
    try:
        model.set_attn_implementation(implementation)
        yield
    finally:
        model.set_attn_implementation(before)


class Lengths:
    """Of the rows of a stream. `torch.compile` does not look into it, and compiles once for any number of rows."""

    def __init__(self, tokens: Sequence[int], turns: Sequence[Sequence[tuple[int, int]]] = ()) -> None:
        self._tokens, self.turns = tokens, turns

    def __iter__(self) -> Iterator[int]:
        return iter(self._tokens)


def packed_hidden(model: PreTrainedModel, batch: Packed) -> Float[Tensor, "tokens d_model"]:
    """Last hidden states of a packed stream. Call within `attention(model, PACKED)`."""
    if model.config._attn_implementation != PACKED:
        raise ValueError("packed_hidden needs `attention(model, PACKED)`: rows would attend to one another")
    output = model.get_decoder()(
        input_ids=batch.ids[None],
        position_ids=batch.position_ids[None],
        lengths=Lengths(batch.lengths, batch.turns),
        use_cache=False,
    )
    return output.last_hidden_state[0]


@torch.compiler.disable
def packed_attention(
    module: nn.Module,
    query: Float[Tensor, "1 heads tokens d_head"],
    key: Float[Tensor, "1 kv_heads tokens d_head"],
    value: Float[Tensor, "1 kv_heads tokens d_head"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    *,
    lengths: Iterable[int],
    **_: Any,
) -> tuple[Float[Tensor, "1 tokens heads d_head"], None]:
    """Causal attention within each row of a flat stream. Exact: nothing is padded and nothing crosses rows. A turn that
    is said again at a row's end sees the row up to where it stands there, and itself."""
    rows = list(zip(*(states.split(list(lengths), dim=2) for states in (query, key, value)), strict=True))
    turns: Sequence[Sequence[tuple[int, int]]] = getattr(lengths, "turns", ()) or [()] * len(rows)
    attend = partial(_attend, dropout=dropout, scaling=scaling, window=sliding_window)
    outputs = []
    for (q, k, v), again in zip(rows, turns, strict=True):
        said = q.shape[2] - sum(end - start for start, end in again)
        outputs.append(attend(q[:, :, :said], k[:, :, :said], v[:, :, :said]))
        for start, end in again:
            turn, said = slice(said, said + end - start), said + end - start
            keys, values = (torch.cat([states[:, :, :start], states[:, :, turn]], dim=2) for states in (k, v))
            outputs.append(attend(q[:, :, turn], keys, values))
    return torch.cat(outputs, dim=1), None


AttentionInterface.register(PACKED, packed_attention)


def _attend(
    q: Float[Tensor, "1 heads queries d_head"],
    k: Float[Tensor, "1 kv_heads cells d_head"],
    v: Float[Tensor, "1 kv_heads cells d_head"],
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> Float[Tensor, "1 queries heads d_head"]:
    """The queries are those of the last cells; each sees the cells up to its own."""
    band = _band(q.shape[2], k.shape[2], window, q.device)
    attended = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=band,
        dropout_p=dropout,
        is_causal=band is None,
        scale=scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return attended.transpose(1, 2)


def _band(queries: int, cells: int, window: int | None, device: torch.device) -> Bool[Tensor, "queries cells"] | None:
    """The mask of the last cells, or of a row longer than the sliding window: each token sees the last `window` tokens,
    itself included. None where plain causal attention is meant."""
    if queries == cells and (window is None or cells <= window):
        return None
    seen = torch.ones(queries, cells, dtype=torch.bool, device=device).tril(cells - queries)
    return seen if window is None else seen.triu(cells - queries + 1 - window)


def linear(model: nn.Module, site: str) -> nn.Linear:
    """The linear layer at a site. Raises `ModelError` if there is none."""
    try:
        found = model.get_submodule(site)
    except AttributeError:
        found = None
    if not isinstance(found, nn.Linear):
        raise ModelError(f"the base has no linear layer {site!r}; use the base that the adapter was made for")
    return found


def _fitting(model: nn.Module, site: str, shape: tuple[int, int]) -> nn.Linear:
    layer = linear(model, site)
    if (found := (layer.in_features, layer.out_features)) != shape:
        raise ModelError(f"at {site!r} the base is {found} and the adapter {shape}; use the adapter's own base")
    return layer


Delta = Callable[[Tensor], Tensor]


def _add(delta: Delta, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + delta(inputs[0])


def _gated_delta(delta: Delta, acting: Bool[Tensor, " tokens"], x: Float[Tensor, "1 tokens d_in"]) -> Tensor:
    return delta(x) * acting[:, None]


def _cut_delta(deltas: Sequence[Delta], spans: Sequence[int], x: Float[Tensor, "1 tokens d_in"]) -> Tensor:
    return torch.cat([delta(part) for delta, part in zip(deltas, x.split(list(spans), dim=1), strict=True)], dim=1)


def _folded_delta(delta: Delta, spans: int, x: Float[Tensor, "1 tokens d_in"]) -> Tensor:
    return delta(x.view(spans, -1, x.shape[-1])).flatten(0, 1)[None]


def _padding(spans: Sequence[int], device: torch.device) -> tuple[Int[Tensor, "spans widest"], Int[Tensor, " tokens"]]:
    """For each span its tokens, the last one repeated; and where each token is in that, flat."""
    widest, ends = max(spans), accumulate(spans)
    rows = [
        [min(end - span + column, end - 1) for column in range(widest)] for end, span in zip(ends, spans, strict=True)
    ]
    back = [row * widest + column for row, span in enumerate(spans) for column in range(span)]
    return torch.tensor(rows, device=device), torch.tensor(back, device=device)


def _padded_delta(
    delta: Delta, rows: Int[Tensor, "spans widest"], back: Int[Tensor, " tokens"], x: Float[Tensor, "1 tokens d_in"]
) -> Tensor:
    return delta(x[0, rows]).flatten(0, 1)[back][None]
