from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models import ARCHITECTURES, random_rows, tiny

from engrain.batch import collate
from engrain.model import PACKED, attention
from engrain.objective import masked_nll, output_logits
from engrain.renderer import Row


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_masked_nll_is_the_mean_over_masked_targets_of_rows_alone(architecture: str) -> None:
    model, rows = tiny(architecture), random_rows(5)
    expected, terms = 0.0, 0
    for row in rows:
        ids = torch.tensor(row.ids)
        logs = F.log_softmax(model(ids[None]).logits[0].float(), dim=-1)
        for place in range(1, len(ids)):
            if row.mask[place]:
                expected, terms = expected - logs[place - 1, ids[place]].item(), terms + 1
    with attention(model, PACKED):
        loss, count = masked_nll(model, None, collate(rows))
    assert count == terms
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_logits_are_computed_only_where_the_mask_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tiny("llama"), random_rows(5)
    seen = []
    head = model.get_output_embeddings()
    assert head is not None
    head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    with attention(model, PACKED):
        _, count = masked_nll(model, None, collate(rows))
    assert seen == [(count, 64)] and count < sum(len(row.ids) for row in rows) / 1.5


def test_tokens_outside_the_mask_do_not_count_as_targets() -> None:
    model = tiny("llama")
    with attention(model, PACKED):
        one, _ = masked_nll(model, None, collate([Row([1, 2, 3, 9], [False, True, False, False])]))
        other, _ = masked_nll(model, None, collate([Row([1, 2, 7, 8], [False, True, False, False])]))
    assert one.item() == pytest.approx(other.item(), abs=1e-5)


def test_a_batch_without_targets_is_zero() -> None:
    model = tiny("llama")
    with attention(model, PACKED):
        loss, count = masked_nll(model, None, collate([Row([1, 2, 3], [False] * 3)]))
    loss.backward()
    assert (loss.item(), count) == (0.0, 0)


def test_logit_scale_and_soft_cap_are_applied() -> None:
    model, hidden = tiny("llama"), torch.randn(3, 32)
    plain = output_logits(model, hidden)
    model.config.logit_scale = 0.5
    torch.testing.assert_close(output_logits(model, hidden), plain * 0.5)
    model.config.logit_scale = None
    model.config.final_logit_softcapping = 2.0
    assert output_logits(model, hidden).abs().max() <= 2.0
