"""`engrain/PATH`: a compiled agent as a model of Inspect's; with `-M compiled=false` the bare base below it.

Turns of all samples are decoded together, greedily unless the evaluation says otherwise. The tenant is the one of
`-M tenant=NAME`, or of a call's `extra_body={"tenant": NAME}`, where `"tools"` may name those of the workflow that are
allowed at this step.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Literal

from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
)
from inspect_ai.tool import ToolChoice, ToolFunction, ToolInfo

from engrain.agent import load_agent
from engrain.errors import InputError
from engrain.inspect_ai.messages import from_inspect, to_inspect
from engrain.service import Asked, Service, as_tool
from engrain.turn import LONGEST_TURN, Sampling
from engrain.workflow import load_workflow


class AgentModel(ModelAPI):
    """`workflow` is where the tools' code lies, `tenants` a directory of profiles. Raises `InputError`."""

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008
        *,
        tenant: str = "",
        workflow: str | None = None,
        tenants: str | None = None,
        compiled: bool = True,
        parallel: int = 16,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config)
        path = Path(model_name)
        agent = load_agent(path)
        source = load_workflow(Path(workflow) if workflow else Path(os.path.normpath(path / agent.manifest.source)))
        if compiled:
            agent.check_workflow(source)
        self._workflow, self._tenant, self._parallel = source, tenant, parallel
        profiles = Path(tenants) if tenants else None
        self._service = Service(agent, source, profiles, parallel, most_waiting=100_000, compiled=compiled)

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        if config.stop_seqs or config.num_choices not in (None, 1):
            raise InputError("stop sequences and several choices are not taken; leave them out")
        own = dict(config.extra_body or {})
        given = [as_tool(tool.model_dump(exclude_none=True)) for tool in tools]
        if "tools" in own:  # of its own workflow: their schemas say more than Inspect's can
            given = [tool for tool in self._workflow.tools if tool.name in own["tools"]]
        asked = Asked(
            [from_inspect(message) for message in input],
            given,
            "must not" if isinstance(tool_choice, ToolFunction) else _ANSWER[tool_choice],
            config.max_tokens or LONGEST_TURN,
            Sampling(config.temperature or 0.0, config.top_p or 1.0, config.seed or 0),
            tool_choice.name if isinstance(tool_choice, ToolFunction) else "",
            self._workflow.tools if "tools" in own else (),
        )
        prepared = await asyncio.to_thread(self._service.prepare, str(own.get("tenant", self._tenant)), asked)
        self._service.check(prepared)
        job = self._service.submit(prepared, lambda ids: None)
        try:
            completion = await asyncio.wrap_future(job.done)
        except asyncio.CancelledError:
            job.cancel()
            raise
        message = to_inspect(self._service.message(prepared, completion))
        assert isinstance(message, ChatMessageAssistant)
        cut = completion.error == "truncated"
        choice = ChatCompletionChoice(
            message=message.model_copy(update={"model": self.model_name, "source": "generate"}),
            stop_reason="max_tokens" if cut else "tool_calls" if message.tool_calls else "stop",
        )
        read, written = len(prepared.request.prompt), len(completion.ids)
        return ModelOutput(
            model=self.model_name,
            choices=[choice],
            usage=ModelUsage(input_tokens=read, output_tokens=written, total_tokens=read + written),
            time=completion.seconds,
            metadata={"in_prompt": prepared.in_prompt} if prepared.in_prompt else None,
        )

    def max_connections(self) -> int:
        return 2 * self._parallel

    async def aclose(self) -> None:
        await asyncio.to_thread(self._service.close)


_ANSWER: dict[str, Literal["may", "must", "must not"]] = {"auto": "may", "none": "must", "any": "must not"}
