"""Inspect AI: agents as its models, workflows as its tasks. Needs the extra `eval`.

    inspect eval engrain/workflow -T path=examples/support_desk --model engrain/agents/support_desk
    inspect eval my_benchmark.py --model engrain/agents/support_desk -M tenant=harbor
    inspect eval engrain/workflow -T path=examples/support_desk -T instructions=full --model openai/gpt-...

Inspect finds this package by its entry point and imports nothing heavy before it is used.
"""

from inspect_ai.model import ModelAPI, modelapi

from engrain.inspect_ai.task import workflow

__all__ = ["engrain", "workflow"]


@modelapi(name="engrain")
def engrain() -> type[ModelAPI]:
    from engrain.inspect_ai.model import AgentModel

    return AgentModel
