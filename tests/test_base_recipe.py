"""The recipe of the bundled base: what it trains on, how it splits text, and that it runs from nothing to a base."""

from __future__ import annotations

import random
import re
import sys
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


def copied(model: LlamaForCausalLM) -> float:
    """Accuracy on the second half of repeated random sequences."""
    rng = random.Random(0)
    hits = []
    for _ in range(8):
        half = rng.choices(range(300), k=30)
        ids = torch.tensor([half * 2])
        with torch.no_grad():
            guess = model(input_ids=ids).logits[0].argmax(-1)
        hits += (guess[33:-1] == ids[0, 34:]).tolist()
    return sum(hits) / len(hits)


def test_induction_heads_copy_without_training():
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
    assert copied(model) < 0.1
    write_induction_heads(model, torch.Generator().manual_seed(0))
    assert copied(model) > 0.7


def test_the_recipe_runs_from_nothing_to_a_base(tmp_path, monkeypatch):
    monkeypatch.setattr(make, "PER_CHUNK", 20)
    monkeypatch.setattr(make, "TOKENIZER_TRAJECTORIES", 40)
    make.main(tmp_path / "base", tokens=3000, work=tmp_path / "work", trajectories=20, processes=1, layers=2)
    base = load_base(tmp_path / "base")
    assert base.tokenizer.chat_template and base.model.config.num_hidden_layers == 2
    card = (tmp_path / "base" / "README.md").read_text()
    assert "--tokens 3000 --seed 0" in card and "apache-2.0" in card
