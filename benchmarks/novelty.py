"""Does a hypernetwork know which rules it should not be trusted with: AUROC of `Novelty` against unseen tenants.

Unseen tenants of trained families are what it is for. Against them: the families that are held out, profiles worded as
no trained one is, the support desk's, words in another order, and letters in another order, which is gibberish. Beside
the AUROC, the share that lies beyond the threshold, whose rules would go into the prompt instead.

    python benchmarks/novelty.py HYPERNETWORK
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))

from worlds.catalogue import HELD_OUT, TRAINED
from worlds.contexts import paraphrased
from worlds.probes import Pick, trials, whole

from engrain.agent import bundled_base
from engrain.context import Context, Section
from engrain.controls import shuffled
from engrain.hypernetwork import load_hypernetwork
from engrain.model import load_base
from engrain.workflow import load_workflow

DESK = Path(__file__).resolve().parents[1] / "examples" / "support_desk"


def tenants(families: tuple[str, ...], pick: Pick, number: int) -> list[Context]:
    """Of unseen worlds, each once."""

    def found() -> Iterator[Context]:
        known: set[Context] = set()
        for trial in trials(families, pick, seed=0):
            context = trial.workflow.context(trial.task.tenant)
            if context not in known:
                known.add(context)
                yield context

    return list(islice(found(), number))


def changed(context: Context, change: Callable[[str], str]) -> Context:
    """With another text in the place of each rule."""
    return Context(tuple(Section(one.kind, one.name, tuple(map(change, one.rules))) for one in context.sections))


def gibberish(rule: str) -> str:
    letters = [at for at, sign in enumerate(rule) if sign.isalpha()]
    drawn = iter(random.Random(rule).sample([rule[at] for at in letters], len(letters)))
    return "".join(next(drawn) if sign.isalpha() else sign for sign in rule)


def auroc(usual: Sequence[float], strange: Sequence[float]) -> float:
    """The share of pairs in which the strange one lies further; ties count half."""
    ours, theirs = np.asarray(usual)[:, None], np.asarray(strange)[None]
    return float(((theirs > ours) + (theirs == ours) / 2).mean())


def main(
    hypernetwork: Path,
    base: Annotated[Path | None, typer.Option(help="another base than the bundled one")] = None,
    number: Annotated[int, typer.Option("-n", help="contexts of each kind")] = 200,
) -> None:
    source = load_hypernetwork(hypernetwork, load_base(base or bundled_base()))
    usual, desk = tenants(TRAINED, whole, number), load_workflow(DESK)
    kinds = {
        "unseen tenants": usual,
        "unseen families": tenants(HELD_OUT, whole, number),
        "paraphrased": tenants(TRAINED, paraphrased, number),
        "support desk": [desk.context(tenant) for tenant in desk.tenants],
        "words shuffled": [shuffled(lambda tenant, one=one: one, "", ()) for one in usual],
        "gibberish": [changed(one, gibberish) for one in usual],
    }
    scores = {kind: [source.novelty(source.features, one) for one in contexts] for kind, contexts in kinds.items()}
    threshold = float(source.novelty.threshold)
    table = Table("contexts", "number", "mean novelty", "AUROC", f"beyond {threshold:.2f}, %")
    for kind, found in scores.items():
        beyond = 100 * sum(score > threshold for score in found) / len(found)
        against = f"{auroc(scores['unseen tenants'], found):.2f}" if kind != "unseen tenants" else ""
        table.add_row(kind, str(len(found)), f"{sum(found) / len(found):.2f}", against, f"{beyond:.0f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
