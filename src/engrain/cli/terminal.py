"""What people see: progress on stderr, results on stdout, a step of a run as one line a fact."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from engrain.trajectory import Message, Trajectory

if TYPE_CHECKING:
    from engrain.record import RecordReport

errors = Console(stderr=True, highlight=False, soft_wrap=True)
results = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)


def note(text: str) -> None:
    """A line of progress."""
    errors.print(Text(text))


def quiet() -> None:
    """Keep transformers' own progress bars off stderr."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False, indent=2))


def print_step(message: Message) -> None:
    """One message of a live run: who, what, how long."""
    time = f"{message.seconds * 1000:.0f} ms" if message.seconds is not None else ""
    if message.role == "assistant":
        if message.reasoning:
            _line(message.phase, "thinks", message.reasoning, "dim")
        for call in message.tool_calls:
            _line(message.phase, "calls", f"{call.name} {call.arguments}", "bold cyan", time)
        if not message.tool_calls:
            _line(message.phase, "answers", message.content, "bold green", time)
    elif message.role == "tool":
        _line("", "reads", message.content, "red" if message.error else "", time)
    elif message.role == "user":
        _line("", "request", message.content, "bold")


def _line(phase: str, verb: str, text: str, style: str, time: str = "") -> None:
    shown = text if len(text) <= 300 else f"{text[:300]} … ({len(text)} characters)"
    line = Text.assemble((f"{phase:>9} ", "magenta"), (f"{verb:<8}", "dim"), (" ".join(shown.split()), style))
    results.print(line.append(f"  {time}", "yellow") if time else line)


def print_outcome(trajectory: Trajectory) -> None:
    """How a live run ended."""
    steps = [message for message in trajectory.messages if message.role == "assistant"]
    seconds = sum(message.seconds or 0.0 for message in trajectory.messages)
    tokens = [message.prompt_tokens for message in steps if message.prompt_tokens is not None]
    outcome = trajectory.outcome
    success = outcome is not None and outcome.success
    reason = f": {outcome.reason}" if outcome and outcome.reason else ""
    line = Text(f"{'':>9} ")
    line.append("reached its goal" if success else "failed", "bold green" if success else "bold red")
    line.append(f"{reason}  {len(steps)} steps, {seconds:.2f} s")
    line.append(f", {sum(tokens) / len(tokens):.0f} tokens in context a step\n" if tokens else "\n")
    results.print(line)


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str]) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number < 2 else "right", no_wrap=number < 2)
    for row in rows:
        table.add_row(*row)
    results.print(table)
    for line in notes:
        results.print(Text(line))


@contextmanager
def recording() -> Iterator[Callable[[RecordReport], None]]:
    """A bar for teacher rollouts."""
    with _Bars() as bars:

        def show(report: RecordReport) -> None:
            refused = sum(report.refused.values())
            bars.show("record", f"record, {refused} refused" if refused else "record", report.done, report.tasks)

        yield show


@contextmanager
def evaluating() -> Iterator[Callable[[str, str, int, int], None]]:
    """A bar for each arm and split."""
    with _Bars() as bars:
        yield lambda arm, split, done, total: bars.show((arm, split), f"{arm}, {split}", done, total)


class _Bars:
    """Bars that appear as they are first heard of, and leave the terminal to others when they are full."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._key: object = None
        self._task = TaskID(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def show(self, key: object, title: str, done: int, total: int) -> None:
        if self._progress is None or key != self._key:
            self._stop()
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._progress, self._key = Progress(*columns, console=errors), key
            self._progress.start()
            self._task = self._progress.add_task(title, total=total)
        self._progress.update(self._task, description=title, completed=done, total=total)
        if done >= total:
            self._stop()

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._progress = None
