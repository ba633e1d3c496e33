"""What llama.cpp would read of a GGUF file is the model and its tokenizer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from models import tiny
from torch import Tensor

from engrain.agent import bundled_base
from engrain.errors import ModelError
from engrain.gguf import FILE, interleaved, save_gguf
from engrain.model import Base, load_base


@pytest.fixture(scope="module")
def bundled() -> Base:
    return load_base(bundled_base())


def sized(architecture: str, bundled: Base, **changes: Any) -> Base:
    return replace(bundled, model=tiny(architecture, vocab_size=len(bundled.tokenizer) + 3, **changes))


def turned(vectors: Tensor, heads: int, theta: float, *, neighbours: bool) -> Tensor:
    """Rows (positions, heads x dim) turned as transformers does, or as llama.cpp's Llama does."""
    positions, rows = vectors.shape
    half = rows // heads // 2
    angle = torch.arange(positions)[:, None, None] * theta ** -(torch.arange(half) / half)
    split = vectors.view(positions, heads, half, 2) if neighbours else vectors.view(positions, heads, 2, half).mT
    x, y = split.unbind(-1)
    return torch.stack([x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()], -1).flatten(1)


def test_interleaved_rows_turn_by_neighbours_as_the_others_turn_by_halves() -> None:
    weight, inputs = torch.randn(4 * 8, 16), torch.randn(5, 16)
    ours = turned(inputs @ weight.T, 4, 1e4, neighbours=False)
    theirs = turned(inputs @ interleaved(weight, 4).T, 4, 1e4, neighbours=True)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_file_holds_every_weight(architecture: str, dtype: torch.dtype, bundled: Base, tmp_path: Path) -> None:
    changes = {"sliding_window": None} if architecture == "mistral" else {}
    base = sized(architecture, bundled, **changes)
    base.model.to(dtype)  # type: ignore[arg-type]
    save_gguf(base, tmp_path / "out", "a name")
    read = gguf.GGUFReader(tmp_path / "out" / FILE)
    found = {one.name: torch.tensor(gguf.dequantize(one.data, one.tensor_type)) for one in read.tensors}
    own = {name: weight.float() for name, weight in base.model.state_dict().items()}
    tied = base.model.config.tie_word_embeddings
    assert len(found) == len(own) - tied and ("output.weight" in found) != tied
    for ours, theirs in (("embed_tokens", "token_embd"), ("layers.1.mlp.down_proj", "blk.1.ffn_down"),
                         ("layers.0.self_attn.v_proj", "blk.0.attn_v"), ("norm", "output_norm")):  # fmt: skip
        assert torch.equal(found[f"{theirs}.weight"], own[f"model.{ours}.weight"])
    key = own["model.layers.1.self_attn.k_proj.weight"]
    heads = base.model.config.num_key_value_heads
    assert torch.equal(found["blk.1.attn_k.weight"], key if architecture == "qwen3" else interleaved(key, heads))


def test_the_file_says_how_the_model_is_shaped_and_what_its_tokens_are(bundled: Base, tmp_path: Path) -> None:
    base = sized("llama", bundled)
    assert save_gguf(base, tmp_path / "out", "a name") is False  # nothing else splits text as the bundled base does
    fields = gguf.GGUFReader(tmp_path / "out" / FILE).fields
    said = {name: field.contents() for name, field in fields.items()}
    assert said["general.architecture"] == "llama" and said["general.name"] == "a name"
    assert said["llama.attention.head_count_kv"] == 2 and said["llama.context_length"] == 256
    assert said["llama.rope.freq_base"] == base.model.config.rope_parameters["rope_theta"]
    tokens, vocabulary = said["tokenizer.ggml.tokens"], bundled.tokenizer.get_vocab()
    assert [tokens[number] for number in vocabulary.values()] == list(vocabulary)
    assert len(tokens) == len(bundled.tokenizer) + 3 and tokens[-1].startswith("[unused")
    assert tokens[said["tokenizer.ggml.eos_token_id"]] == bundled.tokenizer.eos_token
    assert said["tokenizer.chat_template"] == bundled.tokenizer.chat_template
    assert said["tokenizer.ggml.token_type"][vocabulary["<|im_end|>"]] == gguf.TokenType.CONTROL


def test_what_llama_cpp_would_run_otherwise_is_refused(bundled: Base, tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    for architecture, changes, said in (
        ("mistral", {}, "sliding window of 8"),
        ("llama", {"rope_parameters": rope}, "of type 'linear'"),
    ):
        with pytest.raises(ModelError, match=said):
            save_gguf(sized(architecture, bundled, **changes), tmp_path / "out", "a name")
    assert not (tmp_path / "out").exists()
