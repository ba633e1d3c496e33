"""A real MCP server on standard input and output, with tools that behave and tools that do not."""

from __future__ import annotations

import os
import sys
import time
from typing import Literal

from mcp.server.mcpserver import MCPServer

server = MCPServer("desk", log_level="ERROR")
calls: list[str] = []


@server.tool()
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@server.tool()
def find(key: str, kind: Literal["order", "customer"] = "order") -> dict[str, str]:
    """Find a record."""
    calls.append(key)
    return {"key": key, "kind": kind, "name": "Zoë"}


@server.tool()
def seen() -> list[str]:
    """Every key that was looked for in this session."""
    return calls


@server.tool()
def environment(name: str) -> str:
    """A variable of the server's environment."""
    return os.environ.get(name, "")


@server.tool(name="files.read")
def read(size: int) -> str:
    """Text of a given size."""
    return "x" * size


@server.tool()
def fail() -> str:
    """Always fails."""
    raise ValueError("the shelf is empty")


@server.tool()
def sleep(seconds: float) -> str:
    """Answer late."""
    time.sleep(seconds)
    return "late"


@server.tool()
def die() -> str:
    """Stop the server in the middle of a call."""
    os._exit(3)


if __name__ == "__main__":
    if "--broken" in sys.argv:
        sys.exit("no such database")
    if "--mute" in sys.argv:
        time.sleep(60)
    server.run("stdio")
