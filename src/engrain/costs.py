"""What ways of adapting an agent cost in all, and after how many requests one has paid for another.

Costs are seconds on the machine at hand: before the first request, after each change of a rule, and for each request.
Invariant: a way is never picked for its price if it was shown to succeed less often than another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engrain.errors import InputError
from engrain.score import paired_difference


@dataclass(frozen=True)
class Priced:
    """One way, as measured: seconds `once`, for each `change` of a rule and for each `request`."""

    name: str
    once: float
    change: float
    request: float
    successes: Mapping[str, float]
    """By task: a share of its runs. All methods met the same tasks."""

    def total(self, requests: float, changes: float = 0.0) -> float:
        """Seconds for so many requests and changes."""
        return self.once + self.change * changes + self.request * requests


def break_even(usual: Priced, other: Priced, changes_per_request: float = 0.0) -> float:
    """Requests from which on `other` has cost no more than `usual`: 0 if from the first, infinity if never for good."""
    dearer = other.once - usual.once
    saved = usual.request - other.request + (usual.change - other.change) * changes_per_request
    if dearer <= 0 and saved >= 0:
        return 0.0
    return dearer / saved if dearer > 0 and saved > 0 else math.inf


def pick(methods: Sequence[Priced], requests: float, changes: float = 0.0, *, seed: int = 0) -> Priced:
    """The cheapest of those that were not shown to succeed less often than the best. Raises `InputError` for none."""
    if not methods:
        raise InputError("no method to pick from; measure at least one arm")
    best = max(methods, key=lambda one: sum(one.successes.values()))
    good = [one for one in methods if not _worse(one, best, seed)]
    return min(good, key=lambda one: one.total(requests, changes))


def _worse(method: Priced, best: Priced, seed: int) -> bool:
    """Whether the whole interval of the difference lies below 0."""
    return paired_difference(method.successes, best.successes, seed=seed).high < 0
