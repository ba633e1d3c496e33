"""A workflow as a task of Inspect's: its own tools, faults, phases and goal check, for any model that Inspect knows."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import anyio.from_thread
import anyio.to_thread
from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import GenerateConfig, Model, get_model
from inspect_ai.scorer import Score, Scorer, Target, accuracy, scorer, stderr
from inspect_ai.solver import Generate, Solver, TaskState, solver
from inspect_ai.tool import ToolInfo

from engrain.budget import UNTIMED
from engrain.errors import EngrainError
from engrain.inspect_ai.messages import from_inspect, to_inspect
from engrain.policy import Episode, OneByOne
from engrain.rollout import rollout
from engrain.task import Task as WorkflowTask
from engrain.trajectory import Message
from engrain.workflow import Instructions, Workflow, load_workflow


@task
def workflow(
    path: str,
    split: str = "held_out",
    number: int = 100,
    seed: int = 1000,
    instructions: Literal["none", "shared", "full"] = "none",
) -> Task:
    """So many tasks of a split. `instructions` is what the system prompt says: one line, which is enough for an agent
    that was compiled from this workflow; the procedure and the tools; or these and the tenant's rules."""
    loaded = load_workflow(Path(os.path.normpath(path)))
    tasks = islice(loaded.tasks(split, seed), number)
    samples = [Sample(id=one.id, input=one.request, metadata={"task": one.model_dump()}) for one in tasks]
    return Task(
        dataset=MemoryDataset(samples, name=f"{loaded.name}/{split}"),
        solver=run(loaded, instructions),
        scorer=goal(),
    )


@solver
def run(workflow: Workflow, instructions: Instructions) -> Solver:
    """The whole loop: a turn of the model, the tools that it calls, until it answers or its budget ends."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        one = WorkflowTask.model_validate(state.metadata["task"])
        policy = ModelPolicy(get_model())

        def go() -> Any:
            return next(rollout(workflow, [one], policy, parallel=1, budget=UNTIMED, instructions=instructions))

        done = await anyio.to_thread.run_sync(go)
        if policy.broken is not None:
            raise policy.broken  # an error of the sample, which Inspect reports, and not a failure of the model
        state.messages = [to_inspect(message) for message in done.messages]
        state.metadata["outcome"] = done.outcome.model_dump() if done.outcome is not None else {}
        state.metadata["steps"] = done.steps
        state.output.completion = done.messages[-1].content
        state.completed = True
        return state

    return solve


@scorer(metrics=[accuracy(), stderr()])
def goal() -> Scorer:
    """The workflow's own goal check."""

    async def score(state: TaskState, target: Target) -> Score:
        outcome = state.metadata["outcome"]
        return Score(
            value="C" if outcome.get("success") else "I",
            answer=state.output.completion,
            explanation=outcome.get("reason") or None,
            metadata={"steps": state.metadata["steps"]},
        )

    return score


class ModelPolicy(OneByOne):
    """A model of Inspect's as a policy; called from a thread that Inspect's event loop started."""

    def __init__(self, model: Model) -> None:
        self.name, self._model = str(model), model
        self.broken: Exception | None = None
        """What kept the model from answering, unless that was a limit of the model itself."""

    def _turn(self, episode: Episode) -> Message | Exception:
        try:
            return anyio.from_thread.run(self._generate, episode)
        except EngrainError as error:
            return error
        except Exception as error:
            self.broken = error
            return error

    async def _generate(self, episode: Episode) -> Message:
        ours = type(self._model.api).__module__.startswith("engrain.")
        names = [tool.name for tool in episode.tools]
        own = {"tenant": episode.task.tenant, "tools": names} if ours else None
        config = GenerateConfig(extra_body=own)
        tools = [ToolInfo.model_validate(tool.schema()["function"]) for tool in episode.tools]
        messages = [to_inspect(message) for message in episode.trajectory.messages]
        output = await self._model.generate(messages, tools=tools, config=config)
        message = from_inspect(output.message)
        usage = output.usage
        return message.model_copy(
            update={
                "seconds": output.time,
                "prompt_tokens": usage.input_tokens if usage is not None else None,
                "error": "truncated" if output.stop_reason == "max_tokens" else "",
            }
        )
