"""What training minimises: an `Objective` returns the summed loss of a batch and how many terms it sums."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from engrain.adapter import Adapter
from engrain.batch import Packed
from engrain.errors import InputError, ModelError
from engrain.model import packed_hidden


class Objective(Protocol):
    """`adapter` is already applied to `model`; objectives on the adapter itself may read it."""

    def __call__(self, model: PreTrainedModel, adapter: Adapter | None, batch: Packed, /) -> tuple[Tensor, int]: ...


def masked_nll(model: PreTrainedModel, adapter: Adapter | None, batch: Packed) -> tuple[Float[Tensor, ""], int]:
    """Negative log-likelihood (nats, summed) of the masked tokens; logits are computed only where they are needed."""
    targets = batch.mask.nonzero()[:, 0]
    hidden = packed_hidden(model, batch)[targets - 1]
    logits = output_logits(model, hidden).float()
    return F.cross_entropy(logits, batch.ids[targets], reduction="sum"), len(targets)


def distillation(model: PreTrainedModel, adapter: Adapter | None, batch: Packed) -> tuple[Float[Tensor, ""], int]:
    """KL divergence (nats, summed) from the teacher's choices to the model's, at the masked tokens.

    All that the teacher would choose otherwise counts as one more choice. Rows get their choices from
    `distil.with_choices`. Raises `InputError` if some have none.
    """
    if batch.choices is None or batch.choice_logprobs is None:
        raise InputError("distillation needs a teacher's choices in every row; make them with distil.with_choices")
    targets = batch.mask.nonzero()[:, 0]
    own = output_logits(model, packed_hidden(model, batch)[targets - 1]).float().log_softmax(dim=-1)
    known, wanted = own.gather(-1, batch.choices), batch.choice_logprobs
    wanted, known = (torch.cat([one, _rest(one)], dim=-1) for one in (wanted, known))
    return (wanted.exp() * (wanted - known)).sum(), len(targets)


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
