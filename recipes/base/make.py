"""Make the bundled base from nothing: `python recipes/base/make.py -o src/engrain/base`.

Data -> tokenizer -> rows -> one pretraining run through `engrain.train` -> bf16 safetensors and a card. Every stage
leaves its result in the work directory and is skipped when it is there, and training resumes from its checkpoint, so
the same command continues after an interruption. One main dial: `--tokens`.
"""

from __future__ import annotations

import gzip
import json
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from data import Mix, rows
from induction import write_induction_heads
from safetensors.numpy import load_file, save_file
from tokenizer import train_tokenizer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from engrain.files import replacing, replacing_directory
from engrain.model import Base, save_base
from engrain.renderer import Renderer, Row
from engrain.train import TrainConfig, TrainResult, train
from engrain.trajectory import Trajectory

MAX_TOKENS = 4096
PER_CHUNK = 500
TOKENIZER_TRAJECTORIES = 1500


@dataclass(frozen=True)
class Recipe:
    """All that decides the base."""

    tokens: int
    """The dial: tokens to train on."""
    trajectories: int = 31_000
    """How many are generated; enough for each row to be met at most once at the default dial."""
    seed: int = 0
    vocabulary: int = 4096
    width: int = 192
    layers: int = 6
    lr: float = 1.5e-3
    batch_tokens: int = 6144
    initializer_range: float = 0.04
    min_trained: float = 0.15
    """Rows with a smaller share of trained tokens are left out: long prompts before few turns teach little."""
    mix: Mix = field(default_factory=Mix)

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
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            pad_token_id=pad,
            eos_token_id=stop,
            bos_token_id=None,
        )


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


def tokenizer_texts(count: int, seed: int) -> Iterator[str]:
    """What the tokenizer learns from: our format, and nothing of the held-out parts."""
    for trajectory in rows(seed, count):
        yield from texts_of(trajectory)


def texts_of(trajectory: Trajectory) -> Iterator[str]:
    for message in trajectory.messages:
        yield f"<|im_start|>{message.role}\n{message.content}"
        yield message.reasoning
        for call in message.tool_calls:
            yield f'{{"name": "{call.name}", "arguments": {call.arguments}}}'
    if trajectory.tools != "[]":
        yield trajectory.tools


@cache
def english_texts(folder: Path | None) -> list[str]:
    """Utterances of STAR (MIT) and Taskmaster-4 (CC BY 4.0), so that there are English words; none without a folder."""
    return [] if folder is None else list(_utterances(folder))


def _utterances(folder: Path) -> Iterator[str]:
    for name in ("star", "taskmaster4"):
        with gzip.open(folder / name / "dialogues.jsonl.gz", "rt", encoding="utf-8") as lines:
            for line in lines:
                yield from _strings(json.loads(line))


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        if " " in value:
            yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            if key.lower() in ("text", "utterance") or isinstance(item, (dict, list)):
                yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _render(work: Path, seed: int, recipe: Recipe, english: Path | None) -> dict[str, np.ndarray]:
    renderer = Renderer(AutoTokenizer.from_pretrained(work / "tokenizer"))
    ids: list[int] = []
    mask: list[bool] = []
    starts = [0]
    for trajectory in rows(seed, PER_CHUNK, recipe.mix, english_texts(english)):
        for row in renderer.rows(trajectory):
            if len(row.ids) <= MAX_TOKENS and sum(row.mask) >= recipe.min_trained * len(row.ids):
                ids += row.ids
                mask += row.mask
                starts.append(len(ids))
    return {"ids": np.array(ids, np.uint16), "mask": np.array(mask, np.bool_), "starts": np.array(starts, np.int64)}


