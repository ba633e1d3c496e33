"""Rivals: rows that a context must make likelier than another context does.

A hypernetwork that ignores its context writes every row as likely under any. Two rows of one task, whose contexts
differ in a rule, part at one token: up to it both read alike, so only the context can tell what comes.
"""

from __future__ import annotations

from dataclasses import replace

from engrain.renderer import Rival, Row


def contrasted(row: Row, other: Row) -> Row:
    """The row with the other's context as its rival, at the token where they part.

    As it is if they never part at a trained token, or if the other has no context.
    """
    parting = next((n for n, pair in enumerate(zip(row.ids, other.ids, strict=False)) if pair[0] != pair[1]), 0)
    if not parting or other.context is None or not row.mask[parting]:
        return row
    return replace(row, rival=Rival(other.context, parting))
