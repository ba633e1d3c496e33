"""`Adapter`: LoRA factors for named linear sites, and the plain functions on them.

Invariant: a site with factors `a: rank d_in` and `b: d_out rank` changes its output by (alpha / rank) · b @ a · x, and
only `lora_delta` applies that scale. A site may have less than the adapter's rank. Leading batch dimensions hold one
adapter a context. On disk an adapter is an ordinary PEFT directory.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engrain.errors import ModelError
from engrain.files import replacing_directory

if TYPE_CHECKING:
    from engrain.context import Context

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."


class Factors(NamedTuple):
    a: Float[Tensor, "*batch rank d_in"]
    b: Float[Tensor, "*batch d_out rank"]


@dataclass(frozen=True)
class Adapter:
    """One low-rank term for each site, by the site's qualified name in the base."""

    factors: Mapping[str, Factors]
    alpha: float
    rank: int
    invocation: tuple[int, ...] = ()
    """Of an activated adapter: the tokens that open a turn of the agent, from which on it acts. See `activated`."""

    def to(self, *where: torch.device | torch.dtype) -> Adapter:
        """The same adapter on another device or in another dtype."""
        move = {site: Factors(*(_move(factor, where) for factor in pair)) for site, pair in self.factors.items()}
        return replace(self, factors=move)

    def detach(self) -> Adapter:
        """The same values, cut off from what made them."""
        return replace(self, factors={site: Factors(a.detach(), b.detach()) for site, (a, b) in self.factors.items()})

    def tensors(self) -> list[Tensor]:
        """All factors in a fixed order."""
        return [factor for pair in self.factors.values() for factor in pair]


class AdapterSource(Protocol):
    """Contexts to an adapter: constant (a fine-tuned LoRA) or learned (a hypernetwork)."""

    def __call__(self, contexts: Sequence[Context], /) -> Adapter: ...


class ConstantAdapter(nn.Module):
    """A fine-tuned LoRA: ignores its contexts. Starts as PEFT's does, `a` Kaiming-uniform and `b` zero."""

    def __init__(
        self,
        sites: Mapping[str, tuple[int, int]],
        rank: int,
        alpha: float | None = None,
        invocation: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.invocation = tuple(invocation)
        if rank < 1 or not sites:
            raise ModelError(f"an adapter needs rank >= 1 and linear sites, got rank {rank} and {len(sites)} sites")
        self.rank, self.alpha = rank, float(2 * rank if alpha is None else alpha)
        self.sites = dict(sites)
        self.a = nn.ParameterDict({parameter_name(site): torch.empty(rank, d_in) for site, (d_in, _) in sites.items()})
        self.b = nn.ParameterDict(
            {parameter_name(site): torch.zeros(d_out, rank) for site, (_, d_out) in sites.items()}
        )
        for a in self.a.values():
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))

    def forward(self, contexts: Sequence[Context] = ()) -> Adapter:
        factors = {site: Factors(self.a[parameter_name(site)], self.b[parameter_name(site)]) for site in self.sites}
        return Adapter(factors, self.alpha, self.rank, self.invocation)


def lora_delta(
    x: Float[Tensor, "*tokens d_in"],
    a: Float[Tensor, "*batch rank d_in"],
    b: Float[Tensor, "*batch d_out rank"],
    alpha: float,
    rank: int,
) -> Float[Tensor, "... d_out"]:
    """What an adapter adds to a linear site's output. With a batch of adapters, `x` is `batch tokens d_in`.

    Many tokens go through the product of the factors, where that takes fewer multiplications.
    """
    a, b = a.to(x.dtype), b.to(x.dtype)
    (own, d_in), d_out, tokens = a.shape[-2:], b.shape[-2], x.shape[-2]
    if tokens * own * (d_in + d_out) > d_in * d_out * (own + tokens):
        return (alpha / rank) * x @ (b @ a).mT
    return (alpha / rank) * (x @ a.mT) @ b.mT


def delta_weight(adapter: Adapter, site: str) -> Float[Tensor, "*batch d_out d_in"]:
    """The full matrix that the adapter adds to a site's weight."""
    a, b = adapter.factors[site]
    return lora_delta(torch.eye(a.shape[-1], dtype=a.dtype, device=a.device), a, b, adapter.alpha, adapter.rank).mT


