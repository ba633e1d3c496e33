"""`/v1/adapters`: what the caller's context becomes, or would become. A tenant sees and evicts its own only."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from fastapi import APIRouter, Depends
from pydantic import BaseModel, ConfigDict, Field

from engrain.adapters import Adapters
from engrain.context import Context
from engrain.context_files import parse_context
from engrain.errors import InputError
from engrain.keys import Caller
from engrain.serve.refused import Refused
from engrain.serve.server import Server


class PreviewRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")
    context: str = Field(min_length=1)
    """A profile in Markdown, each rule a line that starts with '- '."""


def routes(server: Server) -> APIRouter:
    router, known, service = APIRouter(), Depends(server.caller), server.service

    def own(caller: Caller) -> dict[str, Context]:
        return service.agent.contexts(service.workflow(caller.tenant), caller.tenant)

    @router.get("/v1/adapters")
    async def listed(caller: Caller = known) -> dict[str, Any]:
        """The caller's adapters, one a phase where the agent was compiled so, and whether they are in memory."""

        def look(adapters: Adapters) -> list[dict[str, Any]]:
            return [
                _about(adapters, context) | {"phase": phase, "kept": adapters.knows(context)}
                for phase, context in own(caller).items()
            ]

        return {"object": "list", "data": await _using(server, look)}

    @router.post("/v1/adapters/preview")
    async def preview(body: PreviewRequest, caller: Caller = known) -> dict[str, Any]:
        """What an adapter for this context would be; its rules take effect nowhere."""

        def make(adapters: Adapters) -> dict[str, Any]:
            context = parse_context(body.context, caller.tenant)
            began = time.perf_counter()
            adapter = adapters(context)
            seconds = time.perf_counter() - began
            return _about(adapters, context) | {
                "rules": [{"kind": rule.kind, "text": rule.text, "digest": rule.digest} for rule in context.rules],
                "rank": adapter.rank,
                "sites": len(adapter.factors),
                "bytes": sum(factor.nbytes for factor in adapter.tensors()),
                "seconds": seconds,
            }

        server.admission.enter(caller)
        try:
            return await _using(server, make)
        finally:
            server.admission.leave(caller)

    @router.delete("/v1/adapters")
    async def evict(caller: Caller = known) -> dict[str, Any]:
        """Drop the caller's adapters from memory; they are made again when needed."""

        def drop(adapters: Adapters) -> int:
            return sum(adapters.forget(context) for context in own(caller).values())

        return {"object": "list", "deleted": await _using(server, drop)}

    return router


async def _using(server: Server, use: Any) -> Any:
    """Raises `Refused`."""
    try:
        return await asyncio.to_thread(server.service.use_adapters, use)
    except InputError as error:
        raise Refused(400, str(error)) from error


def _about(adapters: Adapters, context: Context) -> dict[str, Any]:
    """With why the context goes into the prompt instead, if it does."""
    return {"object": "adapter", "digest": context.digest(), "in_prompt": adapters.strange([context])}
