"""How far a context lies from those that a hypernetwork learnt from, and when that is too far to trust it.

A rule's distance is Mahalanobis's, of the mean of its token states (Lee et al., 2018, arXiv:1807.03888); a context's is
the mean over its rules. Above the threshold `Agent.policy` puts the context into the prompt and leaves the adapter out.

Not covered: rules that read like those learnt from and mean something else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from engrain.context import Context, Rule
from engrain.encoder import Features

Read = Callable[[Sequence[Rule]], Features]
"""Rules to features, as the hypernetwork reads them."""

FEWEST_CONTEXTS = 40
"""Of fewer there is too little to know what is usual, so nothing is too far."""
MOST_CONTEXTS = 1000
"""Of more, so many that lie evenly among them."""
BEYOND = 0.01
"""Share of contexts like those learnt from that lie above the threshold."""
RIDGE = 1e-3
"""Added to each variance, as a share of the mean variance."""


class Novelty(nn.Module):
    """Of the first `width` features. Measured once after training; saved with the hypernetwork."""

    mean: Float[Tensor, " width"]
    whitening: Float[Tensor, "width width"]
    threshold: Float[Tensor, ""]

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("whitening", torch.zeros(width, width))
        self.register_buffer("threshold", torch.tensor(math.inf))

    @torch.no_grad()
    def fit(self, read: Read, contexts: Sequence[Context]) -> None:
        """From what it learnt from: four fifths give what is usual, the others how far such contexts lie."""
        distinct = [context for context in dict.fromkeys(contexts) if context.rules]
        if len(distinct) < FEWEST_CONTEXTS:
            return
        distinct = distinct[:: math.ceil(len(distinct) / MOST_CONTEXTS)]
        usual, others = [one for n, one in enumerate(distinct) if n % 5], distinct[::5]
        rules = list(dict.fromkeys(rule for context in usual for rule in context.rules))
        points = torch.stack([self._point(states) for states in read(rules).rows()]).double()
        covariance = torch.cov(points.T)
        covariance += RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=covariance.dtype)
        root = torch.linalg.cholesky(covariance)
        self.mean.copy_(points.mean(dim=0))
        self.whitening.copy_(torch.linalg.inv(root))
        self.threshold.copy_(torch.tensor([self(read, context) for context in others]).quantile(1 - BEYOND))

    @torch.no_grad()
    def forward(self, read: Read, context: Context) -> float:
        """About 1 for what is usual; 0 without rules, and for all before `fit`."""
        if not context.rules:
            return 0.0
        points = torch.stack([self._point(states) for states in read(context.rules).rows()]).to(self.mean)
        return float(((points - self.mean) @ self.whitening.T).square().mean(dim=-1).sqrt().mean())

    def _point(self, states: Float[Tensor, "tokens features"]) -> Float[Tensor, " width"]:
        return states[:, : len(self.mean)].mean(dim=0)
