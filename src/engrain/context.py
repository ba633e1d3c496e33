"""`Context`: what an adapter is made for, as typed sections of rules.

A section is a tenant's profile, a tool, a phase, a task or examples; its rules are the units that a hypernetwork
encodes and that a person edits. Canonical form ignores the order of rules and sections and the width of white space,
so equal meaning has an equal digest and the digest names the adapter.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml

from engrain.errors import WorkflowError

Kind = Literal["tenant", "tool", "phase", "task", "examples"]


@dataclass(frozen=True)
class Section:
    """One typed part of a context. `settings` is the front matter: names, not behaviour."""

    kind: Kind
    name: str
    rules: tuple[str, ...]
    settings: Mapping[str, str] = field(default_factory=dict)

    def canonical(self) -> str:
        rules = sorted({" ".join(rule.split()) for rule in self.rules})
        return json.dumps([self.kind, self.name, rules], ensure_ascii=False)

    def markdown(self) -> str:
        return "\n".join(f"- {rule}" for rule in self.rules)


@dataclass(frozen=True)
class Context:
    sections: tuple[Section, ...] = ()

    def digest(self) -> str:
        """SHA-256, hexadecimal, of the canonical form."""
        canonical = json.dumps(sorted(section.canonical() for section in self.sections))
        return hashlib.sha256(canonical.encode()).hexdigest()


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
