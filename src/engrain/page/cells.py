"""What a table's cell is worth: cells are text, written for people, and sorted by the number that they begin with."""

from __future__ import annotations

import re
from collections.abc import Sequence

MISSING = re.compile(r"|[-\u2013\u2014]|n/a\b.*|not applicable\b.*", re.DOTALL)
_NAN = re.compile(r"nan\s*%?(\s*\[nan, nan\])?")
_NUMBER = r"[-\u2212+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e[-+]?\d+)?"
_FIRST = re.compile(rf"[<>≤≥~≈]?\s*({_NUMBER})(?![\d.])")
_INTERVAL = re.compile(rf"({_NUMBER})\s*%?\s*\[({_NUMBER}), ({_NUMBER})\]")


def shown(cell: str) -> str:
    """The cell, where it says that a number is not one: `n/a`."""
    return "n/a" if _NAN.fullmatch(cell.strip()) else cell


def missing(cell: str) -> bool:
    return MISSING.fullmatch(shown(cell).strip()) is not None


def number(cell: str) -> float | None:
    """The number that a cell begins with: 66.1 of "66.1 [62.0, 70.2]", 1234 of "1,234", 98 of "98 %"."""
    found = _FIRST.match(cell.strip())
    return _value(found[1]) if found else None


def interval(cell: str) -> tuple[float, float, float] | None:
    """Mean, low and high of "66.1 [62.0, 70.2]"."""
    found = _INTERVAL.fullmatch(cell.strip())
    return (_value(found[1]), _value(found[2]), _value(found[3])) if found else None


def numeric(column: Sequence[str]) -> bool:
    """Whether every cell that says something begins with a number."""
    said = [cell for cell in column if not missing(cell)]
    return bool(said) and all(number(cell) is not None for cell in said)


def _value(text: str) -> float:
    return float(text.replace(",", "").replace("\u2212", "-"))
