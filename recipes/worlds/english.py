"""English that nobody here wrote: utterances of STAR (MIT) and Taskmaster-4 (CC BY 4.0), from `shared/data`."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class English:
    texts: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    """Lower-case words of 4 to 10 letters, each once, sorted."""


NONE = English()


@cache
def english_of(folder: Path | None) -> English:
    """`NONE` without a folder."""
    if folder is None:
        return NONE
    texts = tuple(_utterances(folder))
    words = {word for text in texts for word in re.findall(r"\b[a-z]{4,10}\b", text)}
    return English(texts, tuple(sorted(words)))


def _utterances(folder: Path) -> Iterator[str]:
    for name in ("star", "taskmaster4"):
        with gzip.open(folder / name / "dialogues.jsonl.gz", "rt", encoding="utf-8") as lines:
            for line in lines:
                yield from _strings(json.loads(line))


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        if " " in value:
            yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            if key.lower() in ("text", "utterance") or isinstance(item, (dict, list)):
                yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
