"""What each optimisation of the engine is worth: an agent's steps with each of them switched off in turn.

Tasks run one at a time, as a user waits for them. Greedy output must be the same whatever is on; that it is stands in
the table. Jump-forward appends the tokens that the grammar forces without a choice; drafts guess what follows from what
followed before; a kept line never encodes a conversation again.

    python benchmarks/optimisations.py agents/support_desk
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from rich.console import Console
from rich.table import Table

from engrain import engine as engine_module
from engrain.agent import load_agent
from engrain.budget import UNTIMED
from engrain.engine import LONGEST_DRAFT, Engine
from engrain.policy import Episode, Policy
from engrain.rollout import rollout
from engrain.trajectory import Message
from engrain.workflow import load_workflow


@contextmanager
def without_jumps() -> Iterator[None]:
    """Every token is chosen from logits, also where the grammar leaves one only."""
    before = engine_module.forced
    engine_module.forced = lambda matcher: []
    try:
        yield
    finally:
        engine_module.forced = before


class Forgetful:
    """A policy whose engine forgets all that it has encoded before each turn."""

    name = "forgetful"

    def __init__(self, policy: Policy, engine: Engine) -> None:
        self._policy, self._engine = policy, engine

    def __call__(self, episodes: Sequence[Episode], /) -> Sequence[Message | Exception]:
        for line in self._engine.cache.lines:
            line.ids.clear()
        return self._policy(episodes)

    def finish(self, episode: Episode, /) -> None:
        self._policy.finish(episode)


def main(
    path: Annotated[Path, typer.Argument(help="an agent")],
    n: Annotated[int, typer.Option("-n", help="tasks")] = 16,
    split: str = "held_out",
) -> None:
    torch.set_num_threads(1)
    agent = load_agent(path)
    workflow = load_workflow(path / agent.manifest.source)
    nothing: Callable[[], Any] = nullcontext
    arms: dict[str, tuple[int, Callable[[], Any], bool]] = {
        "all on": (LONGEST_DRAFT, nothing, True),
        "no drafts": (0, nothing, True),
        "no jump-forward": (LONGEST_DRAFT, without_jumps, True),
        "neither": (0, without_jumps, True),
        "no kept lines": (LONGEST_DRAFT, nothing, False),
        "nothing on": (0, without_jumps, False),
    }
    table = Table("arm", "passes a step", "tokens encoded a step", "s a step", "same output",
                  title=f"{n} tasks of {workflow.name}, one at a time, one thread")  # fmt: skip
    plain: list[Any] = []
    for name, (draft, context, kept) in arms.items():
        policy = agent.policy(workflow, 1)
        engine = cast(Engine, policy.engine)
        engine.draft = draft
        asked: Policy = policy if kept else Forgetful(policy, engine)
        with context():
            began = time.perf_counter()
            runs = list(rollout(workflow, islice(workflow.tasks(split, 1000), n), asked, parallel=1, budget=UNTIMED))
            seconds = time.perf_counter() - began
        turns = [message.token_ids for run in runs for message in run.messages if message.role == "assistant"]
        plain = plain or turns
        steps = len(turns)
        cells = (f"{engine.passes / steps:.1f}", f"{engine.encoded_tokens / steps:.0f}", f"{seconds / steps:.3f}")
        table.add_row(name, *cells, str(turns == plain))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
