"""Branches are those that a run took, counted once a run, with what became of the runs."""

from __future__ import annotations

import pytest
from desk import call, say, workflow

from engrain.coverage import FEW, branch_table, branches, coverage
from engrain.policy import ScriptTeacher
from engrain.rollout import rollout
from engrain.task import Fault, Task
from engrain.trajectory import Message, Outcome, ToolCall, Trajectory


def faulty(amount: int, *faults: Fault, name: str = "t") -> Task:
    start, goal = {"orders": {"A10": amount}}, {"order": "A10", "refund": amount if amount <= 50 else 0}
    return Task(id=name, request="Refund A10.", tenant="acme", kind="refund", start=start, goal=goal, faults=faults)


def taken(*messages: Message, success: bool = True, task: str = "t") -> Trajectory:
    return Trajectory(id=task, task=task, messages=list(messages), outcome=Outcome(success=success))


def look(phase: str = "look", **arguments: str) -> Message:
    return call("find_order", **arguments).model_copy(
        update={"phase": phase, "tool_calls": [ToolCall(id="1", name="find_order", arguments=str(arguments))]}
    )


FAILED = Message(role="tool", name="find_order", tool_call_id="1", error="timeout", content="{}")


def test_a_rollout_records_what_its_branches_need() -> None:
    task = faulty(20, Fault(tool="find_order", kind="http_429"))
    [run] = rollout(workflow, [task], ScriptTeacher(workflow))
    assert set(branches(workflow, run)) == {
        ("phase", "look"),
        ("phase", "act"),
        ("edge", "look>act"),
        ("tool", "look: find_order"),
        ("tool", "act: refund_order"),
        ("error path", "find_order http_429: retried"),
        ("kind", "refund"),
        ("tenant", "acme"),
    }


@pytest.mark.parametrize(
    ("after", "reaction"),
    [
        ([look(order_id="A1")], "retried"),
        ([look(order_id="B2")], "called something else"),
        ([say("Sorry.")], "answered"),
        ([], "ended"),
        ([Message(role="assistant", error="truncated")], "ended"),
    ],
)
def test_an_error_path_says_what_the_next_turn_did(after: list[Message], reaction: str) -> None:
    run = taken(look(order_id="A1"), FAILED, *after)
    assert ("error path", f"find_order timeout: {reaction}") in set(branches(workflow, run))


def test_a_run_counts_once_for_a_branch_and_a_task_once_for_its_interval() -> None:
    runs = [taken(look(), look("act"), look(), look("act"), success=n % 2 == 0, task=f"t{n}") for n in range(40)]
    found = {(one.sort, one.name): one for one in coverage(workflow, runs).branches}
    edge = found["edge", "look>act"]
    assert (edge.runs, edge.success.mean) == (40, 0.5) and edge.success.low < 0.4
    alike = [run.model_copy(update={"task": "one"}) for run in runs]
    assert coverage(workflow, alike).branches[0].success.low == 0.5


def test_what_no_run_took_is_named() -> None:
    teacher = list(rollout(workflow, [faulty(20)], ScriptTeacher(workflow)))
    made = coverage(workflow, [taken(look(), say("No."), success=False)], teacher)
    assert made.never == (("phase", "act"), ("tool", "refund_order"), ("tool", "write_note"), ("edge", "look>act"))
    assert coverage(workflow, teacher, teacher).never == (("tool", "write_note"),)
    assert made.to_dict()["never"][0] == {"sort": "phase", "name": "act"} and made.to_dict()["runs"] == 1
    assert len(made.rows()) == len(made.branches) + 4 and len(made.rows()[0]) == len(made.headings)


def test_tools_that_do_not_exist_are_one_branch() -> None:
    odd = call("make_coffee").model_copy(update={"phase": "look"})
    refused = Message(role="tool", name="make_coffee", tool_call_id="", error="unknown_tool")
    names = {name for _, name in branches(workflow, taken(odd, refused, say("")))}
    assert {"look: unknown tool", "unknown tool unknown_tool: answered"} <= names


def test_worst_first_but_never_for_a_single_run() -> None:
    good = [taken(look(), task=f"g{n}") for n in range(FEW)]
    bad = [taken(look("act"), success=n == 0, task=f"b{n}") for n in range(FEW)]
    once = [taken(call("write_note").model_copy(update={"phase": "audit"}), success=False, task="once")]
    made = coverage(workflow, [*good, *bad, *once])
    assert [one.name for one in made.branches][:2] == ["act", "act: find_order"]
    assert {one.name for one in made.branches[-2:]} == {"audit", "audit: write_note"}
    assert made.weakest().startswith("is weakest on phase `act`: 20.0 [")
    assert coverage(workflow, good).weakest() == "passed on every branch that it took"
    assert coverage(workflow, []).weakest() == "took no branch"
    headings, rows = branch_table({"one": made, "other": coverage(workflow, good)})
    assert len(headings) == 4 and all(len(row) == 4 for row in rows)
    assert rows[0][:2] == ("phase", "act") and rows[0][2].endswith("(5)") and rows[0][3] == "-"
    assert rows[-1] == ("tool", "refund_order", "-", "-")  # neither called it; the note, one did
    assert ("tool", "write_note", "-", "-") not in rows
