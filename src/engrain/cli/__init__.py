"""The command line: results on stdout, progress on stderr, and one line for whatever goes wrong.

Exit codes: 0; 2 the user's mistake; 1 ours; 130 interrupted. Commands import late, so `engrain --help` loads no torch.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

import engrain
from engrain.cli import agents, measure, serving, sources
from engrain.errors import EngrainError

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
app.command("new")(sources.new)
app.command("record")(sources.record)
app.command("import")(sources.import_)
app.command("compile")(agents.compile_)
app.command("run")(agents.run)
app.command("adapter")(agents.adapter)
app.command("export")(agents.export)
app.command("eval")(measure.evaluate)
app.command("compare")(measure.compare)
app.command("report")(measure.report)
app.command("serve")(serving.serve)
app.command("key")(serving.key)
app.add_typer(measure.base, name="base")


def _version(asked: bool | None) -> None:
    if asked:
        typer.echo(f"engrain {engrain.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool | None, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = None,
) -> None:
    """Compile agent workflows into LoRA weights."""


def main() -> None:
    """The `engrain` program."""
    sys.exit(invoke(sys.argv[1:]))


def invoke(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; nothing is raised."""
    try:
        code = app(list(arguments), prog_name="engrain", standalone_mode=False)
        if code == 130:  # typer's word for Ctrl-C
            return _fail("interrupted", 130)
        return code if isinstance(code, int) else 0
    except EngrainError as error:
        _debug()
        return _fail(str(error), error.exit_code)
    except typer.TyperException as error:
        return _fail(f"{error.format_message()} (see engrain --help)", error.exit_code) if str(error) else 2
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except Exception as error:
        _debug()
        return _fail(f"{type(error).__name__}: {error}; set ENGRAIN_DEBUG=1 for the traceback", 1)


def _fail(message: str, code: int) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return code


def _debug() -> None:
    if os.environ.get("ENGRAIN_DEBUG"):
        traceback.print_exc()
