"""The example workflow: its teacher and its goal check were written apart and must agree; the check must also bite."""

from __future__ import annotations

import random
import re
from collections import Counter
from importlib import import_module
from itertools import islice, product
from pathlib import Path

import pytest

from engrain.agent import bundled_base
from engrain.errors import WorkflowError
from engrain.model import load_base
from engrain.policy import Episode, ScriptTeacher
from engrain.renderer import Renderer
from engrain.rollout import rollout
from engrain.task import Task
from engrain.trajectory import Message, ToolCall, Trajectory
from engrain.turn import LONGEST_TURN
from engrain.workflow import load_workflow

DESK = load_workflow(Path(__file__).parents[1] / "examples" / "support_desk")
requests, rules, teacher, generator, store = (
    import_module(f"engrain_workflow_support_desk.{name}")
    for name in ("requests", "rules", "teacher", "tasks", "store")
)


def run(tasks: list[Task], policy=None):
    return list(rollout(DESK, tasks, policy or ScriptTeacher(DESK), parallel=1))


def succeeded(trajectory: Trajectory) -> bool:
    return trajectory.outcome is not None and trajectory.outcome.success


def draw(split: str, count: int, seed: int = 5) -> list[Task]:
    return list(islice(DESK.tasks(split, seed), count))


def test_size_of_the_workflow():
    assert len(DESK.tools) == 15 and len(DESK.phases) == 4
    assert len(requests.KINDS) >= 30 and set(requests.HELD_OUT) == set(requests.PHRASES)


@pytest.mark.parametrize("split", ["train", "held_out", "wording", "faults", "long20", "unseen"])
def test_teacher_reaches_every_goal(split):
    for trajectory in run(draw(split, 8 if split == "long20" else 60)):
        assert succeeded(trajectory), trajectory.outcome
        assert not any(message.error in ("not_allowed", "bad_arguments") for message in trajectory.messages)


def test_words_that_matter_are_quoted_as_the_record_or_the_call_writes_them():
    quotes = Counter[str]()
    for trajectory in run(draw("train", 120)):
        for place, turn in enumerate(trajectory.messages):
            if turn.role == "assistant":
                so_far = trajectory.messages[: place + 1]
                seen = [message.content for message in so_far if message.role == "tool"]
                seen += [call.arguments for message in so_far for call in message.tool_calls]
                for quote, name in re.findall(r'("(\w+)": "\w+")', turn.reasoning):
                    assert any(quote in content for content in seen)
                    quotes[name] += 1
                for rule, name in re.findall(r'\w+ field: (\w+), "(\w+)"', turn.reasoning):
                    assert rule == name
    words = {"category", "method", "item", "parcel", "payment", "tier", "role", "team", "api_version", "ticket"}
    assert {*words, *rules.FIELDS} <= set(quotes)


def test_the_plan_quotes_the_customer_and_names_every_item():
    for trajectory in run(draw("train", 60)):
        request, plan = (message for message in trajectory.messages[1:3])
        lines = plan.reasoning.splitlines()
        assert lines
        for place, line in enumerate(lines):
            said, name = line.split(" = ")
            assert said.removeprefix(f"{requests.mark(place)} ") in request.content
            group, title = name.split(f" {requests.mark(place)}: ")
            assert group == requests.group(next(kind for kind in requests.KINDS if title.startswith(kind)))


def test_every_note_after_the_plan_begins_with_the_customer_or_the_item_at_hand():
    for trajectory in run(draw("train", 60)):
        titles = {line.split(" = ")[1].split(" ", 1)[1] for line in trajectory.messages[2].reasoning.splitlines()}
        for message in trajectory.messages[4:]:
            if message.role == "assistant" and message.reasoning:
                assert message.reasoning.startswith(('"tier": ', "retry", "failed", *titles))


