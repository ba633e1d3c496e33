"""Commands that measure: an agent against its base, and the base itself."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engrain.cli.agents import AgentPath, WorkflowPath, attached
from engrain.cli.sources import Interrupted, Json
from engrain.errors import InputError, ModelError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engrain import claims
    from engrain import compare as comparing
    from engrain import evaluate as evaluation
    from engrain import probe as probing
    from engrain.agent import Agent
    from engrain.workflow import Workflow

base = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Inspect and measure a base.")


def evaluate(
    agent: AgentPath,
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory for report and trajectories.")],
    arms: Annotated[str, typer.Option(help="Such as base, prompt, lora; by default all that there are.")] = "",
    beside: Annotated[list[Path] | None, typer.Option(help="Further agents, for arms of their kinds.")] = None,
    split: Annotated[str, typer.Option(help="Splits of the workflow; by default all but train.")] = "",
    n: Annotated[int, typer.Option("-n", help="Tasks for each arm and split.", min=1)] = 300,
    latency: Annotated[int, typer.Option(help="Tasks run one at a time, for seconds a step.", min=0)] = 10,
    parallel: Annotated[int, typer.Option(help="Tasks at a time.", min=1)] = 16,
    steps: Annotated[int, typer.Option(help="Steps a task may take.", min=1)] = 64,
    seed: Annotated[int, typer.Option(help="Seed of the tasks.")] = 1000,
    trials: Annotated[int, typer.Option(help="Runs of each task, for pass^k; needs --temperature.", min=1)] = 1,
    temperature: Annotated[float, typer.Option(help="Of sampling; 0 is greedy.", min=0)] = 0.0,
    suite: Annotated[str, typer.Option(help="`sources`: every way to adapt an agent, and orchestrated ones.")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="The suite on a few tasks.")] = False,
    workflow: WorkflowPath = None,
    json: Json = False,
) -> None:
    """Measure arms on splits. A finished arm and split is not run again."""
    from engrain import claims
    from engrain import evaluate as evaluation
    from engrain.agent import load_agent
    from engrain.arms import agent_arms, default_arms
    from engrain.budget import UNTIMED
    from engrain.cli import terminal

    agents = [load_agent(path) for path in (agent, *(beside or ()))]
    names = _listed(arms) or default_arms(agents)
    terminal.quiet()
    place = workflow or agent / agents[0].manifest.source
    source = attached(place, workflow)
    facts = (place if place.is_dir() else place.parent) / "facts"
    if suite:
        if suite != "sources" or arms or split or trials > 1 or temperature:
            raise InputError("the suite is called `sources`, chooses its own arms and splits and decodes greedily; "
                             "leave out --arms, --split, --trials and --temperature, or --suite")  # fmt: skip
        sizes = claims.QUICK if quick else claims.Sizes(n, max(1, n // 5), latency, replace(UNTIMED, steps=steps))
        return _sources(source, agents, facts, sizes, seed, parallel, output, json)
    splits = tuple(_listed(split) or [name for name in source.splits if name != "train"])
    plan = evaluation.Plan(splits, n, latency, seed, parallel, replace(UNTIMED, steps=steps), trials, temperature)
    with terminal.evaluating() as progress:
        chosen = agent_arms(names, agents, source, facts)
        report = evaluation.evaluate(source, chosen, plan, output, progress)
    _show(report, output, json)


def _sources(
    workflow: Workflow, agents: Sequence[Agent], facts: Path, sizes: claims.Sizes, seed: int, parallel: int,
    output: Path, json: bool,
) -> None:  # fmt: skip
    from engrain import claim_tables, claims
    from engrain import probe as probing
    from engrain.cli import terminal
    from engrain.page import REPORT, TABLE, WEB, write_report
    from engrain.page import Table as Shown

    suite = probing.load_suite(probing.SUITE) if probing.SUITE.is_dir() else ()
    try:
        with terminal.evaluating() as progress:
            measured = claims.measure(
                workflow, agents, sizes, output, facts=facts, suite=suite, seed=seed, parallel=parallel,
                progress=progress,
            )  # fmt: skip
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; finished arms lie in {output}, the same command goes on") from None
    page = claim_tables.document(measured)
    write_report(output, claim_tables.totals(measured), page)
    if json:
        return terminal.print_json(claim_tables.totals(measured))
    for block in page.blocks:
        if isinstance(block, Shown):
            typer.echo(f"\n{block.caption}")
            terminal.print_table(block.headings, block.rows, [])
    for line in claim_tables.notes(measured):
        typer.echo(line)
    typer.echo(f"written: {', '.join(str(output / name) for name in (REPORT, TABLE, WEB))}")


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def compare(
    hypernetwork: Annotated[Path, typer.Argument(help="The directory of a hypernetwork, or `bundled`.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory for report and trajectories.")],
    base: Annotated[Path | None, typer.Option(help="Its base; by default the bundled one.")] = None,
    suite: Annotated[Path | None, typer.Option(help="By default recipes/worlds/contexts.py.")] = None,
    split: Annotated[str, typer.Option(help="Which of the suite's probes; by default all.")] = "",
    arms: Annotated[str, typer.Option(help="Such as prompt, hypernetwork, another; by default all.")] = "",
    against: Annotated[list[str] | None, typer.Option(help="NAME=DIR: another hypernetwork, or a LoRA.")] = None,
    n: Annotated[int, typer.Option("-n", help="Tasks for each arm and probe, all seeds together.", min=1)] = 510,
    seeds: Annotated[int, typer.Option(help="How many seeds these come from.", min=1)] = 3,
    parallel: Annotated[int, typer.Option(help="Tasks at a time in each process.", min=1)] = 16,
    processes: Annotated[int, typer.Option(help="By default one a core.", min=1)] = os.cpu_count() or 1,
    json: Json = False,
) -> None:
    """Measure a hypernetwork beside its controls, on unseen tenants. Interrupted, the same command goes on."""
    from engrain import compare as comparing
    from engrain import probe as probing
    from engrain.agent import bundled_base, named_hypernetwork
    from engrain.cli import terminal
    from engrain.source import code_digest

    others = {name: Path(path) for name, _, path in (one.partition("=") for one in against or [])}
    place = _suite(suite, "contexts.py")
    terminal.quiet()
    every = comparing.arms(named_hypernetwork(hypernetwork), base or bundled_base(), others)
    names = _listed(arms) or list(every)
    if unknown := [name for name in names if name not in every]:
        raise InputError(f"unknown arm {unknown[0]!r}; there are {', '.join(every)}")
    chosen = probing.chosen(probing.load_suite(place), _listed(split))
    plan = probing.Plan(math.ceil(n / seeds), seeds, parallel, processes)
    code = code_digest(place if place.is_dir() else place.parent)
    try:
        with terminal.evaluating() as progress:
            picked = {name: every[name] for name in names}
            report = comparing.compare(picked, chosen, code, plan, output, progress)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; finished arms lie in {output}, the same command goes on") from None
    _show(report, output, json)


def _show(report: evaluation.Report | probing.Report | comparing.Comparison, output: Path, json: bool) -> None:
    from engrain.cli import terminal
    from engrain.page import REPORT, TABLE, WEB

    if json:
        terminal.print_json(report.to_dict())
    else:
        terminal.print_table(report.headings, report.rows(), report.notes())
        typer.echo(f"written: {', '.join(str(output / name) for name in (REPORT, TABLE, WEB))}")


def report(
    path: Annotated[Path, typer.Argument(help="A directory with report.json, or with committed reports, NAME.json.")],
    into: Annotated[
        Path | None, typer.Option(help="Put their tables into this file, where it says <!-- report:NAME -->.")
    ] = None,
) -> None:
    """Make the page of a report again from its JSON, or put tables of committed reports into a README."""
    from engrain.files import replacing
    from engrain.page import REPORT, WEB, filled, html, read_page

    if into is None:
        target, text = path / WEB, html(read_page(path / REPORT))
    elif into.is_file():
        target, text = into, filled(into.read_text(encoding="utf-8"), path)
    else:
        raise InputError(f"{into}: no such file; give one with marks such as <!-- report:NAME --><!-- /report:NAME -->")
    with replacing(target) as file:
        file.write(text)
    typer.echo(f"written: {target}")


def _suite(given: Path | None, file: str = "") -> Path:
    from engrain.probe import SUITE

    if given is None and not SUITE.is_dir():
        raise InputError("this copy of engrain has no suite; give one with --suite, such as recipes/worlds of the "
                         "repository")  # fmt: skip
    return given or SUITE / file


@base.command("probe")
def probe(
    path: Annotated[Path | None, typer.Argument(help="A base directory; by default the bundled one.")] = None,
    suite: Annotated[Path | None, typer.Option(help="A directory with probes.py; by default recipes/worlds.")] = None,
    n: Annotated[int, typer.Option("-n", help="Tasks for each probe, all seeds together.", min=1)] = 510,
    seeds: Annotated[int, typer.Option(help="How many seeds these come from.", min=1)] = 3,
    probes: Annotated[str, typer.Option(help="Which of the suite's probes; by default all.")] = "",
    parallel: Annotated[int, typer.Option(help="Tasks at a time in each process.", min=1)] = 16,
    processes: Annotated[int, typer.Option(help="By default one a core.", min=1)] = os.cpu_count() or 1,
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory for report and trajectories.")] = Path(
        "report"
    ),
    json: Json = False,
) -> None:
    """Measure what a base can do with the context in its prompt. Interrupted, the same command goes on."""
    from engrain import probe as probing
    from engrain.agent import bundled_base
    from engrain.cli import terminal
    from engrain.source import code_digest

    suite = _suite(suite)
    terminal.quiet()
    chosen = probing.chosen(probing.load_suite(suite), _listed(probes))
    subject = probing.subject(path or bundled_base())
    plan = probing.Plan(math.ceil(n / seeds), seeds, parallel, processes)
    try:
        with terminal.evaluating() as progress:
            report = probing.probe(subject, chosen, code_digest(suite), plan, output, progress)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; finished probes lie in {output}, the same command goes on") from None
    _show(report, output, json)


@base.command("show")
def show(
    path: Annotated[Path | None, typer.Argument(help="A base directory; by default the bundled one.")] = None,
    json: Json = False,
) -> None:
    """Parameters, vocabulary, digest and card of a base."""
    from engrain.agent import bundled_base
    from engrain.cli import terminal

    path = path or bundled_base()
    if not path.is_dir():
        raise ModelError(f"{path}: no such directory; give a base with config.json and *.safetensors")
    from engrain.compile import licence
    from engrain.model import load_base, sites

    terminal.quiet()
    loaded = load_base(path)
    facts = {
        "path": str(path),
        "digest": loaded.digest,
        "architecture": type(loaded.model).__name__,
        "parameters": sum(parameter.numel() for parameter in loaded.model.parameters()),
        "linear sites": len(sites(loaded.model)),
        "vocabulary": len(loaded.tokenizer),
        "licence": licence(path),
    }
    if json:
        terminal.print_json(facts)
        return
    for name, value in facts.items():
        typer.echo(f"{name}: {value:,}" if isinstance(value, int) else f"{name}: {value}")
    card = path / "README.md"
    if card.is_file():
        typer.echo("\n" + card.read_text(encoding="utf-8"))
