"""The directory of a compile under way: `<AGENT>.work`, kept until the agent is whole.

Invariant: it belongs to exactly one command. The same command goes on in it; any other is refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engrain.errors import InputError
from engrain.files import replacing
from engrain.spent import Spent

SETTINGS = "compile.json"


def work_directory(out: Path) -> Path:
    return out.with_name(out.name + ".work")


class Work:
    """The directory of what is under way, for exactly one command; made when there is something to keep.

    Raises `InputError` if it holds another compile.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.settings = json.loads(json.dumps(settings, default=lambda value: str(Path(value).resolve())))
        try:
            found = json.loads((path / SETTINGS).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            raise InputError(f"{path / SETTINGS} cannot be read ({error}); delete {path} to start over") from error
        if changed := [key for key in self.settings if found.get(key) != self.settings[key]]:
            key = changed[0]
            raise InputError(
                f"{path} holds an unfinished compile with {key}={found.get(key)!r}, now {self.settings[key]!r}; "
                f"repeat that command, or delete it to start over"
            )

    def claim(self) -> Path:
        if not (self.path / SETTINGS).exists():
            with replacing(self.path / SETTINGS) as file:
                json.dump(self.settings, file, indent=2)
        return self.path

    @contextmanager
    def clocked(self, spent: Callable[[], Spent]) -> Iterator[Callable[[], Spent]]:
        """What this compile took: `spent` by this call, and by interrupted ones before."""
        file = self.claim() / "spent.json"
        before = Spent(**json.loads(file.read_text())) if file.exists() else Spent(0.0, 0.0)

        def clock() -> Spent:
            return before + spent()

        try:
            yield clock
        finally:
            with replacing(file) as text:
                json.dump(asdict(clock()), text)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
