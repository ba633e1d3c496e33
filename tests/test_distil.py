"""The base with a context in its prompt teaches the base without it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import random_rows, tiny
from transformers import PreTrainedTokenizerBase

from engrain.adapter import ConstantAdapter
from engrain.batch import collate
from engrain.distil import with_choices
from engrain.errors import InputError
from engrain.learner import TrainConfig
from engrain.model import PACKED, Base, adapted, attention, sites
from engrain.objective import row_loss
from engrain.renderer import Row
from engrain.train import train

TOLD = [9, 17, 3]


def base() -> Base:
    return Base(tiny("qwen3"), PreTrainedTokenizerBase(), "tiny")


def pairs() -> tuple[list[Row], list[Row]]:
    """Rows, and the same rows behind a few more tokens."""
    rows = [Row(row.ids[:24], row.mask[:24]) for row in random_rows(20)]
    return rows, [Row(TOLD + row.ids, [False] * len(TOLD) + row.mask) for row in rows]


def test_choices_are_the_teachers_likeliest_tokens_at_the_same_tokens() -> None:
    ours, (rows, prompted) = base(), pairs()
    for row, whole in zip(with_choices(ours, rows, prompted, most=5), prompted, strict=True):
        assert row.choices is not None
        logs = ours.model(torch.tensor([whole.ids])).logits[0].log_softmax(-1)
        places = [place - 1 for place in range(len(TOLD) + 1, len(whole.ids)) if whole.mask[place]]
        expected = logs[places].topk(5)
        torch.testing.assert_close(torch.from_numpy(row.choices.logprobs), expected.values, atol=1e-4, rtol=1e-4)
        assert row.choices.tokens[:, 0].tolist() == expected.indices[:, 0].tolist()


def test_the_divergence_is_zero_from_oneself_and_over_all_choices_the_exact_one() -> None:
    ours, (rows, prompted) = base(), pairs()
    with attention(ours.model, PACKED), torch.no_grad():
        same, count = row_loss(ours.model, None, collate(with_choices(ours, rows, rows, most=63)))
        other, _ = row_loss(ours.model, None, collate(with_choices(ours, rows, prompted, most=63)))
    exact = 0.0
    for row, whole in zip(rows, prompted, strict=True):
        own, told = (ours.model(torch.tensor([one.ids])).logits[0].log_softmax(-1) for one in (row, whole))
        for place in range(1, len(row.ids)):
            if row.mask[place]:
                teacher, pupil = told[place - 1 + len(TOLD)], own[place - 1]
                exact += (teacher.exp() * (teacher - pupil)).sum().item()
    assert count == sum(sum(row.mask[1:]) for row in rows) and abs(same.item()) < 1e-3
    assert other.item() == pytest.approx(exact, rel=1e-3) and exact > 1


def test_an_adapter_learns_what_the_prompt_told(tmp_path: Path) -> None:
    ours, (rows, prompted) = base(), pairs()
    taught = with_choices(ours, rows, prompted)

    def divergence() -> float:
        with attention(ours.model, PACKED), torch.no_grad(), adapted(ours.model, source(())):
            loss, count = row_loss(ours.model, None, collate(taught))
        return loss.item() / count

    torch.manual_seed(0)
    source = ConstantAdapter(sites(ours.model), 8)
    before = divergence()
    config = TrainConfig(tokens=6000, batch_tokens=200, lr=1e-2, threads=1, precision="fp32")
    train(ours, source, taught, config, tmp_path)
    assert divergence() < 0.3 * before


def test_rows_that_differ_are_refused() -> None:
    ours, (rows, prompted) = base(), pairs()
    with pytest.raises(InputError, match="same tokens"):
        with_choices(ours, rows[:1], prompted[1:2])
