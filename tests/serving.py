"""A running server of the committed agent, on a thread of the tests."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from engrain.keys import Everybody, Keys
from engrain.serve import Listener, create_app
from engrain.service import Service
from engrain.task import Task
from engrain.workflow import Workflow

ROOT = Path(__file__).parents[1]
AGENT = ROOT / "agents" / "support_desk"
DESK = ROOT / "examples" / "support_desk"


def served(service: Service, keys: Keys | Everybody) -> AbstractContextManager[str]:
    """Its address, up to `/v1`."""
    return running(create_app(service, keys))


@contextmanager
def running(app: FastAPI) -> Iterator[str]:
    """An application's address, up to `/v1`."""
    with listening(app) as (_, port):
        yield f"http://127.0.0.1:{port}/v1"


@contextmanager
def listening(app: FastAPI) -> Iterator[tuple[Listener, int]]:
    """A server of an application, and its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = uvicorn.Config(app, port=port, log_level="error", timeout_graceful_shutdown=30)
    server = Listener(config, app, grace_s=0.3)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield server, port
    finally:
        server.should_exit = True
        thread.join(60)


def task_of(desk: Workflow, tenant: str, number: int = 0) -> Task:
    return next(islice((task for task in desk.tasks("held_out", 5) if task.tenant == tenant), number, None))
