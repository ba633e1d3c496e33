"""What training minimises: an `Objective` returns the summed loss of a batch and how many terms it sums."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from engrain.adapter import Adapter
from engrain.batch import Packed
from engrain.errors import ModelError
from engrain.model import packed_hidden


class Objective(Protocol):
    """`adapter` is already applied to `model`; objectives on the adapter itself may read it."""

    def __call__(self, model: PreTrainedModel, adapter: Adapter | None, batch: Packed, /) -> tuple[Tensor, int]: ...


def row_loss(
    model: PreTrainedModel, adapter: Adapter | None, batch: Packed, *, margin: float = 2.0, weight: float = 0.2
) -> tuple[Float[Tensor, ""], int]:
    """Each masked token by what its row has, in nats, summed; logits are computed only where they are needed.

    A row of its own has its tokens' negative log-likelihood; one with a teacher's choices (`distil.with_choices`) the
    KL divergence from these, all other choices counted as one more. Under a row's rival the token where they part must
    be less likely by a `margin`; what is missing counts `weight`.
    """
    targets = batch.mask.nonzero()[:, 0]
    hidden = packed_hidden(model, batch)
    logprobs = output_logits(model, hidden[targets - 1]).float().log_softmax(dim=-1)
    own = logprobs.gather(-1, batch.ids[targets, None])
    loss = -own[~batch.taught].sum()
    known, wanted = logprobs[batch.taught].gather(-1, batch.choices), batch.choice_logprobs
    wanted, known = (torch.cat([one, _rest(one)], dim=-1) for one in (wanted, known))
    loss = loss + (wanted.exp() * (wanted - known)).sum()
    if batch.partings.shape[1]:
        right, wrong = (_logprob(model, hidden, batch.ids, places) for places in batch.partings)
        loss = loss + weight * F.relu(margin - (right - wrong)).sum()
    return loss, len(targets)


def _logprob(
    model: PreTrainedModel, hidden: Float[Tensor, "tokens d_model"], ids: Int[Tensor, " tokens"],
    places: Int[Tensor, " chosen"],
) -> Float[Tensor, " chosen"]:  # fmt: skip
    """Of the tokens at these places."""
    return -F.cross_entropy(output_logits(model, hidden[places - 1]).float(), ids[places], reduction="none")


def _rest(logprobs: Float[Tensor, "targets choices"]) -> Float[Tensor, "targets 1"]:
    """The log-probability of all other choices together."""
    return (1 - logprobs.exp().sum(dim=-1, keepdim=True).clamp(max=1 - 1e-6)).log()


def output_logits(model: PreTrainedModel, hidden: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens vocab"]:
    """The output head on chosen hidden states, with the scale and soft cap of Cohere, Granite and Gemma configs.

    Not covered: architectures that transform hidden states between decoder and head in some other way.
    """
    config, head = model.config, model.get_output_embeddings()
    if head is None:
        raise ModelError(f"{type(model).__name__} has no output head; use a causal language model as base")
    logits = head(hidden)
    logits = logits * getattr(config, "logit_scale", None) if getattr(config, "logit_scale", None) else logits
    logits = logits / config.logits_scaling if getattr(config, "logits_scaling", None) else logits
    cap = getattr(config, "final_logit_softcapping", None)
    return cap * torch.tanh(logits / cap) if cap else logits
