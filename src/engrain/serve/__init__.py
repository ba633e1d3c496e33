"""`engrain serve`: an agent over HTTP, as the official OpenAI client speaks it.

    POST /v1/chat/completions    a turn: `chat`
    POST /v1/responses           a turn, in OpenAI's newer form: `responses`
    POST /v1/agent/runs          the whole loop, tools called here: `runs`
    GET  /v1/adapters            what the caller's context becomes: `adapters`
    GET  /healthz /readyz /metrics

Invariant: a key names the tenant; no field of a request does.
"""

from engrain.serve.app import create_app
from engrain.serve.listener import Listener

__all__ = ["Listener", "create_app"]
