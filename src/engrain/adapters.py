"""`Adapters`: a hypernetwork at work, with what it made last kept in memory.

A context met before costs nothing; one that differs in a rule costs that rule and the composing of all. Invariant: what
is kept is bit for bit what would be made anew, so the source must not be trained meanwhile.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Generic, TypeVar

import torch

from engrain.adapter import Adapter, unstack
from engrain.context import Context, Rule
from engrain.hypernetwork import Hypernetwork, Terms
from engrain.learned import LearnedSource

MOST_BYTES = 2**29
"""Of adapters, and as much again of terms."""
Value = TypeVar("Value", Adapter, Terms)


class Adapters:
    """The same adapter for the same context, and what the source finds too strange for one."""

    def __init__(self, source: LearnedSource) -> None:
        self._source, self._strange = source, cache(source.strange)
        self._adapters, self._terms = _Recent[Adapter](), _Recent[Terms]()

    def __call__(self, context: Context) -> Adapter:
        name = context.digest()
        if name not in self._adapters:
            self._adapters.keep(name, self._make(context))
        return self._adapters(name)

    def strange(self, contexts: Iterable[Context]) -> str:
        """Why one of these should not be left to an adapter; empty if all may be."""
        return next(filter(None, map(self._strange, contexts)), "")

    def knows(self, context: Context) -> bool:
        """Whether its adapter is in memory."""
        return context.digest() in self._adapters

    def forget(self, context: Context) -> bool:
        """Drop its adapter, not its rules' terms; whether there was one."""
        return self._adapters.forget(context.digest())

    def kept(self) -> tuple[int, int]:
        """How many adapters are in memory, and their bytes."""
        return len(self._adapters), self._adapters.bytes

    @torch.no_grad()
    def _make(self, context: Context) -> Adapter:
        source = self._source
        if isinstance(source, Hypernetwork) and context.rules:
            terms = self._of_rules(source, context.rules)
            made = source.compose(Terms.join(terms), [range(len(terms))])
        else:
            made = source([context])
        (adapter,) = unstack(made)
        return adapter

    def _of_rules(self, source: Hypernetwork, rules: Sequence[Rule]) -> list[Terms]:
        """Those that are not kept are made together."""
        new = [rule for rule in rules if rule.digest not in self._terms]
        made = {rule.digest: term for rule, term in zip(new, source.each(new) if new else (), strict=True)}
        kept = {rule.digest: self._terms(rule.digest) for rule in rules if rule.digest not in made}
        for digest, term in made.items():
            self._terms.keep(digest, term)
        return [(made | kept)[rule.digest] for rule in rules]


class _Recent(Generic[Value]):
    """The values used last, up to `MOST_BYTES` of them and at least one."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Value] = OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, name: str) -> bool:
        return name in self._kept

    def forget(self, name: str) -> bool:
        value = self._kept.pop(name, None)
        self.bytes -= _bytes(value) if value is not None else 0
        return value is not None

    def __call__(self, name: str) -> Value:
        """One that is kept."""
        self._kept.move_to_end(name)
        return self._kept[name]

    def keep(self, name: str, value: Value) -> None:
        self.forget(name)
        self._kept[name] = value
        self.bytes += _bytes(value)
        while self.bytes > MOST_BYTES and len(self._kept) > 1:
            self.bytes -= _bytes(self._kept.popitem(last=False)[1])


def _bytes(value: Adapter | Terms) -> int:
    return sum(factor.nbytes for pair in value.factors.values() for factor in pair)
