"""Make a hypernetwork for the bundled base: `python recipes/hypernetwork/make.py -o OUT`.

It reads a tenant's rules and writes an adapter with which the base knows them, none in its prompt. Stages are a
curriculum in the number of rules and in their words (`rules_apart.py`); each but the last ends once it has taught
enough. After each it says which share of unseen tenants' values (that an edit of a rule would change) and whole lines
would be written right, under the right rules, edited ones, another tenant's and none, by the base alone, and by the
base with the rules in its prompt. Training resumes; the result appears whole.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from rules_apart import STAGES, UNRELATED, Stage, rows, tokens_of, unrelated

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "base"))

import cpu_attention
from transformers import PreTrainedModel
from worlds.catalogue import HELD_OUT, TRAINED

from engrain.agent import bundled_base
from engrain.batch import collate
from engrain.context import Context
from engrain.distil import with_choices
from engrain.encoder import BaseEncoder, Cached
from engrain.files import replacing
from engrain.hypernetwork import HEAD, SOURCES, load_hypernetwork, read_weights, save_hypernetwork
from engrain.learned import LearnedSource, Settings
from engrain.model import PACKED, Base, adapted, attention, load_base, packed_hidden, sites
from engrain.objective import output_logits
from engrain.renderer import Renderer, Row
from engrain.train import TrainConfig, train

UNSEEN = 9_000
"""Seeds from here on are of the tenants that are asked about after each stage."""
LOOK_EVERY, WATCHED = 250, 30
"""Steps between two looks at so many rows of unseen tenants, of other seeds than those that are reported."""
ENOUGH = 0.95
"""Share of values right under the right rules that ends a stage early, but for the last."""
Arm = Callable[[Row, Row], Context]
Found = dict[str, dict[str, float]]
"""By rows and what is measured, then by arm."""
ARMS: dict[str, Arm] = {
    "right": lambda row, other: row.context or Context(),
    "edited": lambda row, other: row.rival.context if row.rival else row.context or Context(),
    "another's": lambda row, other: other.context or Context(),
    "none": lambda row, other: Context(),
}


def likeliest(base: Base, source: LearnedSource | None, row: Row, context: Context, places: Sequence[int]) -> list[int]:
    """The token that would be written at each of these places of a row, after what stands before it there."""
    batch, training = collate([replace(row, context=context, rival=None)]), source is not None and source.training
    with torch.no_grad(), attention(base.model, PACKED):
        adapter = source.eval()(batch.contexts) if source is not None else None
        with adapted(base.model, adapter, batch.spans) if adapter is not None else nullcontext():
            hidden = packed_hidden(base.model, batch)
        found = output_logits(base.model, hidden[torch.tensor(places) - 1]).argmax(dim=-1).tolist()
    if source is not None:
        source.train(training)
    return found


def values_right(base: Base, source: LearnedSource | None, asked: Sequence[Row], arm: Arm) -> float:
    """The share of rows that have a rival in which the token would be right that the rule decides in which they differ.

    Under the rival's rules it is another, so what is right there is wrong.
    """
    right = [
        likeliest(base, source, row, arm(row, other), [row.rival.at]) == [row.ids[row.rival.at]]
        for row, other in zip(asked, [*asked[1:], *asked[:1]], strict=True)
        if row.rival is not None
    ]
    return sum(right) / max(len(right), 1)


def lines_right(base: Base, source: LearnedSource | None, asked: Sequence[Row], arm: Arm) -> float:
    """The share of the masked lines whose every token would be written, given what stands before it."""
    (newline,) = base.tokenizer.encode("\n", add_special_tokens=False)
    right, total = 0, 0
    for row, other in zip(asked, [*asked[1:], *asked[:1]], strict=True):
        places, line = [place for place, trained in enumerate(row.mask) if trained and place], True
        found = likeliest(base, source, row, arm(row, other), places)
        for place, after, token in zip(places, [*places[1:], -1], found, strict=True):
            line = line and token == row.ids[place]
            if row.ids[place] == newline or after != place + 1:
                right, total, line = right + line, total + 1, True
    return right / max(total, 1)


def unseen(
    renderer: Renderer, stage: Stage, asked: int, families: tuple[str, ...] = TRAINED, seed: int = UNSEEN
) -> tuple[list[Row], list[Row]]:
    """Rows of tenants that training does not meet, where an edit matters, and the same with the rules in the prompt."""
    pairs = [
        (row, replace(whole, rival=replace(row.rival, at=row.rival.at + len(whole.ids) - len(row.ids))))
        for row, whole in zip(*rows(renderer, stage, seed, asked * 3000, families), strict=True)
        if row.rival is not None
    ]
    held, prompted = zip(*random.Random(0).sample(pairs, min(asked, len(pairs))), strict=True)
    return list(held), list(prompted)


def report(base: Base, source: LearnedSource, stage: Stage, asked: int) -> Found:
    renderer, found, chosen = Renderer(base.tokenizer), Found(), list[Row]()
    for split, families in (("unseen tenants", TRAINED), ("unseen families", HELD_OUT)):
        chosen, prompted = unseen(renderer, stage, asked, families)
        for name, measure in {"values": values_right, "lines": lines_right}.items():
            shares = {arm: measure(base, source, chosen, of) for arm, of in ARMS.items()}
            shares["base alone"] = measure(base, None, chosen, ARMS["none"])
            shares["prompted"] = measure(base, None, prompted, ARMS["none"])
            found[f"{split}: {name}"] = shares
    contexts = [row.context for row in chosen if row.context is not None]
    others = unrelated(renderer, UNSEEN, contexts)
    found["unrelated: lines"] = {name: lines_right(base, source, others, arm) for name, arm in ARMS.items()}
    found["unrelated: lines"]["base alone"] = lines_right(base, None, others, ARMS["none"])
    return found


def taught(base: Base, stage: Stage, seed: int, tokens: int, distilled: bool) -> list[Row]:
    """What a stage trains on; if `distilled`, the base with the rules in its prompt says what is right.

    A few rows are of what no rule bears on: there the base as it is says what is right.
    """
    renderer = Renderer(base.tokenizer)
    made, prompted = rows(renderer, stage, seed, tokens)
    if distilled:
        made = with_choices(base, made, prompted)
    kept = set(random.Random(seed).sample(range(len(made)), round(stage.rivals * len(made))))
    made = [row if number in kept else replace(row, rival=None) for number, row in enumerate(made)]
    contexts = [row.context for row in made[: round(UNRELATED * len(made))] if row.context is not None]
    others = unrelated(renderer, seed, contexts)
    return [*made, *with_choices(base, others, others)]


def go_on(source: LearnedSource, earlier: Mapping[str, torch.Tensor]) -> None:
    """Give it the weights of one whose terms without context may have a smaller rank: at first it says the same."""
    own = source.state_dict()
    for name, weight in earlier.items():
        grows = name.startswith(("shared.", "reading."))
        part = own[name][tuple(map(slice, weight.shape))] if grows else own[name]
        part.copy_(weight)


def passed(stage: Stage, found: Mapping[str, float]) -> bool:
    """Whether a stage has taught what it is for; the last goes on to its end."""
    return stage is not STAGES[-1] and found["right"] >= ENOUGH


def show(found: Found, title: str) -> None:
    table = Table("rows", *next(iter(found.values())), title=title)
    for split, shares in found.items():
        table.add_row(split, *(f"{100 * share:.1f}" for share in shares.values()))
    Console(stderr=True).print(table)


def card(stages: Sequence[Stage], work: Path, base: Base, source: LearnedSource, seed: int) -> str:
    """What a hypernetwork was made from, and what it did after each stage."""
    lines = [
        "---\nlicense: apache-2.0\n---\n# A hypernetwork for the bundled base\n",
        "It reads a tenant's rules and writes a LoRA adapter with which the base knows them, none in its prompt.",
        "Made by `recipes/hypernetwork/make.py` on drills and trajectories of the worlds of `recipes/worlds`; families",
        "in `held_out.txt` there were never seen.\n",
        f"- base: {base.digest}",
        f"- settings: {json.dumps(asdict(source.settings))}",
        f"- seed: {seed}",
        *(f"- stage `{stage.name}`: {json.dumps(asdict(stage))}" for stage in stages),
    ]
    for stage in stages:
        held = json.loads((work / stage.name / "result.json").read_text())
        minutes = held["seconds"] / 60
        lines += [
            f"\n## {stage.name}: {held['tokens']:,} tokens, {held['steps']} steps, {minutes:.0f} minutes, "
            f"{held['loss']:.3f} nats\n",
            f"| % right | {' | '.join(ARMS)} | base alone | prompted |",
            f"|---|{'---|' * (len(ARMS) + 2)}",
        ]
        for asked, shares in held["found"].items():
            cells = (f"{100 * shares[arm]:.1f}" if arm in shares else "" for arm in (*ARMS, "base alone", "prompted"))
            lines.append(f"| {asked} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(
    out: Annotated[Path, typer.Option("-o", help="where the hypernetwork goes")],
    base: Annotated[Path | None, typer.Option(help="another base than the bundled one")] = None,
    kind: Annotated[str, typer.Option(help=", ".join(SOURCES))] = "rule-wise",
    tokens: int = 24_000_000,
    rank: Annotated[int, typer.Option(help="of a context's term, in a kind that is not rule-wise")] = 8,
    shared_rank: Annotated[
        int, typer.Option(help="of the term without context, in which the base learns to use the others")
    ] = 64,
    reading_rank: Annotated[int, typer.Option(help="of the term under which the base reads rules; 0: as it is")] = 32,
    width: int = 128,
    lr: float = 1e-3,
    seed: int = 0,
    asked: Annotated[int, typer.Option(help="rows of unseen tenants that are asked about after each stage")] = 40,
    distilled: Annotated[bool, typer.Option(help="learn from the base with the rules in its prompt")] = False,
    start: Annotated[Path | None, typer.Option(help="a hypernetwork of this kind to go on from, of any base")] = None,
    first: Annotated[str | None, typer.Option(help="the stage to begin with, going on from a --start")] = None,
    work: Path = Path("build/hypernetwork"),
    own_attention: Annotated[
        bool, typer.Option(help="on CPUs with bf16 instructions, twice as fast; needs a C++ compiler and ninja")
    ] = False,
) -> None:
    if own_attention and not cpu_attention.use():
        raise typer.BadParameter("--own-attention needs a CPU with AVX-512's bf16 instructions")
    names = [stage.name for stage in STAGES]
    if first is not None and (start is None or first not in names):
        raise typer.BadParameter(f"--first is one of {', '.join(names)}, going on from a --start")
    stages = STAGES[names.index(first or names[0]) :]
    loaded = load_base(base or bundled_base())
    renderer, encoder = Renderer(loaded.tokenizer), Cached(BaseEncoder(loaded))
    torch.manual_seed(seed)
    settings = Settings(rank=rank, shared_rank=shared_rank, reading_rank=reading_rank, width=width)
    source = SOURCES[kind](encoder, sites(loaded.model), settings)
    new = start is None or json.loads((start / HEAD).read_text())["base"] != loaded.digest
    if start is not None:
        go_on(source, read_weights(start))
    for stage in stages:
        folder = work / stage.name
        if not (folder / "done" / "hypernetwork.json").exists():
            budget = tokens_of(stage, tokens)
            config = TrainConfig(
                tokens=budget,
                batch_tokens=stage.batch,
                lr=lr,
                final=0.1 if stage is STAGES[-1] else 1.0,  # a stage that ends early must not have slowed down before
                seed=seed,
                threads=2,
                probe_every_steps=LOOK_EVERY,
            )
            made = taught(loaded, stage, seed, budget, distilled)
            watched, _ = unseen(renderer, stage, WATCHED, seed=UNSEEN + 1)

            def look(step: int, model: PreTrainedModel, watched: list[Row] = watched) -> dict[str, float]:
                return {name: values_right(loaded, source, watched, ARMS[name]) for name in ("right", "edited")}

            if stage is stages[0] and new:
                source.prepare([row.context for row in made if row.context is not None])
            enough = partial(passed, stage)
            result = train(loaded, source.train(), made, config, folder, probe=look, enough=enough)
            source.learnt_from([row.context for row in made if row.context is not None])
            found = report(loaded, source, stage, asked)
            with replacing(folder / "result.json") as file:
                json.dump({**asdict(result), "found": found}, file, indent=1)
            save_hypernetwork(folder / "done", source, loaded)
        source.load_state_dict(load_hypernetwork(folder / "done", loaded, encoder).state_dict())
        held = json.loads((folder / "result.json").read_text())
        show(held["found"], f"{stage.name}: {held['tokens']:,} tokens, {held['loss']:.3f} nats, % right")
    save_hypernetwork(out, source, loaded, torch.bfloat16)
    with replacing(out / "README.md") as file:
        file.write(card(stages, work, loaded, source, seed))


if __name__ == "__main__":
    typer.run(main)
