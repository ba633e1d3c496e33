"""How far a context lies from those learnt from."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch

from engrain.context import Context, Rule, Section
from engrain.encoder import Features, padded
from engrain.novelty import FEWEST_CONTEXTS, Novelty


class Letters:
    """A rule's letters, each a fixed random vector."""

    width, digest, settings, inputs = 6, "letters", {"kind": "letters"}, dict[str, int]()

    def __call__(self, rules: Sequence[Rule]) -> Features:
        table = torch.randn(128, self.width, generator=torch.Generator().manual_seed(0))
        return padded([table[[ord(letter) for letter in rule.text]] for rule in rules], self.width)

    together = __call__


def contexts(count: int, letters: str, seed: int = 0) -> list[Context]:
    rng = random.Random(seed)
    texts = [tuple("".join(rng.choices(letters, k=12)) for _ in range(4)) for _ in range(count)]
    return [Context((Section("tenant", "t", rules),)) for rules in texts]


def test_a_context_of_another_kind_lies_beyond_the_threshold_and_one_of_the_same_does_not() -> None:
    encoder, novelty = Letters(), Novelty(6)
    novelty.fit(encoder, contexts(200, "abcdefgh"))
    usual = [novelty(encoder, one) for one in contexts(100, "abcdefgh", seed=1)]
    strange = [novelty(encoder, one) for one in contexts(100, "stuvwxyz", seed=1)]
    threshold = float(novelty.threshold)
    assert sum(score > threshold for score in usual) <= 6 and all(score > threshold for score in strange)
    assert 0.8 < sum(usual) / len(usual) < 1.2


def test_the_order_of_rules_does_not_matter_and_an_empty_context_is_not_strange() -> None:
    encoder, novelty = Letters(), Novelty(6)
    novelty.fit(encoder, contexts(60, "abcdefgh"))
    (one,) = contexts(1, "defghi", seed=2)
    turned = Context(tuple(Section(part.kind, part.name, part.rules[::-1]) for part in one.sections))
    assert novelty(encoder, one) == novelty(encoder, turned) > 0
    assert novelty(encoder, Context()) == 0.0


def test_of_too_few_contexts_nothing_is_learnt() -> None:
    encoder, novelty = Letters(), Novelty(6)
    novelty.fit(encoder, contexts(FEWEST_CONTEXTS - 1, "abcdefgh") * 3)
    assert float(novelty.threshold) == math.inf and novelty(encoder, contexts(1, "xyz")[0]) == 0.0
