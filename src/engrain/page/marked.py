"""Tables of committed reports in other files, such as the README, so that no number is copied by hand.

A table stands between `<!-- report:NAME -->` and `<!-- /report:NAME -->`; it is the first of `NAME.json`, or with
`NAME:2` its second.
"""

from __future__ import annotations

import re
from pathlib import Path

from engrain.errors import InputError
from engrain.page.directory import read_page
from engrain.page.document import Table
from engrain.page.text import table_markdown

_BEGUN = "<!-- report:"
_MARKED = re.compile(rf"({_BEGUN}(?P<label>[\w.-]+(?::\d+)?) -->).*?(<!-- /report:(?P=label) -->)", re.DOTALL)


def filled(text: str, reports: Path) -> str:
    """The text, with the table of `reports/NAME.json` between the marks of each NAME.

    Raises `InputError` for a mark that is not closed and for a report or table that is not there.
    """
    closed = len(_MARKED.findall(text))
    if closed != text.count(_BEGUN):
        raise InputError(f"of {text.count(_BEGUN)} marks `{_BEGUN}NAME -->` only {closed} are closed; end each with "
                         "`<!-- /report:NAME -->`, before the next begins")  # fmt: skip
    return _MARKED.sub(lambda mark: f"{mark[1]}\n{_table(reports, mark['label'])}\n{mark[3]}", text)


def _table(reports: Path, label: str) -> str:
    name, _, number = label.partition(":")
    path, wanted = reports / f"{name}.json", int(number or 1)
    tables = [block for block in read_page(path).blocks if isinstance(block, Table)]
    if not 1 <= wanted <= len(tables):
        raise InputError(f"{path}: has {len(tables)} tables, no {wanted}; mark one of them as `report:{name}:NUMBER`")
    return table_markdown(tables[wanted - 1])
