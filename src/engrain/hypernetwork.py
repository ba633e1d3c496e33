"""Hypernetworks: learned `AdapterSource`s, contexts to one adapter each, in a single pass.

The default, `Hypernetwork`, is rule-wise: a context's adapter is a shared context-free term plus one low-rank term a
rule, joined along rank. Invariant: in evaluation mode a rule's term is bit for bit a function of that rule alone, so
editing a rule changes one term and removing it removes exactly that term. The other three read all rules of a context
together, for comparison.
"""

from __future__ import annotations

import dataclasses
import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engrain.adapter import Adapter, ConstantAdapter, Factors
from engrain.context import Context, Rule
from engrain.encoder import Cached, Encoder, Features, open_encoder, padded
from engrain.errors import InputError, ModelError
from engrain.files import replacing_directory
from engrain.layers import KINDS, Heads, Reader, SiteLatents, residual_mlp
from engrain.model import Base
from engrain.novelty import Novelty

SCHEMA = "engrain.hypernetwork/1"
Sites = Mapping[str, tuple[int, int]]
"""Linear layers of the base by qualified name, as (d_in, d_out)."""
HEAD, _WEIGHTS = "hypernetwork.json", "hypernetwork.safetensors"


@dataclass(frozen=True)
class Settings:
    rank: int
    """Of each rule's term; of the context's one term in a source that reads all rules together."""
    shared_rank: int = 8
    width: int = 128
    layers: int = 2
    strength: float = 2.0
    """alpha / rank of every adapter, however many rules it has."""


class LearnedSource(nn.Module):
    """What all hypernetworks share: an encoder that is not trained, and a context-free term."""

    defaults: ClassVar[Settings] = Settings(rank=8)

    def __init__(self, encoder: Encoder, sites: Sites, settings: Settings | None = None) -> None:
        super().__init__()
        self.encoder, self.sites, self.settings = encoder, dict(sites), settings or self.defaults
        self.shared = ConstantAdapter(sites, self.settings.shared_rank)
        self.novelty = Novelty(encoder.width)

    @abstractmethod
    def forward(self, contexts: Sequence[Context]) -> Adapter:
        """One adapter a context, in a leading batch dimension."""

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Every parameter once: `trunk`, `heads` (to be clipped by themselves) and `shared`."""
        groups: dict[str, list[nn.Parameter]] = {"trunk": [], "heads": [], "shared": []}
        for name, parameter in self.named_parameters():
            part = name.split(".")[0]
            groups[part if part in groups else "trunk"].append(parameter)
        return groups

    def learnt_from(self, contexts: Sequence[Context]) -> None:
        """Tell a trained source what it was trained on, for `strange`."""
        self.novelty.fit(self.encoder, contexts)

    def strange(self, context: Context) -> str:
        """Why this context should not be left to an adapter; empty if it may be."""
        score, threshold = self.novelty(self.encoder, context), float(self.novelty.threshold)
        return f"novelty {score:.2f} is over {threshold:.2f}" if score > threshold else ""

    def features(self, rules: Sequence[Rule]) -> Features:
        return (self.encoder.together(rules) if self.training else self.encoder(rules)).to(self._device())

    def _kinds(self, rules: Sequence[Rule]) -> Int[Tensor, " rules"]:
        return torch.tensor([KINDS.index(rule.kind) for rule in rules], dtype=torch.long, device=self._device())

    def _with_shared(self, factors: Mapping[str, Factors], contexts: int) -> Adapter:
        """The shared term and the contexts' own, side by side along rank."""
        shared, joined = self.shared().factors, {}
        for site, (a, b) in factors.items():
            common_a, common_b = (factor.expand(contexts, -1, -1) for factor in shared[site])
            joined[site] = Factors(torch.cat([common_a, a], dim=-2), torch.cat([common_b, b], dim=-1))
        rank = next(iter(joined.values())).a.shape[-2]
        return Adapter(joined, self.settings.strength * rank, rank)

    def _device(self) -> torch.device:
        return next(self.parameters()).device


