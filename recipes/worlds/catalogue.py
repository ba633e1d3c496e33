"""All families, and which of them are held out."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pathlib import Path

from worlds.spec import Family

HERE = Path(__file__).parent
NAMES = tuple(sorted(file.stem for file in (HERE / "families").glob("[a-z]*.py")))
HELD_OUT = tuple(
    line for line in (HERE / "held_out.txt").read_text(encoding="utf-8").splitlines() if not line.startswith("#")
)
TRAINED = tuple(name for name in NAMES if name not in HELD_OUT)


@cache
def family(name: str) -> Family:
    return import_module(f"worlds.families.{name}").FAMILY
