"""The recipe of the bundled base: what it trains on, how it splits text, and that it runs from nothing to a base."""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engrain.model import load_base
from engrain.workflow import load_workflow

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "recipes" / "base"))
DESK = load_workflow(ROOT / "examples" / "support_desk")

import data  # noqa: E402
import make  # noqa: E402
from induction import write_induction_heads  # noqa: E402
from tokenizer import train_tokenizer  # noqa: E402


@pytest.fixture(scope="module")
def trajectories():
    return list(data.trajectories(3, 80))


def test_nothing_held_out_is_trained_on(trajectories):
    requests = sys.modules["engrain_workflow_support_desk.requests"]
    assert not {trajectory.tenant for trajectory in trajectories} & set(DESK.tenants)
    openings = [opening.split("{")[0] for opening in requests.OPENINGS_HELD_OUT]
    for trajectory in trajectories:
        assert trajectory.outcome.success
        assert not any(name in message.content for name in DESK.tenants for message in trajectory.messages)
        assert not any(trajectory.messages[1].content.startswith(opening) for opening in openings)


def test_contexts_come_in_three_depths_and_the_seed_decides(trajectories):
    depths = {(t.tools != "[]", "Rules of" in t.messages[0].content) for t in trajectories}
    assert depths == {(True, True), (False, True), (False, False)}
    assert [t.to_json() for t in data.trajectories(3, 5)] != [t.to_json() for t in data.trajectories(4, 5)]
    again = list(data.trajectories(3, 80))
    assert [t.messages[1].content for t in again] == [t.messages[1].content for t in trajectories]


def test_tenants_come_back_only_where_their_rules_are_not_given():
    hidden = [t.tenant for t in data.trajectories(5, 40, data.Mix(full=0, rules=0, population=3))]
    assert len(set(hidden)) == 3
    given = [t.tenant for t in data.trajectories(5, 40, data.Mix(full=0.2, rules=0.8, population=3))]
    assert len(set(given)) == 40 and not set(given) & set(hidden)


def test_drills_ask_for_what_can_be_read_or_known():
    rows = list(data.practice(5, 60, english=["One two three.", "Four five."]))
    assert {row.kind for row in rows} == {"recall", "compare", "find", "repeat"}
    for row in rows:
        system, asked, answer = (message.content for message in row.messages)
        if row.kind == "repeat":
            assert asked == f"Repeat: {answer}" and "three." in answer
        elif row.kind == "find":
            marks, *lines = asked.removeprefix("Find: ").splitlines()
            found = answer.splitlines()
            assert [line.split()[0] for line in found] == marks.split(", ") and set(found) <= set(lines)
        elif row.kind == "compare":
            pairs = re.findall(r"(\d+), (\d+): [^,]+, (within|over)", answer)
            assert len(pairs) > 10
            assert all((int(value) <= int(limit)) == (word == "within") for limit, value, word in pairs)
        else:
            name = re.search(r"Tenant: (\w+)\.", system)
            assert name and name[1] not in DESK.tenants
            said = dict(line.split(": ", 1) for line in answer.split("; "))
            assert list(said) == asked.removeprefix("Name: ").split("; ")
            assert all(rule.endswith(f" of {name[1]}") for rule in said)
            if "Rules of" in system:
                words = {value.split(": ")[-1].strip('"') for value in said.values()} - {"none"}
                assert all(word in system for word in words)


def test_a_call_is_few_tokens_and_numbers_are_digits(trajectories):
    tokenizer = train_tokenizer((text for t in trajectories for text in make.texts_of(t)), 1500)
    call = '<tool_call>{"name": "get_order", "arguments": {"order_id": "A4821"}}</tool_call>'
    tokens = [str(tokenizer.decode([token])) for token in tokenizer.encode(call, add_special_tokens=False)]
    assert "".join(tokens) == call and len(tokens) <= 13
    assert tokens[-7:-2] == ["A", "4", "8", "2", "1"]
    text = "Ünïcode, tabs\t and 🙂 survive."
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


OPENING, CLOSING, NEWLINE, FIRST_WORD = 40, 41, 42, 50


def repeated(rng: random.Random) -> tuple[list[int], list[int]]:
    """A random sequence twice, and the places where what comes next is known."""
    half = rng.choices(range(FIRST_WORD, 300), k=30)
    return half * 2, list(range(33, 59))


def marked_lines(rng: random.Random) -> tuple[list[int], list[int]]:
    """Marked lines of one phrase and a code, said again in another order, and the places before their codes."""
    phrase = rng.choices(range(FIRST_WORD, 300), k=6)
    lines = [[OPENING, mark, CLOSING, *phrase, *rng.choices(range(10), k=3), NEWLINE] for mark in range(10, 18)]
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


@pytest.mark.parametrize("draw", [repeated, marked_lines])
def test_the_model_copies_without_training(draw):
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
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    model = LlamaForCausalLM(config)
    assert copied(model, draw) < 0.2
    write_induction_heads(model, OPENING, torch.Generator().manual_seed(0))
    assert copied(model, draw) > 0.7


def test_the_recipe_runs_from_nothing_to_a_base(tmp_path, monkeypatch):
    monkeypatch.setattr(make, "PER_CHUNK", 20)
    monkeypatch.setattr(make, "TOKENIZER_TRAJECTORIES", 40)
    make.main(tmp_path / "base", tokens=3000, work=tmp_path / "work", trajectories=20, processes=1, layers=3)
    base = load_base(tmp_path / "base")
    assert base.tokenizer.chat_template and base.model.config.num_hidden_layers == 3
    card = (tmp_path / "base" / "README.md").read_text()
    assert "--tokens 3000 --seed 0" in card and "apache-2.0" in card
