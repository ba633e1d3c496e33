"""The package's surface: few names, all of them there, and no torch until it is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import engrain

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "tokenizers", "peft", "accelerate", "numpy", "llguidance", "httpx", "jsonschema")


def test_all_names_exist_and_none_is_a_module() -> None:
    modules = {path.stem for path in Path(engrain.__file__).parent.iterdir()}
    assert list(engrain.__all__) == sorted(engrain.__all__) and len(engrain.__all__) <= 13
    for name in engrain.__all__:
        assert getattr(engrain, name) is not None
        assert name not in modules
    assert set(engrain.__all__) <= set(dir(engrain))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = engrain.nothing  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("code", ["import engrain", "from engrain.cli import invoke; invoke(['--help'])"])
def test_the_root_and_the_help_load_nothing_heavy(code: str) -> None:
    loaded = f"{code}; import sys; print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, env=os.environ)
    assert done.stderr.strip().endswith("[]")


def test_modules_import_only_upwards() -> None:
    """The order of CONTRIBUTING.md: a module imports modules above it, so one can read from the top."""
    import ast
    import re

    listed = re.search(r"in this order: (.*?)\.", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    assert listed
    order = re.findall(r"\w+", re.sub(r"\(.*?\)", "", listed[1]))
    places = {name: place for place, name in enumerate(order)}
    package = ROOT / "src" / "engrain"
    missing = {path.stem for path in package.glob("*.py")} - {"__init__"} - places.keys()
    assert not missing, f"add {missing} to the order in CONTRIBUTING.md"
    for name in order:
        files = sorted((package / name).glob("*.py")) or [package / f"{name}.py"]
        for node in (node for file in files for node in ast.parse(file.read_text()).body):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("engrain."):
                imported = (node.module or "").split(".")[1]
                assert places[imported] <= places[name], f"{name} imports {imported}, which comes after it"


def test_version_and_licence_are_declared() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["license"] == "Apache-2.0" and "version" in project["dynamic"]
    assert (ROOT / "LICENSE").read_text().strip().startswith("Apache License")
    pins = (ROOT / "constraints.txt").read_text().split("\n")
    assert "torch==2.13.0" in pins
    assert all("==" in line for line in pins if line and not line.startswith("#"))
