"""`Hypernetwork`: the rule-wise source. A context's adapter is a shared context-free term plus a term a rule.

Every token of a rule writes an association of rank one at each site that feeds the residual stream. Its key is what the
site itself takes in while the base reads that token, whitened; its value is what should follow. So the term acts where
the base at work is in the state in which it read the rule: linear attention over the rules, folded into the weights
("fast weights": Schlag et al., 2021, arXiv:2102.11174), with the keys by which ROME edits facts (Meng et al., 2022,
arXiv:2202.05262).

Invariant: in evaluation mode a rule's term is bit for bit a function of that rule alone, so editing a rule changes one
term and removing it removes exactly that term.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from engrain.adapter import Adapter, ConstantAdapter, Factors
from engrain.context import Context, Rule
from engrain.encoder import Cached, Encoder, Features, open_encoder
from engrain.errors import ModelError
from engrain.exact import Exact
from engrain.files import replacing_directory
from engrain.generators import GenerativeAdapter, JointHypernetwork, TextToLora
from engrain.layers import Associations, Reader
from engrain.learned import LearnedSource, Settings, Sites, distinct_rules
from engrain.model import Base

SCHEMA = "engrain.hypernetwork/2"
MOST_RULES = 1000
"""Whose tokens tell what is usual at a site."""
HEAD, WEIGHTS, MEASURED = "hypernetwork.json", "hypernetwork.safetensors", "measured.safetensors"


@dataclass(frozen=True)
class Terms:
    """What some rules write, rule after rule: associations, side by side along rank."""

    factors: Mapping[str, Factors]
    lengths: tuple[int, ...]
    """How many associations each rule has at every site."""

    def of(self, number: int) -> Mapping[str, Factors]:
        """Those of one rule."""
        own = slice(sum(self.lengths[:number]), sum(self.lengths[: number + 1]))
        return {site: Factors(a[own], b[:, own]) for site, (a, b) in self.factors.items()}

    @classmethod
    def join(cls, terms: Sequence[Terms]) -> Terms:
        """All their rules, in this order."""
        factors = {
            site: Factors(torch.cat([one.factors[site].a for one in terms]),
                          torch.cat([one.factors[site].b for one in terms], dim=1))
            for site in terms[0].factors
        }  # fmt: skip
        return cls(factors, tuple(length for one in terms for length in one.lengths))


class Hypernetwork(LearnedSource):
    """Rule-wise: each rule is read by itself and writes an association a token."""

    def __init__(self, encoder: Encoder, sites: Sites, settings: Settings | None = None) -> None:
        super().__init__(encoder, sites, settings)
        self.reader = Reader(2 * self.read, self.settings.width, self.settings.layers)
        self._exact = Exact()
        rank = self.settings.reading_rank if encoder.inputs else 0  # an encoder that is not the base reads as it does
        self.reading = ConstantAdapter(sites, rank) if rank else None
        own = {site: sites[site] for site in encoder.inputs or sites}
        self.heads = Associations(own, encoder.inputs, self.read, self.settings.width)

    def forward(self, contexts: Sequence[Context]) -> Adapter:
        rules, chosen = distinct_rules(contexts)
        return self.compose(self.terms(rules), chosen)

    def prepare(self, contexts: Sequence[Context]) -> None:
        rules, _ = distinct_rules(contexts)
        if not rules:
            return
        states = torch.cat(self.encoder.together(rules[:: math.ceil(len(rules) / MOST_RULES)]).rows())
        self.heads.whiten(self._inputs(states))

    def _reading(self) -> Adapter | None:
        return self.reading() if self.reading is not None else None

    def terms(self, rules: Sequence[Rule]) -> Terms:
        """One for each rule.

        In evaluation mode each rule is computed as if by itself, which makes its term exact; in training tokens of all
        rules share each product, which is equal to rounding.
        """
        if rules and not self.training:
            return Terms.join(self.each(rules))
        features = self.features(rules)
        return Terms(self._write(features, self._kinds(rules), features.mask), tuple(features.mask.sum(dim=1).tolist()))

    def each(self, rules: Sequence[Rule]) -> list[Terms]:
        """The term of each rule, exact."""
        features, kinds = self.features(rules), self._kinds(rules)
        lengths = features.mask.sum(dim=1).tolist()

        def run(numbers: Sequence[int], to: int) -> list[Tensor]:
            chosen, more = list(numbers), max(0, to - features.mask.shape[1])
            states, mask = features.states[chosen, :to], features.mask[chosen, :to]
            own = Features(F.pad(states, (0, 0, 0, more)), F.pad(mask, (0, more)))
            factors = self._write(own, kinds[chosen], torch.ones_like(own.mask))
            return [part.unflatten(0, (len(chosen), to)) for a, b in factors.values() for part in (a, b.mT)]

        terms = []
        for length, parts in zip(lengths, self._exact(lengths, run), strict=True):
            pairs = zip(self.heads.sites, parts[::2], parts[1::2], strict=True)
            terms.append(Terms({site: Factors(a, b.mT) for site, a, b in pairs}, (length,)))
        return terms

    def compose(self, terms: Terms, chosen: Sequence[Sequence[int]]) -> Adapter:
        """One adapter for each choice among the rules: the shared term and the chosen, then zeros up to the longest."""
        starts = list(accumulate(terms.lengths, initial=0))
        places = [[place for n in one for place in range(starts[n], starts[n + 1])] for one in chosen]
        longest, absent = max(map(len, places)), starts[-1]
        index = torch.tensor([one + [absent] * (longest - len(one)) for one in places], dtype=torch.long)
        index = index.to(self._device())
        factors = {}
        for site, (a, b) in terms.factors.items():
            a, b = (F.pad(factor, (0, 0, 0, 1))[index] for factor in (a, b.mT))
            factors[site] = Factors(a, b.mT)
        return self._with_shared(factors, len(chosen))

    def _write(
        self, features: Features, kinds: Int[Tensor, " rules"], wanted: Bool[Tensor, "rules tokens"]
    ) -> dict[str, Factors]:
        """What the wanted tokens write."""
        read = features.states[..., : self.read]
        after = F.pad(read, (0, 0, 0, 1))[:, 1:]  # what the next token reads like; zeros after a rule's last
        seen = self.reader(Features(torch.cat([read, after], dim=-1), features.mask), kinds)
        inputs = self._inputs(features.states[wanted])
        return self.heads(inputs, after[wanted], F.rms_norm(seen[wanted], seen.shape[-1:]))

    def _inputs(self, states: Float[Tensor, "tokens features"]) -> Sequence[Float[Tensor, "tokens _"]]:
        return states[:, self.read :].split(list(self.encoder.inputs.values()), dim=1)


SOURCES: Mapping[str, type[LearnedSource]] = {
    "rule-wise": Hypernetwork,
    "joint": JointHypernetwork,
    "text-to-lora": TextToLora,
    "generative": GenerativeAdapter,
}


def save_hypernetwork(path: Path, module: LearnedSource, base: Base, dtype: torch.dtype = torch.float32) -> None:
    """Write weights, in this dtype, and what they were trained for as a directory, whole or not at all."""
    if not base.digest:
        raise ModelError("expected a base with a digest to bind the hypernetwork to; load it with load_base")
    head = {
        "schema": SCHEMA,
        "kind": next(kind for kind, source in SOURCES.items() if type(module) is source),
        "settings": dataclasses.asdict(module.settings),
        "sites": module.sites,
        "base": base.digest,
        "encoder": {"digest": module.encoder.digest, "settings": dict(module.encoder.settings)},
    }
    with replacing_directory(path) as aside:
        for name, tensors in {WEIGHTS: module.named_parameters(), MEASURED: module.named_buffers()}.items():
            try:
                save_file({at: one.detach().to("cpu", dtype).contiguous() for at, one in tensors}, aside / name)
            except SafetensorError as error:
                raise OSError(f"{name}: {error}") from error
        (aside / HEAD).write_text(json.dumps(head, indent=1) + "\n", encoding="utf-8")


def read_weights(path: Path) -> dict[str, Tensor]:
    """What was learnt and what was measured, by name. Raises `OSError` or `SafetensorError`."""
    return load_file(path / WEIGHTS) | load_file(path / MEASURED)


def load_hypernetwork(path: Path, base: Base, encoder: Encoder | None = None) -> LearnedSource:
    """A saved hypernetwork in evaluation mode, with the encoder that it was trained with unless one is given.

    Raises `ModelError` if it is damaged, or made for another base or encoder.
    """
    again = "give the directory that save_hypernetwork wrote, or train again"
    try:
        head = json.loads((path / HEAD).read_text(encoding="utf-8"))
        if head["schema"] != SCHEMA:
            raise ModelError(f"{path}: expected {SCHEMA!r}, got {head['schema']!r}; {again}")
        if head["base"] != base.digest:
            raise ModelError(
                f"{path}: made for base {head['base']:.12}, got base {base.digest or 'without digest':.12}; "
                "load the base that it was trained on, or train a hypernetwork for this one"
            )
        encoder = encoder or Cached(open_encoder(head["encoder"]["settings"], base))
        if head["encoder"]["digest"] != encoder.digest:
            raise ModelError(
                f"{path}: trained with encoder {head['encoder']['digest']:.12}, got {encoder.digest:.12}; "
                "give the same encoder with the same settings"
            )
        sites = {site: (int(d_in), int(d_out)) for site, (d_in, d_out) in head["sites"].items()}
        settings = {**head["settings"], "invocation": tuple(head["settings"].get("invocation", ()))}
        module = SOURCES[head["kind"]](encoder, sites, Settings(**settings))
        module.load_state_dict(read_weights(path))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ModelError(f"{path}: cannot read the hypernetwork ({type(error).__name__}: {error}); {again}") from error
    return module.eval()
