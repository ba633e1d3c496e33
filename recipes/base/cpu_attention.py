"""Packed attention for CPUs with AMX or AVX-512's bf16: `engrain.model.packed_attention`, two to four times faster.

torch's own flash attention on CPU takes half of a training step. `use()` compiles `cpu_attention.cpp` (a C++ compiler
and ninja, half a minute, once) and puts it in the place of the packed attention for this process. It rounds otherwise.

Not covered: values that are not bf16, heads of another size than 64, grouped queries and sliding windows, which go the
usual way.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.cpp_extension import load
from transformers import AttentionInterface

from engrain.errors import EngrainError
from engrain.model import PACKED, packed_attention

HEAD = 64
NEEDED = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512bf16", "fma", "amx-tile", "amx-bf16")
PLAIN: Any = packed_attention


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernel: Any, lengths: Sequence[int], scale: float, *states: Tensor) -> Tensor:
        out, log_sums = kernel.forward(*states, lengths, scale)
        ctx.save_for_backward(*states, out, log_sums)
        ctx.kernel, ctx.lengths, ctx.scale = kernel, lengths, scale
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        return None, None, None, *ctx.kernel.backward(gradient.contiguous(), *ctx.saved_tensors, ctx.lengths, ctx.scale)


def deviation(kernel: Any, lengths: Sequence[int]) -> float:
    """The largest difference of outputs and gradients from torch's in fp32 on random states, as a share of them."""
    random = torch.Generator().manual_seed(0)
    drawn = [torch.randn(sum(lengths), 3, HEAD, generator=random).bfloat16() for _ in range(4)]
    states, weight = [one.float().requires_grad_() for one in drawn[:3]], drawn[3]
    own = [one.detach().requires_grad_() for one in drawn[:3]]
    module, stream = torch.nn.Module(), [one.transpose(0, 1)[None] for one in states]
    exact = PLAIN(module, *stream, None, lengths=lengths)[0][0]
    found = _Attention.apply(kernel, list(lengths), HEAD**-0.5, *own)
    exact.backward(weight.float())
    found.backward(weight)
    pairs = [(found, exact), *((one.grad, other.grad) for one, other in zip(own, states, strict=True))]
    return max(float(((one.float() - other).norm() / other.norm()).detach()) for one, other in pairs)


def built() -> Any:
    """The compiled kernel; None where the CPU has no bf16 instructions."""
    source = Path(__file__).with_name("cpu_attention.cpp")
    kernel: Any = load("cpu_attention", [str(source)], extra_cflags=["-O3", *(f"-m{one}" for one in NEEDED)])
    return kernel if kernel.available() else None


def use() -> bool:
    """Attend with the kernel from now on; False where the CPU has no bf16 instructions."""
    if (kernel := built()) is None:
        return False
    if (error := deviation(kernel, (70, 3, 64, 129))) > 0.02:
        raise EngrainError(
            f"our attention differs from torch's by {error:.2g} of its size; train without --own-attention"
        )

    @torch.compiler.disable
    def attend(
        module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        window, scale = options.get("sliding_window"), options.get("scaling") or query.shape[-1] ** -0.5
        lengths = list(options["lengths"])
        longer = window is not None and max(lengths) > window
        again = bool(getattr(options["lengths"], "turns", ()))
        if again or value.dtype != torch.bfloat16 or query.shape != value.shape or query.shape[-1] != HEAD or longer:
            return PLAIN(module, query, key, value, mask, **options)
        states = (one[0].transpose(0, 1).to(torch.bfloat16).contiguous() for one in (query, key, value))
        return _Attention.apply(kernel, lengths, scale, *states)[None], None

    AttentionInterface.register(PACKED, attend)
    return True
