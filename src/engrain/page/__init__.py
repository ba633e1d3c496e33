"""The report page: a neutral description of a report, as one HTML file that needs nothing else, and as Markdown.

    document     what a report says: tables, plots and notes, as plain data
    cells        what a table's cell is worth: a number, an interval, nothing
    axis         round ticks, and where values lie
    charts       plots as SVG
    web, text    the page, and the tables and notes as Markdown
    directory    report.json, report.md and report.html
    marked       tables of committed reports in the README

Invariant: whatever a report's words are, they are text on the page; a number that is missing is a gap, never a mark.
"""

from engrain.page.directory import REPORT, TABLE, WEB, read_page, write_report
from engrain.page.document import Block, Distribution, Document, Lines, Notes, Point, Table
from engrain.page.marked import filled
from engrain.page.text import markdown
from engrain.page.web import html

__all__ = [
    "REPORT",
    "TABLE",
    "WEB",
    "Block",
    "Distribution",
    "Document",
    "Lines",
    "Notes",
    "Point",
    "Table",
    "filled",
    "html",
    "markdown",
    "read_page",
    "write_report",
]
