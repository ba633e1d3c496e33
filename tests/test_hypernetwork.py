from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import ARCHITECTURES, tiny
from sources import EMPTY, LONG, SHORT, SITES, SMALL, Words, equal, one, perturbed, rule_wise, source_of
from templates import tokenizer
from torch import Tensor, nn

from engrain.adapter import Adapter, ConstantAdapter, delta_weight, load_peft, lora_delta, save_peft
from engrain.context import Context, Rule, Section
from engrain.encoder import BaseEncoder, Cached
from engrain.errors import InputError, ModelError
from engrain.generators import GenerativeAdapter, JointHypernetwork, TextToLora, polar, split_site
from engrain.hypernetwork import SOURCES, Hypernetwork, load_hypernetwork, save_hypernetwork
from engrain.layers import Associations, Heads
from engrain.learned import LearnedSource, Settings
from engrain.model import Base, adapted, sites

every_source = pytest.mark.parametrize("kind", SOURCES)


@every_source
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_untrained_it_leaves_the_base_unchanged_and_trained_it_follows_the_context(
    kind: str, architecture: str
) -> None:
    words = tokenizer("chatml")
    base = Base(tiny(architecture, vocab_size=len(words)), words, digest=architecture)
    source, ids = SOURCES[kind](BaseEncoder(base), sites(base.model), SMALL), torch.randint(0, 64, (2, 9))
    with torch.no_grad():
        plain = base.model(ids).logits
        with adapted(base.model, source([LONG, SHORT])):
            assert torch.equal(base.model(ids).logits, plain)
        trained = perturbed(source)([LONG, SHORT])
        with adapted(base.model, trained):
            changed = base.model(ids).logits
    assert (changed - plain).abs().max() > 1e-3
    for n, context in enumerate((LONG, SHORT)):
        with adapted(base.model, source([context])), torch.no_grad():
            torch.testing.assert_close(base.model(ids[n : n + 1]).logits[0], changed[n], atol=1e-4, rtol=1e-4)


@every_source
def test_a_batch_gives_what_each_context_gives_alone(kind: str) -> None:
    source = perturbed(source_of(kind)).train()
    batch = source([LONG, EMPTY, SHORT])
    assert batch.alpha / batch.rank == pytest.approx(SMALL.strength)
    assert all(a.shape == (3, batch.rank, SITES[site][0]) for site, (a, _) in batch.factors.items())
    for n, context in enumerate((LONG, EMPTY, SHORT)):
        alone = source([context])
        for site in SITES:
            torch.testing.assert_close(delta_weight(batch, site)[n], delta_weight(alone, site)[0], atol=1e-5, rtol=1e-4)
    assert (delta_weight(batch, "m.0.x")[0] - delta_weight(batch, "m.0.x")[2]).abs().max() > 1e-3


@every_source
def test_the_order_of_rules_does_not_matter(kind: str) -> None:
    source = perturbed(source_of(kind))
    turned = Context(tuple(Section(one.kind, one.name, one.rules[::-1]) for one in LONG.sections[::-1]))
    assert equal(source([LONG]).factors, source([turned]).factors)


@every_source
def test_every_parameter_learns_and_is_in_one_group(kind: str) -> None:
    source = perturbed(source_of(kind)).train()
    adapter = source([LONG, SHORT, EMPTY])
    torch.stack([delta_weight(adapter, site).square().sum() for site in SITES]).sum().backward()
    groups = {name: group for name, group in source.parameter_groups().items() if group}
    assert set(groups) == {"trunk", "heads", "shared"}
    grouped = [parameter for group in groups.values() for parameter in group]
    assert len(grouped) == len(set(grouped)) == len(list(source.parameters()))
    for parameter in grouped:
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any()


@every_source
def test_one_step_of_training_leaves_the_zero(kind: str) -> None:
    """Exactly one factor of each product starts at zero: with two, nothing would ever move."""
    source = source_of(kind).train()
    adapter = source([LONG])
    assert all(not b.any() and a.flatten(1).norm(dim=1).all() for a, b in adapter.factors.values())
    torch.stack([(delta_weight(adapter, site) - 1).square().sum() for site in SITES]).sum().backward()
    for part in ("heads", "shared"):
        assert any(p.grad is not None and p.grad.any() for p in source.parameter_groups()[part])


