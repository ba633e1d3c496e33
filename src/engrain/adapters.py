"""`Adapters`: a hypernetwork at work, with what it made last kept in memory.

A context met before costs nothing; one that differs in a rule costs that rule and the composing of all. Invariant: what
is kept is bit for bit what would be made anew, so the source must not be trained meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch

from engrain.adapter import Adapter, reduced, unstack
from engrain.context import Context, Rule
from engrain.hypernetwork import Hypernetwork, Terms
from engrain.learned import LearnedSource
from engrain.recent import Recent

MOST_BYTES = 2**30
"""Of adapters, and as much again of terms."""


class Adapters:
    """The same adapter for the same context, and what the source finds too strange for one."""

    def __init__(self, source: LearnedSource) -> None:
        self._source, self._strange = source, lru_cache(4096)(source.strange)
        self._adapters, self._terms = Recent[Adapter](MOST_BYTES, _bytes), Recent[Terms](MOST_BYTES, _bytes)

    def __call__(self, context: Context) -> Adapter:
        name = context.digest()
        if name not in self._adapters:
            self._adapters[name] = self._make(context)
        return self._adapters[name]

    def strange(self, contexts: Iterable[Context]) -> str:
        """Why one of these should not be left to an adapter; empty if all may be."""
        return next(filter(None, map(self._strange, contexts)), "")

    def knows(self, context: Context) -> bool:
        """Whether its adapter is in memory."""
        return context.digest() in self._adapters

    def forget(self, context: Context) -> bool:
        """Drop its adapter, not its rules' terms; whether there was one."""
        return self._adapters.pop(context.digest())

    def kept(self) -> tuple[int, int]:
        """How many adapters are in memory, and their bytes."""
        return len(self._adapters), self._adapters.total

    @torch.no_grad()
    def _make(self, context: Context) -> Adapter:
        source = self._source
        if isinstance(source, Hypernetwork) and context.rules:
            terms = self._of_rules(source, context.rules)
            made = source.compose(Terms.join(terms), [range(len(terms))])
        else:
            made = source([context])
        (adapter,) = unstack(made)
        return reduced(adapter)

    def _of_rules(self, source: Hypernetwork, rules: Sequence[Rule]) -> list[Terms]:
        """Those that are not kept are made together."""
        terms = {rule: self._terms[rule.digest] for rule in rules if rule.digest in self._terms}
        new = [rule for rule in rules if rule not in terms]
        terms |= zip(new, source.each(new) if new else (), strict=True)
        for rule in new:
            self._terms[rule.digest] = terms[rule]
        return [terms[rule] for rule in rules]


def _bytes(value: Adapter | Terms) -> int:
    return sum(factor.nbytes for pair in value.factors.values() for factor in pair)
