"""How long a tenant waits for its first token: one that was never seen, beside one whose adapter is in memory.

Each tenant has a profile of so many rules of the worlds, new to the server. The first request makes its adapter, reads
the prompt and decodes; the second asks something else, so that only the adapter is known. Without an agent that has a
hypernetwork there is nothing to measure.

    python benchmarks/first_token.py AGENT
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import threading
import time
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))

from generation_time import contexts

from engrain.agent import load_agent
from engrain.service import Asked, Service
from engrain.trajectory import Message
from engrain.workflow import load_workflow


def seconds_to_first(service: Service, tenant: str, request: str) -> float:
    """From the conversation's arrival."""
    began, there = time.perf_counter(), threading.Event()
    found: list[float] = []

    def listen(ids: list[int]) -> None:
        if ids and not found:
            found.append(time.perf_counter() - began)
            there.set()

    prepared = service.prepare(tenant, Asked([Message(role="user", content=request)], most_tokens=8))
    job = service.submit(prepared, listen)
    there.wait(60)
    job.done.result(60)
    return found[0]


def main(
    path: Annotated[Path, typer.Argument(help="an agent with a hypernetwork")],
    number: Annotated[int, typer.Option("-n", help="tenants")] = 50,
) -> None:
    agent = load_agent(path)
    workflow = load_workflow(path / agent.manifest.source)
    requests = [task.request for task in islice(workflow.tasks("held_out", 0), 3)]
    with tempfile.TemporaryDirectory() as folder:
        profiles = Path(folder)
        for name, context in enumerate(contexts(number + 1)):
            (profiles / f"t{name}.md").write_text(context.sections[0].markdown() + "\n")
        service = Service(agent, workflow, profiles, parallel=1)
        for request in requests[:2]:  # what is slow once only
            seconds_to_first(service, f"t{number}", request)
        new = [seconds_to_first(service, f"t{name}", requests[0]) for name in range(number)]
        known = [seconds_to_first(service, f"t{name}", requests[1]) for name in range(number)]
        again = [seconds_to_first(service, f"t{name}", requests[2]) for name in range(number)]
        service.close()
    reference = statistics.median(known + again)
    table = Table("tenant", "p50 ms", "p95 ms", "x a known one", title=f"first token, {number} tenants of 20 rules")
    for arm, taken in {"never seen": new, "adapter in memory": known + again}.items():
        p50, p95 = statistics.median(taken), statistics.quantiles(taken, n=20)[-1]
        table.add_row(arm, f"{1000 * p50:.0f}", f"{1000 * p95:.0f}", f"{p50 / reference:.1f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
