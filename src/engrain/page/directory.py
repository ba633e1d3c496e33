"""A report's directory: `report.json` with its numbers and its page, and the page as Markdown and as HTML.

Invariant: the two are made from what the JSON holds, and can be made again from it alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from engrain.errors import InputError
from engrain.files import replacing
from engrain.page.document import Document
from engrain.page.text import markdown
from engrain.page.web import html

REPORT = "report.json"
TABLE = "report.md"
WEB = "report.html"
PAGE = "page"
"""The key of the JSON that holds the document."""


def write_report(out: Path, report: Mapping[str, Any], page: Document) -> None:
    """Write the three. `report` are the numbers, under any keys but `page`."""
    with replacing(out / REPORT) as file:
        json.dump(_finite({**report, PAGE: asdict(page)}), file, indent=2, ensure_ascii=False)
    for name, text in ((TABLE, markdown(page)), (WEB, html(page))):
        with replacing(out / name) as file:
            file.write(text)


def read_page(path: Path) -> Document:
    """The document in a report's JSON. Raises `InputError`."""
    again = "run the command that wrote it again: finished work is kept"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        return TypeAdapter(Document).validate_python(report[PAGE])
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a directory with {path.name}") from error
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: has no {PAGE!r}; {again}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in (PAGE, *first["loc"]))
        raise InputError(f"{path}: {place}: {first['msg']}; {again}") from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON in UTF-8 ({error}); {again}") from error


def _finite(value: Any) -> Any:
    """NaN is not JSON."""
    match value:
        case dict():
            return {key: _finite(item) for key, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
        case float() if not math.isfinite(value):
            return None
        case _:
            return value
