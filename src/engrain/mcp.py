"""One session with an MCP server over its standard input and output, kept open on a thread with its own event loop.

Invariant: after the start, whatever the server does (dies, hangs, answers with an error) reaches the caller as a
`ToolFailure` within the timeout, and the server is stopped when the session closes.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import threading
from concurrent.futures import Future
from typing import Any

from mcp import Client, MCPError, StdioServerParameters
from mcp.client.stdio import stdio_client
from mcp_types import CONNECTION_CLOSED, REQUEST_TIMEOUT, CallToolResult, TextContent, Tool

from engrain.errors import ToolFailure, WorkflowError

_MOST_PAGES = 100
_STOP_SECONDS = 10.0


class Session:
    """Use as a context manager: `tools` is what the server lists, `call` calls one of them."""

    def __init__(self, command: list[str], env: dict[str, str] | None, startup: float) -> None:
        if not command:
            raise WorkflowError("an MCP server needs a command, such as ['python', 'server.py']; got an empty list")
        self.command, self.env, self.startup = command, env, startup
        self.tools: list[Tool] = []
        self._loop = asyncio.new_event_loop()
        self._ready: Future[Client] = Future()
        self._open = True
        self._thread = threading.Thread(target=self._run, name="engrain-mcp", daemon=True)

    def __enter__(self) -> Session:
        with tempfile.TemporaryFile("w+", errors="replace") as self._stderr:
            self._thread.start()
            try:
                self._client = self._ready.result(self.startup)
            except BaseException as error:
                self.close()
                if not isinstance(error, Exception):
                    raise
                raise WorkflowError(self._why(error)) from error
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the session and stop the server: politely, then by force, within ten seconds."""
        self._open = False
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._serving.cancel)
            self._thread.join(_STOP_SECONDS)

    def call(self, name: str, timeout: float, /, **arguments: Any) -> Any:
        """The result of one tool call. Raises `ToolFailure`."""
        if not self._open:
            raise ToolFailure("server_closed", "the MCP session is closed")
        request = self._client.call_tool(name, arguments, read_timeout_seconds=timeout)
        try:
            result = asyncio.run_coroutine_threadsafe(request, self._loop).result(timeout + 1)
        except MCPError as error:
            codes = {CONNECTION_CLOSED: "server_closed", REQUEST_TIMEOUT: "timeout"}
            raise ToolFailure(codes.get(error.code, "server_error"), error.message) from error
        return _value(result)

    def _run(self) -> None:
        self._serving = self._loop.create_task(self._serve())
        try:
            self._loop.run_until_complete(self._serving)
        except BaseException as error:
            if not self._ready.done():
                self._ready.set_exception(error)
        finally:
            self._open = False
            self._loop.close()

    async def _serve(self) -> None:
        parameters = StdioServerParameters(command=self.command[0], args=self.command[1:], env=self.env)
        async with Client(stdio_client(parameters, errlog=self._stderr)) as client:
            cursor = None
            for _ in range(_MOST_PAGES):
                page = await client.list_tools(cursor=cursor)
                self.tools += page.tools
                cursor = page.next_cursor
                if cursor is None:
                    break
            self._ready.set_result(client)
            await asyncio.get_running_loop().create_future()  # until cancelled

    def _why(self, error: Exception) -> str:
        while isinstance(error, ExceptionGroup):
            error = error.exceptions[0]
        self._stderr.seek(0)
        said = self._stderr.read()[-2000:].strip().splitlines()
        problem = f"no answer within {self.startup:g} seconds" if isinstance(error, TimeoutError) else str(error)
        detail = f"; its last words: {said[-1]}" if said else ""
        return f"cannot start the MCP server {' '.join(self.command)!r}: {problem}{detail}; run the command by hand"


def _value(result: CallToolResult) -> Any:
    """What the tool returned: its structured value if it sent one, else its text."""
    texts = [_block(block) for block in result.content]
    if result.is_error:
        raise ToolFailure("tool_error", "\n".join(texts))
    value = result.structured_content
    whole = _parsed(texts[0]) if len(texts) == 1 else None
    if isinstance(value, dict) and set(value) == {"result"} and value != whole:
        return value["result"]  # the SDK's wrapping of anything that is not an object
    if value is None:
        value = whole if isinstance(whole, dict | list) else "\n".join(texts)
    return value


def _block(block: Any) -> str:
    if isinstance(block, TextContent):
        return block.text
    text = getattr(getattr(block, "resource", None), "text", None)
    return text if text is not None else f"[{block.type} content, which this agent cannot read]"


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