def adapter_digest(adapter: Adapter) -> str:
    """sha256 over the sites' names and factors, and the scale."""
    total = hashlib.sha256(repr((adapter.alpha, adapter.rank, adapter.invocation)).encode())
    for site, factors in adapter.factors.items():
        total.update(site.encode())
        for factor in factors:
            total.update(repr((factor.dtype, tuple(factor.shape))).encode())
            total.update(factor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def merge(model: nn.Module, adapter: Adapter) -> None:
    """Add the adapter into the model's weights, in place. Raises `ModelError` for one that is not for all tokens."""
    if adapter.invocation:
        raise ModelError(
            "an activated adapter acts on the agent's own turns only and cannot be merged; use it as it is"
        )
    with torch.no_grad():
        for site in adapter.factors:
            weight = model.get_submodule(site).weight
            delta = delta_weight(adapter.to(torch.float32), site)
            if not isinstance(weight, Tensor) or weight.shape != delta.shape:
                raise ModelError(f"cannot merge at {site!r}: base and adapter differ in shape; use the adapter's base")
            weight.copy_(weight.float() + delta.to(weight.device))


def scale(adapter: Adapter, factor: float) -> Adapter:
    """The adapter with `factor` times its effect."""
    return replace(adapter, alpha=adapter.alpha * factor)


def concat(adapters: Sequence[Adapter]) -> Adapter:
    """One adapter whose effect is the sum of all: factors joined along rank, sites united."""
    if not adapters:
        raise ValueError("concat needs at least one adapter")
    strength = adapters[0].alpha / adapters[0].rank or 1.0
    even = [_with_strength(adapter, strength) for adapter in adapters]
    rank = sum(adapter.rank for adapter in adapters)
    factors = {site: _join(even, site) for site in dict.fromkeys(site for one in even for site in one.factors)}
    return replace(adapters[0], factors=factors, alpha=strength * rank, rank=rank)


def stack(adapters: Sequence[Adapter | None]) -> Adapter:
    """A batch of adapters of one base; None has no effect. A site's ranks are filled up with zeros, sites united."""
    own = [adapter for adapter in adapters if adapter is not None]
    if not own:
        raise ValueError("stack needs at least one adapter")
    strength, rank = own[0].alpha / own[0].rank, max(adapter.rank for adapter in own)
    nothing = Adapter({}, strength, 1)
    even = [_with_strength(adapter or nothing, strength) for adapter in adapters]
    factors: dict[str, Factors] = {}
    for site in dict.fromkeys(site for adapter in own for site in adapter.factors):
        pairs = _pairs(even, site)
        most = max(a.shape[-2] for a, _ in pairs)
        pairs = [_of_rank(pair, most) for pair in pairs]
        factors[site] = Factors(torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs]))
    return Adapter(factors, strength * rank, rank)


def unstack(adapters: Adapter) -> list[Adapter]:
    """The adapters of a batch."""
    (count,) = {a.shape[0] for a, _ in adapters.factors.values()}
    return [
        replace(adapters, factors={site: Factors(a[n], b[n]) for site, (a, b) in adapters.factors.items()})
        for n in range(count)
    ]


def reduced(adapter: Adapter) -> Adapter:
    """The same adapter, to rounding, with no site's rank above its smaller side: more is never needed.

    What many rules write side by side is often more. The product of the factors then takes the place of one of them,
    and the identity that of the other.
    """
    factors: dict[str, Factors] = {}
    for site, (a, b) in adapter.factors.items():
        (rank, d_in), d_out = a.shape[-2:], b.shape[-2]
        if rank > min(d_in, d_out):
            one = torch.eye(min(d_in, d_out), dtype=a.dtype, device=a.device).expand(*a.shape[:-2], -1, -1)
            a, b = (b @ a, one) if d_out <= d_in else (one, b @ a)
        factors[site] = Factors(a, b)
    rank = max(a.shape[-2] for a, _ in factors.values())
    return replace(adapter, factors=factors, alpha=adapter.alpha / adapter.rank * rank, rank=rank)


def compress(adapter: Adapter, rank: int) -> tuple[Adapter, float]:
    """The closest adapter of `rank` (QR of both factors, SVD of the small core) and the share of energy lost.

    Energy is the sum of squared Frobenius norms of the sites' deltas.
    """
    kept = lost = 0.0
    factors: dict[str, Factors] = {}
    for site, (a, b) in adapter.factors.items():
        q_b, r_b = torch.linalg.qr(b.double())
        q_a, r_a = torch.linalg.qr(a.double().mT)
        u, s, vh = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
        root = s[..., :rank].sqrt()
        new_b, new_a = q_b @ u[..., :rank] * root.unsqueeze(-2), root.unsqueeze(-1) * (vh[..., :rank, :] @ q_a.mT)
        factors[site] = _of_rank(Factors(new_a.to(a.dtype), new_b.to(b.dtype)), rank)
        kept += s[..., :rank].square().sum().item()
        lost += s[..., rank:].square().sum().item()
    made = replace(adapter, factors=factors, alpha=adapter.alpha / adapter.rank * rank, rank=rank)
    return made, lost / max(kept + lost, 1e-300)


