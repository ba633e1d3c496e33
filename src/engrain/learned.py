"""`LearnedSource`: what all hypernetworks share, contexts to one adapter each in a single pass."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from engrain.adapter import Adapter, ConstantAdapter, Factors
from engrain.context import Context, Rule
from engrain.encoder import Encoder, Features, padded
from engrain.errors import InputError
from engrain.layers import KINDS
from engrain.novelty import Novelty

Sites = Mapping[str, tuple[int, int]]
"""Linear layers of the base by qualified name, as (d_in, d_out)."""


@dataclass(frozen=True)
class Settings:
    rank: int = 8
    """Of the context's term in a source that reads all rules together; rule-wise, each token has one of rank 1."""
    shared_rank: int = 8
    width: int = 128
    layers: int = 2
    reading_rank: int = 32
    """Rule-wise: of the term under which the base reads rules, which so learns to read them as they are looked up; 0
    reads them with the base as it is."""
    strength: float = 2.0
    """alpha / rank of every adapter, however many rules it has."""
    invocation: tuple[int, ...] = ()
    """Of activated adapters: see `Adapter`."""


class LearnedSource(nn.Module):
    """What all hypernetworks share: an encoder that is not trained, and a context-free term."""

    def __init__(self, encoder: Encoder, sites: Sites, settings: Settings | None = None) -> None:
        super().__init__()
        self.encoder, self.sites, self.settings = encoder, dict(sites), settings or Settings()
        self.read = encoder.width - sum(encoder.inputs.values())
        """Features that tell what a token says; then come the inputs of sites."""
        self.shared = ConstantAdapter(sites, self.settings.shared_rank)
        self.novelty = Novelty(self.read)

    @abstractmethod
    def forward(self, contexts: Sequence[Context]) -> Adapter:
        """One adapter a context, in a leading batch dimension."""

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Every parameter once, by what is clipped together: `trunk`, `heads`, `shared` and `reading`."""
        groups: dict[str, list[nn.Parameter]] = {"trunk": [], "heads": [], "shared": [], "reading": []}
        for name, parameter in self.named_parameters():
            part = name.split(".")[0]
            groups[part if part in groups else "trunk"].append(parameter)
        return groups

    def prepare(self, contexts: Sequence[Context]) -> None:
        """Tell an untrained source what it is about to be trained on, if it has to know."""

    def learnt_from(self, contexts: Sequence[Context]) -> None:
        """Tell a trained source what it was trained on, for `strange`."""
        self.novelty.fit(self.features, contexts)

    def strange(self, context: Context) -> str:
        """Why this context should not be left to an adapter; empty if it may be."""
        score, threshold = self.novelty(self.features, context), float(self.novelty.threshold)
        return f"novelty {score:.2f} is over {threshold:.2f}" if score > threshold else ""

    def features(self, rules: Sequence[Rule]) -> Features:
        read = self.encoder.together if self.training else self.encoder
        return read(rules, self._reading()).to(self._device())

    def _reading(self) -> Adapter | None:
        """What the encoder reads under."""
        return None

    def words(self, rules: Sequence[Rule]) -> Features:
        """Features without the inputs of sites."""
        features = self.features(rules)
        return Features(features.states[..., : self.read], features.mask)

    def _kinds(self, rules: Sequence[Rule]) -> Int[Tensor, " rules"]:
        return torch.tensor([KINDS.index(rule.kind) for rule in rules], dtype=torch.long, device=self._device())

    def _with_shared(self, factors: Mapping[str, Factors], contexts: int) -> Adapter:
        """The shared term at every site and the contexts' own where they have one, side by side along rank."""
        joined = {}
        for site, (a, b) in self.shared().factors.items():
            a, b = a.expand(contexts, -1, -1), b.expand(contexts, -1, -1)
            if site in factors:
                a, b = torch.cat([a, factors[site].a], dim=-2), torch.cat([b, factors[site].b], dim=-1)
            joined[site] = Factors(a, b)
        rank = max(a.shape[-2] for a, _ in joined.values())
        return Adapter(joined, self.settings.strength * rank, rank, self.settings.invocation)

    def _device(self) -> torch.device:
        return next(self.parameters()).device


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
