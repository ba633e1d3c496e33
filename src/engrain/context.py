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
from pathlib import Path
from typing import Literal

import yaml

from engrain.errors import InputError, WorkflowError

Kind = Literal["tenant", "tool", "phase", "task", "examples"]


@dataclass(frozen=True)
class Section:
    """One typed part of a context. `settings` is the front matter: names, not behaviour."""

    kind: Kind
    name: str
    rules: tuple[str, ...]
    settings: Mapping[str, str] = field(default_factory=dict, compare=False)

    def canonical(self) -> str:
        rules = sorted(set(map(_plain, self.rules)))
        return json.dumps([self.kind, self.name, rules], ensure_ascii=False)

    def markdown(self) -> str:
        return "\n".join(f"- {rule}" for rule in self.rules)

    def without(self, rule: str) -> Section:
        """Raises `InputError` if the section does not have the rule."""
        wanted = _plain(rule)
        if wanted not in map(_plain, self.rules):
            raise InputError(f"{self.kind} {self.name!r} has no rule {wanted!r:.80}; it has {len(self.rules)} others")
        return replace(self, rules=tuple(one for one in self.rules if _plain(one) != wanted))

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
        return tuple(sorted({Rule(one.kind, _plain(rule)) for one in self.sections for rule in one.rules}))

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


def _plain(rule: str) -> str:
    return " ".join(rule.split())


def read_section(path: Path, kind: Kind = "tenant") -> Section:
    """A Markdown file: optional YAML front matter (`name`, other strings), then one rule a `- ` bullet.

    A bullet may go on over indented lines. Raises `WorkflowError` naming the file and what is missing.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise WorkflowError(f"{path}: cannot read the {kind} profile: {error}") from error
    settings: dict[str, str] = {}
    if text.startswith("---\n"):
        head, mark, text = text[4:].partition("\n---\n")
        if not mark:
            raise WorkflowError(f"{path}: front matter starts with '---' but never ends; close it with a line '---'")
        try:
            loaded = yaml.safe_load(head) or {}
        except yaml.YAMLError as error:
            raise WorkflowError(f"{path}: front matter is not YAML: {str(error).splitlines()[0]}") from error
        if not isinstance(loaded, dict):
            raise WorkflowError(f"{path}: front matter must be 'key: value' lines, got {type(loaded).__name__}")
        settings = {str(key): str(value) for key, value in loaded.items()}
    rules: list[str] = []
    for line in text.splitlines():
        if line.startswith("- "):
            rules.append(line[2:].strip())
        elif rules and line.startswith("  ") and line.strip():
            rules[-1] += " " + line.strip()
    if not rules:
        raise WorkflowError(f"{path}: no rules found; write each rule as a line that starts with '- '")
    return Section(kind, settings.pop("name", path.stem), tuple(rules), settings)
