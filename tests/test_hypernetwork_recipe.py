"""The recipe of the bundled hypernetwork: rules leave the prompt and nothing else does."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch

from engrain.agent import BUNDLED_HYPERNETWORK, bundled_base
from engrain.context import Context, Section
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
        for example in data.examples(stage, 3, 8):
            system = example.trajectory.messages[0].content
            (section,) = example.context.sections
            assert section.rules and section.name in system
            assert not any(rule in system for rule in section.rules)
            assert "Rules of" not in system


def test_a_stage_leaves_out_tenants_with_more_rules_and_the_seed_decides() -> None:
    few, renderer = data.STAGES[0], Renderer(load_base(bundled_base()).tokenizer)
    made, prompted = data.rows(renderer, few, 1, 20_000)
    assert (made, prompted) == data.rows(renderer, few, 1, 20_000)
    assert made != data.rows(renderer, few, 2, 20_000)[0]
    for row, whole in zip(made, prompted, strict=True):
        written = [[t for t, bit in zip(one.ids, one.mask, strict=True) if bit] for one in (row, whole)]
        assert written[0] == written[1] and len(whole.ids) > len(row.ids)
    assert all(row.context and 0 < len(row.context.rules) <= few.most_rules for row in made)
    assert sum(data.tokens_of(stage, 1_800_000) for stage in data.STAGES) == 1_800_000


def test_prompts_without_rules_are_refused() -> None:
    example, *_ = data.examples(data.STAGES[0], 1, 1)
    with pytest.raises(ValueError, match="no rules"):
        data.told(example.trajectory)


def test_an_edit_changes_one_rule_and_the_row_parts_where_its_value_does() -> None:
    tokenizer = load_base(bundled_base()).tokenizer
    made, _ = data.rows(Renderer(tokenizer), data.STAGES[0], 4, 20_000)
    rivals = [row for row in made if row.rival is not None]
    assert len(rivals) > 0.6 * len(made)  # a rule that is drawn again may be the same
    for row in rivals:
        assert row.context is not None and row.rival is not None
        own, other = set(row.context.rules), set(row.rival.context.rules)
        assert len(own - other) <= 1 and len(other - own) <= 1 and own != other
        parting = row.rival.at
        line = str(tokenizer.decode(row.ids[:parting])).rpartition("\n")[2]
        assert row.mask[parting] and ": " in line


def test_an_edit_of_a_rule_changes_what_is_done_in_a_task() -> None:
    renderer = Renderer(load_base(bundled_base()).tokenizer)
    tasks = replace(data.STAGES[-1], drills=0.0)
    made = [one for one in data.examples(tasks, 3, 30) if one.edited is not None]
    assert len(made) > 15
    for example in made:
        assert example.edited is not None
        after, context = example.edited
        own, other = set(example.context.rules), set(context.rules)
        assert len(own - other) == len(other - own) == 1
        assert after.messages[:2] == example.trajectory.messages[:2] and after.messages != example.trajectory.messages
    rows, _ = data.rows(renderer, tasks, 3, 20_000)
    assert any(row.rival is not None for row in rows)


def test_what_is_right_is_counted_by_value_and_by_line() -> None:
    make = recipe()
    base = load_base(bundled_base())
    rows, prompted = make.unseen(Renderer(base.tokenizer), data.STAGES[0], 12)
    none, right = make.ARMS["none"], make.ARMS["right"]
    assert none(rows[0], rows[1]) == Context() and make.ARMS["another's"](rows[0], rows[1]) == rows[1].context
    assert make.values_right(base, None, rows, none) < 0.3 < 0.8 < make.values_right(base, None, prompted, none)
    share = make.lines_right(base, None, rows[:3], none)
    assert 0 <= share < 1
    torch.manual_seed(0)
    untrained = make.SOURCES["rule-wise"](make.Cached(make.BaseEncoder(base)), make.sites(base.model)).train()
    assert make.lines_right(base, untrained, rows[:3], right) == share and untrained.training


@pytest.mark.parametrize("distilled", [False, True])
def test_what_no_rule_bears_on_is_taught_by_the_base_itself(distilled: bool) -> None:
    make, base = recipe(), load_base(bundled_base())
    made = make.taught(base, replace(data.STAGES[0], disguised=0.0), 1, 15_000, distilled)
    others = [row for row in made if row.choices is not None and row.rival is None]
    rest = [row for row in made if row not in others]
    assert 0 < len(others) < len(rest) or distilled
    assert all(row.context for row in made) and all((row.choices is not None) == distilled for row in rest)


def test_a_stage_keeps_its_share_of_rivals() -> None:
    make, base = recipe(), load_base(bundled_base())
    every, few = (
        make.taught(base, replace(data.STAGES[0], rivals=share, disguised=0.0), 1, 20_000, False)
        for share in (1.0, 0.2)
    )
    kept, of = (sum(row.rival is not None for row in rows) for rows in (few, every))
    assert 0 < kept < 0.5 * of and [row.ids for row in few] == [row.ids for row in every]


def test_it_goes_on_from_a_hypernetwork_at_a_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, base = recipe(), load_base(bundled_base())
    few = replace(data.STAGES[0], name="few", disguised=0.0)
    monkeypatch.setattr(make, "STAGES", (replace(few, name="before"), few))
    monkeypatch.setattr(make, "WATCHED", 2)
    monkeypatch.setattr(make, "tokens_of", lambda stage, of: of)
    earlier = make.SOURCES["rule-wise"](make.Cached(make.BaseEncoder(base)), make.sites(base.model))
    torch.nn.init.constant_(earlier.heads.strength, 0.5)
    make.save_hypernetwork(tmp_path / "earlier", earlier, base)
    head = tmp_path / "earlier" / "hypernetwork.json"
    head.write_text(head.read_text().replace(base.digest, "0" * 64))  # of another base
    again = partial(make.main, tmp_path / "out", work=tmp_path / "work", tokens=4000, asked=2)
    again(start=tmp_path / "earlier", first="few")
    assert {path.name for path in (tmp_path / "work").iterdir()} == {"few"}
    source = make.load_hypernetwork(tmp_path / "out", base)
    assert (source.heads.strength - 0.5).abs().max() < 0.1
    for wrong in ({"first": "few"}, {"start": tmp_path / "earlier", "first": "fewer"}):
        with pytest.raises(make.typer.BadParameter, match="--start"):
            again(**wrong)


def test_a_wider_shared_term_says_the_same_at_first() -> None:
    make, base = recipe(), load_base(bundled_base())
    encoder, known = make.BaseEncoder(base), make.sites(base.model)
    narrow, wide = (make.SOURCES["rule-wise"](encoder, known, make.Settings(shared_rank=rank)) for rank in (2, 5))
    for parameter in narrow.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    make.go_on(wide, narrow.state_dict())
    contexts = [Context((Section("tenant", "one", ("the limit is 5", "the desk is north")),))]
    before, after = (source.eval()(contexts) for source in (narrow, wide))
    for site, (a, b) in before.factors.items():
        torch.testing.assert_close(after.factors[site].b @ after.factors[site].a, b @ a, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError):
        make.go_on(narrow, wide.state_dict())


def test_the_bundled_hypernetwork_knows_the_rules_it_has_read_and_no_others() -> None:
    make, base = recipe(), load_base(bundled_base())
    assert all(file.stat().st_size <= 16e6 for file in BUNDLED_HYPERNETWORK.iterdir())
    source = make.load_hypernetwork(BUNDLED_HYPERNETWORK, base)
    rows, _ = make.unseen(Renderer(base.tokenizer), replace(data.STAGES[0], most_rules=8), 10, seed=make.UNSEEN + 7)
    right, edited = (make.values_right(base, source, rows, make.ARMS[arm]) for arm in ("right", "edited"))
    assert right >= 0.7 and edited <= 0.3
