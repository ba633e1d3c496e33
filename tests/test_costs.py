"""Prices are added up rightly, and a cheaper way that fails more often is never picked."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest

from engrain.costs import Priced, break_even, pick
from engrain.errors import InputError


def tasks(right: int, of: int = 100) -> Mapping[str, float]:
    return {str(number): float(number < right) for number in range(of)}


PROMPT = Priced("prompt", 0.0, 0.0, 3.0, tasks(95))
LORA = Priced("lora", 1000.0, 1000.0, 1.0, tasks(96))
HYPERNETWORK = Priced("hypernetwork", 5000.0, 0.1, 1.0, tasks(94))
BLIND = Priced("blind", 0.0, 0.0, 0.5, tasks(60))


def test_a_dear_start_pays_for_itself_where_the_totals_meet() -> None:
    requests = break_even(PROMPT, LORA)
    assert requests == 500.0
    assert PROMPT.total(requests) == LORA.total(requests)
    assert LORA.total(requests + 1) < PROMPT.total(requests + 1)


def test_changes_of_rules_move_it_or_take_it_away() -> None:
    assert break_even(PROMPT, LORA, changes_per_request=0.001) == 1000.0
    assert break_even(PROMPT, LORA, changes_per_request=0.01) == math.inf
    assert break_even(PROMPT, HYPERNETWORK, changes_per_request=0.01) == pytest.approx(2501, abs=1)


def test_what_costs_less_at_once_and_later_needs_no_request() -> None:
    assert break_even(LORA, BLIND) == 0.0
    assert break_even(BLIND, LORA) == math.inf


def test_the_pick_depends_on_how_much_there_is_to_do() -> None:
    every = [PROMPT, LORA, HYPERNETWORK, BLIND]
    assert pick(every, 100).name == "prompt"
    assert pick(every, 10_000).name == "lora"
    assert pick(every, 10_000, changes=100).name == "hypernetwork"
    with pytest.raises(InputError, match="no method"):
        pick([], 100)


def test_what_is_not_shown_to_be_worse_may_be_picked() -> None:
    few = Priced("few", 0.0, 0.0, 0.5, tasks(3, of=4))
    assert pick([Priced("all", 0.0, 0.0, 3.0, tasks(4, of=4)), few], 100) is few
