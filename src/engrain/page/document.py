"""What a report says, whoever shows it: values that JSON keeps, so that a page can be made again from them alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field


@dataclass(frozen=True)
class Table:
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    kind: Literal["table"] = "table"


@dataclass(frozen=True)
class Point:
    """A value at x and its interval; None, or not a number, where it is not known."""

    x: float
    mean: float | None
    low: float | None = None
    high: float | None = None
    count: int = 0
    """How many runs, tasks or tenants it comes from; 0 if that is not said."""


@dataclass(frozen=True)
class Lines:
    """y against x, a line for each series."""

    title: str
    x: str
    y: str
    series: Mapping[str, tuple[Point, ...]]
    about: str = ""
    labels: tuple[str, ...] = ()
    """Names of categories, if x counts them from 0."""
    shares: bool = False
    """Whether y are shares from 0 to 1, shown in percent."""
    diagonal: bool = False
    """Whether x are shares too; where both are equal is drawn."""
    kind: Literal["lines"] = "lines"


@dataclass(frozen=True)
class Distribution:
    """Single values, a row for each series; one that is None, or not a number, is not known."""

    title: str
    unit: str
    series: Mapping[str, tuple[float | None, ...]]
    about: str = ""
    kind: Literal["distribution"] = "distribution"


@dataclass(frozen=True)
class Notes:
    lines: tuple[str, ...]
    title: str = "Notes"
    kind: Literal["notes"] = "notes"


Block = Table | Lines | Distribution | Notes


@dataclass(frozen=True)
class Document:
    title: str
    about: str
    blocks: tuple[Annotated[Block, Field(discriminator="kind")], ...]