class Hypernetwork(LearnedSource):
    """Rule-wise: each rule is read by itself and writes its own term at every site."""

    defaults: ClassVar[Settings] = Settings(rank=1)

    def __init__(self, encoder: Encoder, sites: Sites, settings: Settings | None = None) -> None:
        super().__init__(encoder, sites, settings)
        self.reader = Reader(encoder.width, self.settings.width, self.settings.layers)
        self.latents = SiteLatents(len(sites), self.settings.width)
        self.heads = Heads(sites, self.settings.width, self.settings.rank)

    def forward(self, contexts: Sequence[Context]) -> Adapter:
        rules, chosen = distinct_rules(contexts)
        return self.compose(self.terms(rules), chosen)

    def terms(self, rules: Sequence[Rule]) -> Adapter:
        """One term a rule, in a leading dimension.

        In evaluation mode each rule is computed by itself, which makes its term exact; in training all share one
        padded batch, which is faster and equal to rounding.
        """
        parts = [list(rules)] if self.training and rules else [[rule] for rule in rules]
        written = [self._write(part) for part in parts] or [self._none()]
        factors = {
            site: Factors(*(torch.cat(parts) for parts in zip(*(one[site] for one in written), strict=True)))
            for site in self.sites
        }
        return Adapter(factors, self.settings.strength * self.settings.rank, self.settings.rank)

    def compose(self, terms: Adapter, chosen: Sequence[Sequence[int]]) -> Adapter:
        """One adapter for each choice among the terms: the shared term and the chosen, then zeros up to the longest."""
        longest, absent = max(map(len, chosen)), len(next(iter(terms.factors.values())).a)
        places = [place for one in chosen for place in [*one, *[absent] * (longest - len(one))]]
        index = torch.tensor(places, dtype=torch.long, device=self._device())
        factors = {}
        for site, (a, b) in terms.factors.items():
            a, b = (F.pad(factor, (0, 0, 0, 0, 0, 1)).index_select(0, index) for factor in (a, b.mT))
            a, b = (factor.unflatten(0, (len(chosen), longest)).flatten(1, 2) for factor in (a, b))
            factors[site] = Factors(a, b.mT)
        return self._with_shared(factors, len(chosen))

    def _write(self, rules: Sequence[Rule]) -> dict[str, Factors]:
        features = self.features(rules)
        return self.heads(self.latents(self.reader(features, self._kinds(rules)), features.mask))

    def _none(self) -> dict[str, Factors]:
        new, rank = self.heads.scale.new_zeros, self.settings.rank
        return {site: Factors(new(0, rank, d_in), new(0, d_out, rank)) for site, (d_in, d_out) in self.sites.items()}


class JointHypernetwork(LearnedSource):
    """A Perceiver: latents attend to the tokens of all rules at once, so rules may interact. No order between rules."""

    def __init__(self, encoder: Encoder, sites: Sites, settings: Settings | None = None) -> None:
        super().__init__(encoder, sites, settings)
        self.reader = Reader(encoder.width, self.settings.width, self.settings.layers)
        self.latents = SiteLatents(len(sites), self.settings.width, layers=2)
        self.heads = Heads(sites, self.settings.width, self.settings.rank)
        self.nothing = nn.Parameter(0.1 * torch.randn(1, self.settings.width))
        """A token that every context has: an empty one has nothing else to attend to."""

    def forward(self, contexts: Sequence[Context]) -> Adapter:
        rules, chosen = distinct_rules(contexts)
        features = self.features(rules)
        states = Features(self.reader(features, self._kinds(rules)), features.mask)
        tokens = joined(states, chosen, self.nothing)
        return self._with_shared(self.heads(self.latents(tokens.states, tokens.mask)), len(contexts))


class TextToLora(LearnedSource):
    """After Charakorn et al. 2025 (arXiv:2506.06105): one pooled vector a context, plus layer and module embeddings."""

    def __init__(self, encoder: Encoder, sites: Sites, settings: Settings | None = None) -> None:
        super().__init__(encoder, sites, settings)
        width = self.settings.width
        layers, modules = zip(*map(split_site, sites), strict=True)
        self.project = nn.Sequential(nn.Linear(encoder.width, width), nn.LayerNorm(width))
        self.layer = nn.Embedding(len(set(layers)), width)
        self.module = nn.Embedding(len(set(modules)), width)
        self.mlps = nn.ModuleList(residual_mlp(width) for _ in range(self.settings.layers))
        self.heads = Heads(sites, width, self.settings.rank)
        self._at_layer = [sorted(set(layers)).index(layer) for layer in layers]
        self._at_module = [sorted(set(modules)).index(module) for module in modules]

    def forward(self, contexts: Sequence[Context]) -> Adapter:
        rules, chosen = distinct_rules(contexts)
        tokens = joined(self.features(rules), chosen)
        pooled = tokens.states.sum(dim=1) / tokens.mask.sum(dim=1, keepdim=True).clamp(min=1)
        place = self.layer.weight[self._at_layer] + self.module.weight[self._at_module]
        latents = self.project(pooled)[:, None] + place
        for mlp in self.mlps:
            latents = latents + mlp(latents)
        return self._with_shared(self.heads(F.rms_norm(latents, latents.shape[-1:])), len(contexts))


