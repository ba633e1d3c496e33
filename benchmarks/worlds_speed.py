"""Speed of the data engine: worlds drawn, their teacher run, rendered and tokenised, in tokens a second.

python benchmarks/worlds_speed.py                       # on all cores, with the bundled base's tokenizer
"""

from __future__ import annotations

import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes" / "base"))

from data import STAGES, rows

from engrain.agent import BUNDLED
from engrain.renderer import Renderer


def made(base: Path, seed: int, stage: int, count: int) -> tuple[int, int, int, float]:
    """Rows, tokens and trained tokens of one chunk, and the CPU seconds that it took."""
    from transformers import AutoTokenizer

    renderer = Renderer(AutoTokenizer.from_pretrained(base))
    next(iter(rows(STAGES[stage], 1, 1)))  # imports the families
    began = time.process_time()
    found = [row for trajectory in rows(STAGES[stage], seed, count) for row in renderer.rows(trajectory)]
    seconds = time.process_time() - began
    return len(found), sum(len(row.ids) for row in found), sum(sum(row.mask) for row in found), seconds


def main(
    base: Annotated[Path, typer.Argument(help="whose tokenizer")] = BUNDLED,
    count: Annotated[int, typer.Option("-n", help="rows a process and stage")] = 1000,
    processes: int = os.cpu_count() or 1,
) -> None:
    table = Table("stage", "rows", "tokens", "trained tokens", "tokens a CPU second", "tokens/s on all cores")
    with ProcessPoolExecutor(processes) as pool:
        for number, stage in enumerate(STAGES):
            list(pool.map(made, [base] * processes, [0] * processes, [number] * processes, [1] * processes))  # warm up
            began = time.monotonic()
            seeds = range(1, 1 + processes)
            parts = list(pool.map(made, [base] * processes, seeds, [number] * processes, [count] * processes))
            wall = time.monotonic() - began
            found, tokens, trained, seconds = (sum(part[at] for part in parts) for at in range(4))
            table.add_row(
                stage.name,
                f"{found:,}",
                f"{tokens:,}",
                f"{trained:,}",
                f"{tokens / seconds:,.0f}",
                f"{tokens / wall:,.0f}",
            )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
