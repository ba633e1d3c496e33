"""The layers that hypernetworks share: read tokens, ask them for one latent a site, write factors from it.

Invariant: nothing is random and no row sees another, so what a row gives depends on that row (in a padded batch, to
rounding). New heads write an `a` of the size that PEFT starts with and a `b` of exactly zero: one zero factor in each
product, so that an untrained hypernetwork changes nothing and still learns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from engrain.adapter import Factors, parameter_name
from engrain.context import Kind
from engrain.encoder import Features
from engrain.errors import ModelError

KINDS: tuple[Kind, ...] = get_args(Kind)
WHITENING_RIDGE = 0.05
"""Added to each variance, as a share of the mean variance."""
TURNING, STRENGTH = 0.3, 0.25
"""What a step of Adam moves: so much of how keys are turned, and of how strongly they act."""
KeyMaps = tuple[Float[Tensor, "width d_in"], Float[Tensor, "d_in d_in"] | None]


class Attention(nn.Module):
    """Queries of a row attend to its unmasked tokens."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        if width % heads:
            raise ModelError(f"expected a width divisible by {heads}, got {width}; choose another width")
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(
        self,
        queries: Float[Tensor, "rows queries width"],
        tokens: Float[Tensor, "rows tokens width"],
        mask: Bool[Tensor, "rows tokens"],
    ) -> Float[Tensor, "rows queries width"]:
        key, value = self.key_value(tokens).chunk(2, dim=-1)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (self.query(queries), key, value))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm attention, then a pre-norm MLP. `block(x, x, mask)` is self-attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_states, self.norm_tokens = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width)
        self.mlp = residual_mlp(width)

    def forward(
        self,
        states: Float[Tensor, "rows queries width"],
        tokens: Float[Tensor, "rows tokens width"],
        mask: Bool[Tensor, "rows tokens"],
    ) -> Float[Tensor, "rows queries width"]:
        states = states + self.attention(self.norm_states(states), self.norm_tokens(tokens), mask)
        return states + self.mlp(states)


