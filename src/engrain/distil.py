"""Distillation without labels: the base with the context in its prompt teaches the base with an adapter in its place.

The teacher is frozen, so what it would write is asked once, before training. Invariant: teacher and pupil are asked
about the same tokens; only what stands before them differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from engrain.batch import collate
from engrain.errors import InputError
from engrain.model import PACKED, Base, attention, packed_hidden
from engrain.objective import output_logits
from engrain.renderer import Choices, Row


def with_choices(base: Base, rows: Sequence[Row], prompted: Sequence[Row], most: int = 8) -> list[Row]:
    """The rows with the `most` likeliest tokens that the base gives to the same masked tokens of `prompted`.

    `prompted[i]` is `rows[i]` with the context in its prompt. Raises `InputError` if their masked tokens differ.
    """
    made = []
    with torch.no_grad(), attention(base.model, PACKED):
        for row, whole in zip(rows, prompted, strict=True):
            if _masked(row) != _masked(whole):
                raise InputError("a row and its prompted form must be trained on the same tokens; render both from one "
                                 "trajectory")  # fmt: skip
            batch = collate([whole]).to(base.model.device)
            targets = batch.mask.nonzero()[:, 0]
            logits = output_logits(base.model, packed_hidden(base.model, batch)[targets - 1]).float()
            logprobs, tokens = logits.log_softmax(dim=-1).topk(min(most, logits.shape[-1]), dim=-1)
            choices = Choices(tokens.cpu().numpy().astype(np.int32), logprobs.cpu().numpy())
            made.append(replace(row, choices=choices))
    return made


def _masked(row: Row) -> list[int]:
    return [token for token, trained in zip(row.ids[1:], row.mask[1:], strict=True) if trained]
