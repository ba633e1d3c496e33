"""Associative recall, told `key value` pairs to give the value of a key: which start and which aids make it emerge.

A row is 8 pairs drawn anew, as `key value key value ...`, then queries in the same form; only the queries' values carry
loss. Keys are distinct, each one token of 128; values are one token of 128 others. Two aids may shorten the way: a
vocabulary that begins with 8 keys and 8 values and grows fourfold whenever accuracy on training rows passes 0.9
(`widening`), and 16 queries a row instead of one (`many queries`).

Equal compute is equal 6 x parameters x tokens: arms differ in parameters by 0.2%, and see the same number of tokens,
queries included; so rows with many queries are fewer. CPU seconds are shown beside it. The learning rate is a start's
own: 3e-4 for written heads, which 3e-3 erases, and 1e-3 for the others; another one is a row of the table. Held-out
rows have the full vocabulary and one query for every arm. A run ends early once it is right on 99% of them. Rows are a
plain batch of equal length: in engrain's packed streams an LFM2's convolutions would read across rows (docs/log.md).

    nice python benchmarks/recall.py -o build/recall
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import Lfm2Config, Lfm2ForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "base"))

from induction import write_induction_heads

RECALLED, DONE = 0.9, 0.99
UNUSED = 0
"""A token that no row holds: rows have no marked lines, and the written start asks for the token before a mark."""


@dataclass(frozen=True)
class Setting:
    """All that decides a run but its start, its aids and its seed."""

    tokens: int = 240_000
    words: int = 128
    """Keys, and as many values."""
    few: int = 8
    growth: int = 4
    pairs: int = 8
    queries: int = 16
    """In a row with many."""
    batch_tokens: int = 512
    warmup_tokens: int = 20_000
    probe_every: int = 10_000
    held_out: int = 256
    width: int = 192
    layers: int = 4
    inner: int = 96


@dataclass(frozen=True)
class Start:
    """An architecture and its first weights."""

    name: str
    lfm2: bool = False
    std: float = 0.04
    embedding_std: float | None = None
    written: bool = False
    lr: float = 1e-3


STARTS = (
    Start("llama, std 0.04"),
    Start("llama, induction written", written=True, lr=3e-4),
    Start("lfm2, std 0.04", lfm2=True),
)
EXTRA = (
    Start("lfm2, std 0.04, lr 3e-3", lfm2=True, lr=3e-3),
    Start("llama, std 0.04, lr 3e-3", lr=3e-3),
    Start("llama, induction written, lr 1e-3", written=True),
    Start("llama, std 0.02", std=0.02),
    Start("llama, embeddings std 1", embedding_std=1.0),
    Start("lfm2, std 0.02", lfm2=True, std=0.02),
)
"""Tried with both aids only."""
AIDS = {"none": (False, False), "widening": (True, False), "many queries": (False, True), "both": (True, True)}


@dataclass(frozen=True)
class Arm:
    start: Start
    aid: str
    seed: int

    @property
    def key(self) -> str:
        return f"{self.start.name} | {self.aid} | {self.seed}"


def arms(seeds: int) -> list[Arm]:
    """Seed by seed, so that an interrupted table is whole for the seeds it has."""
    each = [(start, aid) for aid in AIDS for start in STARTS] + [(start, "both") for start in EXTRA]
    return [Arm(start, aid, seed) for seed in range(seeds) for start, aid in each]


def rows(generator: torch.Generator, count: int, words: int, queries: int, setting: Setting) -> Tensor:
    """`count` rows of token ids: the pairs, then the queries, each with its value."""
    keys = torch.rand(count, words, generator=generator).argsort(1)[:, : setting.pairs]
    values = torch.randint(words, (count, setting.pairs), generator=generator)
    asked = torch.randint(setting.pairs, (count, queries), generator=generator)
    order = torch.cat([torch.arange(setting.pairs).expand(count, -1), asked], 1)
    first = UNUSED + 1
    pairs = [first + keys.gather(1, order), first + setting.words + values.gather(1, order)]
    return torch.stack(pairs, 2).flatten(1)


def trivial(ids: Tensor, setting: Setting) -> float:
    """How often the most frequent value of the context is the answer."""
    guesses = ids[:, 1 : 2 * setting.pairs : 2].mode(1).values
    return (guesses == ids[:, -1]).float().mean().item()


def build(start: Start, setting: Setting, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "vocab_size": UNUSED + 1 + 2 * setting.words,
        "hidden_size": setting.width,
        "num_hidden_layers": setting.layers,
        "intermediate_size": setting.inner,
        "num_attention_heads": setting.width // 64,
        "num_key_value_heads": setting.width // 64,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "initializer_range": start.std,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e9},
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if start.lfm2:
        mixers = ["conv", "full_attention"] * (setting.layers // 2)
        model = Lfm2ForCausalLM(Lfm2Config(layer_types=mixers, block_auto_adjust_ff_dim=False, **shape))
    else:
        model = LlamaForCausalLM(LlamaConfig(**shape))
    if start.embedding_std is not None:
        embeddings: Any = model.get_input_embeddings().weight
        torch.nn.init.normal_(embeddings, std=start.embedding_std)
    if start.written:
        assert isinstance(model, LlamaForCausalLM)
        write_induction_heads(model, UNUSED, torch.Generator().manual_seed(seed))
    return model


def answers(model: PreTrainedModel, ids: Tensor, setting: Setting) -> tuple[Tensor, Tensor]:
    """Logits where a query's value is due, and that value."""
    due = torch.arange(2 * setting.pairs + 1, ids.shape[1], 2)
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[:, due - 1]
    head: Any = model.get_output_embeddings()
    return head(hidden).flatten(0, 1), ids[:, due].flatten()


