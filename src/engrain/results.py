"""A directory of results: what they were made with, and trajectories that are made once.

Invariant: a file of trajectories is there whole or not at all, and what is there is not made again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from engrain.errors import InputError
from engrain.files import replacing
from engrain.trajectory import Trajectory, read_trajectories, write_trajectories

SETTINGS = "settings.json"


def read_settings(out: Path) -> dict[str, Any] | None:
    """What the directory's results were made with; None if there are none yet."""
    path = out / SETTINGS
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); choose another directory with -o") from error


def write_settings(out: Path, settings: Mapping[str, Any]) -> None:
    with replacing(out / SETTINGS) as file:
        json.dump(settings, file, indent=2)


def kept(
    path: Path, count: int, make: Callable[[], Iterable[Trajectory]], progress: Callable[[int, int], None]
) -> list[Trajectory]:
    """The trajectories of a file; if there is none, `count` of them are made and written there."""
    if path.exists():
        return list(read_trajectories(path))
    trajectories: list[Trajectory] = []
    progress(0, count)
    for trajectory in make():
        trajectories.append(trajectory)
        progress(len(trajectories), count)
    write_trajectories(path, trajectories)
    return trajectories
