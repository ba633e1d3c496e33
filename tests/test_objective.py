from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import ARCHITECTURES, random_rows, tiny

from engrain.adapter import Adapter, Factors, unstack
from engrain.batch import collate
from engrain.context import Context, Section
from engrain.model import PACKED, adapted, attention, sites
from engrain.objective import output_logits, row_loss
from engrain.renderer import Choices, Rival, Row


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_row_loss_is_the_mean_over_masked_targets_of_rows_alone(architecture: str) -> None:
    model, rows = tiny(architecture), random_rows(5)
    expected, terms = 0.0, 0
    for row in rows:
        ids = torch.tensor(row.ids)
        logs = F.log_softmax(model(ids[None]).logits[0].float(), dim=-1)
        for place in range(1, len(ids)):
            if row.mask[place]:
                expected, terms = expected - logs[place - 1, ids[place]].item(), terms + 1
    with attention(model, PACKED):
        loss, count = row_loss(model, None, collate(rows))
    assert count == terms
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_logits_are_computed_only_where_the_mask_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tiny("llama"), random_rows(5)
    seen = []
    head = model.get_output_embeddings()
    assert head is not None
    head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    with attention(model, PACKED):
        _, count = row_loss(model, None, collate(rows))
    assert seen == [(count, 64)] and count < sum(len(row.ids) for row in rows) / 1.5


def test_tokens_outside_the_mask_do_not_count_as_targets() -> None:
    model = tiny("llama")
    with attention(model, PACKED):
        one, _ = row_loss(model, None, collate([Row([1, 2, 3, 9], [False, True, False, False])]))
        other, _ = row_loss(model, None, collate([Row([1, 2, 7, 8], [False, True, False, False])]))
    assert one.item() == pytest.approx(other.item(), abs=1e-5)


def test_a_batch_without_targets_is_zero() -> None:
    model = tiny("llama")
    with attention(model, PACKED):
        loss, count = row_loss(model, None, collate([Row([1, 2, 3], [False] * 3)]))
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


def test_what_a_rival_would_change_must_be_less_likely_under_it_by_a_margin() -> None:
    model, (row, plain, *_) = tiny("llama"), random_rows(5)
    own, other = (Context((Section("tenant", name, ("a rule",)),)) for name in ("own", "other"))
    asked = Row(row.ids, row.mask, own, rival=Rival(other, 5))
    batch = collate([asked, Row(plain.ids, plain.mask, own), Row(plain.ids, plain.mask, other)])
    assert batch.contexts == (own, other) and batch.mask.sum() == sum(row.mask[1:]) + 2 * sum(plain.mask[1:])
    assert batch.ids[batch.partings].tolist() == 2 * [[row.ids[5]]] and 6 in batch.lengths

    torch.manual_seed(0)
    shapes = sites(model)
    factors = {
        site: Factors(torch.randn(2, 4, d_in), torch.randn(2, d_out, 4)) for site, (d_in, d_out) in shapes.items()
    }
    adapter = Adapter(factors, 0.1, 4)
    terms = []
    for which in range(2):
        with adapted(model, unstack(adapter)[which]):
            logs = model(torch.tensor([row.ids])).logits[0].float().log_softmax(-1)
        terms.append(logs[4, row.ids[5]])
    gap = terms[0] - terms[1]
    with attention(model, PACKED), adapted(model, adapter, batch.spans):
        without, count = row_loss(model, adapter, batch, weight=0.0)
        loss, _ = row_loss(model, adapter, batch, margin=0.1, weight=0.5)
    assert count == batch.mask.sum() and gap.abs() > 1e-3
    torch.testing.assert_close(loss - without, 0.5 * (0.1 - gap).clamp(min=0), atol=1e-3, rtol=1e-3)


def test_rows_with_and_without_a_teacher_share_a_batch() -> None:
    model, (row, other, *_) = tiny("llama"), random_rows(5)
    targets = sum(row.mask[1:])
    certain = [token for token, trained in zip(row.ids[1:], row.mask[1:], strict=True) if trained]
    choices = Choices(np.array(certain)[:, None], np.full((targets, 1), -1e-7))
    taught = Row(row.ids, row.mask, choices=choices)
    with attention(model, PACKED):
        both, count = row_loss(model, None, collate([taught, other]))
        expected, terms = row_loss(model, None, collate([row, other]))
    assert count == terms and both.item() == pytest.approx(expected.item(), rel=1e-3)  # of a teacher who is certain
