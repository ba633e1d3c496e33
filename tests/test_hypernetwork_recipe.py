"""The recipe of the bundled hypernetwork: rules leave the prompt and nothing else does."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from engrain.agent import bundled_base
from engrain.context import Context
from engrain.model import load_base
from engrain.renderer import Renderer

RECIPE = Path(__file__).parents[1] / "recipes" / "hypernetwork"
sys.path.insert(0, str(RECIPE))

import rules_apart as data  # noqa: E402


def recipe() -> ModuleType:
    """By another name than the file's: both recipes have a make.py."""
    spec = importlib.util.spec_from_file_location("make_hypernetwork", RECIPE / "make.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_rules_are_the_context_and_no_longer_in_the_prompt() -> None:
    for stage in data.STAGES:
        for trajectory, context in data.examples(stage, 3, 8):
            system = trajectory.messages[0].content
            (section,) = context.sections
            assert section.rules and section.name in system
            assert not any(rule in system for rule in section.rules)
            assert "Rules of" not in system


def test_a_stage_leaves_out_tenants_with_more_rules_and_the_seed_decides() -> None:
    few, renderer = data.STAGES[0], Renderer(load_base(bundled_base()).tokenizer)
    made = data.rows(renderer, few, 1, 20_000)
    assert made == data.rows(renderer, few, 1, 20_000) != data.rows(renderer, few, 2, 20_000)
    assert all(row.context and 0 < len(row.context.rules) <= few.most_rules for row in made)
    assert sum(data.tokens_of(stage, 1_200_000) for stage in data.STAGES) == 1_200_000


def test_prompts_without_rules_are_refused() -> None:
    (trajectory, _), *_ = data.examples(data.STAGES[0], 1, 1)
    with pytest.raises(ValueError, match="no rules"):
        data.told(trajectory)


def test_lines_are_right_only_where_every_token_is() -> None:
    make = recipe()
    base = load_base(bundled_base())
    rows = data.rows(Renderer(base.tokenizer), data.STAGES[0], 1, 3_000)[:3]
    share = make.lines_right(base, None, rows, make.ARMS["none"])
    assert 0 <= share < 1 and make.ARMS["none"](rows[0], rows[1]) == Context()
    assert make.ARMS["another's"](rows[0], rows[1]) == rows[1].context
    torch.manual_seed(0)
    untrained = make.SOURCES["rule-wise"](make.Cached(make.BaseEncoder(base)), make.sites(base.model))
    assert make.lines_right(base, untrained, rows, make.ARMS["right"]) == share
