from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import ARCHITECTURES, tiny, trained_like
from safetensors.torch import load_file, save_file

from engrain import adapter as module
from engrain.adapter import (
    Adapter,
    ConstantAdapter,
    Factors,
    compress,
    concat,
    delta_weight,
    load_peft,
    lora_delta,
    merge,
    reduced,
    save_peft,
    scale,
    stack,
)
from engrain.errors import InputError, ModelError
from engrain.model import adapted, sites

peft_warns = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
"""peft 0.21 reads a name that transformers 5.23 deprecates."""


def random_adapter(seed: int, rank: int, alpha: float, names: tuple[str, ...] = ("x", "y")) -> Adapter:
    chance = torch.Generator().manual_seed(seed)
    return Adapter(
        {
            name: Factors(torch.randn(rank, 6, generator=chance), torch.randn(5, rank, generator=chance))
            for name in names
        },
        alpha,
        rank,
    )


def test_the_one_line() -> None:
    for rank, tokens in ((2, 3), (9, 400)):  # one after the other; their product first
        a, b, x = torch.randn(3, rank, 6), torch.randn(3, 5, rank), torch.randn(3, tokens, 6)
        expected = torch.einsum("ntd,nrd,nor->nto", x, a, b)
        torch.testing.assert_close(lora_delta(x, a, b, 8.0 * rank, 2 * rank), 4.0 * expected, rtol=1e-4, atol=1e-4)
        assert lora_delta(x.bfloat16(), a, b, 8.0, 2).dtype == torch.bfloat16


def test_a_rank_above_a_sites_smaller_side_is_never_needed() -> None:
    wide, tall, low = (Factors(torch.randn(2, rank, d_in), torch.randn(2, d_out, rank))
                       for rank, d_in, d_out in ((9, 6, 4), (9, 4, 6), (2, 6, 4)))  # fmt: skip
    whole = Adapter({"wide": wide, "tall": tall, "low": low}, 18.0, 9)
    small = reduced(whole)
    assert small.rank == 4 and small.factors["low"].a.shape == (2, 2, 6)
    for site in whole.factors:
        torch.testing.assert_close(delta_weight(small, site), delta_weight(whole, site))


@peft_warns
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hooked_equals_peft_equals_merged(architecture: str, tmp_path: Path) -> None:
    from peft import PeftModel

    model, ids = tiny(architecture), torch.randint(0, 64, (2, 30), generator=torch.Generator().manual_seed(3))
    adapter = trained_like(model)
    with torch.no_grad():
        plain = model(ids).logits
        with adapted(model, adapter):
            hooked = model(ids).logits
        save_peft(adapter, tmp_path / "adapter")
        with adapted(model, load_peft(tmp_path / "adapter")):
            assert torch.equal(model(ids).logits, hooked)
        theirs = PeftModel.from_pretrained(tiny(architecture), str(tmp_path / "adapter")).eval()(ids).logits
        merge(model, adapter)
        merged = model(ids).logits
    assert (hooked - plain).abs().max() > 0.1
    torch.testing.assert_close(theirs, hooked, atol=1e-4, rtol=0)
    torch.testing.assert_close(merged, hooked, atol=1e-4, rtol=0)


