"""One run for each definition; what precedes what; nothing that succeeded has a kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from desk import call, say, workflow

from engrain.budget import Budget
from engrain.failure_kinds import KINDS, Failure, departure, failure, failure_kinds, said, total
from engrain.policy import Episode, ScriptTeacher
from engrain.rollout import rollout
from engrain.task import Fault, Task
from engrain.trajectory import Message, Trajectory

ACME = {"order_id": "A10"}
FIND, NOTE = call("find_order", **ACME), call("write_note", **ACME, topic="over_limit")
REFUND = call("refund_order", **ACME, amount=40)
OUTAGE = Fault(tool="find_order", kind="http_500", times=2)


class Says:
    """Given turns in order, then the last one again."""

    name = "says"

    def __init__(self, turns: Sequence[Message | Exception]) -> None:
        self.turns = turns

    def __call__(self, episodes: Sequence[Episode], /) -> list[Message | Exception]:
        return [self.turns[min(episode.trajectory.steps, len(self.turns) - 1)] for episode in episodes]

    def finish(self, episode: Episode, /) -> None:
        pass


def task(amount: int = 40, *faults: Fault) -> Task:
    """Refund order A10 of acme, whose limit is 50."""
    goal = {"order": "A10", "refund": amount if amount <= 50 else 0}
    start = {"orders": {"A10": amount, "B20": 7}}
    return Task(id="t", request="Refund order A10.", tenant="acme", goal=goal, start=start, faults=faults)


def run(asked: Task, *turns: Message | Exception, steps: int = 8) -> Trajectory:
    [made] = rollout(workflow, [asked], Says(turns), budget=Budget(steps=steps))
    return made


def kind(asked: Task, *turns: Message | Exception, steps: int = 8) -> tuple[str, str]:
    made = failure(workflow, asked, run(asked, *turns, steps=steps))
    return made.kind, made.how


@pytest.mark.parametrize(
    ("amount", "turns", "how"),
    [
        (80, (FIND, call("refund_order", **ACME, amount=80), say("Refunded 80.")), "another tool"),
        (80, (FIND, call("write_note", **ACME, topic="handover"), NOTE, say("Noted.")), "another value"),
        (40, (FIND, say("It is over the limit.")), "stopped early"),
        (40, (FIND, REFUND, NOTE, say("Refunded 40.")), "went on"),
        (40, (FIND, REFUND, say("")), "another answer"),
    ],
)
def test_valid_calls_by_the_wrong_rule_are_domain_blindness(amount: int, turns: tuple[Message, ...], how: str) -> None:
    assert kind(task(amount), *turns) == ("domain blindness", how)


def test_the_departure_names_both_turns() -> None:
    failed = run(task(80), FIND, call("refund_order", **ACME, amount=80), say("Refunded 80."))
    found = failure(workflow, task(80), failed).departure
    assert found is not None and found == departure(workflow, task(80), failed)
    assert (found.place, found.got.tool_calls[0].name) == (4, "refund_order")
    assert found.expected.tool_calls[0].name == "write_note"


@pytest.mark.parametrize(
    ("turns", "how"),
    [
        ((FIND, FIND, REFUND, REFUND, say("Refunded 40.")), "repeated a call that had succeeded"),
        ((FIND, FIND), "budget"),
        ((FIND, say("How much was it?")), "asked for what was known"),
        ((call("find_order", order_id="A1"), say("There is no order A10.")), "called with a value from nowhere"),
        ((FIND, call("refund_order", **ACME, amount=41), say("Refunded 41.")), "called with a value from nowhere"),
        ((FIND, REFUND, NOTE, call("write_note", order_id="B20")), "budget"),
        ((FIND, Message(role="assistant", error="truncated", content="and so on")), "turn cut off"),
    ],
)
def test_what_is_lost_on_the_way_is_context_exhaustion(turns: tuple[Message, ...], how: str) -> None:
    assert kind(task(), *turns) == ("context exhaustion", how)


def test_a_full_context_is_context_exhaustion_and_another_error_is_not() -> None:
    from engrain.errors import EngrainError

    assert kind(task(), FIND, EngrainError("context full: the prompt has 9 tokens")) == (
        "context exhaustion",
        "context full",
    )
    assert kind(task(), FIND, EngrainError("no more memory")) == ("other", "policy raised")


def test_an_answer_with_a_number_from_nowhere_contradicts_the_run() -> None:
    strict = replace(workflow, check=lambda task, desk, messages: workflow.check(task, desk, messages[:-1]))
    for words, expected in [("Refunded 99.", "answered with a number from nowhere"), ("Refunded!", "another answer")]:
        [made] = rollout(strict, [task()], Says((FIND, REFUND, say(words))))
        assert failure(strict, task(), made).how == expected


@pytest.mark.parametrize(
    ("fault", "turns", "how"),
    [
        (OUTAGE, (FIND, say("It does not work.")), "gave up"),
        (OUTAGE, (FIND, call("find_order", order_id="B20"), say("Hm.")), "went on"),
        (Fault(tool="find_order", kind="missing_record", times=9), (FIND, FIND), "repeated a failing call"),
        (Fault(tool="find_order", kind="missing_record"), (FIND, FIND, NOTE, say("Hm.")), "repeated a failing call"),
        (Fault(tool="find_order", kind="missing_record"), (FIND, say("All is well.")), "answered otherwise"),
        (
            Fault(tool="find_order", kind="renamed_field", field="amount", renamed="amount_v2"),
            (FIND, say("It has no amount.")),
            "gave up",
        ),
    ],
)
def test_a_wrong_turn_after_an_error_is_recovery_paralysis(fault: Fault, turns: tuple[Message, ...], how: str) -> None:
    """Also where the budget ended the run: repeating was why."""
    strict = replace(workflow, check=lambda task, desk, messages: workflow.check(task, desk, messages[:-1]))
    [made] = rollout(strict, [task(40, fault)], Says(turns), budget=Budget(steps=6))
    found = failure(strict, task(40, fault), made)
    assert (found.kind, found.how) == ("recovery paralysis", how)


def test_an_error_that_was_mastered_is_no_cause() -> None:
    asked = task(80, OUTAGE)
    turns = (FIND, FIND, FIND, call("refund_order", **ACME, amount=80), say("Refunded 80."))
    assert kind(asked, *turns) == ("domain blindness", "another tool")


def test_a_refused_call_is_an_error_not_a_departure() -> None:
    early = call("refund_order", **ACME, amount=40)  # not allowed before the order is found
    assert kind(task(80), early, FIND, call("refund_order", **ACME, amount=80), say("")) == (
        "domain blindness",
        "another tool",
    )
    assert kind(task(), early, early, early, steps=3) == ("recovery paralysis", "repeated a failing call")
    assert kind(task(), early, say("I cannot.")) == ("recovery paralysis", "gave up")


def test_what_is_nobodys_or_cannot_be_read_is_other() -> None:
    assert kind(task(), FIND, Message(role="assistant", error="malformed_call")) == ("other", "malformed call")
    broken = replace(workflow, check=lambda task, desk, messages: 1 / 0)
    [made] = rollout(broken, [task()], ScriptTeacher(workflow))
    assert failure(broken, task(), made) == Failure("other", "check raised")
    assert failure(workflow, task(), made.model_copy(update={"outcome": None})) == Failure("other", "no outcome")
    wrong = replace(workflow, teacher=lambda task, messages: FIND if len(messages) < 3 else say("Done."))
    [made] = rollout(wrong, [task()], ScriptTeacher(wrong))  # a teacher with a bug
    assert failure(wrong, task(), made) == Failure("other", "did as the teacher does")
    lost = replace(workflow, teacher=lambda task, messages: 1 / 0)
    assert failure(lost, task(), run(task(), say(""))).how == "the teacher raised ZeroDivisionError"


def test_counts_by_kind() -> None:
    failed, right = run(task(80), FIND, say("No.")), run(task(40), FIND, REFUND, say("Refunded 40."))
    with pytest.raises(ValueError, match="expected a failed run of task 't', got 't:says'"):
        failure(workflow, task(40), right)
    counts = failure_kinds(workflow, {"t": task(80)}, [failed, failed, right])
    assert list(counts) == list(KINDS) and counts["domain blindness"] == {"stopped early": 2}
    gone = failure_kinds(workflow, {}, [failed])
    assert gone["other"] == {"its task is gone": 1}
    assert said(total([counts, counts, gone])) == (
        "4 x domain blindness (4 stopped early); 1 x other (1 its task is gone)"
    )
    assert said(failure_kinds(workflow, {}, [right])) == "none"