def test_a_rules_term_is_a_function_of_that_rule_alone() -> None:
    source = rule_wise()
    terms = source.terms(LONG.rules)
    words = [len(rule.text.split()) for rule in LONG.rules]
    assert terms.lengths == tuple(words) and terms.factors["m.0.y"].b.shape == (3, sum(words))
    for n, rule in enumerate(LONG.rules):
        assert equal(source.terms([rule]).factors, terms.of(n))
    edited = Context((Section("tenant", "t", ("refund up to 50", "escalate fraud")), LONG.sections[1]))
    after = source.terms(edited.rules)
    for n, (old, new) in enumerate(zip(LONG.rules, edited.rules, strict=True)):
        assert equal(terms.of(n), after.of(n)) == (old == new)


def test_what_is_usual_is_learnt_from_rules_and_not_without() -> None:
    words = tokenizer("chatml")
    base = Base(tiny("llama", vocab_size=len(words)), words, digest="mine")
    source = Hypernetwork(BaseEncoder(base), sites(base.model), SMALL)
    before = {name: buffer.clone() for name, buffer in source.heads.named_buffers()}
    source.prepare([EMPTY])
    assert all(torch.equal(buffer, before[name]) for name, buffer in source.heads.named_buffers())
    source.prepare([LONG, SHORT])
    assert not any(torch.equal(buffer, before[name]) for name, buffer in source.heads.named_buffers())
    assert all(buffer.isfinite().all() for buffer in source.heads.buffers())


def test_the_base_learns_to_read_rules_and_what_is_cached_follows() -> None:
    words = tokenizer("chatml")
    base = Base(tiny("llama", vocab_size=len(words)), words, digest="mine")
    encoder = Cached(BaseEncoder(base))
    source = Hypernetwork(encoder, sites(base.model), replace(SMALL, reading_rank=2)).eval()
    plain = encoder(LONG.rules).states
    assert torch.equal(source.features(LONG.rules).states, plain)
    group = perturbed(source).parameter_groups()["reading"]
    read = source.features(LONG.rules).states
    assert not torch.allclose(read, plain) and torch.equal(encoder(LONG.rules).states, plain)
    assert equal(source.terms(LONG.rules).of(1), source.terms(LONG.rules[1:2]).of(0))
    torch.testing.assert_close(source.train().features(LONG.rules).states, read, atol=1e-4, rtol=1e-4)
    adapter = source([LONG])
    torch.stack([delta_weight(adapter, site).square().sum() for site in adapter.factors]).sum().backward()
    assert sum(parameter.grad is not None and bool(parameter.grad.any()) for parameter in group) > len(group) / 2


def test_equal_words_of_another_kind_are_another_rule() -> None:
    source = rule_wise()
    terms = source.terms([Rule("tenant", "limit is 250"), Rule("tool", "limit is 250")])
    assert not equal(terms.of(0), terms.of(1))


def test_removing_a_rule_removes_exactly_its_term() -> None:
    source = rule_wise()
    terms = source.terms(LONG.rules)
    whole = source([LONG])
    for gone, rule in enumerate(LONG.rules):
        left = [n for n in range(3) if n != gone]
        without = source([LONG.without(rule)])
        composed = source.compose(terms, [left])
        rank = SMALL.shared_rank + sum(terms.lengths[n] for n in left)
        assert equal(without.factors, composed.factors) and (without.alpha, without.rank) == (composed.alpha, rank)
        for site in SITES:
            a, b = terms.of(gone)[site]
            removed = delta_weight(whole, site) - delta_weight(without, site)
            torch.testing.assert_close(removed[0], SMALL.strength * b @ a, atol=1e-5, rtol=1e-4)
    assert equal(source([EMPTY]).factors, source.compose(terms, [[]]).factors)


def test_a_key_meets_the_state_that_the_base_read_the_rule_in() -> None:
    """Untrained keys, whitened: about 1 for the state itself, near 0 for others."""
    torch.manual_seed(0)
    states = torch.randn(600, 48) @ torch.randn(48, 48) + 3
    heads = Associations({"x": (48, 5)}, {"x": 48}, read=4, width=16)
    heads.whiten([states])
    keys = heads([states], torch.randn(600, 4), torch.randn(600, 16))["x"].a.detach()
    met = keys @ (states - states.mean(dim=0)).T
    assert 0.6 < met.diagonal().mean() < 1.1
    assert (met - met.diagonal().diag()).abs().mean() < 0.2