class GenerativeAdapter(LearnedSource):
    """After Chen et al. 2024 (arXiv:2411.05877): at each site a sum of outer products of the context's token states.

    delta = B · polar(sum over tokens of f(h) g(h)ᵀ) · A, with `A` and `B` learned, the sum rank by rank, and `B` zero
    at first. The paper too replaces the sum by its polar factor, there by SVD; see `polar`.
    """

    def __init__(self, encoder: Encoder, sites: Sites, settings: Settings | None = None) -> None:
        super().__init__(encoder, sites, settings)
        width, rank = self.settings.width, self.settings.rank
        self.project = nn.Linear(encoder.width, width)
        self.f = nn.Parameter(torch.randn(len(sites), rank, width) * width**-0.5)
        self.g = nn.Parameter(torch.randn(len(sites), rank, width) * width**-0.5)
        self.heads = ConstantAdapter(sites, rank)

    def forward(self, contexts: Sequence[Context]) -> Adapter:
        rules, chosen = distinct_rules(contexts)
        tokens = joined(self.features(rules), chosen)
        states = self.project(tokens.states) * tokens.mask[..., None]
        gram = (states.mT @ states)[:, None]  # f and g are linear: sum of f(h) g(h)ᵀ = f (sum of h hᵀ) gᵀ
        core = polar(self.f @ gram @ self.g.mT)
        factors = {
            site: Factors(core[:, n] @ a, b.expand(len(contexts), -1, -1))
            for n, (site, (a, b)) in enumerate(self.heads().factors.items())
        }
        return self._with_shared(factors, len(contexts))


SOURCES: Mapping[str, type[LearnedSource]] = {
    "rule-wise": Hypernetwork,
    "joint": JointHypernetwork,
    "text-to-lora": TextToLora,
    "generative": GenerativeAdapter,
}


def distinct_rules(contexts: Sequence[Context]) -> tuple[list[Rule], list[list[int]]]:
    """Every rule of the contexts once, and for each context the places of its rules among them."""
    if not contexts:
        raise InputError("expected at least one context to make an adapter for, got none; give one for each adapter")
    number = {rule: n for n, rule in enumerate(dict.fromkeys(rule for one in contexts for rule in one.rules))}
    return list(number), [[number[rule] for rule in one.rules] for one in contexts]


def joined(
    features: Features, chosen: Sequence[Sequence[int]], first: Float[Tensor, "_ width"] | None = None
) -> Features:
    """Each context's tokens in one row: those of `first`, if any, then those of its rules."""
    rows, width = features.rows(), features.states.shape[-1]
    first = features.states.new_zeros(0, width) if first is None else first
    return padded([torch.cat([first, *(rows[n] for n in one)]) for one in chosen], width)


def polar(core: Float[Tensor, "*batch rank rank"], steps: int = 8) -> Float[Tensor, "*batch rank rank"]:
    """U Vᵀ of the singular value decomposition U S Vᵀ, nearly, by Newton-Schulz iteration.

    Unlike that of the decomposition, its gradient is finite where singular values tie. Zero stays zero.
    """
    core = core / (core.norm(dim=(-2, -1), keepdim=True) + 1e-6)
    for _ in range(steps):
        core = 1.5 * core - 0.5 * core @ core.mT @ core
    return core


def split_site(site: str) -> tuple[int, str]:
    """A site's layer, which is the first number in its name (-1 if it has none), and the name without it."""
    parts = site.split(".")
    place = next((n for n, part in enumerate(parts) if part.isdecimal()), None)
    return (-1, site) if place is None else (int(parts[place]), ".".join([*parts[:place], *parts[place + 1 :]]))


def save_hypernetwork(path: Path, module: LearnedSource, base: Base) -> None:
    """Write weights and what they were trained for as a directory, whole or not at all."""
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
        try:
            tensors = {name: tensor.cpu().contiguous() for name, tensor in module.state_dict().items()}
            save_file(tensors, aside / _WEIGHTS)
        except SafetensorError as error:
            raise OSError(f"{_WEIGHTS}: {error}") from error
        (aside / HEAD).write_text(json.dumps(head, indent=1) + "\n", encoding="utf-8")


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
        module = SOURCES[head["kind"]](encoder, sites, Settings(**head["settings"]))
        module.load_state_dict(load_file(path / _WEIGHTS))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ModelError(f"{path}: cannot read the hypernetwork ({type(error).__name__}: {error}); {again}") from error
    return module.eval()