def share_right(logits: Tensor, due: Tensor) -> float:
    return (logits.argmax(1) == due).float().mean().item()


def learn(arm: Arm, setting: Setting, held: Tensor) -> dict[str, Any]:
    """One run: its accuracy at the end, when it first passed 0.9, and the accuracies on the way."""
    widening, many = AIDS[arm.aid]
    model = build(arm.start, setting, arm.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arm.start.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    generator = torch.Generator().manual_seed(arm.seed)
    queries = setting.queries if many else 1
    count = max(1, setting.batch_tokens // (2 * (setting.pairs + queries)))
    words = setting.few if widening else setting.words
    seen, recent, curve, reached, began = 0, 0.0, list[tuple[int, float, int]](), None, time.process_time()
    while True:
        ids = rows(generator, count, words, queries, setting)
        logits, due = answers(model, ids, setting)
        F.cross_entropy(logits, due).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = arm.start.lr * min(1.0, (seen + ids.numel()) / setting.warmup_tokens)
        optimizer.step()
        optimizer.zero_grad()
        seen += ids.numel()
        recent = 0.8 * recent + 0.2 * share_right(logits, due)
        if recent > RECALLED and words < setting.words:
            words, recent = min(setting.growth * words, setting.words), 0.0
        if seen >= setting.probe_every * (len(curve) + 1) or seen >= setting.tokens:
            with torch.no_grad():
                accuracy = share_right(*answers(model, held, setting))
            curve.append((seen, accuracy, words))
            reached = seen if reached is None and accuracy > RECALLED else reached
            if accuracy >= DONE or seen >= setting.tokens:
                break
    return {
        "arm": arm.key,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "accuracy": accuracy,
        "reached": reached,
        "words": words,
        "tokens": seen,
        "cpu_seconds": time.process_time() - began,
        "curve": curve,
    }


def median_range(values: list[float], scale: float = 1.0) -> str:
    low, middle, high = (f"{scale * pick(values):,.0f}" for pick in (min, statistics.median, max))
    return middle if low == high else f"{middle} [{low}, {high}]"


def table(done: dict[str, dict[str, Any]], setting: Setting, seeds: int, guess: float) -> Table:
    made = Table(
        title=f"Recall of {setting.pairs} pairs, {setting.words} keys and values, {setting.tokens:,} tokens a run",
        caption=f"Median and range of the seeds. The most frequent value of the context: {guess:.1%} right; "
        f"any value: {1 / setting.words:.1%}. Tokens to 0.9: of the seeds that passed it. Words: how far the "
        f"vocabulary grew. Tokens, CPU s: of a whole run, or until it was right on {DONE:.0%}.",
    )
    for heading in ("start", "aids", "lr", "accuracy %", "passed 0.9", "tokens to 0.9", "words", "tokens", "CPU s"):
        made.add_column(heading, justify="left" if heading in ("start", "aids") else "right", no_wrap=True)
    for first in (arm for arm in arms(1) if arm.key in done):
        runs = [done[key] for seed in range(seeds) if (key := Arm(first.start, first.aid, seed).key) in done]
        passed = [run["reached"] for run in runs if run["reached"] is not None]
        made.add_row(
            first.start.name,
            first.aid,
            f"{first.start.lr:.0e}".replace("e-0", "e-"),
            median_range([run["accuracy"] for run in runs], 100),
            f"{len(passed)} of {len(runs)}",
            median_range(passed) if passed else "not reached",
            median_range([run["words"] for run in runs]),
            median_range([run["tokens"] for run in runs]),
            median_range([run["cpu_seconds"] for run in runs]),
        )
    return made


def main(
    out: Annotated[Path, typer.Option("-o", "--output", help="Where finished runs are kept, and are not run again.")],
    tokens: Annotated[int, typer.Option(help="The dial: tokens of a run.")] = Setting.tokens,
    seeds: int = 3,
) -> None:
    """Train every arm on one thread and print the table."""
    torch.set_num_threads(1)
    setting = Setting(tokens=tokens)
    held = rows(torch.Generator().manual_seed(1_000_003), setting.held_out, setting.words, 1, setting)
    out.mkdir(parents=True, exist_ok=True)
    file = out / "runs.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {line["arm"]: line for line in lines if line["setting"] == asdict(setting)}
    missing = [arm for arm in arms(seeds) if arm.key not in done]
    for arm in track(missing, "runs", console=Console(stderr=True)):
        done[arm.key] = learn(arm, setting, held) | {"setting": asdict(setting)}
        with file.open("a") as kept:
            kept.write(f"{json.dumps(done[arm.key])}\n")
    Console(width=max(Console().width, 130)).print(table(done, setting, seeds, trivial(held, setting)))


if __name__ == "__main__":
    typer.run(main)
