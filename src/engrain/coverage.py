"""Branch coverage: which ways through a workflow were taken, and how often the runs that took each succeeded.

A branch is a phase that was entered, an edge between two phases, a tool called in a phase, an error path (which tool
failed how, and what the next turn did about it), a kind of task, or a tenant. A run counts once for each branch that it
took, however often. Only what was recorded counts: turns without a phase, as in imported logs, take no phase branch.

A pass rate says that runs which took the branch failed, not that they failed there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from engrain.score import Interval, bootstrap, same_call, succeeded
from engrain.trajectory import Message, Trajectory
from engrain.workflow import Workflow

Named = tuple[str, str]
"""(sort of branch, name)"""
RESAMPLES = 2_000
"""Enough for intervals of a few dozen runs, of which there are many."""
FEW = 5
"""Branches that fewer runs took are listed last: one run that failed would head the list."""


@dataclass(frozen=True)
class Branch:
    """One way that at least one run took."""

    sort: str
    """`phase`, `edge`, `tool`, `error path`, `kind` or `tenant`."""
    name: str
    """`act`, `plan>act`, `act: refund_order`, `find_order timeout: retried`, or the kind's or tenant's own."""
    runs: int
    success: Interval
    """Of these runs; 95% bootstrap over tasks."""


@dataclass(frozen=True)
class Coverage:
    """What the runs of one arm exercised of a workflow."""

    runs: int
    branches: tuple[Branch, ...]
    """Worst first; those that fewer than five runs took after the others."""
    never: tuple[Named, ...]
    """Phases and tools that the workflow declares, and edges that its teacher took, which no run did."""

    headings = ("branch", "", "success % [95%]", "runs")

    def rows(self) -> list[tuple[str, ...]]:
        taken = [(one.sort, one.name, one.success.percent(), str(one.runs)) for one in self.branches]
        return taken + [(sort, name, "", "0") for sort, name in self.never]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "never": [{"sort": sort, "name": name} for sort, name in self.never]}

    def weakest(self) -> str:
        """The branch to look at first, in words."""
        if not self.branches:
            return "took no branch"
        worst = self.branches[0]
        if worst.success.mean == 1:
            return "passed on every branch that it took"
        return f"is weakest on {worst.sort} `{worst.name}`: {worst.success.percent()}% of {worst.runs} runs"


def coverage(
    workflow: Workflow, trajectories: Sequence[Trajectory], teacher: Iterable[Trajectory] = (), *, seed: int = 0
) -> Coverage:
    """What the runs took of the workflow; `teacher` are runs of its teacher, whose edges are those that there are."""
    took: dict[Named, list[Trajectory]] = {}
    for trajectory in trajectories:
        for branch in set(branches(workflow, trajectory)):
            took.setdefault(branch, []).append(trajectory)
    found = [_branch(name, runs, seed) for name, runs in took.items()]
    found.sort(key=lambda one: (one.runs < FEW, one.success.mean, -one.runs, one.sort, one.name))
    called = {call.name for run in trajectories for message in run.messages for call in message.tool_calls}
    edges = {branch for run in teacher for branch in branches(workflow, run) if branch[0] == "edge"}
    never: list[Named] = [("phase", phase.name) for phase in workflow.phases if ("phase", phase.name) not in took]
    never += [("tool", tool.name) for tool in workflow.tools if tool.name not in called]
    return Coverage(len(trajectories), tuple(found), (*never, *sorted(edges - took.keys())))


def branches(workflow: Workflow, trajectory: Trajectory) -> Iterator[Named]:
    """The branches that a run took, those taken twice twice."""
    steps = [turn for turn in trajectory.messages if turn.role == "assistant"]
    for before, after in pairwise(turn.phase for turn in steps if turn.phase):
        if before != after:
            yield "edge", f"{before}>{after}"
    for turn in steps:
        if turn.phase:
            yield "phase", turn.phase
            for call in turn.tool_calls:
                yield "tool", f"{turn.phase}: {_known(workflow, call.name)}"
    for place, message in enumerate(trajectory.messages):
        if message.role == "tool" and message.error:
            name = _known(workflow, message.name)
            yield "error path", f"{name} {message.error}: {_reaction(trajectory.messages, place)}"
    if trajectory.kind:
        yield "kind", trajectory.kind
    if trajectory.tenant:
        yield "tenant", trajectory.tenant


def branch_table(arms: Mapping[str, Coverage]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings and rows of all arms beside each other: a row a branch, the one that is worst on average first."""
    taken = {arm: {(one.sort, one.name): one for one in found.branches} for arm, found in arms.items()}
    names = {name: None for found in taken.values() for name in found}
    never = [set(found.never) for found in arms.values()]
    names |= dict.fromkeys(set.intersection(*never) if never else ())

    def order(name: Named) -> tuple[bool, float, int, Named]:
        here = [found[name] for found in taken.values() if name in found]
        runs, enough = sum(one.runs for one in here), [one for one in here if one.runs >= FEW]
        mean = sum(one.success.mean for one in enough or here) / max(1, len(enough or here))
        return not enough, mean if here else 2.0, -runs, name

    rows = [
        (sort, name, *(_cell(taken[arm].get((sort, name))) for arm in arms)) for sort, name in sorted(names, key=order)
    ]
    return ("branch", "", *(f"{arm}: success % [95%] (runs)" for arm in arms)), rows


def _reaction(messages: Sequence[Message], place: int) -> str:
    """What the turn after a failed call did about it."""
    turn = next((message for message in messages[place + 1 :] if message.role == "assistant"), None)
    if turn is None or turn.error:
        return "ended"
    if not turn.tool_calls:
        return "answered"
    made = [call for message in messages[:place] for call in message.tool_calls]
    failed = [call for call in made if call.id == messages[place].tool_call_id]
    retried = any(same_call(call, again) for call in failed for again in turn.tool_calls)
    return "retried" if retried else "called something else"


def _branch(name: Named, runs: Sequence[Trajectory], seed: int) -> Branch:
    tasks = [(run.split, run.task) for run in runs]
    passed = bootstrap([float(succeeded(run)) for run in runs], tasks, resamples=RESAMPLES, seed=seed)
    return Branch(*name, len(runs), passed)


def _known(workflow: Workflow, tool: str) -> str:
    """A model may call what does not exist by any name."""
    return tool if workflow.tool(tool) else "unknown tool"


def _cell(branch: Branch | None) -> str:
    return f"{branch.success.percent()} ({branch.runs})" if branch else "-"
