"""Make the bundled base from nothing: `python recipes/base/make.py -o src/engrain/base`.

Data -> tokenizer -> for each stage, rows and a run through `engrain.train` -> bf16 safetensors and a card. Every part
leaves its result in the work directory and is skipped when it is there, and training resumes from its checkpoint, so
the same command continues after an interruption; with `--probes` added at the end, it puts their table into the card.
One main dial: `--size`.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Annotated

import cpu_attention
import numpy as np
import torch
import typer
from data import STAGES, Stage, rows, tokens_of
from induction import write_induction_heads
from safetensors.numpy import load_file, save_file
from tokenizer import train_tokenizer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from worlds.english import english_of
from worlds.probes import suite

from engrain.files import replacing, replacing_directory
from engrain.learner import Probe
from engrain.model import Base, base_digest, load_base, save_base
from engrain.page import REPORT, TABLE
from engrain.probe import chosen, measure
from engrain.renderer import Renderer, Row
from engrain.train import TrainConfig, train
from engrain.trajectory import Trajectory

MAX_TOKENS = 16_384
PER_CHUNK = 500
TOKENIZER_TRAJECTORIES = 3000
PROBES = "## Capability probes"
"""What comes after this in a card is of that base alone."""
WATCHED = {"copy": 16, "compare": 16, "tenants": 16, "families": 16}
"""Probes that are run during training, on so many tasks."""
WATCH_EVERY, WATCH_SEED = 3, 9
"""In parts of the recipe's tokens, as stages have them; the seed is none of those that are reported."""


@dataclass(frozen=True)
class Recipe:
    """All that decides the base, with the stages of `data.py`."""

    tokens: int
    """To train on, over all stages."""
    seed: int = 0
    vocabulary: int = 4096
    width: int = 192
    layers: int = 6
    lr: float = 6e-4
    embedding_lr: float = 0.1
    """Faster, embeddings drift from what the written heads match on before the rest has learnt anything."""
    batch: int = 1
    """Multiplies the stages' batches."""
    initializer_range: float = 0.04
    compiled: bool = False
    """Through `torch.compile`, where there is a C++ compiler."""
    min_trained: float = 0.1
    """Rows with a smaller share of trained tokens are left out: long prompts before few turns teach little."""

    def config(self, vocabulary: int, pad: int, stop: int) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            intermediate_size=self.width * 8 // 3,
            num_attention_heads=self.width // 64,
            num_key_value_heads=self.width // 64,
            max_position_embeddings=MAX_TOKENS,
            tie_word_embeddings=True,
            initializer_range=self.initializer_range,
            rope_parameters={"rope_type": "default", "rope_theta": 1e9},
            pad_token_id=pad,
            eos_token_id=stop,
            bos_token_id=None,
        )


SIZES = {
    "cpu": Recipe(tokens=56_000_000),
    "gpu": Recipe(tokens=1_000_000_000, vocabulary=8192, width=384, layers=10, batch=16),
}
"""`cpu`: 3.4M parameters, four to six hours on two cores. `gpu`: 21M parameters."""


class Rows(Sequence[Row]):
    """Rows kept as flat arrays, one token in three bytes, made into `Row` when asked for."""

    def __init__(self, ids: np.ndarray, mask: np.ndarray, starts: np.ndarray) -> None:
        self.ids, self.mask, self.starts = ids, mask, starts

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index):  # type: ignore[override]
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        span = slice(self.starts[index], self.starts[index + 1])
        return Row(self.ids[span].tolist(), self.mask[span].tolist())


def texts_of(trajectory: Trajectory) -> Iterator[str]:
    """What the tokenizer learns from: our format."""
    for message in trajectory.messages:
        yield f"<|im_start|>{message.role}\n{message.content}"
        yield message.reasoning
        for call in message.tool_calls:
            yield f'{{"name": "{call.name}", "arguments": {call.arguments}}}'
    if trajectory.tools != "[]":
        yield trajectory.tools


