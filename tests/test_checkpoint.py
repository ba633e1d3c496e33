from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch

from engrain import checkpoint as module
from engrain.checkpoint import Checkpoint, latest_checkpoint, save_checkpoint
from engrain.errors import InputError, ModelError


def made(step: int, digest: str = "d") -> Checkpoint:
    tensors = {"w": torch.full((3,), float(step)), "random": torch.arange(5, dtype=torch.uint8), "n": torch.tensor(1.0)}
    return Checkpoint(step, digest, tensors, {"tokens": 10 * step, "loss": 0.1})


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, made(3))
    found = latest_checkpoint(tmp_path, "d")
    assert found is not None and (found.step, found.state) == (3, {"tokens": 30, "loss": 0.1})
    for name, tensor in made(3).tensors.items():
        assert torch.equal(found.tensors[name], tensor) and found.tensors[name].dtype == tensor.dtype


def test_nothing_saved_is_none(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "none", "d") is None


def test_the_last_two_are_kept_and_leftovers_of_a_kill_go(tmp_path: Path) -> None:
    (tmp_path / ".step-000000001.abcd1234").mkdir()
    for step in (2, 9, 10, 11):
        save_checkpoint(tmp_path, made(step))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step-000000010", "step-000000011"]


def test_there_is_no_pickle(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, made(1))
    assert sorted(file.name for file in path.iterdir()) == ["state.json", "tensors.safetensors"]
    json.loads((path / "state.json").read_text())


def test_a_truncated_checkpoint_names_the_fix(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, made(1))
    path = save_checkpoint(tmp_path, made(2))
    tensors = path / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-4])
    with pytest.raises(ModelError, match="damaged; delete it to resume from the one before"):
        latest_checkpoint(tmp_path, "d")
    (path / "state.json").write_text("{")
    with pytest.raises(ModelError, match="cannot read the checkpoint"):
        latest_checkpoint(tmp_path, "d")
    (path / "state.json").unlink()
    with pytest.raises(ModelError, match="cannot read the checkpoint"):
        latest_checkpoint(tmp_path, "d")


def test_one_flipped_bit_is_noticed(tmp_path: Path) -> None:
    tensors = save_checkpoint(tmp_path, made(1)) / "tensors.safetensors"
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)
    with pytest.raises(ModelError, match="damaged"):
        latest_checkpoint(tmp_path, "d")


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, made(1, "other"))
    with pytest.raises(ModelError, match="another base, data or settings"):
        latest_checkpoint(tmp_path, "d")


@pytest.mark.parametrize("stage", ["tensors", "state", "flush"])
def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    save_checkpoint(tmp_path, made(1))

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    places: dict[str, tuple[object, str]] = {
        "tensors": (module, "save_file"),
        "state": (Path, "write_text"),
        "flush": (module.os, "fsync"),
    }
    target = places[stage]
    with monkeypatch.context() as patch:
        patch.setattr(target[0], target[1], full)
        with pytest.raises(InputError, match=r"No space left on device; free space"):
            save_checkpoint(tmp_path, made(2))
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-000000001"]
    found = latest_checkpoint(tmp_path, "d")
    assert found is not None and found.step == 1
