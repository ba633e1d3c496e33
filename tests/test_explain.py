"""Which rule did it: the one whose term makes the action likely, and no other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny
from transformers import PreTrainedTokenizerBase

from engrain.adapter import Adapter, unstack
from engrain.context import Context, Rule, Section
from engrain.encoder import Features, padded
from engrain.errors import InputError
from engrain.explain import rule_effects
from engrain.hypernetwork import Hypernetwork
from engrain.learned import Settings
from engrain.learner import TrainConfig
from engrain.model import Base, adapted, sites
from engrain.renderer import Row
from engrain.train import train

LAST = [False, False, True]


class Words:
    """A fixed random vector for each word."""

    width, digest = 16, "words"
    settings: Mapping[str, Any] = {}
    inputs: Mapping[str, int] = {}

    def __call__(self, rules: Sequence[Rule], adapter: Adapter | None = None) -> Features:
        return padded([torch.stack([self._vector(word) for word in rule.text.split()]) for rule in rules], self.width)

    def _vector(self, word: str) -> torch.Tensor:
        return torch.randn(self.width, generator=torch.Generator().manual_seed(sum(map(ord, word))))

    together = __call__


def context(*rules: str) -> Context:
    return Context((Section("tenant", "a", rules),))


def rows() -> list[Row]:
    """After token 30 + s comes 40 + a where a rule says `s a`."""
    made = []
    for first in range(4):
        for second in range(4):
            one = context(f"x {first}", f"y {second}")
            made += [Row([5, asked, answer], LAST, one) for asked, answer in ((30, 40 + first), (31, 50 + second))]
    return made


def test_the_rule_that_an_action_follows_has_the_largest_effect(tmp_path: Path) -> None:
    base = Base(tiny("llama"), PreTrainedTokenizerBase(), "tiny")
    torch.manual_seed(0)
    source = Hypernetwork(Words(), sites(base.model), Settings(shared_rank=4, width=32, layers=1))
    config = TrainConfig(tokens=20_000, batch_tokens=96, lr=5e-3, threads=1, precision="fp32")
    result = train(base, source, rows(), config, tmp_path)
    assert result.loss < 0.3
    own, other = [], []
    for row in rows():
        assert row.context is not None
        mine = next(rule for rule in row.context.rules if rule.text[0] == ("x" if row.ids[1] == 30 else "y"))
        effects = rule_effects(base, source, row.context, row)
        assert list(effects.values()) == sorted(effects.values(), key=abs, reverse=True)
        own.append(effects[mine])
        other += [abs(effect) for rule, effect in effects.items() if rule != mine]
    assert sum(own) / len(own) > 1 and max(other) < 0.5
    told = context("x 2", "y 1")
    row = Row([5, 30, 42], LAST)
    assert rule_effects(base, source, told, row) == rule_effects(base, source.eval(), told, replace(row, context=told))


def test_nothing_to_explain_is_refused() -> None:
    base = Base(tiny("llama"), PreTrainedTokenizerBase(), "tiny")
    source = Hypernetwork(Words(), sites(base.model))
    for row, told in ((Row([1, 2], [True, False]), context("x")), (Row([1, 2], [False, True]), Context())):
        with pytest.raises(InputError, match="masked action"):
            rule_effects(base, source, told, row)


def test_an_activated_term_has_its_effect_where_it_acts() -> None:
    base = Base(tiny("llama"), PreTrainedTokenizerBase(), "tiny")
    torch.manual_seed(0)
    source = Hypernetwork(Words(), sites(base.model), Settings(shared_rank=4, width=32, layers=1, invocation=(5,)))
    torch.nn.init.ones_(source.heads.strength)
    told = context("x 2")
    effects = [rule_effects(base, source, told, Row([*before, 5, 30, 42], [False] * len(before) + LAST))
               for before in ([9, 9], [8, 7])]  # fmt: skip
    ((first,), (second,)) = (found.values() for found in effects)
    assert first != second  # the base's own reading of what came before still counts
    row = torch.tensor([[9, 9, 5, 30, 42]])
    with torch.no_grad():
        said = []
        for one in (source([told]), source([Context()])):
            with adapted(base.model, unstack(one)[0], acting=torch.arange(5) >= 2):
                said.append(float(base.model(row).logits[0, 3].log_softmax(-1)[42]))
    assert first == pytest.approx(said[0] - said[1], abs=1e-3)