def test_numbers_are_compared_digit_by_digit():
    assert rules.judged(360, 352) == "360, 352: 33= 65>, within"
    assert rules.judged(95, 120) == "95, 120: shorter, over"
    assert rules.judged(21, 21) == "21, 21: 22= 11=, within"
    for limit, value in product(range(1, 130, 3), range(1, 130)):
        assert rules.judged(limit, value).endswith("within" if value <= limit else "over")


def test_every_refund_says_which_rules_of_the_tenant_led_to_it():
    refunds = 0
    for trajectory in run(draw("train", 60)):
        known = rules.parse(DESK.tenants[trajectory.tenant].rules)
        for message in trajectory.messages:
            if message.tool_calls and message.tool_calls[0].name == "issue_refund":
                refunds += 1
                assert f"{trajectory.tenant} credit method: {known.method}, " in message.reasoning
                version = rules.quoted("api_version", known.version)
                assert message.reasoning.endswith(f"{trajectory.tenant} version: {version}")
    assert refunds > 5


def test_long_tasks_are_as_long_as_they_say():
    for split, steps in (("long20", 20), ("long40", 40)):
        assert all(steps <= trajectory.steps <= steps + 3 for trajectory in run(draw(split, 3)))


def test_long_requests_are_like_those_trained_on_and_fit_the_bundled_base():
    def items(task: Task) -> int:
        return len(task.goal["items"])

    longest = draw("long40", 12)
    assert max(map(items, longest)) <= max(map(items, draw("train", 300)))
    base = load_base(bundled_base())
    renderer = Renderer(base.tokenizer)
    for trajectory in run(longest):
        row = renderer.rows(trajectory)[0]
        assert len(row.ids) <= base.model.config.max_position_embeddings
        plan = renderer.tokenizer.encode(trajectory.messages[2].reasoning)
        assert len(plan) < LONGEST_TURN / 2


def test_tasks_are_seeded_and_never_share_a_seed():
    assert draw("held_out", 5) == draw("held_out", 5) != draw("held_out", 5, seed=6)
    assert not {task.request for task in draw("train", 200)} & {task.request for task in draw("held_out", 200)}


def test_held_out_wording_is_never_trained():
    rng = random.Random(0)
    trained = {
        requests.vary(phrase, rng) for phrases in requests.PHRASES.values() for phrase in phrases for _ in range(40)
    }
    assert not trained & {phrase for phrases in requests.HELD_OUT.values() for phrase in phrases}
    openings = {*requests.OPENINGS}
    assert all(
        not any(task.request.startswith(opening.split("{")[0]) for opening in openings if opening[0] != "{")
        for task in draw("wording", 50)
    )


class Meddling(ScriptTeacher):
    """The teacher, with one extra call slipped in after so many turns, or before its answer."""

    def __init__(self, call: ToolCall, after: int | None = None) -> None:
        super().__init__(DESK)
        self.call, self.after = call, after

    def _turn(self, episode: Episode) -> Message | Exception:
        turn = super()._turn(episode)
        assert isinstance(turn, Message)
        messages = episode.trajectory.messages
        if any(call.id == self.call.id for message in messages for call in message.tool_calls):
            return turn
        now = episode.trajectory.steps == self.after if self.after is not None else not turn.tool_calls
        return Message(role="assistant", tool_calls=[self.call]) if now else turn


def test_a_forbidden_side_effect_fails_the_goal_check():
    meddling = Meddling(ToolCall(id="extra", name="escalate", arguments='{"category": "press", "team": "care"}'))
    for trajectory in run(draw("held_out", 20), meddling):
        assert trajectory.outcome is not None and not trajectory.outcome.success
        assert not trajectory.outcome.checks["nothing forbidden"]


class Lazy(ScriptTeacher):
    """Answers as the teacher would have, without doing anything that changes the store."""

    def _turn(self, episode: Episode) -> Message | Exception:
        return Message(role="assistant", content=run([episode.task])[0].messages[-1].content)


