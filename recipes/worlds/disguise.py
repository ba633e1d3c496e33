"""A family in other words. A base that saw a dozen families only learns their words by heart and then cannot copy the
words of another; here every word is new in each world, so that it has to read.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import cache
from typing import Any

from worlds.language import blended, made_up
from worlds.spec import Family

DISGUISED = 0.7
"""Share of the worlds to train on that are in other words."""
KEPT = {"none", "else", "address", "same", "other", "over", "after", "within", "stop", "done"}
"""Words that mean something to all families or to the notes; nothing is called by them."""
WORD = re.compile("[a-z]{4,}")


def disguised(family: Family, rng: random.Random, lexicon: Sequence[str] = ()) -> Family:
    """The family with other words for its own of four letters or more, the same one throughout: words of the lexicon,
    blends of two of them, and made-up ones."""
    said: dict[str, str] = {}
    taken = set(KEPT)

    def other(word: str) -> str:
        if word not in said:
            new = word
            while new == word or new in taken:
                dice = rng.random() if lexicon else 1.0
                new = rng.choice(lexicon) if dice < 0.5 else blended(rng, lexicon) if dice < 0.75 else made_up(rng)
            taken.add(new)
            said[word] = new
        return said[word]

    @cache
    def text(part: str) -> str:
        return WORD.sub(lambda match: match[0] if match[0] in KEPT else other(match[0]), part)

    def rewritten(part: Any) -> Any:
        if isinstance(part, str):
            return text(part)
        if isinstance(part, Mapping):
            return {rewritten(name): rewritten(value) for name, value in part.items()}
        if isinstance(part, Sequence):
            return tuple(rewritten(value) for value in part)
        if is_dataclass(part) and not isinstance(part, type):
            return replace(part, **{one.name: rewritten(getattr(part, one.name)) for one in fields(part)})
        return part

    return replace(rewritten(family), name=family.name)
