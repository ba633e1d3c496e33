"""A workflow under Inspect AI, met by a compiled agent, its bare base and a model that is none of ours."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from inspect_ai import eval as run_eval
from inspect_ai.log import EvalLog
from inspect_ai.model import (
    ChatMessageAssistant,
    ChatMessageTool,
    ChatMessageUser,
    ContentImage,
    ContentReasoning,
    ContentText,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    get_model,
    modelapi,
)
from inspect_ai.tool import ToolFunction, ToolInfo
from serving import AGENT, DESK

from engrain.agent import load_agent
from engrain.budget import UNTIMED
from engrain.errors import InputError
from engrain.inspect_ai.messages import from_inspect, to_inspect
from engrain.inspect_ai.task import workflow
from engrain.rollout import rollout
from engrain.trajectory import Message, ToolCall
from engrain.workflow import Workflow

pytestmark = pytest.mark.filterwarnings("ignore")


def evaluated(tmp_path: Path, model: Any, number: int, **options: Any) -> EvalLog:
    task = workflow(str(DESK), number=number, seed=5, **options)
    (log,) = run_eval(task, model=model, log_dir=str(tmp_path), display="none", log_level="error", max_samples=3)
    assert log.status == "success", log.error
    return log


def test_it_measures_what_our_own_rollout_does(desk: Workflow, tmp_path: Path) -> None:
    tasks, policy = islice(desk.tasks("held_out", 5), 3), load_agent(AGENT).policy(desk, parallel=3)
    ours = {run.task: run for run in rollout(desk, tasks, policy, parallel=3, budget=UNTIMED)}
    log = evaluated(tmp_path, get_model(f"engrain/{AGENT}", parallel=3, memoize=False), 3)
    assert log.samples is not None and len(log.samples) == 3
    for sample in log.samples:
        own = ours[str(sample.id)]
        assert own.outcome is not None and sample.scores is not None
        assert (sample.scores["goal"].value == "C") == own.outcome.success
        assert [message.role for message in sample.messages] == [message.role for message in own.messages]
        for theirs, here in zip(map(from_inspect, sample.messages), own.messages, strict=True):
            assert (theirs.content, theirs.reasoning) == (here.content, here.reasoning)
            assert [call.name for call in theirs.tool_calls] == [call.name for call in here.tool_calls]
    assert log.results is not None
    (score,) = log.results.scores
    success = sum(run.outcome is not None and run.outcome.success for run in ours.values())
    assert score.metrics["accuracy"].value == pytest.approx(success / 3) and success >= 2


@modelapi(name="brief")
class Brief(ModelAPI):
    """A model that is none of ours, and does not do much; named `broken`, it does nothing."""

    async def generate(self, *asked: Any, **more: Any) -> ModelOutput:
        if "broken" in self.model_name:
            raise ConnectionError("nobody there")
        return ModelOutput.from_content(self.model_name, "I am done.")


def test_a_model_that_cannot_be_reached_is_an_error_and_no_failed_task(tmp_path: Path) -> None:
    task = workflow(str(DESK), number=1, seed=5)
    (log,) = run_eval(task, model="brief/broken", log_dir=str(tmp_path), display="none", log_level="error")
    assert log.status == "error" and log.error is not None and "nobody there" in log.error.message


def test_any_model_can_be_measured_on_a_workflow(tmp_path: Path) -> None:
    log = evaluated(tmp_path, get_model("brief/model"), 3, instructions="full")
    assert log.samples is not None
    for sample in log.samples:
        assert sample.scores is not None and sample.scores["goal"].value == "I" and sample.scores["goal"].explanation
        assert sample.messages[-1].text == "I am done."


async def _asked(**more: Any) -> ModelOutput:
    model = get_model(f"engrain/{AGENT}", tenant="harbor", parallel=2, memoize=False)
    look = ToolInfo.model_validate({"name": "look", "description": "", "parameters": {"type": "object"}})
    async with model:
        return await model.generate([ChatMessageUser(content="Where is my order?")], tools=[look], **more)


def test_a_foreign_benchmark_brings_its_own_tools() -> None:
    import asyncio

    for choice in ("any", ToolFunction("look")):
        made = asyncio.run(_asked(tool_choice=choice))
        assert made.stop_reason == "tool_calls"
        assert [(call.function, call.arguments) for call in made.message.tool_calls or []] == [("look", {})]
    cut = asyncio.run(_asked(config=GenerateConfig(max_tokens=1)))
    assert cut.stop_reason == "max_tokens" and cut.usage is not None and cut.usage.output_tokens == 1
    with pytest.raises(Exception, match="stop sequences"):
        asyncio.run(_asked(config=GenerateConfig(stop_seqs=["x"])))


def test_messages_survive_the_way_there_and_back() -> None:
    call = ToolCall(id="call_1", name="look", arguments='{"at": "é"}')
    for message in (
        Message(role="system", content="s"),
        Message(role="user", content="u"),
        Message(role="assistant", content="words", reasoning="thoughts"),
        Message(role="assistant", tool_calls=[call]),
        Message(role="assistant", reasoning="thoughts", tool_calls=[call]),
        Message(role="tool", content="found", tool_call_id="call_1", name="look"),
    ):
        assert from_inspect(to_inspect(message)) == message
    broken = to_inspect(Message(role="assistant", tool_calls=[call.model_copy(update={"arguments": "{"})]))
    assert isinstance(broken, ChatMessageAssistant) and broken.tool_calls and broken.tool_calls[0].parse_error
    parts = [ContentReasoning(reasoning="a"), ContentText(text="b"), ContentText(text="c")]
    back = from_inspect(ChatMessageAssistant(content=parts))
    assert (back.reasoning, back.content) == ("a", "bc")
    failed = to_inspect(Message(role="tool", content="no such order", tool_call_id="call_1", name="look", error="tool"))
    assert isinstance(failed, ChatMessageTool) and failed.error is not None
    with pytest.raises(InputError, match="image"):
        from_inspect(ChatMessageUser(content=[ContentImage(image="data:image/png;base64,AA==")]))
