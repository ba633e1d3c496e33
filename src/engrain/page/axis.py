"""Axes: where a value lies, and the round values that are written beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

WIDE = 20.0
"""The ratio of the largest to the smallest value from which a scale is logarithmic."""
_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high` on pixels from `start` to `end`. Invariant: low < high, and all four are finite."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (math.log(x) if self.logarithmic else x for x in (self.low, self.high, value))
        return self.start + (self.end - self.start) * min(1.0, max(0.0, (at - low) / (high - low)))


def finite(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]


def axis(values: Sequence[float], start: float, end: float, *, zero: bool = False, most: int = 6) -> Axis:
    """An axis for finite values, logarithmic where they range widely; else with zero on it if asked."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if low > 0 and high / low >= WIDE:
        return _logarithmic(low, high, start, end, most)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if math.isclose(low, high):
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if low else (0.0, 1.0)
    step = _step((high - low) / (most - 1))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(count * step for count in range(first, last + 1))
    return Axis(ticks[0], ticks[-1], start, end, ticks)


def shares(start: float, end: float) -> Axis:
    return Axis(0.0, 1.0, start, end, (0.0, 0.25, 0.5, 0.75, 1.0))


def _step(least: float) -> float:
    power = 10.0 ** math.floor(math.log10(least))
    return power * next(step for step in _STEPS if step * power >= least * (1 - 1e-9))


def _logarithmic(low: float, high: float, start: float, end: float, most: int) -> Axis:
    """From one of 1, 2 and 5 in a decade to another; where there are too many, decades, or every second one."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    fine = [part * 10.0**decade for decade in decades for part in (1, 2, 5)]
    bottom = max(value for value in fine if value <= low * (1 + 1e-9))
    top = min(value for value in fine if value >= high * (1 - 1e-9))
    ticks = [value for value in fine if bottom <= value <= top]
    if len(ticks) > most + 1:
        ticks = [10.0**decade for decade in decades if bottom <= 10.0**decade <= top]
    return Axis(bottom, top, start, end, tuple(ticks[:: math.ceil(len(ticks) / (most + 1))]), logarithmic=True)


def written(value: float) -> str:
    """A value in as few digits as people need: 0.05, 12.5, 1,000, 27.6k, 2e-05."""
    for least, size, letter in ((999.5e6, 1e9, "G"), (999.5e3, 1e6, "M"), (9999.5, 1e3, "k")):
        if least <= abs(value) < 1e12:
            return f"{value / size:.3g}{letter}"
    return f"{value:,.0f}" if 999.5 <= abs(value) < 9999.5 else f"{value:.3g}"
