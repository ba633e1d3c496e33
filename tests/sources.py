"""Small hypernetworks of a few words, and how their adapters compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from engrain.adapter import Adapter, Factors
from engrain.context import Context, Rule, Section
from engrain.encoder import Features, padded
from engrain.hypernetwork import SOURCES, Hypernetwork
from engrain.learned import LearnedSource, Settings

SITES = {"m.0.x": (6, 5), "m.0.y": (7, 3), "m.1.x": (6, 5), "m.1.y": (6, 3)}
SMALL = Settings(rank=2, shared_rank=3, width=16, layers=1, strength=1.7)
LONG = Context((Section("tenant", "t", ("refund up to 40", "escalate fraud")), Section("tool", "f", ("limit is 250",))))
SHORT = Context((Section("tenant", "u", ("escalate fraud",)),))
EMPTY = Context()


class Words:
    """An encoder of words, each with random states of its own."""

    width, settings, inputs = 12, {"kind": "words"}, dict[str, int]()
    digest = "words"

    def __call__(self, rules: Sequence[Rule], adapter: Adapter | None = None) -> Features:
        return padded([torch.stack([self._word(word) for word in rule.text.split()]) for rule in rules], self.width)

    together = __call__

    def _word(self, word: str) -> Tensor:
        return torch.randn(self.width, generator=torch.Generator().manual_seed(int.from_bytes(word.encode()[:7])))


def perturbed(source: LearnedSource) -> LearnedSource:
    """As if trained: no factor is zero."""
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(parameter))))
    return source.eval()


def source_of(kind: str) -> LearnedSource:
    torch.manual_seed(0)
    return SOURCES[kind](Words(), SITES, SMALL)


def rule_wise() -> Hypernetwork:
    source = perturbed(source_of("rule-wise"))
    assert isinstance(source, Hypernetwork)
    return source


def one(adapter: Adapter, n: int) -> Mapping[str, Factors]:
    return {site: Factors(a[n], b[n]) for site, (a, b) in adapter.factors.items()}


def equal(left: Mapping[str, Factors], right: Mapping[str, Factors]) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(mine, theirs) for site in left for mine, theirs in zip(left[site], right[site], strict=True)
    )
