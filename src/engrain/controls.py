"""Controls: contexts that a hypernetwork is given in the place of a tenant's own.

One that ignores its context does as well under each of them: the field's commonest failure, and a silent one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from engrain.context import Context
from engrain.errors import InputError

Control = Callable[[Callable[[str], Context], str, Sequence[str]], Context]
"""(tenant -> its context, this tenant, all tenants) -> the context to read."""


def own(read: Callable[[str], Context], tenant: str, tenants: Sequence[str]) -> Context:
    """No control: what the tenant's rules say."""
    return read(tenant)


def another(read: Callable[[str], Context], tenant: str, tenants: Sequence[str]) -> Context:
    """The next tenant's. Raises `InputError` if there is no other."""
    names = sorted(tenants)
    if len(names) < 2 or tenant not in names:
        raise InputError(f"no other tenant than {tenant!r} to read the rules of; leave out arm `another`")
    return read(names[(names.index(tenant) + 1) % len(names)])


def shuffled(read: Callable[[str], Context], tenant: str, tenants: Sequence[str]) -> Context:
    """The tenant's own, the words of each rule in another order, always the same."""
    sections = (
        replace(section, rules=tuple(_out_of_order(rule) for rule in section.rules))
        for section in read(tenant).sections
    )
    return Context(tuple(sections))


def empty(read: Callable[[str], Context], tenant: str, tenants: Sequence[str]) -> Context:
    """No rules: the shared term alone, which is a constant adapter."""
    return Context()


def _out_of_order(rule: str) -> str:
    words = rule.split()
    return " ".join(random.Random(rule).sample(words, len(words)))


CONTROLS: Mapping[str, Control] = {"another": another, "shuffled": shuffled, "empty": empty}
