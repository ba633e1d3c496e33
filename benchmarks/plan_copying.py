"""Copying of long requests into the plan: how many lines a base would quote exactly, given the teacher's history.

A request of 12 or more items has lines that share their words; the plan quotes each. Counted are the tokens of a quote
after its first, where the likeliest token is the right one. `--start` measures the recipe's untrained start as well.
Intervals are 95% bootstraps over requests.

    python benchmarks/plan_copying.py src/engrain/base --start
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "base"))

import make
from worlds.trajectories import Depths, trajectories

from engrain.model import load_base
from engrain.score import bootstrap
from engrain.trajectory import Trajectory

LONG = 12


@dataclass(frozen=True)
class Quotes:
    """A request and its plan as token ids, and where in them each quote begins and ends."""

    ids: list[int]
    spans: list[tuple[int, int]]


def quotes(trajectory: Trajectory, tokenizer: PreTrainedTokenizerBase) -> Quotes:
    def ids_of(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    system, user, plan = trajectory.messages[:3]
    turns = [{"role": "system", "content": system.content}, {"role": "user", "content": user.content}]
    head = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert isinstance(head, str)
    heading = plan.reasoning.partition("(")[0]
    ids, spans = ids_of(f"{head}<think>{heading}"), list[tuple[int, int]]()
    for line in planned(plan.reasoning):
        mark, said = line.split(" = ")[0].split(" ", 1)
        ids += ids_of(mark)
        said_ids = ids_of(f" {said}")
        spans.append((len(ids) + 1, len(ids) + len(said_ids)))
        ids += said_ids + ids_of(f"{line[len(mark) + 1 + len(said) :]}\n")
    return Quotes(ids, spans)


def planned(notes: str) -> list[str]:
    return [line for line in notes.splitlines() if line.startswith("(") and " = " in line]


def rights(model: PreTrainedModel, requests: list[Quotes]) -> list[list[list[bool]]]:
    """By request, by quote: whether each token would be right."""
    model.eval()
    found: list[list[list[bool]]] = []
    for request in requests:
        ids = torch.tensor([request.ids])
        with torch.inference_mode():
            guess = model(input_ids=ids).logits[0].argmax(-1)
        right = (guess[:-1] == ids[0, 1:]).tolist()
        found.append([right[begin - 1 : end - 1] for begin, end in request.spans])
    return found


def main(
    bases: Annotated[list[Path], typer.Argument(help="base directories")],
    start: Annotated[bool, typer.Option(help="measure the recipe's start as well")] = False,
    n: Annotated[int, typer.Option("-n", help="requests")] = 40,
    seed: int = 990,
) -> None:
    depths = Depths(full=0, part=1, many=0, long=1, faults=0)
    drawn = list(
        islice((t for t in trajectories(seed, 3 * n, depths) if len(planned(t.messages[2].reasoning)) >= LONG), n)
    )
    table = Table("base", "tokens right %", "lines exact %", "requests exact %", "requests", "lines")
    for path in bases:
        base = load_base(path)
        arms = [(str(path), base.model)]
        if start:
            arms.append(("untrained start", make.initial_model(base.tokenizer, make.SIZES["cpu"])))
        for name, model in arms:
            found = rights(model, [quotes(trajectory, base.tokenizer) for trajectory in drawn])
            tokens = [sum(map(sum, request)) / sum(map(len, request)) for request in found]
            lines = [sum(map(all, request)) / len(request) for request in found]
            whole = [float(all(map(all, request))) for request in found]
            cells = [bootstrap(values).percent() for values in (tokens, lines, whole)]
            table.add_row(name, *cells, str(len(found)), str(sum(map(len, found))))
    Console(width=140).print(table)


if __name__ == "__main__":
    typer.run(main)
