from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import ARCHITECTURES, random_rows, tiny, trained_like
from torch import Tensor
from transformers import PreTrainedModel

from engrain import model as model_module
from engrain.adapter import Adapter, Factors
from engrain.batch import collate
from engrain.errors import ModelError
from engrain.model import PACKED, adapted, attention, base_digest, load_base, packed_hidden, sites


def separately(model: PreTrainedModel, lengths: tuple[int, ...], ids: Tensor) -> Tensor:
    """The reference: each row alone, eager attention."""
    with attention(model, "eager"), torch.no_grad():
        return torch.cat([model.get_decoder()(row[None]).last_hidden_state[0] for row in ids.split(list(lengths))])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_rows_equal_rows_alone(architecture: str) -> None:
    model = tiny(architecture)
    batch = collate(random_rows(6))
    with attention(model, PACKED), torch.no_grad():
        packed = packed_hidden(model, batch)
    torch.testing.assert_close(packed, separately(model, batch.lengths, batch.ids), atol=1e-5, rtol=1e-5)


def test_a_window_shorter_than_the_row_matters_and_is_kept() -> None:
    batch = collate(random_rows(4, longest=40))
    assert max(batch.lengths) > 8
    narrow, wide = tiny("mistral"), tiny("mistral", sliding_window=None)
    with attention(narrow, PACKED), attention(wide, PACKED), torch.no_grad():
        assert (packed_hidden(narrow, batch) - packed_hidden(wide, batch)).abs().max() > 1e-3
        packed = packed_hidden(wide, batch)
    torch.testing.assert_close(packed, separately(wide, batch.lengths, batch.ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_gradients_equal_the_sum_of_rows_alone(architecture: str) -> None:
    model = tiny(architecture)
    batch = collate(random_rows(4))
    weight = torch.randn(len(batch.ids), 32, generator=torch.Generator().manual_seed(0))
    with attention(model, PACKED):
        (packed_hidden(model, batch) * weight).sum().backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with attention(model, "eager"):
        for ids, part in zip(batch.ids.split(list(batch.lengths)), weight.split(list(batch.lengths)), strict=True):
            (model.get_decoder()(ids[None]).last_hidden_state[0] * part).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(packed[name], parameter.grad, atol=1e-3, rtol=1e-4)


def test_packed_hidden_refuses_an_attention_that_would_mix_rows() -> None:
    with pytest.raises(ValueError, match="attention"):
        packed_hidden(tiny("llama"), collate(random_rows(2)))


def test_attention_is_given_back_even_after_an_error() -> None:
    model = tiny("llama")
    before = model.config._attn_implementation
    with pytest.raises(RuntimeError), attention(model, PACKED):
        raise RuntimeError
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sites_are_every_linear_of_the_decoder_and_not_the_head(architecture: str) -> None:
    found = sites(tiny(architecture))
    assert len(found) == 2 * 7
    assert found["model.layers.1.mlp.down_proj"] == (48, 32)
    assert not any("lm_head" in site or "embed" in site for site in found)


def test_adapted_ends_with_its_block() -> None:
    model, ids = tiny("llama"), torch.arange(10)[None]
    plain = model(ids).logits
    with adapted(model, trained_like(model)):
        assert (model(ids).logits - plain).abs().max() > 0.1
    assert torch.equal(model(ids).logits, plain)


def test_a_batch_of_adapters_equals_each_alone() -> None:
    model, ids = tiny("qwen3"), torch.arange(20).reshape(2, 10)
    one, two = trained_like(model, seed=1), trained_like(model, seed=2)
    both = Adapter(
        {
            site: Factors(torch.stack([a, two.factors[site].a]), torch.stack([b, two.factors[site].b]))
            for site, (a, b) in one.factors.items()
        },
        one.alpha,
        one.rank,
    )
    with adapted(model, both), torch.no_grad():
        batched = model(ids).logits
    for adapter, row, got in zip((one, two), ids, batched, strict=True):
        with adapted(model, adapter), torch.no_grad():
            torch.testing.assert_close(got, model(row[None]).logits[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("widest", "alike"), [(0, False), (10_000, False), (0, True)])
def test_over_a_packed_stream_each_adapter_acts_on_its_own_span(
    widest: int, alike: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_module, "WIDEST_PADDED", widest)
    model, rows = tiny("llama"), random_rows(5)
    rows = [*rows[:3], *rows[2::-1]] if alike else rows
    own = [trained_like(model, seed=seed) for seed in (1, 2)]
    both = Adapter(
        {site: Factors(*(torch.stack(pair) for pair in zip(*(one.factors[site] for one in own), strict=True)))
         for site in own[0].factors}, own[0].alpha, own[0].rank,
    )  # fmt: skip
    spans = [sum(len(row.ids) for row in part) for part in (rows[:3], rows[3:])]
    assert (spans[0] == spans[1]) == alike
    with attention(model, PACKED), torch.no_grad():
        with adapted(model, both, spans):
            together = packed_hidden(model, collate(rows))
        for adapter, part, got in zip(own, (rows[:3], rows[3:]), together.split(spans), strict=True):
            with adapted(model, adapter):
                torch.testing.assert_close(got, packed_hidden(model, collate(part)), atol=1e-4, rtol=1e-4)


def test_an_adapter_of_another_base_is_refused() -> None:
    model = tiny("llama")
    for site, d_in, message in (
        ("model.layers.7.mlp.up_proj", 32, "no linear layer"),
        ("model.layers.0.mlp.up_proj", 16, "own base"),
        ("model.layers.0.mlp", 32, "no linear layer"),
    ):
        foreign = Adapter({site: Factors(torch.zeros(1, d_in), torch.zeros(48, 1))}, 1.0, 1)
        with pytest.raises(ModelError, match=message), adapted(model, foreign):
            pass


def test_a_saved_base_loads_with_its_digest(tiny_base: Path) -> None:
    base = load_base(tiny_base)
    assert base.digest == base_digest(tiny_base) and len(base.digest) == 64
    assert base.model.dtype == torch.float32 and not base.model.training
    assert load_base(tiny_base, torch.bfloat16).model.dtype == torch.bfloat16


def test_the_digest_names_the_weights(tiny_base: Path, tmp_path: Path) -> None:
    from engrain.model import save_base

    base = load_base(tiny_base)
    assert save_base(base, tmp_path / "same") == base.digest
    with torch.no_grad():
        next(base.model.parameters()).add_(1.0)
    assert save_base(base, tmp_path / "other") != base.digest


def damaged(tiny_base: Path, tmp_path: Path, damage: str) -> Path:
    import shutil

    path = tmp_path / "base"
    shutil.copytree(tiny_base, path)
    weights = path / "model.safetensors"
    if damage == "no config":
        (path / "config.json").unlink()
    elif damage == "no weights":
        weights.unlink()
    elif damage == "cut weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "not json":
        (path / "config.json").write_text("{")
    elif damage == "other shape":
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    elif damage == "unknown architecture":
        (path / "config.json").write_text(json.dumps({"model_type": "nonesuch"}))
    elif damage == "code":
        config = json.loads((path / "config.json").read_text())
        remote = {"auto_map": {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}, "model_type": "evil"}
        (path / "config.json").write_text(json.dumps(config | remote))
        (path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    elif damage == "no tokenizer":
        for file in path.glob("tokenizer*"):
            file.unlink()
    return path


DAMAGES = ("no config", "no weights", "cut weights", "not json", "other shape", "unknown architecture", "code")


@pytest.mark.parametrize("damage", [*DAMAGES, "no tokenizer"])
def test_a_malformed_base_is_one_line_with_the_fix(tiny_base: Path, tmp_path: Path, damage: str) -> None:
    path = damaged(tiny_base, tmp_path, damage)
    with pytest.raises(ModelError) as caught:
        load_base(path)
    assert str(path) in str(caught.value) and ";" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_a_missing_base_is_one_line_with_the_fix(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json; give a local directory"):
        load_base(tmp_path / "nowhere")