def make_tokenizer(work: Path, recipe: Recipe, english: Path | None) -> PreTrainedTokenizerBase:
    folder = work / "tokenizer"
    if not folder.exists():
        seed = recipe.seed * 100_000
        texts = [
            text
            for stage in STAGES
            for one in rows(stage, seed, TOKENIZER_TRAJECTORIES // len(STAGES), english_of(english))
            for text in texts_of(one)
        ]
        with replacing_directory(folder) as aside:
            train_tokenizer([*texts, *english_of(english).texts], recipe.vocabulary).save_pretrained(aside)
    return AutoTokenizer.from_pretrained(folder)


def _render(work: Path, seed: int, stage: Stage, least: float, english: Path | None) -> dict[str, np.ndarray]:
    renderer = Renderer(AutoTokenizer.from_pretrained(work / "tokenizer"))
    ids: list[int] = []
    mask: list[bool] = []
    starts = [0]
    for trajectory in rows(stage, seed, PER_CHUNK, english_of(english)):
        for row in renderer.rows(trajectory):
            if len(row.ids) <= stage.longest and sum(row.mask) >= least * len(row.ids):
                ids += row.ids
                mask += row.mask
                starts.append(len(ids))
    return {"ids": np.array(ids, np.uint16), "mask": np.array(mask, np.bool_), "starts": np.array(starts, np.int64)}


def make_rows(work: Path, recipe: Recipe, number: int, processes: int, english: Path | None = None) -> Rows:
    """Of one stage: chunks of trajectories, by seed, until there are tokens enough to meet each row at most once."""
    stage = STAGES[number]
    file, needed = work / f"{stage.name}.safetensors", tokens_of(stage, recipe.tokens)
    if not file.exists():
        chunks: list[dict[str, np.ndarray]] = []
        seeds = count(recipe.seed * 100_000 + number * 10_000 + 1)
        with ProcessPoolExecutor(processes) as pool:
            while (made := sum(len(chunk["ids"]) for chunk in chunks)) < needed:
                typer.echo(f"{stage.name}: {made / needed:.0%} of the rows", err=True)
                waiting = [
                    pool.submit(_render, work, next(seeds), stage, recipe.min_trained, english)
                    for _ in range(4 * processes)
                ]
                chunks += [done.result() for done in waiting]
        offsets = np.cumsum([0] + [len(chunk["ids"]) for chunk in chunks])
        starts = [chunk["starts"][:-1] + offset for chunk, offset in zip(chunks, offsets[:-1], strict=True)]
        save_file(
            {
                "ids": np.concatenate([chunk["ids"] for chunk in chunks]),
                "mask": np.concatenate([chunk["mask"] for chunk in chunks]),
                "starts": np.concatenate([*starts, offsets[-1:]]),
            },
            file.with_suffix(".part"),
        )
        file.with_suffix(".part").rename(file)
    arrays = load_file(file)
    return Rows(arrays["ids"], arrays["mask"], arrays["starts"])


def initial_model(tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> LlamaForCausalLM:
    torch.manual_seed(recipe.seed)
    assert isinstance(tokenizer.pad_token_id, int) and isinstance(tokenizer.eos_token_id, int)
    config = recipe.config(len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id)
    config._attn_implementation = "sdpa"
    model = LlamaForCausalLM(config)
    (newline,) = tokenizer.encode("\n", add_special_tokens=False)
    write_induction_heads(model, newline, torch.Generator().manual_seed(recipe.seed))
    return model


def watch(tokenizer: PreTrainedTokenizerBase) -> Probe:
    """The share of right answers to a few tasks of each watched probe."""

    def look(step: int, model: PreTrainedModel) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, tasks in WATCHED.items():
            found |= measure(Base(model, tokenizer), chosen(suite, [name]), tasks, WATCH_SEED)
        return found

    return look


def curves(work: Path, stages: Sequence[Stage]) -> str:
    """Loss and watched probes, a line each time that they were looked at."""
    lines = ""
    for stage in stages:
        losses: list[float] = []
        for line in (work / stage.name / "metrics.jsonl").read_text().splitlines():
            at = json.loads(line)
            if "loss" in at:
                losses.append(at["loss"])
            else:
                shares = " | ".join(f"{100 * at[name]:.0f}" for name in WATCHED)
                mean = sum(losses[-50:]) / len(losses[-50:])
                lines += f"| {stage.name} | {at['tokens']:,} | {mean:.4f} | {shares} |\n"
    return lines


def train_stage(base: Base, work: Path, recipe: Recipe, number: int, processes: int, english: Path | None) -> Base:
    """The base after one stage, in fp32, with `result.json` beside it."""
    stage, folder = STAGES[number], work / f"{STAGES[number].name}.base"
    if not folder.exists():
        kept = make_rows(work, recipe, number, processes, english)
        tokens, batch_tokens = tokens_of(stage, recipe.tokens), stage.batch_tokens * recipe.batch
        config = TrainConfig(
            tokens=tokens,
            batch_tokens=batch_tokens,
            accumulate=1,
            lr=recipe.lr * stage.lr,
            embedding_lr=recipe.embedding_lr,
            final=stage.final,
            seed=recipe.seed,
            probe_every_steps=max(1, WATCH_EVERY * tokens // stage.parts // batch_tokens),
            threads=2,
            compiled=recipe.compiled,
        )
        result = train(base, None, kept, config, work / stage.name, probe=watch(base.tokenizer))
        counts = {"rows": len(kept), "generated": len(kept.ids), "trained": int(kept.mask.sum())}
        with replacing(work / stage.name / "result.json") as file:
            json.dump(asdict(result) | counts, file)
        save_base(base, folder)
    return load_base(folder)


def probed(report: Path, base: Path) -> str:
    """The table that `engrain base probe` wrote of this base."""
    if (of := json.loads((report / REPORT).read_text())["digest"]) != base_digest(base):
        raise typer.BadParameter(f"{report} is of base {of[:12]}, this one is {base_digest(base)[:12]}; probe it anew")
    _, table = (report / TABLE).read_text().split("\n", 1)
    return f"{PROBES}\n{table}"


def opening(parameters: int) -> str:
    """Of the card: what every base of this recipe is."""
    return f"""\
---
license: apache-2.0
pipeline_tag: text-generation
---
# The bundled base

A Llama decoder of {parameters:,} parameters, trained by `recipes/base/make.py` on drills and on
trajectories of procedural worlds of workflows (`recipes/worlds`). It reads procedures, rules and tool schemas and
carries them out; it is a starting point to compile on and to test with, not a general model. Its first three layers
start as induction heads (`recipes/base/induction.py`), so that it can copy lines and identifiers from the first step.

"""


def how(size: str, recipe: Recipe, work: Path, english: bool, start: Path | None = None, first: int = 0) -> str:
    """Of the card: how this base came to be."""
    settings = "\n".join(f"- {name}: {value}" for name, value in asdict(recipe).items())
    stages = ""
    for stage in STAGES[first:]:
        one = json.loads((work / stage.name / "result.json").read_text())
        counts = " | ".join(f"{one[name]:,}" for name in ("rows", "generated", "trained", "tokens", "steps"))
        stages += f"| {stage.name} | {counts} | {one['loss']:.4f} | {one['seconds'] / 60:.0f} |\n"
    before = base_digest(start)[:12] if start else ""
    earlier = f"an earlier base, {before}; below is what came after" if start else "random weights"
    begun = (f" --start {before}" if start else "") + (f" --first {STAGES[first].name}" if first else "")
    words = (
        "STAR (MIT) and Taskmaster-4 (CC BY 4.0) utterances: for the tokenizer, repeated in drills, as other words"
        if english
        else "none"
    )
    return f"""\
- Started from {earlier}.
- Never seen: the families of workflows named in `recipes/worlds/held_out.txt`, and the support desk.
- Other text: {words}.
- {torch.get_num_threads()} CPU threads; minutes leave out interruptions.
- Again, at commit {commit()}: `python recipes/base/make.py --size {size} --tokens {recipe.tokens} --seed \
{recipe.seed}{" --english ../shared/data" if english else ""}{begun} -o src/engrain/base`

| stage | rows made | their tokens | with loss | tokens trained on | steps | loss, nats a trained token | minutes |
|---|---|---|---|---|---|---|---|
{stages}
Watched during training: the mean loss of 50 steps, and the share of right answers in % to so many tasks of each probe:
{", ".join(f"{tasks} {name}" for name, tasks in WATCHED.items())}.

| stage | tokens | loss | {" | ".join(WATCHED)} |
|---|---|---|{"---|" * len(WATCHED)}
{curves(work, STAGES[first:])}
{settings}
"""


def write_card(base: Path, parameters: int, how_made: str, probes: Path | None) -> None:
    """The base's README, with the table that `engrain base probe` wrote of it to `probes`."""
    with replacing(base / "README.md") as file:
        file.write(opening(parameters) + how_made)
        file.write(f"\n{probed(probes, base)}" if probes else "")


def commit() -> str:
    """Of this recipe, and of the worlds that it trains on."""
    asked = subprocess.run(["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"], capture_output=True)
    return asked.stdout.decode().strip() or "unknown"


def main(
    out: Annotated[Path, typer.Option("-o", help="where the base goes")],
    size: Annotated[str, typer.Option(help=f"the dial: {' or '.join(SIZES)}")] = "cpu",
    seed: int = 0,
    work: Path = Path("build/base"),
    english: Annotated[Path | None, typer.Option(help="shared/data, to give the tokenizer English words")] = None,
    processes: int = os.cpu_count() or 1,
    tokens: Annotated[int | None, typer.Option(help="other than the size's, to try things out")] = None,
    layers: Annotated[int | None, typer.Option(help="other than the size's")] = None,
    compiled: Annotated[bool, typer.Option(help="compile the model for speed; needs a C++ compiler")] = False,
    own_attention: Annotated[
        bool, typer.Option(help="on CPUs with bf16 instructions, twice as fast; needs a C++ compiler and ninja")
    ] = False,
    start: Annotated[Path | None, typer.Option(help="a base of this size to go on from, with its tokenizer")] = None,
    first: Annotated[str | None, typer.Option(help="the stage to begin with, going on from a --start")] = None,
    probes: Annotated[Path | None, typer.Option(help="where `engrain base probe` measured it, for the card")] = None,
) -> None:
    if size not in SIZES:
        raise typer.BadParameter(f"{size!r} is none of {', '.join(SIZES)}")
    names = [stage.name for stage in STAGES]
    if first is not None and first not in names:
        raise typer.BadParameter(f"{first!r} is none of {', '.join(names)}")
    if first is not None and start is None:
        raise typer.BadParameter("--first goes on from an earlier base; name it with --start")
    begin = names.index(first) if first else 0
    chosen = SIZES[size]
    recipe = replace(chosen, seed=seed, tokens=tokens or chosen.tokens, layers=layers or chosen.layers)
    recipe = replace(recipe, compiled=compiled)
    work.mkdir(parents=True, exist_ok=True)
    if own_attention and not cpu_attention.use():
        raise typer.BadParameter("--own-attention needs a CPU with AVX-512's bf16 instructions")
    if start is not None:
        base = load_base(start)
        base.tokenizer.save_pretrained(work / "tokenizer")
    else:
        tokenizer = make_tokenizer(work, recipe, english)
        base = Base(initial_model(tokenizer, recipe), tokenizer)
    for number in range(begin, len(STAGES)):
        base = train_stage(base, work, recipe, number, processes, english)
    base.model.bfloat16()
    save_base(base, out)
    parameters = sum(parameter.numel() for parameter in base.model.parameters())
    write_card(out, parameters, how(size, recipe, work, english is not None, start, begin), probes)
    typer.echo(f"{out}: {parameters:,} parameters")


if __name__ == "__main__":
    typer.run(main)
