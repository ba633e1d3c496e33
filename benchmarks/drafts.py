"""What drafting saves: passes and tokens a CPU second of a compiled agent, with drafts and without; the same tokens.

python benchmarks/drafts.py agents/support_desk -n 16
"""

from __future__ import annotations

import time
from itertools import islice
from pathlib import Path
from typing import Annotated, cast

import torch
import typer
from rich.console import Console
from rich.table import Table

from engrain.agent import load_agent
from engrain.budget import UNTIMED
from engrain.engine import Engine
from engrain.rollout import rollout
from engrain.workflow import load_workflow


def main(
    path: Annotated[Path, typer.Argument(help="a compiled agent")],
    n: Annotated[int, typer.Option("-n", help="tasks")] = 16,
    split: str = "held_out",
    parallel: int = 16,
    drafts: Annotated[str, typer.Option(help="lengths to compare; 0 drafts nothing")] = "0,5,7,10",
) -> None:
    torch.set_num_threads(1)
    agent = load_agent(path)
    workflow = load_workflow(path / agent.manifest.source)
    table = Table("draft", "passes", "tokens", "tokens a CPU second", "tasks right", "tokens as without")
    plain: list[list[int]] = []
    for length in map(int, drafts.split(",")):
        policy = agent.policy(workflow, parallel)
        engine = cast(Engine, policy.engine)
        engine.draft = length
        began = time.process_time()
        runs = list(
            rollout(workflow, islice(workflow.tasks(split, 1000), n), policy, parallel=parallel, budget=UNTIMED)
        )
        seconds = time.process_time() - began
        turns = [message.token_ids or [] for run in runs for message in run.messages if message.role == "assistant"]
        plain = plain or turns
        right = sum(run.outcome is not None and run.outcome.success for run in runs)
        tokens = sum(map(len, turns))
        cells = (length, engine.passes, tokens, f"{tokens / seconds:,.0f}", f"{right} of {n}", turns == plain)
        table.add_row(*map(str, cells))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
