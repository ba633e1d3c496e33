"""The end of a server: what was sent before it is answered."""

from __future__ import annotations

import http.client
import time

import pytest
from fastapi import FastAPI
from serving import listening

from engrain.serve.listener import LastAnswers


@pytest.fixture
def app() -> FastAPI:
    made = FastAPI()
    made.add_middleware(LastAnswers)

    @made.get("/")
    async def said() -> str:
        return "said"

    return made


def test_a_connection_that_looked_idle_at_the_end_is_still_answered_and_then_closed(app: FastAPI) -> None:
    with listening(app) as (server, port):
        idle, fresh = (http.client.HTTPConnection("127.0.0.1", port, timeout=10) for _ in range(2))
        idle.request("GET", "/")
        before = idle.getresponse()
        assert before.read() == b'"said"' and before.getheader("Connection") != "close"
        server.should_exit = True
        while not getattr(app.state, "closing", False):
            time.sleep(0.01)
        for caller in (idle, fresh):
            caller.request("GET", "/")
            answer = caller.getresponse()
            assert answer.read() == b'"said"' and answer.getheader("Connection") == "close"
    with pytest.raises(ConnectionRefusedError):
        http.client.HTTPConnection("127.0.0.1", port, timeout=10).request("GET", "/")