def save_peft(adapter: Adapter, path: Path, base: str = "") -> None:
    """Write a PEFT directory, whole or not at all. `base` becomes `base_model_name_or_path`."""
    if any(factor.dim() != 2 for pair in adapter.factors.values() for factor in pair):
        raise ModelError("a PEFT directory holds one adapter; save one context's adapter, not a batch")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "target_modules": list(adapter.factors),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    if adapter.invocation:
        config["alora_invocation_tokens"] = list(adapter.invocation)
    tensors = {}
    for site, pair in adapter.factors.items():
        a, b = _of_rank(pair, adapter.rank)
        tensors[f"{_PREFIX}{site}.lora_A.weight"] = a.detach().cpu().contiguous()
        tensors[f"{_PREFIX}{site}.lora_B.weight"] = b.detach().cpu().contiguous()
    with replacing_directory(path) as aside:
        (aside / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        try:
            save_file(tensors, aside / WEIGHTS_FILE, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{WEIGHTS_FILE}: {error}") from error


def load_peft(path: Path) -> Adapter:
    """Read a PEFT LoRA directory. Raises `ModelError` if it is not one, or uses what an `Adapter` cannot express."""
    config = _read_config(path)
    try:
        tensors = load_file(path / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot read {WEIGHTS_FILE} ({error}); save the adapter again") from error
    rank, alpha = int(config["r"]), float(config["lora_alpha"])
    factors: dict[str, Factors] = {}
    for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
        stem = name.removesuffix(".lora_A.weight")
        a, b = tensors.pop(name), tensors.pop(f"{stem}.lora_B.weight", None)
        if b is None or a.dim() != 2 or b.dim() != 2 or not a.shape[0] == b.shape[1] == rank:
            raise ModelError(f"{path}: {stem!r} lacks a pair of rank {rank} factors; save the adapter again")
        factors[stem.removeprefix(_PREFIX)] = Factors(a, b)
    if tensors or not factors:
        found = f"unexpected tensor {next(iter(tensors))!r}" if tensors else "no LoRA factors"
        raise ModelError(f"{path}: {found}; only plain LoRA on linear layers is supported")
    invocation = tuple(map(int, config.get("alora_invocation_tokens") or ()))
    return Adapter(factors, alpha * math.sqrt(rank) if config.get("use_rslora") else alpha, rank, invocation)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: no {CONFIG_FILE} ({error.strerror}); give a PEFT adapter directory") from error
    except ValueError as error:
        raise ModelError(f"{path}: {CONFIG_FILE} is not JSON; save the adapter again") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA" or not {"r", "lora_alpha"} <= config.keys():
        raise ModelError(f"{path}: {CONFIG_FILE} must have peft_type LORA, r and lora_alpha; give a LoRA adapter")
    foreign = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save")
    used = [option for option in foreign if config.get(option)]
    if used or config.get("bias", "none") != "none":
        raise ModelError(f"{path}: unsupported LoRA option {(used or ['bias'])[0]!r}; retrain or merge without it")
    return config


def _with_strength(adapter: Adapter, strength: float) -> Adapter:
    """The same effect with alpha / rank equal to `strength`, the difference folded into `b`."""
    ratio = adapter.alpha / adapter.rank / strength
    factors = {site: Factors(a, b * ratio if ratio != 1 else b) for site, (a, b) in adapter.factors.items()}
    return replace(adapter, factors=factors, alpha=strength * adapter.rank)


def _of_rank(pair: Factors, rank: int) -> Factors:
    """Factors filled up with zeros to a larger rank: the same term."""
    more = rank - pair.a.shape[-2]
    return Factors(nn.functional.pad(pair.a, (0, 0, 0, more)), nn.functional.pad(pair.b, (0, more)))


def _join(adapters: Sequence[Adapter], site: str) -> Factors:
    """Factors of one site along rank."""
    pairs = _pairs(adapters, site)
    return Factors(torch.cat([a for a, _ in pairs], dim=-2), torch.cat([b for _, b in pairs], dim=-1))


def _pairs(adapters: Sequence[Adapter], site: str) -> list[Factors]:
    """Each adapter's factors of a site; zeros for one that leaves it as it is."""
    known = next(adapter.factors[site] for adapter in adapters if site in adapter.factors)
    return [
        adapter.factors.get(site)
        or Factors(
            known.a.new_zeros(*known.a.shape[:-2], adapter.rank, known.a.shape[-1]),
            known.b.new_zeros(*known.b.shape[:-1], adapter.rank),
        )
        for adapter in adapters
    ]


def _move(factor: Tensor, where: Sequence[torch.device | torch.dtype]) -> Tensor:
    for place in where:
        factor = factor.to(place)
    return factor


def parameter_name(site: str) -> str:
    """A parameter's name may not contain a dot."""
    return site.replace(".", "/")
