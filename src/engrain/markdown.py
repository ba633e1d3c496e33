"""Markdown as rules: each bullet, numbered item, paragraph or code block is one.

Invariant: a rule makes sense alone. It carries the headings and the bullet that it stands under as its prefix, and so
neither the order of rules nor the width of lines means anything.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from itertools import zip_longest

from markdown_it import MarkdownIt
from markdown_it.tree import SyntaxTreeNode

_LISTS = ("bullet_list", "ordered_list")
_OFF = ["blockquote", "code", "html_block", "lheading", "reference"]
"""Off, because they would take text away: `>300`, an indented line, `<tag>`, a paragraph above `---`, `[VIP]: yes`."""


def plain(text: str) -> str:
    """The text on one line, its words one space apart."""
    return " ".join(text.split())


def under(prefix: str, text: str) -> str:
    """`text` with what it stands under: "Refunds: over 300 ask finance"."""
    return ": ".join(filter(None, (prefix.rstrip(" .:;"), text)))


def parse(text: str) -> list[SyntaxTreeNode]:
    """The blocks of a text, without its comments; line numbers stay."""
    text = re.sub(r"<!--.*?-->", lambda comment: "\n" * comment[0].count("\n"), text, flags=re.DOTALL)
    parser = MarkdownIt("commonmark", {"maxNesting": 200}).disable(_OFF)
    return SyntaxTreeNode(parser.parse(text)).children


def words(node: SyntaxTreeNode) -> str:
    """The words of a heading, paragraph or code block as they are written."""
    return plain(node.children[0].content if node.children else node.content)


def rules(text: str) -> tuple[str, ...]:
    return tuple(block_rules(parse(inspect.cleandoc(text))))


def block_rules(blocks: Sequence[SyntaxTreeNode], prefix: str = "") -> Iterator[str]:
    """A paragraph that ends with a colon right before a list is the prefix of the list's items."""
    headings: dict[int, str] = {}
    lead = inside = prefix
    for block, after in zip_longest(blocks, blocks[1:]):
        if block.type == "heading":
            level = int(block.tag[1:])
            headings = {other: text for other, text in headings.items() if other < level} | {level: words(block)}
            inside = prefix
            for other in sorted(headings):
                inside = under(inside, headings[other])
        elif block.type in _LISTS:
            for item in block.children:
                yield from _item_rules(item, lead)
        elif block.type == "paragraph" and words(block).endswith(":") and after is not None and after.type in _LISTS:
            lead = under(inside, words(block))
            continue
        elif block.type in ("paragraph", "fence") and words(block):
            yield under(inside, words(block))
        lead = inside


def _item_rules(item: SyntaxTreeNode, prefix: str) -> Iterator[str]:
    """The item's own text, unless it only introduces others with a colon; then what is nested in it."""
    text = " ".join(words(block) for block in item.children if block.type in ("paragraph", "heading"))
    nested = [block for block in item.children if block.type not in ("paragraph", "heading")]
    if text and not (nested and text.endswith(":")):
        yield under(prefix, text)
    yield from block_rules(nested, under(prefix, text))
