"""Text <-> token ids, in which only the chat template can write marks.

A mark is an added token of the base (`<|im_end|>`, `<tool_call>`) or another tag of its calls. Untrusted text is
*guarded* before it enters the template: a BREAK goes inside every mark that it spells. Encoding cuts at each BREAK, so
the text keeps its characters and the special token never arises; decoding puts the BREAK back, so parsing cannot be
misled either. What is not covered: role marks that are ordinary text in the base's vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from engrain.errors import RenderError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BREAK = "\ufdd0"
"""A Unicode noncharacter, which text never holds for interchange; one that comes in is replaced by U+FFFD."""


def any_of(marks: Iterable[str]) -> str:
    """A regular expression for any of the marks, the longest first."""
    return "|".join(re.escape(mark) for mark in sorted(marks, key=len, reverse=True)) or "(?!)"


def breaker(marks: Iterable[str]) -> Callable[[str], str]:
    """A function that puts a BREAK inside every mark that a text spells."""
    inside = re.compile(f"(?=(?:{any_of(marks)}))(.)", re.DOTALL)
    return lambda text: inside.sub(rf"\1{BREAK}", text.replace(BREAK, "\ufffd"))


class Codec:
    """A fast tokenizer of the `tokenizers` library, with its added tokens as marks."""

    ids: dict[str, int]
    names: dict[int, str]
    guard: Callable[[str], str]

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._core: Any = getattr(tokenizer, "backend_tokenizer")  # noqa: B009  (only fast tokenizers have it)
        added = self._core.get_added_tokens_decoder()
        self.ids = {token.content: number for number, token in added.items() if len(token.content.strip()) > 1}
        self.names = {number: content for content, number in self.ids.items()}
        self.pattern = re.compile(f"({any_of(self.ids)})")
        self.guard = self._guard_ids = breaker(self.ids)
        self._text = lru_cache(16384)(self._encode_text)
        odd = any(token.lstrip or token.rstrip or token.single_word for token in added.values())
        self._apart = not odd and self._splits_at_marks()

    def protect(self, tags: Iterable[str]) -> None:
        """Guard these marks too, which the base spells in ordinary tokens."""
        self.guard = breaker({*self.ids, *tags})

    def normal(self, text: str) -> str:
        """Text as the tokenizer normalises it."""
        return self._core.normalizer.normalize_str(text) if self._core.normalizer else text

    def encode(self, text: str) -> list[int]:
        """Raises `RenderError` for text that is not valid Unicode."""
        if not self._apart:
            return list(self._text(text))
        return [token for part in self.pattern.split(text) if part for token in self._part(part)]

    def decode(self, ids: Sequence[int], stop: Sequence[int] = ()) -> str:
        """Guarded text up to the first stop token; genuine marks appear bare."""
        parts: list[str] = []
        run: list[int] = []

        def flush() -> None:
            if run:
                parts.append(self._guard_ids(self._core.decode(run, skip_special_tokens=False)))
                run.clear()

        for token in ids:
            if token in stop:
                break
            if token in self.names:
                flush()
                parts.append(self.names[token])
            else:
                run.append(token)
        flush()
        return "".join(parts)

    def _part(self, part: str) -> tuple[int, ...]:
        return (self.ids[part],) if part in self.ids else self._text(part)

    def _encode_text(self, text: str) -> tuple[int, ...]:
        try:
            parts = [self._core.encode(part, add_special_tokens=False).ids for part in text.split(BREAK) if part]
        except (TypeError, ValueError) as error:
            raise RenderError(
                f"not text: expected valid Unicode; got {text[:60]!r}; remove lone surrogates from it"
            ) from error
        return tuple(token for part in parts for token in part)

    def _splits_at_marks(self) -> bool:
        """Whether tokenising between the marks gives what tokenising the whole gives; then repeats are cheap."""
        text = "".join(f"a b{mark} c\n" for mark in self.ids)
        apart = [token for part in self.pattern.split(text) if part for token in self._part(part)]
        return apart == self._core.encode(text, add_special_tokens=False).ids
