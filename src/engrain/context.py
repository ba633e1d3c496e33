"""`Context`: what an adapter is made for, as typed sections of rules.

A section is a tenant's profile, a tool, a phase, a task or examples; its rules are the units that a hypernetwork
encodes and that a person edits. Canonical form ignores the order of rules and sections and the width of white space,
so equal meaning has an equal digest and the digest names the adapter.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from engrain.errors import InputError
from engrain.markdown import plain

Kind = Literal["tenant", "tool", "phase", "task", "examples"]


@dataclass(frozen=True)
class Section:
    """One typed part of a context. `settings` is the front matter: names, not behaviour."""

    kind: Kind
    name: str
    rules: tuple[str, ...]
    settings: Mapping[str, str] = field(default_factory=dict, compare=False)

    def canonical(self) -> str:
        rules = sorted(set(map(plain, self.rules)))
        return json.dumps([self.kind, self.name, rules], ensure_ascii=False)

    def markdown(self) -> str:
        return "\n".join(f"- {rule}" for rule in self.rules)

    def without(self, rule: str) -> Section:
        """Raises `InputError` if the section does not have the rule."""
        wanted = plain(rule)
        if wanted not in map(plain, self.rules):
            raise InputError(f"{self.kind} {self.name!r} has no rule {wanted!r:.80}; it has {len(self.rules)} others")
        return replace(self, rules=tuple(one for one in self.rules if plain(one) != wanted))

    def with_rule(self, rule: str) -> Section:
        return replace(self, rules=(*self.rules, rule))


@dataclass(frozen=True, order=True)
class Rule:
    """One rule as a hypernetwork reads it, apart from all others. Equal rules of two tenants are one and the same."""

    kind: Kind
    text: str

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps([self.kind, self.text], ensure_ascii=False).encode()).hexdigest()


@dataclass(frozen=True)
class Context:
    sections: tuple[Section, ...] = ()

    @cached_property
    def rules(self) -> tuple[Rule, ...]:
        """Every rule once, in canonical order."""
        return tuple(sorted({Rule(one.kind, plain(rule)) for one in self.sections for rule in one.rules}))

    def digest(self) -> str:
        """SHA-256, hexadecimal, of the canonical form."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        canonical = json.dumps(sorted(section.canonical() for section in self.sections))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def without(self, rule: Rule) -> Context:
        """The context in which no section of the rule's kind has it. Raises `InputError` if none has."""
        if rule not in self.rules:
            raise InputError(f"the context has no {rule.kind} rule {rule.text!r:.80}; it has {len(self.rules)} others")
        return Context(tuple(_without(section, rule) for section in self.sections))

    def replacing(self, rule: Rule, text: str) -> Context:
        """The context with another text in the place of a rule. Raises `InputError` if it does not have the rule."""
        at = [rule in Context((section,)).rules for section in self.sections]
        left = self.without(rule).sections
        return Context(tuple(one.with_rule(text) if had else one for one, had in zip(left, at, strict=True)))


def _without(section: Section, rule: Rule) -> Section:
    return section.without(rule.text) if rule in Context((section,)).rules else section
