"""A key names one tenant, and its file holds no key."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import pytest

from engrain.errors import InputError
from engrain.keys import Keys, add_key

LATER = count(1)


def touched(path: Path) -> None:
    """Changed later than anything before, whatever the clock's resolution."""
    later = time.time_ns() + next(LATER) * 10**9
    os.utime(path, ns=(later, later))


def test_a_key_names_its_tenant_and_only_its_hash_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    ours, theirs = add_key(path, "acme", most_at_once=3), add_key(path, "globex")
    keys = Keys(path)
    found = keys.caller(ours), keys.caller(theirs)
    assert [caller and (caller.tenant, caller.most_at_once) for caller in found] == [("acme", 3), ("globex", 16)]
    assert keys.caller("") is None and keys.caller(ours[:-1]) is None and keys.caller(path.read_text()) is None
    assert ours not in path.read_text() and len(ours) > 40
    assert all(keys.caller(one["sha256"]) is None for one in json.loads(path.read_text())["keys"])


def test_keys_made_at_once_are_all_kept(tmp_path: Path) -> None:
    path = tmp_path / "new" / "keys.json"
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda number: add_key(path, f"tenant {number}"), range(24)))
    keys = Keys(path)
    assert [caller and caller.tenant for caller in map(keys.caller, made)] == [f"tenant {n}" for n in range(24)]


def test_keys_come_and_go_while_it_runs_and_a_damaged_file_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    ours = add_key(path, "acme")
    keys = Keys(path)
    new = add_key(path, "new")
    touched(path)
    assert keys.caller(new) is not None
    path.write_text("{")
    touched(path)
    assert keys.caller(ours) is not None and keys.caller(new) is not None
    path.write_text('{"keys": []}')
    touched(path)
    assert keys.caller(ours) is None


@pytest.mark.parametrize(
    "text", ["", "[]", '{"keys": [{"sha256": "12", "tenant": "a"}]}', '{"keys": [{"key": "secret", "tenant": "a"}]}']
)
def test_a_file_that_is_none_is_refused_without_saying_what_is_in_it(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match="engrain key"):
        Keys(tmp_path / "none.json")
    (tmp_path / "keys.json").write_text(text)
    with pytest.raises(InputError, match="engrain key") as error:
        Keys(tmp_path / "keys.json")
    assert "secret" not in str(error.value)
