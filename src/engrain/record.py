"""Teacher rollouts -> a file of the runs that reached their goal, and one of those that did not, with the reason.

Every finished run is appended as one whole line to `<out>.partial` before the next is taken, so a stop at any moment
loses only runs under way; the next call drops a torn last line and goes on. At the end the journal becomes `out` and
`<out>.refused.jsonl` by rename, in the order of the tasks: with a deterministic teacher the same tasks give the same
bytes, whatever the number of processes or interruptions. A task is tried once: delete the refused file to try again.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from engrain.budget import Budget
from engrain.errors import InputError
from engrain.files import replacing
from engrain.parallel import merged
from engrain.policy import Policy
from engrain.rollout import rollout
from engrain.task import Task
from engrain.trajectory import Trajectory
from engrain.workflow import Instructions, Workflow


@dataclass(frozen=True)
class RecordReport:
    """How far a recording is; the last one is its result."""

    out: Path
    tasks: int
    kept: int = 0
    refused: Mapping[str, int] = field(default_factory=dict)
    """Runs whose goal check did not pass, by reason."""
    resumed: int = 0
    """Tasks already recorded by an earlier call."""
    seconds: float = 0.0

    @property
    def done(self) -> int:
        return self.kept + sum(self.refused.values())


def record(
    workflow: Workflow,
    teacher: Policy,
    tasks: Iterable[Task],
    out: Path,
    n: int | None = None,
    parallel: int = 16,
    on_progress: Callable[[RecordReport], None] | None = None,
    *,
    processes: int = 1,
    budget: Budget | None = None,
    instructions: Instructions = "none",
    timings: bool = False,
) -> RecordReport:
    """Have the teacher do the first `n` tasks (all if None), `parallel` at a time in each of `processes` processes.

    More processes help a teacher that computes here, such as the script. `timings` keeps the seconds of each message,
    which differ from run to run. Raises `InputError` if the tasks or the files of an earlier call do not fit.
    """
    wanted = _unique(islice(tasks, n))
    started = time.monotonic()
    with closing(_Journal(out, workflow.name)) as journal:
        todo = [task for task in wanted.values() if not journal.has(task)]
        resumed = len(wanted) - len(todo)
        tally = Counter(journal.runs[id].reason for id in wanted if id in journal.runs)

        def report() -> RecordReport:
            refused = {reason: count for reason, count in tally.items() if reason}
            return RecordReport(out, len(wanted), tally[""], refused, resumed, time.monotonic() - started)

        def play(share: list[Task]) -> Iterator[Trajectory]:
            return rollout(workflow, share, teacher, parallel=parallel, budget=budget, instructions=instructions)

        with closing(merged(play, [todo[k::processes] for k in range(processes)])) as runs:
            for trajectory in runs:
                run = journal.append(trajectory if timings else _untimed(trajectory))
                tally[run.reason] += 1
                if on_progress is not None:
                    on_progress(report())
        journal.finish(list(wanted))
        return report()


def refused_path(out: Path) -> Path:
    return out.with_name(out.name + ".refused.jsonl")


def partial_path(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def _unique(tasks: Iterable[Task]) -> dict[str, Task]:
    wanted: dict[str, Task] = {}
    for task in tasks:
        if task.id in wanted:
            raise InputError(f"two tasks have the id {task.id!r}; recording resumes by id, so give each its own")
        wanted[task.id] = task
    if not wanted:
        raise InputError("no tasks to record; ask for at least one")
    return wanted


def _untimed(trajectory: Trajectory) -> Trajectory:
    messages = [message.model_copy(update={"seconds": None}) for message in trajectory.messages]
    return trajectory.model_copy(update={"messages": messages})


@dataclass(frozen=True)
class _Run:
    """What the journal knows of one run without keeping it in memory."""

    offset: int
    reason: str
    """Why it is refused; empty if it is kept."""
    request: str


class _Journal:
    """Finished runs, one line each, found by task id; held by one process at a time."""

    def __init__(self, out: Path, workflow: str) -> None:
        self.out, self.workflow, self.path = out, workflow, partial_path(out)
        self.runs: dict[str, _Run] = {}
        self.fresh = not self.path.exists()
        """Whether no earlier call left anything to be finished."""
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.path.open("a+b", buffering=0)
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.file.close()
            raise InputError(
                f"{self.path} is being written by another `engrain record`; wait for it or choose another -o"
            ) from error
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            self._load()
        except BaseException:
            self.close()
            raise

    def has(self, task: Task) -> bool:
        """Whether the task was done. Raises `InputError` if what was done under its id is another task."""
        run = self.runs.get(task.id)
        if run is not None and run.request != task.request:
            raise InputError(
                f"{self.out} holds another task {task.id!r} ({run.request[:60]!r}, now "
                f"{task.request[:60]!r}); choose another -o or delete it"
            )
        return run is not None

    def append(self, trajectory: Trajectory) -> _Run:
        """Write one run; from here on the journal is worth keeping."""
        run = self._copy(trajectory)
        self.fresh = False
        return run

    def finish(self, order: list[str]) -> None:
        """Put the two files in place, the tasks of `order` first. If nothing was done, nothing is written."""
        if self.fresh:
            return
        known = set(order)
        order = [id for id in order if id in self.runs] + [id for id in self.runs if id not in known]
        refused = [id for id in order if self.runs[id].reason]
        if refused:
            self._write(refused_path(self.out), refused)
        self._write(self.out, [id for id in order if not self.runs[id].reason])
        self.fresh = True

    def close(self) -> None:
        """Leave the journal for the next call, unless nothing in it needs keeping."""
        if self.fresh:
            self.path.unlink(missing_ok=True)
        self.file.close()

    def _load(self) -> None:
        """Read the journal, cutting off a last line that was torn by a stop; or start from a finished recording."""
        if not self.fresh:
            offset = 0
            for run, line in complete_runs(self.path):
                self._note(run, offset)
                offset += len(line)
            self.file.truncate(offset)
            return
        for path in (self.out, refused_path(self.out)):
            if path.exists():
                for run, _ in complete_runs(path):
                    self._copy(run)

    def _copy(self, trajectory: Trajectory) -> _Run:
        offset = self.file.seek(0, os.SEEK_END)
        rest = memoryview(trajectory.to_json().encode() + b"\n")
        try:
            while rest:
                rest = rest[self.file.write(rest) or 0 :]
        except OSError as error:
            raise self._unwritable(error) from error
        return self._note(trajectory, offset)

    def _note(self, trajectory: Trajectory, offset: int) -> _Run:
        if trajectory.workflow != self.workflow:
            raise InputError(
                f"{self.out} holds runs of workflow {trajectory.workflow!r}, not of {self.workflow!r}; "
                f"choose another -o or delete it"
            )
        request = next((message.content for message in trajectory.messages if message.role == "user"), "")
        self.runs[trajectory.task] = run = _Run(offset, _refusal(trajectory), request)
        return run

    def _write(self, path: Path, ids: list[str]) -> None:
        with self.path.open("rb") as journal, replacing(path) as file:
            for id in ids:
                journal.seek(self.runs[id].offset)
                file.write(journal.readline().decode())

    def _unwritable(self, error: OSError) -> InputError:
        return InputError(
            f"cannot write {self.path}: {error.strerror or error}; free space or choose another place, "
            f"then run the same command to go on"
        )


def complete_runs(path: Path) -> Iterator[tuple[Trajectory, bytes]]:
    """The runs of a file with the bytes of their lines, up to a last line without an end."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n"):
                yield Trajectory.from_json(line.decode(errors="replace"), file=str(path), line=number), line


def _refusal(trajectory: Trajectory) -> str:
    outcome = trajectory.outcome
    if outcome is None:
        return "no goal check was made"
    if outcome.success:
        return ""
    failed = [name for name, passed in outcome.checks.items() if not passed]
    return outcome.reason or f"failed: {', '.join(failed) or 'goal check'}"
