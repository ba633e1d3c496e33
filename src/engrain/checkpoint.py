"""Training state on disk: safetensors and JSON, no pickle.

Invariant: a directory named `step-…` under the checkpoint folder is complete. It is written aside, flushed to disk and
renamed; only then are older ones removed. Whatever fails, the earlier checkpoint stays.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from engrain.errors import ModelError
from engrain.files import replacing_directory

SCHEMA = "engrain.checkpoint/1"
_TENSORS, _STATE = "tensors.safetensors", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """`tensors` are parameters, optimizer moments and generator states; `state` is plain JSON."""

    step: int
    digest: str
    """Of everything that must be the same for a resumed run to continue this one."""
    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int = 2) -> Path:
    """Write a checkpoint, then remove all but the newest `keep`."""
    path = folder / f"step-{checkpoint.step:09d}"
    with replacing_directory(path) as aside:
        try:
            save_file(
                {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()},
                aside / _TENSORS,
            )
        except SafetensorError as error:
            raise OSError(f"{_TENSORS}: {error}") from error
        head = {"schema": SCHEMA, "step": checkpoint.step, "digest": checkpoint.digest}
        head |= {"tensors": _sha256(aside / _TENSORS), "state": dict(checkpoint.state)}
        (aside / _STATE).write_text(json.dumps(head, indent=1) + "\n", encoding="utf-8")
        for part in (aside / _TENSORS, aside / _STATE, aside):
            _flush(part)
    _flush(folder)
    for old in [*_saved(folder)[:-keep], *folder.glob(".step-*")]:  # hidden ones were left by a killed process
        shutil.rmtree(old, ignore_errors=True)
    return path


def latest_checkpoint(folder: Path, digest: str) -> Checkpoint | None:
    """The newest checkpoint, or None if there is none.

    Raises `ModelError` if it is damaged or belongs to another run.
    """
    saved = _saved(folder)
    return _load(saved[-1], digest) if saved else None


def _load(path: Path, digest: str) -> Checkpoint:
    again = "delete it to resume from the one before, or to start again"
    try:
        head = json.loads((path / _STATE).read_text(encoding="utf-8"))
        if head["schema"] != SCHEMA:
            raise ModelError(f"{path}: expected {SCHEMA!r}, got {head['schema']!r}; {again}")
        if head["digest"] != digest:
            raise ModelError(
                f"{path}: made with another base, data or settings; restore those, or choose another output directory"
            )
        if head["tensors"] != _sha256(path / _TENSORS):
            raise ModelError(f"{path}: {_TENSORS} is damaged; {again}")
        return Checkpoint(int(head["step"]), head["digest"], load_file(path / _TENSORS), head["state"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot read the checkpoint ({error}); {again}") from error


def _saved(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
