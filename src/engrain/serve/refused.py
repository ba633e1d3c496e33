"""`Refused`: an answer with a status code and OpenAI's error object, as its client expects them."""

from __future__ import annotations

import json
import math

from fastapi.responses import JSONResponse, Response


class Refused(Exception):
    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        code: str | None = None,
        *,
        after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.body = status, {"error": {"message": message, "type": kind, "param": None, "code": code}}
        self.headers = {} if after is None else {"Retry-After": str(max(1, math.ceil(after)))}

    def answer(self) -> Response:
        return JSONResponse(self.body, self.status, self.headers)

    def event(self) -> str:
        """As a server-sent event, where an answer has begun."""
        return f"data: {json.dumps(self.body)}\n\n"
