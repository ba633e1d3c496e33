"""Commands that put an agent on the network."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from engrain.cli.agents import AgentPath, WorkflowPath, attached
from engrain.errors import InputError

KeysPath = Annotated[Path, typer.Option("--keys", help="The file of API keys' hashes.")]
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(
    agent: AgentPath,
    keys: Annotated[Path | None, typer.Option(help="API keys, which name tenants; see `engrain key`.")] = None,
    tenant: Annotated[str, typer.Option(help="In the place of keys: everybody is this tenant, on this machine.")] = "",
    tenants: Annotated[Path | None, typer.Option(help="Profiles, NAME.md, that may come and change any time.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at.", min=1, max=65535)] = 8000,
    parallel: Annotated[int, typer.Option(help="Turns that are decoded at a time.", min=1)] = 16,
    waiting: Annotated[int, typer.Option(help="Turns that may wait; more are refused.", min=1)] = 256,
    upstream: Annotated[str, typer.Option(help="A vLLM server that decodes, up to /v1; see recipes/serve_vllm.")] = "",
    workflow: WorkflowPath = None,
) -> None:
    """Serve an agent over HTTP, as OpenAI's clients speak it. Ctrl-C lets what was accepted finish."""
    if (keys is None) == (not tenant):
        raise InputError("expected one of: --keys FILE, or --tenant NAME to serve one tenant on this machine only")
    if tenant and host not in LOOPBACK:
        raise InputError(f"without keys anybody who reaches {host} is {tenant!r}; give --keys, or leave --host out")
    if tenants is not None and not tenants.is_dir():
        raise InputError(f"{tenants}: no such directory; give one of profiles, NAME.md")
    try:
        import uvicorn

        from engrain.serve import Listener, create_app
    except ImportError as error:
        raise InputError("engrain serve needs more packages; install: pip install 'engrain[serve]'") from error
    from engrain.agent import load_agent
    from engrain.cli import terminal
    from engrain.keys import Everybody, Keys
    from engrain.service import Service

    loaded = load_agent(agent)
    source = attached(agent / loaded.manifest.source, workflow)
    loaded.check_workflow(source)
    if tenant and tenants is None:
        source.system(tenant, "none")  # an unknown one is an error now, not at the first request
    callers = Keys(keys) if keys is not None else Everybody(tenant)
    terminal.quiet()
    service = Service(loaded, source, tenants, parallel, waiting, upstream=upstream)
    terminal.note(f"{service.name} at http://{host}:{port}/v1")
    app = create_app(service, callers)
    config = uvicorn.Config(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=300)
    with suppress(KeyboardInterrupt):  # which uvicorn raises anew after its graceful end
        Listener(config, app).run()


def key(
    tenant: Annotated[str, typer.Argument(help="Whose key it will be.")],
    keys: KeysPath,
    most_at_once: Annotated[int, typer.Option(help="Requests that may be under way.", min=1)] = 16,
    tokens_a_minute: Annotated[int | None, typer.Option(help="By default without a limit.", min=1)] = None,
) -> None:
    """Make an API key for a tenant and print it: only its hash is kept."""
    from engrain.keys import add_key

    typer.echo(add_key(keys, tenant, most_at_once, tokens_a_minute))
