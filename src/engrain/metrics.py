"""What a training run says while it goes on: a JSONL file to keep, and one live line on stderr.

Invariant: the file has each step at most once, in order; a resumed run drops the lines after its checkpoint.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from engrain.errors import InputError
from engrain.files import replacing

PLAIN_EVERY_S = 30.0
"""Seconds between lines when stderr is not a terminal."""


class Metrics:
    """Opened at a step: what the file holds beyond it is dropped, then lines are appended."""

    def __init__(self, path: Path, step: int, tokens: int, label: str = "train") -> None:
        _drop_after(path, step)
        self._path, self._label, self._total = path, label, tokens
        self._file = path.open("a", encoding="utf-8")
        self._said = time.monotonic() - PLAIN_EVERY_S + 5  # the first line comes soon
        self._live: Progress | None = None
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"))
            self._live = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
            self._task = self._live.add_task(label, total=tokens, text="")
            self._live.start()

    def write(self, values: Mapping[str, Any]) -> None:
        try:
            self._file.write(json.dumps(dict(values)) + "\n")
            self._file.flush()
        except OSError as error:
            raise InputError(f"cannot write {self._path}: {error.strerror}; free space, then resume") from error

    def show(self, tokens: int, loss: float, speed: float) -> None:
        text = f"loss {loss:.3f}  {speed:,.0f} tokens/s"
        if self._live is not None:
            self._live.update(self._task, completed=tokens, text=text)
        elif time.monotonic() - self._said >= PLAIN_EVERY_S:
            self._said = time.monotonic()
            left = max(0, self._total - tokens) / max(speed, 1e-9)
            share = min(1.0, tokens / self._total)
            print(f"{self._label} {share:.0%}  {text}  {left / 60:.1f} min left", file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
        self._file.close()


def _drop_after(path: Path, step: int) -> None:
    kept: list[str] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                known = json.loads(line)["step"] <= step
            except (ValueError, KeyError, TypeError):  # cut short by a kill
                known = False
            if known and step > 0:
                kept.append(line + "\n")
    with replacing(path) as file:
        file.writelines(kept)
