"""A model as one GGUF file, for llama.cpp and Ollama.

What is written is what llama.cpp's own converter writes of these architectures: its names, and query and key rows in
the order in which its Llama kernel turns them. Weights keep their type; norms are float32. Byte-level BPE tokenizers
only, and of what splits a text before its merges llama.cpp knows some patterns by name: where it does not know the
model's, token ids are exact and text is not, and `save_gguf` says so.

Needs the extra `gguf`. https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
from jaxtyping import Float
from torch import Tensor

from engrain.errors import ModelError
from engrain.files import replacing_directory
from engrain.model import Base

FILE = "model.gguf"
ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
"""By transformers' name."""
DTYPES = {torch.float32: "ALL_F32", torch.float16: "MOSTLY_F16", torch.bfloat16: "MOSTLY_BF16"}
SPLITS = {
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": "gpt-2",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+": "llama-bpe",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+": "qwen2",
}
"""llama.cpp's name of the pattern that splits a text before its merges."""


def save_gguf(base: Base, path: Path, name: str) -> bool:
    """Write `path/model.gguf`; whether llama.cpp splits text as the model's tokenizer does.

    Raises `ModelError` for what it cannot hold: another architecture, rotary embeddings that change with the length,
    another kind of tokenizer.
    """
    config: Any = base.model.config
    if config.model_type not in ARCHITECTURES:
        raise ModelError(f"cannot write {config.model_type!r} as GGUF: expected one of {', '.join(ARCHITECTURES)}; "
                         "export --merged and use llama.cpp's converter")  # fmt: skip
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise ModelError(f"cannot write rotary embeddings of type {rope['rope_type']!r} as GGUF; export --merged and "
                         "use llama.cpp's converter")  # fmt: skip
    if (window := getattr(config, "sliding_window", None)) and window < config.max_position_embeddings:
        raise ModelError(f"cannot write a sliding window of {window} tokens as GGUF, since llama.cpp attends to all in "
                         "these architectures; choose another base")  # fmt: skip
    dtype = base.model.dtype
    if dtype not in DTYPES:
        raise ModelError(f"cannot write weights of {dtype} as GGUF; give --dtype float32, bfloat16 or float16")
    architecture = ARCHITECTURES[config.model_type]
    with replacing_directory(path) as aside:
        writer = gguf.GGUFWriter(aside / FILE, gguf.MODEL_ARCH_NAMES[architecture])
        writer.add_name(name)
        writer.add_file_type(gguf.LlamaFileType[DTYPES[dtype]])
        _write_shape(writer, config)
        known = _write_tokenizer(writer, base)
        names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
        tied = getattr(config, "tie_word_embeddings", False)
        for own, weight in base.model.state_dict().items():
            if tied and own == "lm_head.weight":  # llama.cpp takes the embedding in its place
                continue
            if (said := names.get_name(own, (".weight", ".bias"))) is None:
                raise ModelError(f"cannot write {own} as GGUF: llama.cpp has no name for it; export --merged and use "
                                 "its converter")  # fmt: skip
            if architecture is gguf.MODEL_ARCH.LLAMA and (".q_proj." in own or ".k_proj." in own):
                heads = config.num_attention_heads if ".q_proj." in own else config.num_key_value_heads
                weight = interleaved(weight, heads)
            _write_tensor(writer, said, weight)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return known


def interleaved(weight: Float[Tensor, "rows ..."], heads: int) -> Float[Tensor, "rows ..."]:
    """Rows of each head in the order of llama.cpp's Llama, which turns neighbours where transformers turns halves."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _write_shape(writer: gguf.GGUFWriter, config: Any) -> None:
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _write_tokenizer(writer: gguf.GGUFWriter, base: Base) -> bool:
    tokenizer: Any = base.tokenizer
    said = json.loads(tokenizer.backend_tokenizer.to_str())
    model = said["model"]
    if model["type"] != "BPE" or "ByteLevel" not in json.dumps(said["pre_tokenizer"]):
        raise ModelError(f"cannot write a tokenizer of type {model['type']!r} as GGUF: expected byte-level BPE; export "
                         "--merged and use llama.cpp's converter")  # fmt: skip
    added = {one["id"]: one for one in said["added_tokens"]}
    words = {number: word for word, number in model["vocab"].items()} | {
        at: one["content"] for at, one in added.items()
    }
    size = base.model.config.vocab_size
    pattern = _pattern(said["pre_tokenizer"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(SPLITS.get(pattern, "default"))
    writer.add_token_list([words.get(number, f"[unused {number}]") for number in range(size)])
    writer.add_token_types([_type(number, words, added) for number in range(size)])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    for add, number in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if number is not None:
            add(number)
    writer.add_add_bos_token(False)  # the chat template writes it, where there is one
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
    return pattern in SPLITS


def _type(number: int, words: Mapping[int, str], added: Mapping[int, Any]) -> gguf.TokenType:
    if number not in words:
        return gguf.TokenType.UNUSED
    if number not in added:
        return gguf.TokenType.NORMAL
    return gguf.TokenType.CONTROL if added[number]["special"] else gguf.TokenType.USER_DEFINED


def _pattern(pre_tokenizer: dict[str, Any]) -> str:
    """What splits a text: the expression of the first step that has one; GPT-2's, which ByteLevel has built in."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    written = (step["pattern"].get("Regex", "") for step in steps if step["type"] == "Split")
    built_in = next(iter(SPLITS)) if any(step.get("use_regex") for step in steps) else ""
    return next(written, built_in)


def _write_tensor(writer: gguf.GGUFWriter, name: str, weight: Tensor) -> None:
    if weight.ndim == 1:
        writer.add_tensor(name, weight.float().numpy())
    elif weight.dtype == torch.bfloat16:
        stored = weight.contiguous().view(torch.uint8).numpy()
        writer.add_tensor(name, stored, raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(name, weight.contiguous().numpy())
