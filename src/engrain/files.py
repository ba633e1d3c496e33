"""Files appear whole or not at all: written aside, flushed to disk, then renamed. Only journals grow."""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TextIO

from engrain.errors import InputError


def _explain(error: OSError, path: Path) -> InputError:
    return InputError(f"cannot write {path}: {error.strerror or error}; free space or choose another place")


@contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """A text file that takes the place of `path` when the block ends without an error.

    Raises `InputError` when the disk is full or the place cannot be written.
    """
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        raise _explain(error, path) from error
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def appending(path: Path) -> Iterator[IO[str]]:
    """A text file to add lines to; those that are flushed stay, whatever happens next. Raises `InputError`."""
    try:
        with path.open("a", encoding="utf-8") as file:
            yield file
    except OSError as error:
        raise _explain(error, path) from error


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Within the block nobody else is in such a block for a file of the same directory, which is made if need be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
    except OSError as error:
        raise _explain(error, path) from error
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


@contextmanager
def replacing_directory(path: Path) -> Iterator[Path]:
    """An empty directory that takes the place of `path` when the block ends without an error."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        aside.mkdir(parents=True)
        yield aside
        old = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.old")
        if path.exists():
            os.replace(path, old)
        os.replace(aside, path)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise _explain(error, path) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