class Reader(nn.Module):
    """A rule's features to states of another width, its tokens attending to one another and never to other rules."""

    def __init__(self, features: int, width: int, layers: int) -> None:
        super().__init__()
        self.project = nn.Linear(features, width)
        self.kind = nn.Embedding(len(KINDS), width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        nn.init.normal_(self.kind.weight, std=0.1)  # small: what the rule says counts first

    def forward(self, features: Features, kinds: Int[Tensor, " rules"]) -> Float[Tensor, "rules tokens width"]:
        states = self.project(features.states)
        states = states + self.kind(kinds)[:, None] + 0.1 * positions(states.shape[1], states.shape[2]).to(states)
        for block in self.blocks if len(states) else ():
            states = block(states, states, features.mask)
        return states


class SiteLatents(nn.Module):
    """One RMS-normalised latent a site: learned queries that attend to the tokens of a row."""

    def __init__(self, sites: int, width: int, layers: int) -> None:
        super().__init__()
        self.query = nn.Parameter(0.1 * torch.randn(sites, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))

    def forward(
        self, tokens: Float[Tensor, "rows tokens width"], mask: Bool[Tensor, "rows tokens"]
    ) -> Float[Tensor, "rows sites width"]:
        latents = self.query.expand(len(tokens), -1, -1)
        for block in self.blocks:
            latents = block(latents, tokens, mask)
        return F.rms_norm(latents, latents.shape[-1:])


class Heads(nn.Module):
    """Latents to factors: one pair of heads for each distinct shape, one learned scale for each site.

    Outputs are scaled so that one step of Adam at the learning rates of LoRA moves a factor about as much as it moves a
    LoRA's: a latent of width w adds up w such steps.
    """

    def __init__(self, sites: Mapping[str, tuple[int, int]], width: int, rank: int) -> None:
        super().__init__()
        if rank < 1 or not sites:
            raise ModelError(f"an adapter needs rank >= 1 and linear sites, got rank {rank} and {len(sites)} sites")
        self.rank, self.sites = rank, dict(sites)
        shapes = dict.fromkeys(sites.values())
        self.a = nn.ModuleDict({_key(shape): nn.Linear(width, rank * shape[0], bias=False) for shape in shapes})
        self.b = nn.ModuleDict({_key(shape): nn.Linear(width, shape[1] * rank, bias=False) for shape in shapes})
        self.scale = nn.Parameter(torch.ones(len(sites)))
        for head in self.a.parameters():
            nn.init.normal_(head, std=3**-0.5)  # PEFT's a is uniform up to d_in^-0.5
        for head in self.b.parameters():
            nn.init.zeros_(head)
        numbered = list(enumerate(sites.items()))
        self._members = {shape: [(i, site) for i, (site, own) in numbered if own == shape] for shape in shapes}

    def forward(self, latents: Float[Tensor, "rows sites width"]) -> dict[str, Factors]:
        factors: dict[str, Factors] = {}
        for shape, members in self._members.items():
            numbers = [i for i, _ in members]
            chosen = latents[:, numbers]
            width = latents.shape[-1]
            a = self.a[_key(shape)](chosen).unflatten(-1, (self.rank, shape[0])) * (width * shape[0]) ** -0.5
            b = self.b[_key(shape)](chosen).unflatten(-1, (shape[1], self.rank)) / width
            b = b * self.scale[numbers, None, None]
            factors |= {site: Factors(a[:, n], b[:, n]) for n, (_, site) in enumerate(members)}
        return {site: factors[site] for site in self.sites}


class Associations(nn.Module):
    """Tokens to one association each at every site: a key, to which the site's input is compared, and a value.

    Where a site's input is known, as the base reads the token, the key starts as that input, whitened: compared with
    itself it gives about 1, with an unlike one about d_in^-0.5. The value starts as what the next token reads like,
    times a strength of zero.
    """

    def __init__(self, sites: Mapping[str, tuple[int, int]], inputs: Mapping[str, int], read: int, width: int) -> None:
        super().__init__()
        self.sites, self.known = dict(sites), tuple(inputs)
        self.keys, self.values, self.turns = nn.ModuleDict(), nn.ModuleDict(), nn.ParameterDict()
        for site, (d_in, d_out) in sites.items():
            name = parameter_name(site)
            self.keys[name] = key = nn.Linear(width, d_in, bias=False)
            nn.init.normal_(key.weight, std=0.0 if site in inputs else 1.0)
            self.values[name] = value = nn.Linear(read + width, d_out, bias=False)
            nn.init.eye_(value.weight)
            if site in inputs:
                self.turns[name] = nn.Parameter(torch.zeros(d_in, d_in))
                self.register_buffer(f"mean/{name}", torch.zeros(d_in))
                self.register_buffer(f"whitening/{name}", torch.eye(d_in))
        self.gate = nn.Linear(width, len(sites))
        nn.init.zeros_(self.gate.weight)
        self.strength = nn.Parameter(torch.zeros(len(sites)))
        self._maps: dict[str, tuple[list[tuple[int, int]], KeyMaps]] = {}

    @torch.no_grad()
    def whiten(self, inputs: Sequence[Float[Tensor, "tokens _"]]) -> None:
        """Learn what is usual at the sites that are known, before training."""
        for site, states in zip(self.known, inputs, strict=True):
            covariance = torch.cov(states.double().T)
            ridge = WHITENING_RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance)).to(covariance)
            values, vectors = torch.linalg.eigh(covariance + ridge)
            self.get_buffer(f"mean/{parameter_name(site)}").copy_(states.mean(dim=0))
            self.get_buffer(f"whitening/{parameter_name(site)}").copy_((vectors * values.rsqrt()) @ vectors.T)

    def forward(
        self,
        inputs: Sequence[Float[Tensor, "tokens _"]],
        after: Float[Tensor, "tokens read"],
        seen: Float[Tensor, "tokens width"],
    ) -> dict[str, Factors]:
        """All of a site's associations side by side along rank. `inputs` are of the sites that are known."""
        known = dict(zip(self.known, inputs, strict=True))
        gates = 2 * self.gate(seen).sigmoid() * self.strength * STRENGTH
        factors = {}
        for n, (site, (d_in, _)) in enumerate(self.sites.items()):
            from_seen, from_own = self._key_maps(site)
            key = seen @ from_seen
            if from_own is not None:
                key = key + (known[site] - self.get_buffer(f"mean/{parameter_name(site)}")) @ from_own
            value = self.values[parameter_name(site)](torch.cat([after, seen], dim=-1)) * gates[:, n, None]
            factors[site] = Factors(key / d_in, value.mT)
        return factors

    def _key_maps(self, site: str) -> KeyMaps:
        """How keys come from what was seen and from what the site takes in: whitened, turned and whitened again, all
        in one matrix. Where nothing is learnt, they are kept for as long as they are made of the same numbers."""
        name = parameter_name(site)
        parts = [cast(nn.Linear, self.keys[name]).weight]
        if site in self.known:
            parts += [self.get_buffer(f"whitening/{name}"), self.turns[name]]
        if torch.is_grad_enabled():
            return _key_maps(*parts)
        made_of = [(part.data_ptr(), part._version) for part in parts]
        if self._maps.get(site, ([],))[0] != made_of:
            self._maps[site] = made_of, _key_maps(*parts)
        return self._maps[site][1]


def _key_maps(
    weight: Float[Tensor, "d_in width"],
    whitening: Float[Tensor, "d_in d_in"] | None = None,
    turn: Float[Tensor, "d_in d_in"] | None = None,
) -> KeyMaps:
    from_seen = weight.mT * weight.shape[1] ** -0.5
    if whitening is None or turn is None:
        return from_seen, None
    return from_seen @ whitening, whitening @ (whitening + TURNING * turn @ whitening)


def residual_mlp(width: int) -> nn.Sequential:
    """The branch of a residual MLP: norm, four times the width, back."""
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


def positions(tokens: int, width: int) -> Float[Tensor, "tokens width"]:
    """Sines and cosines of a token's place in its rule, for any length."""
    speed = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000) / width))
    angle = torch.arange(tokens)[:, None] * speed
    return torch.cat([angle.sin(), angle.cos()], dim=-1)[:, :width]


def _key(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"
