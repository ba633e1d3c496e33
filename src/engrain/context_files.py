"""Contexts from files: Markdown, tool schemas, demonstrations. What is malformed is an error with its place and fix."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from markdown_it.tree import SyntaxTreeNode

from engrain import markdown
from engrain.context import Context, Kind, Section
from engrain.errors import InputError, WorkflowError
from engrain.markdown import words
from engrain.sections import examples_section, named, tool_section
from engrain.trajectory import read_trajectories

_TITLE = re.compile(r"(tenant|tool|phase) (.+)|(task|examples)")
_TITLES = "'# tenant NAME', '# tool NAME', '# phase NAME', '# task' or '# examples'"


def read_section(path: Path, kind: Kind = "tenant") -> Section:
    """The one section of a kind in a Markdown file. Raises `WorkflowError` naming the file and what is missing."""
    found = [section for section in _read_markdown(path, kind) if section.kind == kind]
    if len(found) != 1:
        raise WorkflowError(f"{path}: expected one {kind} section, got {len(found)}; write one '# {kind} ...' heading")
    return found[0]


def read_context(path: Path, kind: Kind = "tenant") -> Context:
    """A context from a Markdown file, tool schemas (`.json`) or demonstrations (`.jsonl`).

    Markdown may begin with YAML front matter (`name`, other strings). It holds several sections when its level-1
    headings are `# tenant NAME`, `# tool NAME`, `# phase NAME`, `# task` or `# examples`, else one of the kind asked
    for. Raises `InputError` naming the file and the fix.
    """
    if path.suffix == ".jsonl":
        return Context((_read_examples(path),))
    if path.suffix != ".json":
        return Context(_read_markdown(path, kind))
    schemas = _json(_read(path, "tool schemas"), str(path))
    return Context(tuple(_placed_tool(one, str(path)) for one in (schemas if isinstance(schemas, list) else [schemas])))


def _read(path: Path, what: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise WorkflowError(f"{path}: cannot read the {what}: {error}") from error


def _read_examples(path: Path) -> Section:
    runs = list(read_trajectories(path))
    try:
        section = examples_section(runs)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    if not section.rules:
        raise InputError(f"{path}: no runs found; make them with `engrain record`")
    return section


def parse_context(text: str, name: str, kind: Kind = "tenant") -> Context:
    """A context from Markdown at hand, as `read_context` reads it from a file; a section without a name has this one.

    Raises `InputError`.
    """
    return Context(_parse_markdown(text, Path(name), kind))


def _read_markdown(path: Path, kind: Kind) -> tuple[Section, ...]:
    return _parse_markdown(_read(path, f"{kind} profile"), path, kind)


def _parse_markdown(whole: str, path: Path, kind: Kind) -> tuple[Section, ...]:
    settings, text = _front_matter(whole, path)
    before = whole.count("\n") - text.count("\n")
    blocks = markdown.parse(text)
    if not any(_is_title(block) and _TITLE.fullmatch(words(block)) for block in blocks):
        return (_section(path, before, kind, settings.pop("name", path.stem), blocks, settings),)
    parts: dict[tuple[Kind, str], list[SyntaxTreeNode]] = {}
    key: tuple[Kind, str] | None = None
    for block in blocks:
        place = _place(path, before, block)
        if _is_title(block):
            key = _key(words(block), place)
            if key in parts:
                raise WorkflowError(f"{place}: a second '# {words(block)}'; put its rules under the first")
            parts[key] = []
        elif key is None:
            raise WorkflowError(f"{place}: text before the first section; move it under {_TITLES}")
        else:
            parts[key].append(block)
    return tuple(_section(path, before, *key, part, settings) for key, part in parts.items())


def _key(title: str, place: str) -> tuple[Kind, str]:
    match = _TITLE.fullmatch(title)
    if not match:
        raise WorkflowError(f"{place}: expected {_TITLES}, got '# {title}'; write '## {title}'")
    return cast("Kind", match[1] or match[3]), match[2] or ""


def _front_matter(text: str, path: Path) -> tuple[dict[str, str], str]:
    """The settings and the text after them."""
    if not text.startswith("---\n"):
        return {}, text
    head, mark, text = text[3:].partition("\n---\n")
    if not mark:
        raise WorkflowError(f"{path}: front matter starts with '---' but never ends; close it with a line '---'")
    try:
        loaded = yaml.safe_load(head) or {}
    except yaml.YAMLError as error:
        raise WorkflowError(f"{path}: front matter is not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(loaded, dict):
        raise WorkflowError(f"{path}: front matter must be 'key: value' lines, got {type(loaded).__name__}")
    return {str(key): str(value) for key, value in loaded.items()}, text


def _is_title(block: SyntaxTreeNode) -> bool:
    return block.type == "heading" and block.tag == "h1"


def _place(path: Path, before: int, block: SyntaxTreeNode) -> str:
    return f"{path}:{before + 1 + (block.map[0] if block.map else 0)}"


def _section(
    path: Path, before: int, kind: Kind, name: str, blocks: Sequence[SyntaxTreeNode], settings: Mapping[str, str]
) -> Section:
    rules: list[str] = []
    prose: list[SyntaxTreeNode] = []
    for block in blocks:
        if kind == "tool" and block.type == "fence" and (block.info.startswith("json") or block.content[:1] == "{"):
            place = _place(path, before, block)
            rules += _placed_tool(_json(block.content, place), place, name).rules
        else:
            prose.append(block)
    found = markdown.block_rules(prose)
    rules += (named(name, rule) for rule in found) if kind in ("tool", "phase") else found
    if not rules:
        title = f"the {kind} section {name!r}".replace(" ''", "")
        raise WorkflowError(f"{path}: no rules found in {title}; write each as a line that starts with '- '")
    return Section(kind, name, tuple(rules), settings)


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WorkflowError(f"{place}: not JSON ({error}); write the tool's JSON Schema") from error


def _placed_tool(schema: Any, place: str, name: str = "") -> Section:
    """A tool's section; under a heading its schema may leave out the name, or be that of the parameters alone."""
    if not isinstance(schema, dict):
        raise WorkflowError(f"{place}: expected a tool's schema as a JSON object, got {type(schema).__name__}")
    if name and not {"function", "parameters", "inputSchema", "input_schema"} & schema.keys():
        schema = {"name": name, "description": schema.get("description"), "parameters": schema}
    elif name and "function" not in schema:
        schema = {"name": name, **schema}
    try:
        section = tool_section(schema)
    except WorkflowError as error:
        raise WorkflowError(f"{place}: {error}") from error
    if name not in ("", section.name):
        raise WorkflowError(f"{place}: the schema is of {section.name!r}, the heading of {name!r}; give both one name")
    return section
