"""Recording: only good runs are kept, every stop can be resumed, and the result does not depend on how it was made."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from engrain.errors import EngrainError, InputError
from engrain.policy import ScriptTeacher
from engrain.record import RecordReport, partial_path, record, refused_path
from engrain.task import Task
from engrain.tool import from_function
from engrain.trajectory import Message, Outcome, ToolCall, read_trajectories
from engrain.workflow import Phase, Workflow


class Sum:
    def __init__(self) -> None:
        self.value = 0


def add(state: Sum, number: int) -> int:
    """Add a number."""
    state.value += number
    return state.value


def tasks(split: str = "train", seed: int = 0) -> Iterator[Task]:
    for number in range(1000):
        yield Task(id=f"{split}-{seed}-{number}", request=f"add {number}", kind="add", split=split, seed=seed)


def teach(task: Task, messages: Sequence[Message]) -> Message:
    if messages[-1].role == "tool":
        return Message(role="assistant", content="done")
    call = ToolCall(id="", name="add", arguments=f'{{"number": {task.request.split()[1]}}}')
    return Message(role="assistant", tool_calls=[call])


def check(task: Task, state: Sum, messages: Sequence[Message]) -> Outcome:
    """Odd sums are refused when they end in 5."""
    passed = state.value % 10 != 5
    return Outcome(success=passed, checks={"sum": passed})


def workflow(name: str = "sums", teacher=teach) -> Workflow:
    return Workflow(
        name=name,
        description="Sums.",
        procedure="Add.",
        phases=(Phase("plan", "", ("add",)),),
        tools=(from_function(add, state=Sum),),
        tenants={},
        phase_of=lambda messages: "plan",
        tasks=tasks,
        splits=("train",),
        open=lambda task: Sum(),
        teacher=teacher,
        check=check,
    )


def run(out: Path, n: int, flow: Workflow | None = None, **options) -> RecordReport:
    flow = flow or workflow()
    return record(flow, ScriptTeacher(flow), tasks(), out, n, **options)


def files(out: Path) -> tuple[bytes, bytes]:
    return out.read_bytes(), refused_path(out).read_bytes()


def test_keeps_what_reached_its_goal_in_task_order_and_says_why_the_rest_did_not(tmp_path: Path):
    out = tmp_path / "runs.jsonl"
    report = run(out, 30, parallel=7)
    assert (report.tasks, report.kept, dict(report.refused)) == (30, 27, {"failed: sum": 3})
    kept, refused = list(read_trajectories(out)), list(read_trajectories(refused_path(out)))
    assert [one.task for one in kept] == [f"train-0-{k}" for k in range(30) if k % 10 != 5]
    assert [one.task for one in refused] == ["train-0-5", "train-0-15", "train-0-25"]
    assert all(one.outcome and one.outcome.success and one.teacher == "script" for one in kept)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs.jsonl", "runs.jsonl.refused.jsonl"]


@pytest.mark.parametrize("options", [{"parallel": 1}, {"parallel": 16}, {"processes": 2}, {"processes": 9}])
def test_same_tasks_give_the_same_bytes_however_they_are_run(tmp_path: Path, options: dict):
    run(tmp_path / "one.jsonl", 20, parallel=4)
    run(tmp_path / "two.jsonl", 20, **options)
    assert files(tmp_path / "one.jsonl") == files(tmp_path / "two.jsonl")


class Stop(BaseException):
    """As Ctrl-C: not an Exception."""


def stop_after(count: int):
    def on_progress(report: RecordReport) -> None:
        if report.done >= count:
            raise Stop

    return on_progress


@pytest.mark.parametrize("processes", [1, 2])
def test_a_stopped_recording_goes_on_where_it_was(tmp_path: Path, processes: int):
    run(tmp_path / "whole.jsonl", 24)
    out = tmp_path / "runs.jsonl"
    with pytest.raises(Stop):
        run(out, 24, on_progress=stop_after(7), processes=processes)
    assert not out.exists() and not refused_path(out).exists()
    assert len(partial_path(out).read_bytes().splitlines()) == 7
    seen: list[RecordReport] = []
    report = run(out, 24, on_progress=seen.append)
    assert report.resumed == 7 and len(seen) == 17
    assert files(out) == files(tmp_path / "whole.jsonl")
    assert not partial_path(out).exists()


@pytest.mark.parametrize("cut", [1, 40, 200])
def test_a_torn_last_line_is_done_again(tmp_path: Path, cut: int):
    run(tmp_path / "whole.jsonl", 12)
    out = tmp_path / "runs.jsonl"
    with pytest.raises(Stop):
        run(out, 12, on_progress=stop_after(6))
    os.truncate(partial_path(out), partial_path(out).stat().st_size - cut)
    assert run(out, 12).resumed == 5
    assert files(out) == files(tmp_path / "whole.jsonl")


def test_a_finished_recording_is_left_alone_and_can_be_extended(tmp_path: Path):
    out = tmp_path / "runs.jsonl"
    run(out, 10)
    before, modified = files(out), out.stat().st_mtime_ns
    assert run(out, 10).resumed == 10
    assert run(out, 4).tasks == 4
    assert files(out) == before and out.stat().st_mtime_ns == modified
    assert run(out, 26).resumed == 10
    run(tmp_path / "whole.jsonl", 26)
    assert files(out) == files(tmp_path / "whole.jsonl")


def test_a_stop_while_extending_keeps_the_finished_file(tmp_path: Path):
    out = tmp_path / "runs.jsonl"
    run(out, 10)
    before = files(out)
    with pytest.raises(Stop):
        run(out, 30, on_progress=stop_after(15))
    assert files(out) == before
    assert run(out, 30).resumed == 15


def test_a_teacher_that_fails_is_a_reason_and_stops_no_other_run(tmp_path: Path):
    def broken(task: Task, messages: Sequence[Message]) -> Message:
        if task.request == "add 3":
            raise RuntimeError("no idea")
        return teach(task, messages)

    out = tmp_path / "runs.jsonl"
    report = run(out, 5, workflow(teacher=broken))
    assert report.kept == 4
    assert [reason for reason in report.refused if "no idea" in reason]


def test_files_of_another_workflow_or_of_other_tasks_are_not_mixed_in(tmp_path: Path):
    out = tmp_path / "runs.jsonl"
    run(out, 3)
    before = files_or_one(out)
    with pytest.raises(InputError, match="workflow 'sums', not of 'other'"):
        run(out, 3, workflow("other"))
    flow = workflow()
    changed = [Task(id="train-0-1", request="add 77")]
    with pytest.raises(InputError, match="another task 'train-0-1'"):
        record(flow, ScriptTeacher(flow), changed, out)
    twice = [Task(id="a", request="add 1"), Task(id="a", request="add 2")]
    with pytest.raises(InputError, match="two tasks have the id 'a'"):
        record(flow, ScriptTeacher(flow), twice, tmp_path / "new.jsonl")
    with pytest.raises(InputError, match="no tasks"):
        record(flow, ScriptTeacher(flow), [], tmp_path / "new.jsonl")
    assert files_or_one(out) == before and [path.name for path in tmp_path.iterdir()] == ["runs.jsonl"]


def files_or_one(out: Path) -> bytes:
    return out.read_bytes() + (refused_path(out).read_bytes() if refused_path(out).exists() else b"")


def test_two_recordings_do_not_write_the_same_file(tmp_path: Path):
    out = tmp_path / "runs.jsonl"

    def again(report: RecordReport) -> None:
        with pytest.raises(InputError, match="written by another"):
            run(out, 3)

    assert run(out, 3, on_progress=again).kept == 3


def test_a_full_disk_says_so_and_keeps_the_whole_lines(tmp_path: Path):
    run(tmp_path / "whole.jsonl", 12)
    size = (tmp_path / "whole.jsonl").stat().st_size // 2
    out = tmp_path / "runs.jsonl"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))  # a write beyond fails, as on a full disk
        with pytest.raises(InputError, match=r"cannot write .*; free space"):
            run(out, 12)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not out.exists() and partial_path(out).stat().st_size == size, "a torn line"
    assert 0 < run(out, 12).resumed < 12
    assert files(out) == files(tmp_path / "whole.jsonl")


def test_a_dead_process_is_an_error_and_keeps_what_was_done(tmp_path: Path):
    home = os.getpid()

    def dying(task: Task, messages: Sequence[Message]) -> Message:
        if task.request == "add 9" and os.getpid() != home:
            os._exit(1)
        return teach(task, messages)

    out = tmp_path / "runs.jsonl"
    with pytest.raises(EngrainError, match="died without a word"):
        run(out, 12, workflow(teacher=dying), processes=2, parallel=1)
    assert run(out, 12).resumed > 0
