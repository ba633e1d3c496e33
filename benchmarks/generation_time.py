"""How long it takes to make a tenant's adapter, beside what retrieval would cost in its place.

A context of 20 rules of an unseen tenant to an adapter: cold (no rule was seen before), with the rules' features known,
with all but one rule known to `Adapters`, and with the adapter known to it. Beside it, in the same run: one hybrid
search of LanceDB over 10,000 rows with a tenant filter, its vector given, so that no embedding is counted. Needs the
extra `retrieval`. Random weights are as fast as trained ones, so without a hypernetwork an untrained one is timed.

    python benchmarks/generation_time.py [--hypernetwork DIR]
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import Annotated, Any

import lancedb  # pyright: ignore[reportMissingImports]
import torch
import typer
from lancedb.index import FTS  # pyright: ignore[reportMissingImports]
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))

from worlds.catalogue import TRAINED
from worlds.probes import trials, whole

from engrain.adapters import Adapters
from engrain.agent import bundled_base
from engrain.context import Context, Section
from engrain.encoder import BaseEncoder, Cached
from engrain.hypernetwork import Hypernetwork, load_hypernetwork
from engrain.learned import LearnedSource
from engrain.model import load_base, sites

RULES, ROWS, TENANTS, WIDTH = 20, 10_000, 50, 384
"""Rules of a context; rows and tenants of the table, and the width of its vectors."""


def contexts(number: int) -> list[Context]:
    """Of unseen tenants with at least so many rules, the first of them."""

    def found() -> Iterator[Context]:
        known: set[str] = set()
        for trial in trials(TRAINED, whole, seed=0):
            tenant = trial.task.tenant
            (section,) = trial.workflow.context(tenant).sections
            if tenant not in known and len(section.rules) >= RULES:
                known.add(tenant)
                yield Context((Section("tenant", tenant, section.rules[:RULES]),))

    return list(islice(found(), number))


def searching(folder: str, texts: list[str]) -> Callable[[int], Any]:
    """One hybrid search for the rules of a tenant, in a table as wide as a small sentence encoder."""
    rng = random.Random(0)
    vectors = torch.nn.functional.normalize(torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0)))
    rows = [
        {"vector": vector, "text": rng.choice(texts), "tenant": f"t{number % TENANTS}"}
        for number, vector in enumerate(vectors.tolist())
    ]
    table = lancedb.connect(folder).create_table("rules", rows)
    table.create_index("text", config=FTS())

    def search(number: int) -> Any:
        query = table.search(query_type="hybrid").vector(vectors[number].tolist()).text(texts[number % len(texts)])
        return query.where(f"tenant = 't{number % TENANTS}'", prefilter=True).limit(RULES).to_list()

    return search


def timed(call: Callable[[int], Any], number: int) -> list[float]:
    """Milliseconds of each call, after three that are not counted."""
    taken = []
    for n in range(number + 3):
        began = time.perf_counter()
        call(n % number)
        taken.append(1000 * (time.perf_counter() - began))
    return taken[3:]


def main(
    hypernetwork: Annotated[Path | None, typer.Option(help="else an untrained one")] = None,
    base: Annotated[Path | None, typer.Option(help="another base than the bundled one")] = None,
    number: Annotated[int, typer.Option("-n", help="contexts")] = 100,
) -> None:
    loaded, asked = load_base(base or bundled_base()), contexts(number)

    encoder = BaseEncoder(loaded)

    def source() -> LearnedSource:
        if hypernetwork is not None:
            return load_hypernetwork(hypernetwork, loaded, Cached(encoder))
        return Hypernetwork(Cached(encoder), sites(loaded.model)).eval()

    cold, warm = source(), source()
    known = Adapters(warm)
    for context in asked:
        known(context)

    def forget(n: int) -> None:
        cold.encoder = Cached(encoder)
        with torch.no_grad():
            cold([asked[n]])

    def remember(n: int) -> None:
        with torch.no_grad():
            warm([asked[n]])

    edits = count()

    def edit(n: int) -> None:
        rule = asked[n].rules[0]
        known(asked[n].replacing(rule, f"{rule.text} {next(edits)}"))

    texts = [rule for context in asked for rule in context.sections[0].rules]
    with tempfile.TemporaryDirectory() as folder:
        arms = {
            "LanceDB hybrid search with a tenant filter": timed(searching(folder, texts), number),
            "adapter, cold": timed(forget, number),
            "adapter, rules' features known": timed(remember, number),
            "adapter known": timed(lambda n: known(asked[n]), number),
            "adapter, one rule edited": timed(edit, number),
        }
    against = statistics.median(next(iter(arms.values())))
    table = Table("what", "p50 ms", "p95 ms", "x the search", title=f"{RULES} rules, {number} contexts")
    for name, taken in arms.items():
        p50, p95 = statistics.median(taken), statistics.quantiles(taken, n=20)[-1]
        table.add_row(name, f"{p50:.1f}", f"{p95:.1f}", f"{p50 / against:.2f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
