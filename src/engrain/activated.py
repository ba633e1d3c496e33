"""Rows for an activated adapter, which acts on each of the agent's turns and leaves all before it to the base.

Greenewald et al., "Activated LoRA", 2025, arXiv:2504.12397: the adapter acts from the invocation tokens that open a
turn on. What came before, the agent's earlier turns too, is as the base encodes it, so tenants and phases share it and
a change of adapter encodes nothing again. To train on all turns of a row in one pass, the row is said once by the base,
and then each turn once more, seeing the base's row up to where it opens, and itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from engrain.errors import RenderError
from engrain.renderer import Row


def activated(row: Row, invocation: Sequence[int]) -> Row:
    """The row up to its last turn without loss, then its turns again, which carry the loss.

    Raises `RenderError` if a turn does not open with the invocation tokens.
    """
    if row.rival is not None:
        raise RenderError(
            "an activated adapter is trained on rows of their own, got one with a rival; leave rivals out"
        )
    opening = len(invocation)
    turns = [(start - opening, end) for start, end in _runs(row.mask)]
    for start, _ in turns:
        if start < 0 or row.ids[start : start + opening] != list(invocation):
            raise RenderError(f"expected each of the agent's turns to open with the tokens {list(invocation)}, got "
                              f"{row.ids[max(start, 0) : start + opening]}; train without activation")  # fmt: skip
    ids, mask = row.ids[: turns[-1][0]], [False] * turns[-1][0]
    for start, end in turns:
        ids, mask = ids + row.ids[start:end], mask + [False] * opening + row.mask[start + opening : end]
    return replace(row, ids=ids, mask=mask, turns=tuple(turns))


def _runs(mask: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """Where tokens that carry loss begin and end."""
    start = None
    for place, trained in enumerate([*mask, False]):
        if trained and start is None:
            start = place
        elif not trained and start is not None:
            yield start, place
            start = None