def make_rows(work: Path, recipe: Recipe, processes: int, english: Path | None = None) -> Rows:
    """Chunks of trajectories, by seed, until there are tokens enough."""
    file = work / "rows.safetensors"
    if not file.exists():
        chunks: list[dict[str, np.ndarray]] = []
        first = recipe.seed * 100_000 + 1
        seeds = range(first, first + recipe.trajectories // PER_CHUNK)
        with ProcessPoolExecutor(processes) as pool:
            for chunk in pool.map(_render, [work] * len(seeds), seeds, [recipe] * len(seeds), [english] * len(seeds)):
                chunks.append(chunk)
                typer.echo(f"{len(chunks)} of {len(seeds)} chunks of trajectories", err=True)
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


def make_tokenizer(work: Path, recipe: Recipe, english: Path | None) -> PreTrainedTokenizerBase:
    folder = work / "tokenizer"
    if not folder.exists():
        texts = list(tokenizer_texts(TOKENIZER_TRAJECTORIES, seed=recipe.seed * 100_000))
        texts += english_texts(english)
        with replacing_directory(folder) as aside:
            train_tokenizer(texts, recipe.vocabulary).save_pretrained(aside)
    return AutoTokenizer.from_pretrained(folder)


def initial_model(tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> LlamaForCausalLM:
    torch.manual_seed(recipe.seed)
    assert isinstance(tokenizer.pad_token_id, int) and isinstance(tokenizer.eos_token_id, int)
    config = recipe.config(len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id)
    config._attn_implementation = "sdpa"
    model = LlamaForCausalLM(config)
    opening = tokenizer.convert_tokens_to_ids("(")
    assert isinstance(opening, int)
    write_induction_heads(model, opening, torch.Generator().manual_seed(recipe.seed))
    return model


def card(recipe: Recipe, result: TrainResult, rows: Rows, parameters: int, english: bool) -> str:
    settings = "\n".join(f"- {name}: {value}" for name, value in asdict(recipe).items())
    flag = " --english ../shared/data" if english else ""
    words = (
        "STAR (MIT) and Taskmaster-4 (CC BY 4.0) utterances, for the tokenizer and to be repeated in drills"
        if english
        else "none"
    )
    return f"""\
---
license: apache-2.0
pipeline_tag: text-generation
---
# The bundled base, first version

A Llama decoder of {parameters:,} parameters, trained from random weights by `recipes/base/make.py` on trajectories
of the support desk (`examples/support_desk`) for tenants invented at random, and on drills (`recipes/base/drills.py`).
It is a starting point to compile on and to test with, not a general model. Its first three layers start as induction
heads (`recipes/base/induction.py`), so that it can copy identifiers and marked lines from the first step on.

- Data: {len(rows):,} generated rows, {len(rows.ids):,} tokens, {int(rows.mask.sum()):,} of them with loss. Never the
  tenants in `examples/support_desk/tenants`, never the held-out request wording.
- Other text: {words}.
- Training: {result.steps:,} steps, {result.tokens:,} tokens, final loss {result.loss:.4f} nats a trained token,
  {result.seconds / 60:.0f} minutes of training on {torch.get_num_threads()} CPU threads, interruptions left out.
- Again, at commit {commit()}: `python recipes/base/make.py --tokens {recipe.tokens} --seed {recipe.seed}{flag} -o \
src/engrain/base`

{settings}
"""


def commit() -> str:
    """Of this recipe, and of the workflow whose trajectories it trains on."""
    asked = subprocess.run(["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"], capture_output=True)
    return asked.stdout.decode().strip() or "unknown"


def main(
    out: Annotated[Path, typer.Option("-o", help="where the base goes")],
    tokens: Annotated[int, typer.Option(help="the dial: tokens to train on")] = 16_000_000,
    seed: int = 0,
    work: Path = Path("build/base"),
    english: Annotated[Path | None, typer.Option(help="shared/data, to give the tokenizer English words")] = None,
    trajectories: Annotated[int, typer.Option(help="how many to generate, in chunks of 500")] = 31_000,
    processes: int = 2,
    lr: float = 1.5e-3,
    layers: int = 6,
    width: int = 192,
) -> None:
    recipe = Recipe(tokens, trajectories, seed, lr=lr, layers=layers, width=width)
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(work, recipe, english)
    kept = make_rows(work, recipe, processes, english)
    base = Base(initial_model(tokenizer, recipe), tokenizer)
    config = TrainConfig(
        tokens=tokens, batch_tokens=recipe.batch_tokens, accumulate=1, lr=recipe.lr, seed=seed, threads=2
    )
    result = train(base, None, kept, config, work / "train")
    base.model.bfloat16()
    save_base(base, out)
    parameters = sum(parameter.numel() for parameter in base.model.parameters())
    with replacing(out / "README.md") as file:
        file.write(card(recipe, result, kept, parameters, english is not None))
    typer.echo(f"{out}: {parameters:,} parameters, loss {result.loss:.4f}")


if __name__ == "__main__":
    typer.run(main)
