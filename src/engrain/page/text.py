"""A report as Markdown: its tables and notes. Plots are on the page only."""

from __future__ import annotations

from collections.abc import Iterator

from engrain.page.cells import shown
from engrain.page.document import Block, Document, Notes, Table


def markdown(report: Document) -> str:
    """Title, what it is, then its tables and notes."""
    parts = [f"# {report.title}", report.about, *(part for block in report.blocks for part in _parts(block))]
    return "\n\n".join(parts) + "\n"


def _parts(block: Block) -> Iterator[str]:
    match block:
        case Table():
            if block.caption:
                yield f"## {block.caption}"
            yield table_markdown(block)
        case Notes() if block.lines:
            yield "\n".join(f"- {line}" for line in block.lines)


def table_markdown(table: Table) -> str:
    rows = (table.headings, ["---"] * len(table.headings), *table.rows)
    return "\n".join("| " + " | ".join(shown(cell).replace("|", r"\|") for cell in row) + " |" for row in rows)