def test_keys_follow_their_weights_whenever_these_change() -> None:
    states, after, seen = (torch.randn(5, width) for width in (8, 4, 16))
    heads = Associations({"x": (8, 5)}, {"x": 8}, read=4, width=16).eval()

    def keys() -> Tensor:
        """As kept from the first call on; the same as they are when something is to be learnt."""
        with torch.no_grad():
            kept = heads([states], after, seen)["x"].a.clone()
        assert torch.equal(kept, heads([states], after, seen)["x"].a)
        return kept

    found = [keys(), keys()]
    with torch.no_grad():
        for parameter in (heads.turns["x"], heads.get_parameter("keys.x.weight")):
            parameter.add_(torch.randn(parameter.shape))
            found.append(keys())
    heads.whiten([torch.randn(50, 8) * torch.arange(1, 9)])
    found.append(keys())
    heads.load_state_dict({name: torch.randn_like(value) for name, value in heads.state_dict().items()})
    found.append(keys())
    assert torch.equal(found[0], found[1])
    assert not any(torch.equal(one, other) for one, other in itertools.pairwise(found[1:]))


def test_a_context_without_rules_has_the_shared_term_only() -> None:
    source = rule_wise()
    for adapter in (source([EMPTY]), source([LONG, EMPTY])):
        for site, (a, b) in source.shared().factors.items():
            torch.testing.assert_close(delta_weight(adapter, site)[-1], SMALL.strength * b @ a)


def test_strength_does_not_depend_on_the_number_of_rules() -> None:
    source = rule_wise()
    terms, shared = source.terms(LONG.rules), delta_weight(source([EMPTY]), "m.0.x")[0]
    composed, (a, b) = source.compose(terms, [[0, 1, 2], [1]]), terms.of(1)["m.0.x"]
    torch.testing.assert_close(delta_weight(composed, "m.0.x")[1], shared + SMALL.strength * b @ a)


def test_heads_start_at_pefts_size_for_every_shape() -> None:
    torch.manual_seed(0)
    heads = Heads({"x": (256, 8), "y": (64, 8)}, width=32, rank=4)
    latents = torch.nn.functional.rms_norm(torch.randn(50, 2, 32), (32,))
    for site, (a, _) in heads(latents).items():
        d_in = a.shape[-1]
        assert a.detach().std() == pytest.approx(
            (1 / (3 * d_in)) ** 0.5, rel=0.1
        )  # Kaiming-uniform with PEFT's sqrt(5)
        assert site in {"x", "y"}


def test_polar_is_the_orthogonal_factor_and_has_a_gradient_where_singular_values_tie() -> None:
    chance = torch.Generator().manual_seed(0)
    u, _, vt = torch.linalg.svd(torch.randn(5, 4, 4, generator=chance))
    core = u @ torch.diag(torch.tensor([1.0, 0.9, 0.6, 0.3])) @ vt
    torch.testing.assert_close(polar(core, steps=12), u @ vt, atol=1e-4, rtol=0)
    for tied in (torch.eye(3), torch.zeros(3, 3)):
        leaf = tied.requires_grad_()
        polar(leaf).sum().backward()
        assert leaf.grad is not None and leaf.grad.isfinite().all()
    assert not polar(torch.zeros(3, 3)).any()


def test_a_site_is_a_layer_and_a_module() -> None:
    assert split_site("model.layers.11.mlp.up_proj") == (11, "model.layers.mlp.up_proj")
    assert split_site("projector") == (-1, "projector")


