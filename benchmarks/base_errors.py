"""Where a base errs: the teacher's runs, the context in the prompt, each token asked for after what stands before it.

A thousand times more is counted than by whole tasks in the same time, so two bases can be told apart, and errors sorted
by the part of a turn in which they are, by family and by how far into the run. It is no measure of success: not every
error matters, and one that does ends a task. Its worlds are none that a base trains on or is probed on.

    python benchmarks/base_errors.py BASE --long
"""

from __future__ import annotations

import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))

from transformers import PreTrainedTokenizerBase
from worlds.catalogue import HELD_OUT, TRAINED
from worlds.trajectories import Depths, trajectories

from engrain.agent import BUNDLED
from engrain.batch import collate
from engrain.model import PACKED, Base, attention, load_base, packed_hidden
from engrain.objective import output_logits
from engrain.renderer import Renderer, Row

SEED = 777
FAR = 4096
"""Tokens into a run from which on it is far."""
STEP = re.compile(r"[A-Z]\d+ ")
TITLE = re.compile(r"\(\w+\) ")
RESULT = re.compile(r"\(\w+\)\.")


@dataclass(frozen=True)
class Asked:
    """One token that the teacher wrote."""

    part: str
    before: str
    """The line so far."""
    wanted: str
    far: bool
    wrong: bool


def part_of(line: str) -> str:
    """What the next token of a line belongs to."""
    thought = line.rpartition("<think>")[2]
    if "<tool_call>" in line:
        return "a call"
    if STEP.match(thought):
        return "a step's decision" if '": ' in thought or ": " in thought else "a step's words"
    if RESULT.match(thought.rpartition("</think>")[2]):
        return "a result"
    return "an item's title" if TITLE.match(thought) else "the form"


def asked(base: Base, row: Row) -> Iterator[Asked]:
    batch = collate([row])
    targets = batch.mask.nonzero()[:, 0]
    with torch.no_grad(), attention(base.model, PACKED):
        found = output_logits(base.model, packed_hidden(base.model, batch)[targets - 1]).argmax(dim=-1).tolist()
    texts, line, last = _texts(base.tokenizer, row), "", -1
    for place, token in zip(targets.tolist(), found, strict=True):
        if place != last + 1:
            line = ""
        yield Asked(part_of(line), line, texts[place], place >= FAR, token != row.ids[place])
        line, last = ("" if "\n" in texts[place] else line + texts[place]), place


def _texts(tokenizer: PreTrainedTokenizerBase, row: Row) -> list[str]:
    return [str(tokenizer.decode([token])) for token in row.ids]


def main(
    base: Annotated[Path, typer.Argument()] = BUNDLED,
    number: Annotated[int, typer.Option("-n", help="runs")] = 60,
    long: Annotated[bool, typer.Option(help="10 to 32 items each, in the place of 4 to 9")] = False,
    held_out: Annotated[bool, typer.Option(help="of the families that are held out")] = False,
    show: Annotated[int, typer.Option(help="so many errors of each part")] = 0,
) -> None:
    loaded = load_base(base)
    renderer = Renderer(loaded.tokenizer)
    depths = Depths(full=1.0, part=0.0, faults=0.0, many=float(not long), long=float(long), per_world=2)
    counts: dict[str, Counter[str]] = {"part": Counter(), "where": Counter(), "family": Counter()}
    wrong: dict[str, Counter[str]] = {"part": Counter(), "where": Counter(), "family": Counter()}
    examples: dict[str, list[Asked]] = defaultdict(list)
    clean = 0
    runs = trajectories(SEED, number, depths, HELD_OUT if held_out else TRAINED)
    for run in track(runs, "runs", total=number, console=Console(stderr=True)):
        (row,) = renderer.rows(run)
        tokens = list(asked(loaded, row))
        for token in tokens:
            family, where = run.workflow.rpartition("_")[0], f"{'from' if token.far else 'before'} token {FAR}"
            for by, name in {"part": token.part, "where": where, "family": family}.items():
                counts[by][name] += 1
                wrong[by][name] += token.wrong
            if token.wrong:
                examples[token.part].append(token)
        clean += not any(token.wrong for token in tokens)
    for by, names in counts.items():
        table = Table(by, "tokens", "wrong", "%")
        for name in sorted(names, key=lambda one: -wrong[by][one] / names[one]):
            table.add_row(name, f"{names[name]:,}", str(wrong[by][name]), f"{100 * wrong[by][name] / names[name]:.3f}")
        Console().print(table)
    total, errors = counts["part"].total(), wrong["part"].total()
    Console().print(f"{errors} of {total:,} wrong, {100 * errors / total:.3f}%; {clean} of {number} runs without any")
    for part, found in examples.items():
        for one in found[:show]:
            Console().print(f"{part}: {one.before[-150:]!r} and then {one.wanted!r}", markup=False, highlight=False)


if __name__ == "__main__":
    typer.run(main)
