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
from engrain.errors import ModelError
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
