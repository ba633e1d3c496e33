"""What it costs and saves that an adapter acts on the agent's own turns only: two agents, compiled with and without.

Best with adapters that change within a task, where each change encodes the conversation again unless it is activated:

    engrain compile benchmarks/clinic -o agents/plain --to hypernetwork --contexts step
    engrain compile benchmarks/clinic -o agents/activated --to hypernetwork --contexts step --activated
    python benchmarks/activated.py agents/plain agents/activated
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from engrain.agent import load_agent
from engrain.engine import Engine
from engrain.rollout import rollout
from engrain.score import bootstrap, paired_difference, step_seconds, succeeded, successes, verdict
from engrain.workflow import load_workflow


def main(
    plain: Annotated[Path, typer.Argument(help="an agent")],
    activated: Annotated[Path, typer.Argument(help="the same, compiled with --activated")],
    number: Annotated[int, typer.Option("-n", help="tasks, one at a time")] = 100,
    split: str = "held_out",
) -> None:
    table = Table("agent", "success % [95%]", "tokens encoded/step", "s/step, mean", title=f"{number} tasks of {split}")
    found = {}
    for name, path in (("plain", plain), ("activated", activated)):
        agent = load_agent(path)
        workflow = load_workflow(path / agent.manifest.source)
        policy = agent.policy(workflow, 1)
        assert isinstance(policy.engine, Engine)
        tasks = list(islice(workflow.tasks(split, 1000), number))
        runs = list(rollout(workflow, tasks, policy, parallel=1))
        found[name] = successes(runs)
        seconds, steps = step_seconds(runs), sum(run.steps for run in runs)
        share = bootstrap([float(succeeded(run)) for run in runs], [run.task for run in runs])
        table.add_row(
            name, share.percent(), f"{policy.engine.encoded_tokens / steps:.0f}", f"{sum(seconds) / len(seconds):.3f}"
        )
    Console().print(table)
    difference = paired_difference(found["activated"], found["plain"])
    Console().print(verdict("activated", "plain", difference, number))


if __name__ == "__main__":
    typer.run(main)
