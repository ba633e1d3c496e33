"""The recipe of the bundled base: what it trains on, how it splits text, and that it runs from nothing to a base."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM

from engrain.agent import bundled_base
from engrain.model import base_digest, load_base, save_base
from engrain.workflow import load_workflow

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "recipes" / "base"))
DESK = load_workflow(ROOT / "examples" / "support_desk")

import average  # noqa: E402
import data  # noqa: E402
import make  # noqa: E402
from induction import write_induction_heads  # noqa: E402
from tokenizer import train_tokenizer  # noqa: E402
from worlds import catalogue  # noqa: E402
from worlds.trajectories import trajectories as worlds_trajectories  # noqa: E402

ANNEAL = data.STAGES[-1]


@pytest.fixture(scope="module")
def trajectories():
    return list(data.rows(ANNEAL, 3, 80))


def test_nothing_held_out_is_trained_on():
    for stage in data.STAGES:
        for one in data.rows(stage, 3, 40):
            assert one.workflow.rsplit("_", 1)[0] not in (*catalogue.HELD_OUT, DESK.name)
            assert one.tenant not in DESK.tenants
            assert not any(f"Rules of {name}" in one.messages[0].content for name in DESK.tenants)


def test_the_stages_take_all_tokens_and_the_last_has_the_long_and_faulty_rows():
    assert sum(data.tokens_of(stage, 56_000_000) for stage in data.STAGES) == 56_000_000
    assert max(data.STAGES, key=lambda stage: stage.depths.faults) is ANNEAL
    assert max(data.STAGES, key=lambda stage: stage.longest) is ANNEAL
    assert [stage.drills for stage in data.STAGES] == sorted((stage.drills for stage in data.STAGES), reverse=True)
    assert {one.kind for one in data.rows(data.STAGES[0], 3, 20)} == {"route"}


def test_contexts_come_in_three_depths_and_the_seed_decides(trajectories):
    runs = [t for t in trajectories if t.teacher == "script"]
    depths = {(t.tools != "[]", "Rules of" in t.messages[0].content) for t in runs}
    assert depths == {(True, True), (False, True), (False, False)}
    again = list(data.rows(ANNEAL, 3, 80))
    assert [t.messages for t in again] == [t.messages for t in trajectories]
    assert [t.messages for t in data.rows(ANNEAL, 4, 5)] != [t.messages for t in data.rows(ANNEAL, 1, 5)]


def test_a_call_is_few_tokens_and_numbers_are_digits():
    tokenizer = train_tokenizer((text for t in worlds_trajectories(3, 160) for text in make.texts_of(t)), 1500)
    call = '<tool_call>{"name": "get_order", "arguments": {"order_id": "A4821"}}</tool_call>'
    tokens = [str(tokenizer.decode([token])) for token in tokenizer.encode(call, add_special_tokens=False)]
    assert "".join(tokens) == call and len(tokens) <= 16
    assert tokens[-7:-2] == ["A", "4", "8", "2", "1"]
    text = "Ünïcode, tabs\t and 🙂 survive."
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


NEWLINE, FIRST_WORD = 42, 50


def repeated(rng: random.Random) -> tuple[list[int], list[int]]:
    """A random sequence twice, and the places where what comes next is known."""
    half = rng.choices(range(FIRST_WORD, 300), k=30)
    return half * 2, list(range(33, 59))


def marked_lines(rng: random.Random) -> tuple[list[int], list[int]]:
    """Lines of a mark of two tokens, one phrase and a code, said again in another order, and the places before their
    codes."""
    phrase = rng.choices(range(FIRST_WORD, 300), k=6)
    marks = [(letter, digit) for letter in range(10, 13) for digit in range(3)]
    lines = [[NEWLINE, *mark, *phrase, *rng.choices(range(10), k=3)] for mark in marks]
    again = rng.sample(lines, len(lines))
    ids = [token for line in (*lines, *again) for token in line]
    return ids, [len(lines[0]) * (len(lines) + line) + 8 for line in range(len(lines))]


def copied(model: LlamaForCausalLM, draw: Callable[[random.Random], tuple[list[int], list[int]]]) -> float:
    """How often the likeliest token is the right one."""
    rng = random.Random(0)
    hits = []
    for _ in range(8):
        ids, places = draw(rng)
        with torch.no_grad():
            guess = model(input_ids=torch.tensor([ids])).logits[0].argmax(-1).tolist()
        hits += [guess[place] == ids[place + 1] for place in places]
    return sum(hits) / len(hits)


@pytest.mark.parametrize(("draw", "least"), [(repeated, 0.95), (marked_lines, 0.3)])
def test_the_model_copies_without_training(draw, least):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=192,
        num_hidden_layers=3,
        intermediate_size=256,
        num_attention_heads=3,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        initializer_range=0.04,
        rope_parameters={"rope_type": "default", "rope_theta": 1e9},
    )
    model = LlamaForCausalLM(config)
    assert copied(model, draw) < 0.2
    write_induction_heads(model, NEWLINE, torch.Generator().manual_seed(0))
    assert copied(model, draw) > least


def test_the_recipe_runs_from_nothing_to_a_base(tmp_path, monkeypatch):
    monkeypatch.setattr(make, "PER_CHUNK", 20)
    monkeypatch.setattr(make, "TOKENIZER_TRAJECTORIES", 60)
    monkeypatch.setattr(make, "WATCHED", {"copy": 2})
    monkeypatch.setattr(make, "WATCH_EVERY", 1)
    monkeypatch.setattr(make, "measure", lambda base, suite, tasks, seed: {one.name: tasks / 8 for one in suite})
    make.main(tmp_path / "base", tokens=3000, work=tmp_path / "work", processes=1, layers=3)
    base = load_base(tmp_path / "base")
    assert base.tokenizer.chat_template and base.model.config.num_hidden_layers == 3
    card = (tmp_path / "base" / "README.md").read_text()
    assert "--size cpu --tokens 3000 --seed 0" in card and "apache-2.0" in card
    assert all(f"| {stage.name} |" in card for stage in data.STAGES)
    assert "| stage | tokens | loss | copy |" in card and card.count("| 25 |") >= len(data.STAGES)


def test_the_recipe_goes_on_from_an_earlier_base_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(make, "STAGES", ())
    make.main(tmp_path / "base", work=tmp_path / "work", start=bundled_base())
    assert base_digest(tmp_path / "base") == base_digest(bundled_base())
    card = (tmp_path / "base" / "README.md").read_text()
    digest = base_digest(bundled_base())[:12]
    assert f"earlier base, {digest}" in card and f"--start {digest}" in card
    assert "Capability probes" not in card


def test_it_begins_at_the_stage_that_is_asked_for(tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(make, "train_stage", lambda base, work, recipe, number, *_: begun.append(number) or base)
    monkeypatch.setattr(make, "how", lambda *_: "")
    make.main(tmp_path / "base", work=tmp_path / "work", start=bundled_base(), first="anneal")
    assert [make.STAGES[number].name for number in begun] == ["anneal"]
    with pytest.raises(typer.BadParameter, match="'annealing' is none of routes, "):
        make.main(tmp_path / "base", work=tmp_path / "work", start=bundled_base(), first="annealing")
    with pytest.raises(typer.BadParameter, match="--start"):
        make.main(tmp_path / "base", work=tmp_path / "work", first="anneal")


def test_the_card_takes_the_probes_of_this_base_only(tmp_path, monkeypatch):
    monkeypatch.setattr(make, "STAGES", ())
    again = partial(make.main, tmp_path / "base", work=tmp_path / "work", start=bundled_base(), probes=tmp_path)
    (tmp_path / "report.md").write_text("# Capability probes\n\n| probe |\n")
    (tmp_path / "report.json").write_text(json.dumps({"digest": base_digest(bundled_base())}))
    again()
    assert (tmp_path / "base" / "README.md").read_text().endswith("\n## Capability probes\n\n| probe |\n")
    (tmp_path / "report.json").write_text(json.dumps({"digest": "0" * 64}))
    with pytest.raises(typer.BadParameter, match="of base 000000000000, this one is"):
        again()


def test_both_sizes_are_as_large_as_they_say():
    parameters = {}
    for size, recipe in make.SIZES.items():
        with torch.device("meta"):
            model = LlamaForCausalLM(recipe.config(recipe.vocabulary, 0, 1))
        parameters[size] = sum(parameter.numel() for parameter in model.parameters())
    assert 3e6 < parameters["cpu"] < 4e6 and 15e6 < parameters["gpu"] < 25e6


def test_the_mean_of_bases_has_the_mean_of_their_weights(tmp_path: Path):
    paths = [tmp_path / "first", tmp_path / "second"]
    base = load_base(bundled_base())
    for number, path in enumerate(paths, 1):
        base.model.state_dict()["model.embed_tokens.weight"].fill_(float(number))
        save_base(base, path)
        card = make.opening(base.model.num_parameters()) + f"- run {number}\n\n## Capability probes\n\nits own\n"
        (path / "README.md").write_text(card)
    average.main(paths, tmp_path / "mean")
    weights = load_base(tmp_path / "mean").model.state_dict()
    assert (weights["model.embed_tokens.weight"] == 1.5).all()
    assert torch.equal(weights["model.norm.weight"], base.model.state_dict()["model.norm.weight"])
    card = (tmp_path / "mean" / "README.md").read_text()
    assert all(f"## {base_digest(path)[:12]}\n\n- run {number}\n" in card for number, path in enumerate(paths, 1))
    assert card.count("# The bundled base") == 1 and "its own" not in card
    (paths[1] / "README.md").unlink()
    with pytest.raises(typer.BadParameter, match=r"second: expected README\.md"):
        average.main(paths, tmp_path / "mean")
