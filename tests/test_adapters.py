from __future__ import annotations

from collections.abc import Sequence

import pytest
from sources import EMPTY, LONG, SHORT, equal, perturbed, rule_wise, source_of

from engrain import adapters
from engrain.adapter import reduced, unstack
from engrain.adapters import Adapters
from engrain.context import Context, Rule
from engrain.hypernetwork import Hypernetwork, Terms


@pytest.mark.parametrize("kind", ["rule-wise", "joint"])
def test_it_gives_what_the_source_makes_bit_for_bit_and_the_same_object_again(kind: str) -> None:
    source = perturbed(source_of(kind))
    made = Adapters(source)
    for context in (LONG, SHORT, EMPTY):
        fresh = source([context])
        assert equal(made(context).factors, reduced(unstack(fresh)[0]).factors)
        assert made(context) is made(Context(context.sections[::-1]))


def test_a_rule_that_was_met_before_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    source, read = rule_wise(), list[Rule]()
    each = source.each

    def watched(rules: Sequence[Rule]) -> list[Terms]:
        read.extend(rules)
        return each(rules)

    monkeypatch.setattr(source, "each", watched)
    made = Adapters(source)
    made(LONG)
    edited = LONG.replacing(LONG.rules[0], "refund up to 50")
    adapter = made(edited)
    assert len(read) == len(LONG.rules) + 1
    monkeypatch.undo()
    assert equal(adapter.factors, reduced(unstack(source([edited]))[0]).factors)


def test_memory_is_bounded_and_what_was_used_last_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    source = rule_wise()
    assert isinstance(source, Hypernetwork)
    made = Adapters(source)
    size = sum(factor.nbytes for factor in made(LONG).tensors())
    monkeypatch.setattr(adapters, "MOST_BYTES", size + 1)
    made = Adapters(source)
    first = made(LONG)
    assert made(LONG) is first
    made(SHORT)
    again = made(LONG)
    assert again is not first and equal(again.factors, first.factors)
    assert made.kept() == (1, size) and made.knows(LONG) and not made.knows(SHORT)
    assert made.forget(LONG) and not made.forget(LONG) and made.kept() == (0, 0)
