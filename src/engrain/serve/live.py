"""`Live`: one completion on its way to one caller, from the engine's thread to the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass

from fastapi import Request

from engrain.errors import EngrainError, InputError, Overloaded
from engrain.scheduler import Job
from engrain.serve.refused import Refused
from engrain.serve.telemetry import Telemetry
from engrain.service import Asked, Prepared, Service
from engrain.trajectory import Message
from engrain.turn import Completion


@dataclass(frozen=True)
class Ended:
    completion: Completion
    message: Message
    reason: str
    """OpenAI's `finish_reason`."""


class Live:
    """Ends itself where its content says one of `stops`; a turn's thoughts and calls may say them."""

    def __init__(
        self, service: Service, prepared: Prepared, stops: Sequence[str], telemetry: Telemetry, request: Request
    ) -> None:
        self._service, self.prepared, self._stops = service, prepared, stops
        self._pieces: asyncio.Queue[list[int] | None] = asyncio.Queue()
        self._over = False
        self.headers = {"X-Engrain-In-Prompt": prepared.in_prompt} if prepared.in_prompt else {}
        loop = asyncio.get_running_loop()
        observed = telemetry.turn(prepared, request.headers)

        def tell(piece: list[int] | None) -> None:
            if piece:
                observed.first()
            loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

        def ended(job: object) -> None:
            observed.ended(self._how(), *self.used())
            tell(None)

        try:
            self.job: Job = service.submit(prepared, tell)
        except Overloaded:
            observed.ended("refused", 0, 0)
            raise
        self.job.done.add_done_callback(ended)

    @classmethod
    async def begin(
        cls,
        service: Service,
        tenant: str,
        asked: Callable[[], Asked],
        stops: Sequence[str],
        telemetry: Telemetry,
        request: Request,
    ) -> Live:
        """Raises `Refused`."""
        try:
            prepared = await asyncio.to_thread(lambda: service.prepare(tenant, asked()))
            service.check(prepared)
            return cls(service, prepared, stops, telemetry, request)
        except Overloaded as error:
            raise Refused(429, str(error), "server_error", "overloaded", after=1) from error
        except InputError as error:
            raise Refused(400, str(error)) from error
        except EngrainError as error:
            raise Refused(400, str(error), code="context_length_exceeded") from error

    def used(self) -> tuple[int, int]:
        """Tokens read and written until now."""
        return len(self.prepared.request.prompt), self.job.sent

    async def begun(self) -> AsyncIterator[Message]:
        """What is certain of the turn, again whenever there is more of it: thoughts and content, no calls. Once."""
        ids: list[int] = []
        while not self._over:
            if (piece := await self._pieces.get()) is None:
                self._over = True
                return
            ids += piece
            message = self._service.renderer.parse_begun(ids)
            content, stopped = self._until_stop(message.content)
            if stopped:
                self.job.stop()
            yield message.model_copy(update={"content": content})

    async def ended(self) -> Ended:
        """Raises `Refused` where it ended without a completion."""
        async for _ in self.begun():
            pass
        try:
            completion = self.job.done.result()
        except CancelledError as error:
            raise Refused(499, "the caller went away") from error
        except EngrainError as error:
            raise Refused(500, str(error), "server_error") from error
        if completion.error == "grammar":
            raise Refused(500, "constrained decoding gave up on this turn; ask again", "server_error")
        message = self._service.renderer.parse_begun(completion.ids)
        content, stopped = self._until_stop(message.content)
        if stopped:
            return Ended(completion, message.model_copy(update={"content": content}), "stop")
        message = self._service.message(self.prepared, completion)
        reason = "length" if message.error == "truncated" else "tool_calls" if message.tool_calls else "stop"
        return Ended(completion, message, reason)

    async def ended_unless_gone(self, request: Request) -> Ended:
        """As `ended`; gives up once the caller has gone."""
        task = asyncio.ensure_future(self.ended())
        while not (await asyncio.wait({task}, timeout=0.5))[0]:
            if await request.is_disconnected():
                self.job.cancel()
        return task.result()

    def _until_stop(self, content: str) -> tuple[str, bool]:
        """What comes before the first stop, and whether there is one; else all but what may be a stop's beginning."""
        places = [place for stop in self._stops if (place := content.find(stop)) >= 0]
        if places:
            return content[: min(places)], True
        held = (n for n in range(1, max(map(len, self._stops), default=0)) if self._begins_stop(content[-n:]))
        return content[: len(content) - max(held, default=0)], False

    def _begins_stop(self, end: str) -> bool:
        return any(stop.startswith(end) for stop in self._stops)

    def _how(self) -> str:
        if self.job.done.cancelled() or self.job.given_up:
            return "cancelled"
        if self.job.done.exception() is not None:
            return "failed"
        return self.job.done.result().error or "stop"


def added(sent: Message, now: Message) -> dict[str, str]:
    """What has been added to thoughts and content since, by OpenAI's names."""
    before = {"reasoning_content": (sent.reasoning, now.reasoning), "content": (sent.content, now.content)}
    return {name: new[len(old) :] for name, (old, new) in before.items() if new.startswith(old) and new != old}
