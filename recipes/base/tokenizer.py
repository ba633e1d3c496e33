"""The base's tokenizer: byte-level BPE, trained on our own format so that the skeleton of a call is a few tokens.

Text splits into words, single digits (so that numbers of any size are read and copied digit by digit) and the fixed
pieces of a JSON call, which become one token each.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

MARKS = ("<|pad|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>")
PIECES = (r'\{"name": "', r'", "arguments": \{"', r'": \{"', r'"\}\}', r'": "', r'", "', r'": ', r', "', r'\{"')
SPLIT = "|".join((*PIECES, r" ?[\p{L}_]+", r"\p{N}", r"\n+", r" ?[^\s\p{L}\p{N}_]+", r"\s+(?!\S)", r"\s"))


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer of at most `vocabulary` tokens, with the chat template beside this file."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [  # type: ignore[assignment]
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=list(MARKS),
            show_progress=False,
            min_frequency=2,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<|pad|>", eos_token="<|im_end|>")
    tokenizer.chat_template = (Path(__file__).parent / "chat_template.jinja").read_text()
    return tokenizer
