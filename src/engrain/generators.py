"""Hypernetworks that read all rules of a context together, to compare with: a Perceiver and two published ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from engrain.adapter import Adapter, ConstantAdapter, Factors
from engrain.context import Context
from engrain.encoder import Encoder, Features
from engrain.layers import Heads, Reader, SiteLatents, residual_mlp
from engrain.learned import LearnedSource, Settings, Sites, distinct_rules, joined


class JointHypernetwork(LearnedSource):
    """A Perceiver: latents attend to the tokens of all rules at once, so rules may interact. No order between rules."""

    def __init__(self, encoder: Encoder, sites: Sites, settings: Settings | None = None) -> None:
        super().__init__(encoder, sites, settings)
        self.reader = Reader(self.read, self.settings.width, self.settings.layers)
        self.latents = SiteLatents(len(sites), self.settings.width, layers=2)
        self.heads = Heads(sites, self.settings.width, self.settings.rank)
        self.nothing = nn.Parameter(0.1 * torch.randn(1, self.settings.width))
        """A token that every context has: an empty one has nothing else to attend to."""

    def forward(self, contexts: Sequence[Context]) -> Adapter:
        rules, chosen = distinct_rules(contexts)
        features = self.words(rules)
        states = Features(self.reader(features, self._kinds(rules)), features.mask)
        tokens = joined(states, chosen, self.nothing)
        return self._with_shared(self.heads(self.latents(tokens.states, tokens.mask)), len(contexts))


class TextToLora(LearnedSource):
    """After Charakorn et al. 2025 (arXiv:2506.06105): one pooled vector a context, plus layer and module embeddings."""

    def __init__(self, encoder: Encoder, sites: Sites, settings: Settings | None = None) -> None:
        super().__init__(encoder, sites, settings)
        width = self.settings.width
        layers, modules = zip(*map(split_site, sites), strict=True)
        self.project = nn.Sequential(nn.Linear(self.read, width), nn.LayerNorm(width))
        self.layer = nn.Embedding(len(set(layers)), width)
        self.module = nn.Embedding(len(set(modules)), width)
        self.mlps = nn.ModuleList(residual_mlp(width) for _ in range(self.settings.layers))
        self.heads = Heads(sites, width, self.settings.rank)
        self._at_layer = [sorted(set(layers)).index(layer) for layer in layers]
        self._at_module = [sorted(set(modules)).index(module) for module in modules]

    def forward(self, contexts: Sequence[Context]) -> Adapter:
        rules, chosen = distinct_rules(contexts)
        tokens = joined(self.words(rules), chosen)
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
        self.project = nn.Linear(self.read, width)
        self.f = nn.Parameter(torch.randn(len(sites), rank, width) * width**-0.5)
        self.g = nn.Parameter(torch.randn(len(sites), rank, width) * width**-0.5)
        self.heads = ConstantAdapter(sites, rank)

    def forward(self, contexts: Sequence[Context]) -> Adapter:
        rules, chosen = distinct_rules(contexts)
        tokens = joined(self.words(rules), chosen)
        states = self.project(tokens.states) * tokens.mask[..., None]
        gram = (states.mT @ states)[:, None]  # f and g are linear: sum of f(h) g(h)ᵀ = f (sum of h hᵀ) gᵀ
        core = polar(self.f @ gram @ self.g.mT)
        factors = {
            site: Factors(core[:, n] @ a, b.expand(len(contexts), -1, -1))
            for n, (site, (a, b)) in enumerate(self.heads().factors.items())
        }
        return self._with_shared(factors, len(contexts))


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
