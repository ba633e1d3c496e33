"""`Server`: what every endpoint shares. Who is calling, whether they may begin, and their turns."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Annotated

from fastapi import Header, Request

from engrain.keys import Caller, Everybody, Keys
from engrain.serve.admission import Admission
from engrain.serve.live import Live
from engrain.serve.refused import Refused
from engrain.serve.telemetry import Telemetry
from engrain.service import Asked, Service


class Server:
    def __init__(self, service: Service, keys: Keys | Everybody) -> None:
        self.service, self._keys = service, keys
        self.telemetry, self.admission = Telemetry(service), Admission()

    def caller(self, authorization: Annotated[str, Header()] = "") -> Caller:
        """Whose request it is. Raises `Refused`."""
        scheme, _, key = authorization.partition(" ")
        found = self._keys.caller(key.strip() if scheme.lower() == "bearer" else "")
        if found is None:
            raise Refused(401, "no such API key; send one as `Authorization: Bearer KEY`", code="invalid_api_key")
        if not self.service.knows(found.tenant):
            raise Refused(403, f"the tenant of this key, {found.tenant!r}, has no profile here", code="unknown_tenant")
        return found

    def check_model(self, name: str) -> None:
        """Raises `Refused` if this is not the agent that is served."""
        if name != self.service.name:
            problem = f"no model {name!r} here; there is {self.service.name!r}"
            raise Refused(404, problem, code="model_not_found")

    async def begin(
        self, request: Request, caller: Caller, model: str, asked: Callable[[], Asked], stops: Sequence[str] = ()
    ) -> Live:
        """A turn, which counts as under way until it has ended. Raises `Refused`."""
        self.check_model(model)
        self.admission.enter(caller)
        try:
            live = await Live.begin(self.service, caller.tenant, asked, stops, self.telemetry, request)
        except BaseException:
            self.admission.leave(caller)
            raise
        loop = asyncio.get_running_loop()

        def leave() -> None:
            self.admission.leave(caller, sum(live.used()))

        live.job.done.add_done_callback(lambda _: loop.call_soon_threadsafe(leave))
        return live