def fitted(source: nn.Module, contexts: Sequence[Context], targets: Tensor, steps: int) -> float:
    """Final loss, as a share of the targets' variance, of making the delta of one site the context's target."""
    optimizer = torch.optim.Adam(source.parameters(), 1e-2)
    inputs, loss = torch.eye(6).expand(len(contexts), -1, -1), torch.zeros(())
    for _ in range(steps):
        adapter = source(contexts)
        a, b = adapter.factors["x"]
        loss = (lora_delta(inputs, a, b, adapter.alpha, adapter.rank) - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(source.parameters(), 1.0)
        optimizer.step()
    return loss.item() / targets.var().item()


@pytest.mark.parametrize(
    ("kind", "least", "most"),
    [
        (Hypernetwork, 0.0, 0.02),
        (JointHypernetwork, 0.0, 0.05),
        (TextToLora, 0.1, 0.4),  # these two see a bag of tokens, and two of the six contexts have equal bags
        (GenerativeAdapter, 0.1, 0.4),
    ],
)
def test_it_learns_what_depends_on_the_rules_and_a_constant_cannot(
    kind: type[LearnedSource], least: float, most: float
) -> None:
    torch.manual_seed(0)
    rules = [f"when {situation} do {action}" for situation in ("late", "lost") for action in ("refund", "deny")]
    chosen = [(i, j) for i in range(4) for j in range(4) if i < j]
    contexts = [Context((Section("tenant", "t", (rules[i], rules[j])),)) for i, j in chosen]
    parts = torch.randn(4, 6, 1) @ torch.randn(4, 1, 5)
    targets = torch.stack([parts[i] + parts[j] for i, j in chosen])
    assert fitted(ConstantAdapter({"x": (6, 5)}, 4), contexts, targets, 120) > 0.5
    settings = Settings(rank=4, shared_rank=1, width=32, layers=1)
    assert least <= fitted(kind(Words(), {"x": (6, 5)}, settings).train(), contexts, targets, 120) < most


@every_source
def test_a_saved_hypernetwork_is_the_same_bit_for_bit(kind: str, tmp_path: Path) -> None:
    words = tokenizer("chatml")
    base = Base(tiny("llama", vocab_size=len(words)), words, digest="mine")
    source = perturbed(SOURCES[kind](BaseEncoder(base, (0.0, 1.0)), sites(base.model), SMALL))
    save_hypernetwork(tmp_path / "hyper", source, base)
    again = load_hypernetwork(tmp_path / "hyper", base)
    assert type(again) is type(source) and again.settings == SMALL and not again.training
    with torch.no_grad():
        assert equal(again([LONG, SHORT]).factors, source([LONG, SHORT]).factors)
    files = {file.name for file in (tmp_path / "hyper").iterdir()}
    assert files == {"hypernetwork.json", "hypernetwork.safetensors", "measured.safetensors"}
    save_hypernetwork(tmp_path / "half", source, base, torch.bfloat16)
    sizes = [(tmp_path / name / "hypernetwork.safetensors").stat().st_size for name in ("half", "hyper")]
    assert sizes[0] < 0.7 * sizes[1]
    for site, (a, _) in load_hypernetwork(tmp_path / "half", base)([SHORT]).factors.items():
        torch.testing.assert_close(a, source([SHORT]).factors[site].a, atol=0.05, rtol=0.05)


def test_a_hypernetwork_for_another_base_or_encoder_is_refused(tmp_path: Path) -> None:
    words = tokenizer("chatml")
    model = tiny("llama", vocab_size=len(words))
    base, path = Base(model, words, digest="mine"), tmp_path / "hyper"
    source = rule_wise()
    with pytest.raises(ModelError, match="load_base"):
        save_hypernetwork(path, source, Base(model, words))
    save_hypernetwork(path, source, base)
    with pytest.raises(ModelError, match="made for base mine, got base yours"):
        load_hypernetwork(path, Base(model, words, digest="yours"), Words())
    with pytest.raises(ModelError, match="trained with encoder words"):
        load_hypernetwork(path, base, BaseEncoder(base))
    with pytest.raises(ModelError, match="pass the encoder itself"):
        load_hypernetwork(path, base)
    assert equal(load_hypernetwork(path, base, Words())([LONG]).factors, source([LONG]).factors)


def test_a_damaged_hypernetwork_is_refused(tmp_path: Path) -> None:
    words = tokenizer("chatml")
    base, path = Base(tiny("llama", vocab_size=len(words)), words, digest="mine"), tmp_path / "hyper"
    with pytest.raises(ModelError, match="give the directory"):
        load_hypernetwork(path, base, Words())
    save_hypernetwork(path, rule_wise(), base)
    head = json.loads((path / "hypernetwork.json").read_text())
    for change in (
        {"schema": "engrain.hypernetwork/9"},
        {"kind": "other"},
        {"sites": {"m.0.x": [6, 5]}},
        {"settings": {"rank": 1, "deep": 2}},
    ):
        (path / "hypernetwork.json").write_text(json.dumps(head | change))
        with pytest.raises(ModelError, match="train again"):
            load_hypernetwork(path, base, Words())
    (path / "hypernetwork.json").write_text(json.dumps(head))
    for name in ("hypernetwork.safetensors", "measured.safetensors"):
        whole = (path / name).read_bytes()
        (path / name).write_bytes(whole[:50])
        with pytest.raises(ModelError, match="train again"):
            load_hypernetwork(path, base, Words())
        (path / name).write_bytes(whole)


def test_a_contexts_adapter_is_an_ordinary_peft_directory(tmp_path: Path) -> None:
    adapter = rule_wise()([LONG])
    single = Adapter(one(adapter, 0), adapter.alpha, adapter.rank)
    save_peft(single, tmp_path / "adapter")
    found = load_peft(tmp_path / "adapter")
    assert equal(found.factors, single.factors) and (found.alpha, found.rank) == (adapter.alpha, 3 + 9)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ModelError, match="rank"):
        JointHypernetwork(Words(), SITES, Settings(rank=0))
    with pytest.raises(ModelError, match="divisible"):
        Hypernetwork(Words(), SITES, Settings(width=30))
    with pytest.raises(InputError, match="at least one context"):
        rule_wise()([])
