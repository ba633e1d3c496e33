"""Decoding with a different adapter in every row: tokens a second beside the base alone, PEFT and transformers.

All decode the same prompts greedily for the same number of tokens, stop tokens ignored. Adapters are LoRAs of every
linear layer with random weights, which are as fast as trained ones. The engine runs with drafts off, so that what is
compared is a pass; PEFT mixes adapters with `adapter_names`. Best of three runs, each on other prompts.

    python benchmarks/mixed_adapters.py
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from engrain.adapter import Adapter, Factors, save_peft
from engrain.agent import bundled_base
from engrain.engine import Engine
from engrain.model import Base, load_base, sites
from engrain.renderer import Renderer
from engrain.turn import Request

RUNS = 3


def lora(base: Base, rank: int, seed: int) -> Adapter:
    chance = torch.Generator().manual_seed(seed)
    factors = {
        site: Factors(
            torch.randn(rank, d_in, generator=chance) * d_in**-0.5, torch.randn(d_out, rank, generator=chance) * 0.01
        )
        for site, (d_in, d_out) in sites(base.model).items()
    }
    return Adapter(factors, alpha=float(rank), rank=rank)


def generate(model: PreTrainedModel | PeftModel, prompts: torch.Tensor, new: int, **options: object) -> int:
    """transformers' own loop; the number of new tokens."""
    with torch.inference_mode():
        made = model.generate(
            input_ids=prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new, min_new_tokens=new,
            do_sample=False, **options,
        )  # type: ignore[operator]  # fmt: skip
    return made.shape[0] * (made.shape[1] - prompts.shape[1])


def best(decode: Callable[[torch.Tensor], int], prompts: Sequence[torch.Tensor]) -> float:
    """Tokens a second of the fastest run."""
    speeds = []
    for one in prompts:
        began = time.perf_counter()
        speeds.append(decode(one) / (time.perf_counter() - began))
    return max(speeds)


def main(
    base: Annotated[Path | None, typer.Option(help="another base than the bundled one")] = None,
    rows: Annotated[int, typer.Option(help="prompts in a batch")] = 16,
    prompt: Annotated[int, typer.Option(help="tokens of each")] = 512,
    new: Annotated[int, typer.Option(help="tokens to decode of each")] = 64,
    rank: int = 16,
) -> None:
    loaded = load_base(base or bundled_base())
    renderer = Renderer(loaded.tokenizer)
    vocabulary = len(loaded.tokenizer)
    chance, least = torch.Generator().manual_seed(0), vocabulary // 2
    prompts = [torch.randint(least, vocabulary, (rows, prompt), generator=chance) for _ in range(RUNS)]
    adapters = [lora(loaded, rank, seed) for seed in range(rows)]

    def engrain(chosen: Sequence[Adapter | None]) -> float:
        engine = Engine(loaded.model, renderer, loaded.tokenizer, parallel=rows, draft=0)
        engine.stops = frozenset()

        def decode(ids: torch.Tensor) -> int:
            asked = [Request(one.tolist(), None, new, adapter=own) for one, own in zip(ids, chosen, strict=True)]
            return sum(len(done.ids) for done in engine.decode(asked))

        return best(decode, prompts)

    table = Table("who", "adapters", "tokens/s", "% of the base alone", title=f"{rows} rows of {prompt} + {new} tokens")
    alone = engrain([None] * rows)
    table.add_row("engrain, base alone", "0", f"{alone:.0f}", "100")
    for count in sorted({1, 4, rows}):
        mixed = engrain([adapters[row % count] for row in range(rows)])
        table.add_row("engrain", str(count), f"{mixed:.0f}", f"{100 * mixed / alone:.0f}")
    plain = best(lambda ids: generate(loaded.model, ids, new), prompts)
    table.add_row("transformers, base alone", "0", f"{plain:.0f}", f"{100 * plain / alone:.0f}")
    with tempfile.TemporaryDirectory() as folder:
        for number, adapter in enumerate(adapters):
            save_peft(adapter, Path(folder) / f"a{number}")
        peft = PeftModel.from_pretrained(loaded.model, f"{folder}/a0", adapter_name="a0")
        for number in range(1, rows):
            peft.load_adapter(f"{folder}/a{number}", adapter_name=f"a{number}")
    names = [f"a{row}" for row in range(rows)]
    theirs = best(lambda ids: generate(peft.eval(), ids, new, adapter_names=names), prompts)
    table.add_row("PEFT, adapter_names", str(rows), f"{theirs:.0f}", f"{100 * theirs / alone:.0f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
