"""`Listener`: uvicorn's server with an end that loses nothing.

At its end uvicorn closes every connection that looks idle, also one whose request is already on the wire, or that waits
to be accepted: under load a busy event loop has not seen those yet, and their callers read an error.
"""

from __future__ import annotations

import asyncio
import socket

import uvicorn
from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

GRACE_S = 2.0
"""For what was sent before the end to be seen."""


class Listener(uvicorn.Server):
    """Once told to end, it goes on for a moment: not ready for more, answering what comes, and asking each caller to
    close its connection. Then it ends as uvicorn does: no new connection, and what is under way finishes."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, grace_s: float = GRACE_S) -> None:
        super().__init__(config)
        self._app, self._grace_s = app, grace_s

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.state.closing = True
        await asyncio.sleep(self._grace_s)
        await super().shutdown(sockets)


class LastAnswers:
    """Middleware that ends connections with their answers once the application is closing."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def ending(message: Message) -> None:
            if message["type"] == "http.response.start" and is_closing(scope["app"]):
                MutableHeaders(scope=message)["Connection"] = "close"
            await send(message)

        await self._app(scope, receive, ending if scope["type"] == "http" else send)


def is_closing(app: FastAPI) -> bool:
    return getattr(app.state, "closing", False)