@peft_warns
def test_peft_adapts_exactly_the_sites_of_a_partial_adapter(tmp_path: Path) -> None:
    from peft import PeftModel

    model = tiny("llama", num_hidden_layers=12)  # "…layers.1.…" must not also match layer 11
    whole = trained_like(model)
    adapter = Adapter({"model.layers.1.mlp.up_proj": whole.factors["model.layers.1.mlp.up_proj"]}, 8.0, 4)
    save_peft(adapter, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(model, str(tmp_path / "adapter"))
    assert sum(name.endswith("lora_A.default.weight") for name, _ in theirs.named_parameters()) == 1


def test_peft_files_have_the_names_that_vllm_reads(tmp_path: Path) -> None:
    adapter = random_adapter(0, 2, 4.0, ("model.layers.0.mlp.up_proj",))
    save_peft(adapter, tmp_path / "adapter", "some/base")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["bias"], config["task_type"]) == (2, 4.0, "none", "CAUSAL_LM")
    assert config["target_modules"] == ["model.layers.0.mlp.up_proj"]
    assert config["base_model_name_or_path"] == "some/base"
    assert set(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == {
        "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight",
        "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight",
    }


@peft_warns
def test_an_adapter_that_peft_wrote_is_read(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    ids = torch.arange(12)[None]
    theirs = get_peft_model(
        tiny("qwen3"),  # type: ignore[arg-type]
        LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", use_rslora=True, init_lora_weights=False),
    ).eval()
    theirs.save_pretrained(str(tmp_path / "peft"))
    model, adapter = tiny("qwen3"), load_peft(tmp_path / "peft")
    assert set(adapter.factors) == set(sites(model))
    with adapted(model, adapter), torch.no_grad():
        torch.testing.assert_close(model(ids).logits, theirs(ids).logits, atol=1e-4, rtol=0)


def test_a_constant_adapter_starts_as_pefts_does() -> None:
    source = ConstantAdapter({"m.x": (6, 5), "m.y": (7, 3)}, rank=2, alpha=4.0)
    adapter = source(())
    assert list(adapter.factors) == ["m.x", "m.y"] and (adapter.alpha, adapter.rank) == (4.0, 2)
    for site in adapter.factors:
        assert not delta_weight(adapter, site).any() and adapter.factors[site].a.any()
    assert adapter.factors["m.y"].a.abs().max() <= (1 / 7) ** 0.5 + 1e-6  # Kaiming-uniform with PEFT's sqrt(5)
    sum(factor.sum() for factor in adapter.tensors()).backward()  # type: ignore[union-attr]
    assert all(parameter.grad is not None for parameter in source.parameters())


def test_nothing_to_adapt_is_refused() -> None:
    with pytest.raises(ModelError, match="rank"):
        ConstantAdapter({}, 4)


@given(st.integers(1, 3), st.integers(1, 3), st.floats(0.5, 8), st.floats(-2, 2))
def test_concat_is_the_sum_and_scale_the_product(rank_1: int, rank_2: int, alpha: float, factor: float) -> None:
    one, two = random_adapter(1, rank_1, alpha, ("x", "y")), random_adapter(2, rank_2, 3.0, ("y", "z"))
    both = concat([one, two])
    assert both.rank == rank_1 + rank_2 and set(both.factors) == {"x", "y", "z"}
    torch.testing.assert_close(delta_weight(both, "x"), delta_weight(one, "x"), atol=1e-4, rtol=1e-4)
    total = delta_weight(one, "y") + delta_weight(two, "y")
    torch.testing.assert_close(delta_weight(both, "y"), total, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(delta_weight(scale(one, factor), "x"), factor * delta_weight(one, "x"))


def test_stack_is_a_batch_of_the_same_adapters() -> None:
    own = [random_adapter(1, 2, 3.0), None, random_adapter(2, 5, 1.0, ("y",))]
    batch = stack(own)
    for site in ("x", "y"):
        for adapter, delta in zip(own, delta_weight(batch, site), strict=True):
            known = adapter is not None and site in adapter.factors
            expected = delta_weight(adapter, site) if adapter is not None and known else torch.zeros_like(delta)
            torch.testing.assert_close(delta, expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="at least one"):
        stack([None])


def test_compress_is_lossless_at_full_rank_and_reports_what_it_drops() -> None:
    adapter = random_adapter(3, 4, 10.0)
    same, lost = compress(adapter, 4)
    assert lost < 1e-9
    torch.testing.assert_close(delta_weight(same, "x"), delta_weight(adapter, "x"), atol=1e-4, rtol=1e-4)
    small, lost = compress(adapter, 2)
    energy = sum(delta_weight(adapter, site).square().sum() for site in adapter.factors)
    gone = sum((delta_weight(adapter, site) - delta_weight(small, site)).square().sum() for site in adapter.factors)
    assert small.rank == 2 and small.factors["x"].a.shape == (2, 6)
    assert 0 < lost < 1 and lost == pytest.approx(float(gone / energy), abs=1e-5)
    best = torch.linalg.svdvals(delta_weight(adapter, "x"))
    error = (delta_weight(adapter, "x") - delta_weight(small, "x")).square().sum()
    assert error == pytest.approx(float(best[2:].square().sum()), rel=1e-4)
    wide, lost = compress(adapter, 9)
    assert lost == 0 and wide.factors["x"].a.shape == (9, 6)
    torch.testing.assert_close(delta_weight(wide, "y"), delta_weight(adapter, "y"), atol=1e-4, rtol=1e-4)


def test_a_batch_of_adapters_concatenates_and_compresses() -> None:
    batch = Adapter({"x": Factors(torch.randn(3, 2, 6), torch.randn(3, 5, 2))}, 4.0, 2)
    both = concat([batch, batch])
    assert both.factors["x"].a.shape == (3, 4, 6) and both.factors["x"].b.shape == (3, 5, 4)
    small, lost = compress(both, 2)
    assert lost < 1e-9
    torch.testing.assert_close(delta_weight(small, "x"), 2 * delta_weight(batch, "x"), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type LORA"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"rank_pattern": {"x": 3}}, "rank_pattern"),
        ({"r": 3}, "rank 3"),
    ],
)
def test_what_an_adapter_cannot_express_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "adapter"
    save_peft(random_adapter(0, 2, 4.0), path)
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(ModelError, match=message):
        load_peft(path)


def test_damaged_adapter_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "adapter"
    with pytest.raises(ModelError, match="give a PEFT adapter directory"):
        load_peft(path)
    save_peft(random_adapter(0, 2, 4.0), path)
    weights = path / "adapter_model.safetensors"
    whole = load_file(weights)
    save_file({**whole, "base_model.model.lm_head.weight": torch.zeros(2, 2)}, weights)
    with pytest.raises(ModelError, match="unexpected tensor"):
        load_peft(path)
    weights.write_bytes(weights.read_bytes()[:50])
    with pytest.raises(ModelError, match="cannot read"):
        load_peft(path)
    (path / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match="not JSON"):
        load_peft(path)


def test_a_full_disk_leaves_the_earlier_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, first = tmp_path / "adapter", random_adapter(0, 2, 4.0)
    save_peft(first, path)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(InputError, match="No space left"):
        save_peft(random_adapter(1, 2, 4.0), path)
    assert torch.equal(load_peft(path).factors["x"].a, first.factors["x"].a)
    assert [entry.name for entry in tmp_path.iterdir()] == ["adapter"]
