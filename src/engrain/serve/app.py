"""The application: routes, what goes around them, and its end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from engrain.keys import Caller, Everybody, Keys
from engrain.serve import adapters, chat, responses, runs
from engrain.serve.listener import LastAnswers, is_closing
from engrain.serve.refused import Refused
from engrain.serve.server import Server
from engrain.serve.telemetry import Counted
from engrain.service import Service

MOST_BYTES = 8 * 2**20
"""Of a request's body."""


class Bounded:
    """Middleware that lets nobody send a body without an end."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            length = dict(scope["headers"]).get(b"content-length", b"").decode("latin-1")
            if not length.isdecimal():
                refused = Refused(411, "expected the length of the body in Content-Length")
            elif int(length) > MOST_BYTES:
                refused = Refused(413, f"expected a body of at most {MOST_BYTES} bytes, got {length}")
            else:
                refused = None
            if refused is not None:
                await refused.answer()(scope, receive, send)
                return
        await self._app(scope, receive, send)


def create_app(service: Service, keys: Keys | Everybody) -> FastAPI:
    """The server of one agent."""
    server = Server(service, keys)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(title="Engrain", lifespan=life, openapi_url=None)
    app.add_middleware(Bounded)
    app.add_middleware(LastAnswers)
    app.add_middleware(Counted, telemetry=server.telemetry)
    for part in (chat, responses, runs, adapters):
        app.include_router(part.routes(server))
    created, known = int(time.time()), Depends(server.caller)

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return error.answer()

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        return Refused(error.status_code, f"{request.method} {request.url.path}: {error.detail}").answer()

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"] if part != "body")
        return Refused(400, f"{field or 'body'}: {first['msg']}").answer()

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return Refused(500, f"the server failed ({type(error).__name__}); ask again", "server_error").answer()

    @app.get("/healthz")
    async def healthy() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz", response_model=None)
    async def is_ready() -> Response:
        if is_closing(app):
            return JSONResponse({"status": "closing"}, 503)
        if service.has_room():
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "busy"}, 503)

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        return Response(server.telemetry.metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models(caller: Caller = known) -> dict[str, Any]:
        return {"object": "list", "data": [_model(service.name, created)]}

    @app.get("/v1/models/{name}")
    async def model(name: str, caller: Caller = known) -> dict[str, Any]:
        server.check_model(name)
        return _model(name, created)

    return app


def _model(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "engrain"}