def test_a_right_answer_without_the_work_fails_the_goal_check():
    tasks = [task for task in draw("train", 60) if not task.faults]
    writes = {function.__name__ for function in store.WRITES}
    wrote = [trajectory.task for trajectory in run(tasks) if writes & {message.name for message in trajectory.messages}]
    lazy = {trajectory.task: succeeded(trajectory) for trajectory in run(tasks, Lazy(DESK))}
    assert wrote and not any(lazy[task] for task in wrote)


def test_teacher_goes_on_rightly_from_a_state_that_a_student_wandered_into():
    """Prefixes with a needless read in them: the teacher still reaches the goal."""
    needless = ToolCall(id="extra", name="check_stock", arguments='{"sku": "S000"}')
    assert all(succeeded(trajectory) for trajectory in run(draw("held_out", 40), Meddling(needless, after=1)))


def test_every_kind_of_fault_and_recovery_occurs():
    faults = [fault for task in draw("faults", 400) for fault in task.faults]
    assert {fault.kind for fault in faults} == {
        "timeout",
        "http_429",
        "http_500",
        "missing_record",
        "renamed_field",
        "partial_result",
    }
    assert {fault.recovery for fault in faults} == {"normal", "ignorable", "fatal"}


def test_a_free_request_opens_a_desk_with_a_known_customer():
    desk = DESK.open(Task(id="free", request="Where is A1001?", tenant="kestrel"))
    assert (
        store.get_customer(desk, "C1000")["tier"] == "gold" and store.verify_identity(desk, "C1000", "1234")["verified"]
    )
    assert all(store.get_order(desk, order)["amount"] > 0 for order in ("A1001", "A1002", "A1003"))
    desk.close()


def test_rare_exceptions_are_rare():
    tasks = draw("train", 1500)
    rows = [(task, row) for task in tasks for row in task.start.get("payments", [])]
    share = sum(row["method"] == task.goal["rules"]["method"] for task, row in rows) / len(rows)
    assert 0.02 < share < 0.09


def test_profiles_are_read_as_they_were_written():
    rng = random.Random(3)
    for _ in range(200):
        drawn = rules.draw(rng)
        assert rules.parse(rules.write(drawn, rng)) == drawn


def test_an_edited_rule_changes_what_is_right():
    drawn = rules.draw(random.Random(1))
    lines = rules.write(drawn, random.Random(1))
    edited = [line.replace(drawn.version, "v1" if drawn.version != "v1" else "v2") for line in lines]
    assert rules.parse(edited).version != drawn.version


def test_a_profile_with_a_gap_or_a_stray_line_is_refused():
    lines = rules.write(rules.draw(random.Random(1)), random.Random(1))
    with pytest.raises(WorkflowError, match="says nothing about"):
        rules.parse(lines[1:])
    with pytest.raises(WorkflowError, match="no rule reads"):
        rules.parse([*lines, "Be nice."])


def test_every_tenant_has_its_own_rules_and_two_are_held_out():
    parsed = {name: rules.parse(tenant.rules) for name, tenant in DESK.tenants.items()}
    assert len({repr(each) for each in parsed.values()}) == len(parsed) == 8
    held_out = {name for name, tenant in DESK.tenants.items() if tenant.settings["split"] == "held_out"}
    assert len(held_out) == 2
    assert not held_out & {task.tenant for task in draw("train", 100)}
    assert held_out == {task.tenant for task in draw("unseen", 20)}


def test_kinds_are_all_drawn():
    kinds = Counter(item["kind"] for task in draw("train", 500) for item in task.goal["items"])
    assert set(kinds) == set(requests.KINDS)


def test_a_tool_that_keeps_failing_is_tried_three_times():
    task = next(
        task
        for task in draw("faults", 300)
        if any(fault.recovery == "fatal" and fault.times == 3 for fault in task.faults)
    )
    fault = next(fault for fault in task.faults if fault.recovery == "fatal")
    [trajectory] = run([task])
    failed = [message for message in trajectory.messages if message.error == fault.kind and message.name == fault.tool]
    assert len(failed) == teacher.ATTEMPTS
    assert generator.steps_of(task.model_copy(update={"faults": ()})) > 0
