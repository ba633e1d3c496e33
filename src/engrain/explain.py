"""Why an agent acted as it did.

A rule-wise hypernetwork makes one term a rule, so which rule an action came from is asked of the weights: leave one
term out and see how much less likely the action becomes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from engrain.adapter import Adapter, unstack
from engrain.batch import Packed, collate
from engrain.context import Context, Rule
from engrain.engine import active_from
from engrain.errors import InputError
from engrain.learned import LearnedSource
from engrain.model import PACKED, Base, adapted, attention
from engrain.objective import row_loss
from engrain.renderer import Row


def rule_effects(base: Base, source: LearnedSource, context: Context, row: Row) -> Mapping[Rule, float]:
    """Each rule's change in the log-probability (nats) of the row's masked tokens: with it, minus without it.

    The rule that counts most comes first. Mask the action to be explained, not what was said before it. Raises
    `InputError` for a row without masked tokens or a context without rules.
    """
    if not any(row.mask[1:]) or not context.rules:
        raise InputError("expected a masked action and a context with rules; mark the action's tokens in the mask")
    contexts = [context, *(context.without(rule) for rule in context.rules)]
    before = source.training
    source.eval()
    try:
        with torch.no_grad(), attention(base.model, PACKED):
            batch = collate([Row(row.ids, row.mask)]).to(base.model.device)
            adapters = unstack(source(contexts))
            start = active_from(adapters[0], row.ids[: row.mask.index(True, 1)])
            acting = torch.arange(len(row.ids), device=base.model.device) >= start if start else None
            whole, *parts = (_log_likelihood(base, adapter, batch, acting) for adapter in adapters)
    finally:
        source.train(before)
    effects = {rule: whole - part for rule, part in zip(context.rules, parts, strict=True)}
    return dict(sorted(effects.items(), key=lambda pair: -abs(pair[1])))


def _log_likelihood(base: Base, adapter: Adapter, batch: Packed, acting: Tensor | None) -> float:
    with adapted(base.model, adapter, acting=acting):
        return -float(row_loss(base.model, adapter, batch)[0])
