"""API keys: which tenant a caller is. A file holds the SHA-256 of each key, never a key.

    {"keys": [{"sha256": "9f86d0...", "tenant": "acme", "most_at_once": 4, "tokens_a_minute": 100000}]}

Invariant: a key names one tenant, and nothing else that a caller sends does. The file is read again when it changes, so
tenants come and go while a server runs; a file that cannot be read then leaves the keys that were read before.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engrain.errors import InputError
from engrain.files import alone, replacing


class Caller(BaseModel):
    """Whose key it is, how many of the tenant's requests may be under way or waiting, and its tokens a minute."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    tenant: str = Field(min_length=1)
    most_at_once: int = Field(default=16, ge=1)
    tokens_a_minute: int | None = Field(default=None, ge=1)
    """Read and written; by default without a limit."""


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")
    keys: list[Caller] = []


class Keys:
    """The callers of a file, by key. Raises `InputError` if the file cannot be read at first."""

    def __init__(self, path: Path) -> None:
        self._path, self._read_at = path, -1
        self._callers: dict[str, Caller] = {}
        self._read()

    def caller(self, key: str) -> Caller | None:
        with suppress(OSError, InputError):
            if self._path.stat().st_mtime_ns != self._read_at:
                self._read()
        return self._callers.get(_sha256(key))

    def _read(self) -> None:
        self._read_at = self._path.stat().st_mtime_ns if self._path.exists() else -1
        self._callers = {caller.sha256: caller for caller in _load(self._path).keys}


class Everybody:
    """In the place of keys: whoever asks, with a key or without, is one tenant."""

    def __init__(self, tenant: str) -> None:
        self._caller = Caller(sha256=_sha256(""), tenant=tenant, most_at_once=10**6)

    def caller(self, key: str) -> Caller:
        return self._caller


def add_key(path: Path, tenant: str, most_at_once: int = 16, tokens_a_minute: int | None = None) -> str:
    """A new key for a tenant, its hash added to the file: the only time that the key is known. Raises `InputError`."""
    key = f"engrain-{secrets.token_urlsafe(32)}"
    caller = Caller(sha256=_sha256(key), tenant=tenant, most_at_once=most_at_once, tokens_a_minute=tokens_a_minute)
    with alone(path):
        file = _load(path) if path.exists() else _File()
        file.keys.append(caller)
        with replacing(path) as written:
            written.write(json.dumps(file.model_dump(), indent=1) + "\n")
    return key


def _load(path: Path) -> _File:
    try:
        return _File.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: cannot read the keys ({type(error).__name__}); make one with `engrain key`"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{path}: field {field!r}: {first['msg']}; make keys with `engrain key`") from error


def _sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
