"""Commands that make what is compiled: a workflow, recorded runs, imported logs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engrain.errors import DataError, EngrainError, InputError

if TYPE_CHECKING:
    from engrain.policy import Policy
    from engrain.trajectory import Trajectory
    from engrain.workflow import Workflow

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


class Interrupted(EngrainError):
    """Ctrl-C, with a word on how to go on."""

    exit_code = 130


def new(directory: Annotated[Path, typer.Argument(help="A directory that does not exist yet.")]) -> None:
    """Scaffold a small workflow that already compiles."""
    from engrain.files import replacing_directory

    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(f"{directory} already exists and is not empty; choose another name")
    template = Path(__file__).parent.parent / "template"
    with replacing_directory(directory) as made:
        shutil.copytree(template, made, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    typer.echo(f"{directory}/workflow.py: tools, phases, tasks, teacher and check; {directory}/tenants: the rules")
    typer.echo(f"next: engrain compile {directory} -o agent")


def record(
    workflow: Annotated[Path, typer.Argument(help="A directory with workflow.py, or a Python file.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The trajectories to write, .jsonl.")],
    teacher: Annotated[str, typer.Option(help="script, or the URL of an OpenAI-compatible endpoint.")] = "script",
    model: Annotated[str, typer.Option(help="The endpoint's model.")] = "",
    n: Annotated[int, typer.Option("-n", help="How many tasks.", min=1)] = 100,
    split: Annotated[str, typer.Option(help="Which of the workflow's splits.")] = "train",
    task: Annotated[Path | None, typer.Option(help="Tasks from a file, .jsonl, instead.")] = None,
    parallel: Annotated[int, typer.Option(help="Tasks at a time.", min=1)] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the tasks.")] = 0,
    json: Json = False,
) -> None:
    """Have a teacher do tasks; keep the runs that reach their goal. Interrupted, the same command goes on."""
    from engrain.cli import terminal
    from engrain.record import partial_path, refused_path
    from engrain.record import record as record_runs
    from engrain.task import read_tasks
    from engrain.workflow import load_workflow

    source = load_workflow(workflow)
    if task is None and split not in source.splits:
        raise InputError(f"unknown split {split!r}; {source.name!r} has {', '.join(source.splits)}")
    tasks = read_tasks(task) if task else source.tasks(split, seed)
    try:
        with terminal.recording() as on_progress:
            report = record_runs(source, _teacher(source, teacher, model), tasks, output, n, parallel, on_progress)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; runs so far lie in {partial_path(output)}, the same command goes on") from None
    refused = dict(report.refused)
    if json:
        terminal.print_json({"output": str(output), "kept": report.kept, "refused": refused, "resumed": report.resumed})
    else:
        typer.echo(f"{output}: {report.kept} of {report.tasks} runs reached their goal")
        for reason, count in refused.items():
            typer.echo(f"refused {count}: {reason}  ({refused_path(output)})")


def _teacher(workflow: Workflow, teacher: str, model: str) -> Policy:
    from engrain.policy import EndpointTeacher, ScriptTeacher

    if teacher == "script":
        return ScriptTeacher(workflow)
    if not teacher.startswith(("http://", "https://")):
        raise InputError(f"expected --teacher script or a URL such as http://localhost:8000/v1, got {teacher!r}")
    if not model:
        raise InputError("an endpoint serves several models; name one with --model")
    return EndpointTeacher(teacher, model, system=lambda episode: workflow.system(episode.task.tenant, "full"))


def import_(
    files: Annotated[list[Path], typer.Argument(help="Logs: JSONL or a JSON list, also gzipped.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The trajectories to write, .jsonl.")],
    format: Annotated[str | None, typer.Option(help="engrain, openai, sharegpt or sgd; told from the data.")] = None,
    schemas: Annotated[Path | None, typer.Option(help="SGD: the services' schema.json.")] = None,
    results: Annotated[int, typer.Option(help="SGD: rows kept of a call's result.", min=0)] = 3,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Report bad records and go on.")] = False,
    calls_only: Annotated[bool, typer.Option("--calls-only", help="Put loss on turns that call a tool only.")] = False,
    json: Json = False,
) -> None:
    """Read existing logs as trajectories."""
    from engrain.cli import terminal
    from engrain.dataset import deduplicate, import_file, train_on_calls, until_last_call
    from engrain.trajectory import write_trajectories

    bad: list[DataError] = []
    read = 0

    def report(error: DataError) -> None:
        bad.append(error)
        terminal.note(f"skipped {error}")

    def everything() -> Iterator[Trajectory]:
        nonlocal read
        for file in files:
            terminal.note(f"reading {file}")
            for trajectory in import_file(file, format, schemas, results=results, on_bad=report if skip_bad else None):
                read += 1
                yield until_last_call(train_on_calls(trajectory)) if calls_only else trajectory

    written = write_trajectories(output, deduplicate(everything()))
    result = {"output": str(output), "written": written, "duplicates": read - written, "bad": len(bad)}
    if json:
        terminal.print_json(result)
    else:
        typer.echo(f"{output}: {written} trajectories ({read - written} duplicates, {len(bad)} bad records left out)")
