from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import random_rows

from engrain.batch import CONTEXTS, WINDOW, collate, pack
from engrain.context import Context, Section
from engrain.renderer import Row

LENGTHS = st.lists(st.integers(1, 50), max_size=200)


def rows_of(lengths: list[int]) -> list[Row]:
    return [Row([1] * length, [True] * length) for length in lengths]


@given(LENGTHS, st.integers(1, 60), st.integers(0, 3))
def test_every_row_is_packed_once_and_only_a_long_row_exceeds_the_capacity(
    lengths: list[int], capacity: int, seed: int
) -> None:
    bins = pack(rows_of(lengths), capacity, seed)
    assert sorted(index for batch in bins for index in batch) == list(range(len(lengths)))
    for batch in bins:
        assert sum(lengths[index] for index in batch) <= capacity or len(batch) == 1


@given(LENGTHS, st.integers(50, 100))
def test_at_most_one_batch_a_window_is_less_than_half_full(lengths: list[int], capacity: int) -> None:
    bins = pack(rows_of(lengths), capacity, 0)
    windows = sum(lengths) // (WINDOW * capacity) + 1
    assert sum(2 * sum(lengths[index] for index in batch) <= capacity for batch in bins) <= windows


def test_best_fit_leaves_no_avoidable_batch() -> None:
    assert len(pack(rows_of([6, 4, 7, 3, 5, 5, 9, 1]), 10, 0)) == 4


def test_the_seed_alone_decides() -> None:
    rows = random_rows(100)
    assert pack(rows, 60, 1) == pack(rows, 60, 1)
    assert pack(rows, 60, 1) != pack(rows, 60, 2)


def test_rows_of_one_length_do_not_share_every_batch() -> None:
    lengths = [10] * 500 + [20] * 500
    rows = rows_of(lengths)
    fellows = [{lengths[index] for index in batch} for batch in pack(rows, 35, 0)]
    assert sum(len(kinds) == 2 for kinds in fellows) > 0.8 * len(fellows)


def of_contexts(count: int, rows: int, length: int) -> list[Row]:
    contexts = [Context((Section("tenant", str(number), (f"rule {number}",)),)) for number in range(count)]
    return [Row([number] * length, [True] * length, contexts[number % count]) for number in range(rows)]


def test_rows_of_one_context_lie_together_and_a_batch_has_several() -> None:
    rows = of_contexts(12, 240, 10)
    bins = pack(rows, 200, 0)
    assert sorted(index for batch in bins for index in batch) == list(range(240))
    for batch in bins:
        packed = collate([rows[index] for index in batch])
        assert sum(packed.spans) == len(packed.ids)
        owners = [token % 12 for token in packed.ids.tolist()]
        changes = sum(one != other for one, other in pairwise(owners))
        assert changes == len(packed.contexts) - 1
        starts = [sum(packed.spans[:number]) for number in range(len(packed.spans))]
        named = [packed.contexts[number].sections[0].name for number in range(len(starts))]
        assert named == [str(owners[start]) for start in starts]
    assert sum(len({index % 12 for index in batch}) for batch in bins) > 0.75 * CONTEXTS * len(bins)


def test_rows_without_a_context_among_others_have_an_empty_one() -> None:
    (one,) = of_contexts(1, 1, 3)
    packed = collate([one, Row([7], [True]), one])
    assert packed.contexts == (one.context, Context()) and packed.spans == (6, 1)
    assert collate([Row([7], [True])]).contexts == ()


def test_positions_restart_and_a_first_token_never_carries_loss() -> None:
    packed = collate([Row([1, 2, 3], [True, False, True]), Row([4, 5], [True, True])])
    assert packed.ids.tolist() == [1, 2, 3, 4, 5]
    assert packed.position_ids.tolist() == [0, 1, 2, 0, 1]
    assert packed.mask.tolist() == [False, False, True, False, True]
    assert packed.lengths == (3, 2)
    assert packed.ids.dtype == torch.long and packed.mask.dtype == torch.bool


def test_no_capacity_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        pack([], 0, 0)
