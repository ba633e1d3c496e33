"""Our attention for CPUs with bf16 (`recipes/base/cpu_attention.cpp`) against torch's, one row, one thread.

`python benchmarks/cpu_attention.py` prints milliseconds forward and backward for 3 heads of 64, and how far either is
from fp32. Needs a CPU with AMX or AVX-512's bf16, a C++ compiler and ninja.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "base"))

import cpu_attention


def best(run: Any, times: int = 5) -> float:
    spans = []
    for _ in range(times):
        began = time.perf_counter()
        run()
        spans.append(time.perf_counter() - began)
    return 1000 * min(spans)


def main() -> None:
    torch.set_num_threads(1)
    kernel = cpu_attention.built()
    if kernel is None:
        sys.exit("this CPU has no bf16 instructions")
    table = Table("tokens", "torch forward", "our forward", "torch backward", "our backward", "ours against fp32")
    for tokens in (256, 1024, 4096, 8192):
        states = [torch.randn(tokens, 3, 64).bfloat16() for _ in range(4)]
        q, k, v, weight = states
        own_q, own_k, own_v = (one.transpose(0, 1)[None].requires_grad_() for one in (q, k, v))
        attend = partial(F.scaled_dot_product_attention, own_q, own_k, own_v, is_causal=True)

        seen, rows = attend(), [tokens]
        out, log_sums = kernel.forward(q, k, v, rows, 0.125)
        upstream = weight.transpose(0, 1)[None]
        times = (
            best(attend),
            best(lambda: kernel.forward(q, k, v, rows, 0.125)),  # noqa: B023
            best(lambda: seen.backward(upstream, retain_graph=True)),  # noqa: B023
            best(lambda: kernel.backward(weight, q, k, v, out, log_sums, rows, 0.125)),  # noqa: B023
        )
        table.add_row(str(tokens), *(f"{one:.1f} ms" for one in times), f"{cpu_attention.deviation(kernel, rows):.4f}")
    Console().print(table)


if __name__ == "__main__":
    main()
