"""What a LoRA trained for one tenant reaches, which the hypernetwork makes an adapter for at once; and their times.

Each tenant is of an unseen world. The oracle is a LoRA trained on the teacher's runs of other tasks of that tenant,
its rules nowhere in the prompt, as for the hypernetwork. Beside both, on the same tasks: the base alone and the base
with the rules in its prompt. Interrupted, it goes on: tenants' LoRAs and finished tasks lie in the output directory.

    python benchmarks/oracle_lora.py HYPERNETWORK -o build/oracle
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))

from worlds.catalogue import HELD_OUT, TRAINED
from worlds.probes import trials, whole

from engrain.adapter import ConstantAdapter, load_peft, save_peft
from engrain.agent import as_policy, bundled_base, text_digest
from engrain.compare import OURS, Arm, arms, compare
from engrain.files import replacing
from engrain.hypernetwork import load_hypernetwork
from engrain.model import base_digest, load_base, sites
from engrain.policy import Policy, ScriptTeacher
from engrain.probe import SUITE, Capability, Plan, Subject, Trial, WholeTask
from engrain.renderer import Renderer
from engrain.rollout import rollouts
from engrain.source import code_digest
from engrain.task import Task
from engrain.train import TrainConfig, train
from engrain.workflow import Workflow

SEED, TRAINING = 0, 1
"""Tasks of one are asked, those of the other are trained on."""
Place = tuple[Workflow, str]
"""A workflow and one of its tenants."""


def places(families: tuple[str, ...], number: int) -> list[Place]:
    found: dict[tuple[str, str], Place] = {}
    for trial in trials(families, whole, SEED):
        found.setdefault((trial.workflow.name, trial.task.tenant), (trial.workflow, trial.task.tenant))
        if len(found) == number:
            break
    return list(found.values())


def tasks(place: Place, seed: int) -> Iterator[Task]:
    workflow, tenant = place
    return (task for task in workflow.tasks("train", seed) if task.tenant == tenant)


def learn(base: Path, place: Place, config: TrainConfig, rank: int, out: Path) -> None:
    """A LoRA for one tenant, on about as many tokens of runs as it is trained on."""
    loaded = load_base(base)
    renderer, rows, tokens = Renderer(loaded.tokenizer), [], 0
    runs = rollouts(
        ((place[0], task) for task in tasks(place, TRAINING)), ScriptTeacher(place[0]), instructions="shared"
    )
    while tokens < config.tokens:
        rows += renderer.rows(next(runs))
        tokens += len(rows[-1].ids)
    torch.manual_seed(config.seed)
    lora = ConstantAdapter(sites(loaded.model), rank)
    result = train(loaded, lora, rows, config, out.with_suffix(".training"))
    save_peft(lora(), out)
    with replacing(out / "seconds.json") as file:
        json.dump(result.seconds, file)


def oracle(base: Path, out: Path) -> Subject:
    """The base with each tenant's own LoRA."""

    def policy(parallel: int) -> Policy:
        loaded = load_base(base)
        own = {path.name: load_peft(path) for path in out.iterdir() if (path / "seconds.json").exists()}
        renderer = Renderer(loaded.tokenizer)
        return as_policy(loaded.model, renderer, parallel, lambda one: own[name((one.workflow, one.task.tenant))])

    return Subject(text_digest(f"{base_digest(base)} {out.resolve()}"), policy)


def name(place: Place) -> str:
    return f"{place[0].name}-{place[1]}"


def main(
    hypernetwork: Path,
    out: Annotated[Path, typer.Option("-o", help="for LoRAs, runs and the report")],
    base: Annotated[Path | None, typer.Option(help="another base than the bundled one")] = None,
    contexts: Annotated[int, typer.Option(help="tenants")] = 30,
    asked: Annotated[int, typer.Option(help="tasks of each")] = 8,
    families: Annotated[str, typer.Option(help="trained or held-out")] = "trained",
    tokens: Annotated[int, typer.Option(help="to train each LoRA on")] = 300_000,
    rank: int = 16,
    lr: float = 1e-3,
) -> None:
    path, loras = base or bundled_base(), out / "loras"
    config = TrainConfig(tokens=tokens, batch_tokens=4096, lr=lr, threads=2)
    chosen = places(HELD_OUT if families == "held-out" else TRAINED, contexts)
    for place in track(chosen, "a LoRA for each tenant"):
        if not (loras / name(place) / "seconds.json").exists():
            learn(path, place, config, rank, loras / name(place))

    def every(seed: int) -> Iterator[Trial]:
        return (WholeTask(place[0], task) for place in chosen for task in islice(tasks(place, SEED), asked))

    suite = [Capability("tenants", f"{asked} whole tasks of each of {contexts} unseen tenants", every)]
    of = arms(hypernetwork, path, {})
    met = {arm: of[arm] for arm in ("base", "prompt", OURS)} | {"oracle LoRA": Arm(oracle(path, loras), "shared")}
    plan = Plan(tasks=contexts * asked, seeds=1)
    Console().print(compare(met, suite, code_digest(SUITE), plan, out / "runs").markdown())

    loaded = load_base(path)
    source, made = load_hypernetwork(hypernetwork, loaded), list[float]()
    for workflow, tenant in chosen:
        began = time.perf_counter()
        with torch.no_grad():
            source([workflow.context(tenant)])
        made.append(time.perf_counter() - began)
    learnt = [json.loads((loras / name(place) / "seconds.json").read_text()) for place in chosen]
    table = Table("for one tenant, on the CPU", "p50 seconds")
    table.add_row("training its LoRA", f"{statistics.median(learnt):.1f}")
    table.add_row("the hypernetwork's adapter", f"{statistics.median(made):.3f}")
    table.add_row("times faster", f"{statistics.median(learnt) / statistics.median(made):,.0f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
