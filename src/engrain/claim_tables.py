"""What the suite `sources` found, as tables: ways to adapt an agent, orchestrated beside compiled, and what pays when.

Invariant: every cell is a number, with its 95% interval where it comes from runs, or `n/a`, with the reason in the
notes; nothing is called better or worse but by `score.verdict`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from engrain.canary import Leaks
from engrain.claims import COMPILED, CROWDED, NA, SCRIPTS, SEEN, Measured, Method
from engrain.costs import Priced, break_even, pick
from engrain.facts import foreign
from engrain.orchestrated import META
from engrain.page import Block, Document, Lines, Notes, Table
from engrain.plots import plots, point_of, reduced
from engrain.score import Interval, bootstrap, paired_difference, step_seconds, succeeded, successes, verdict, written
from engrain.spent import Spent
from engrain.trajectory import Message, Trajectory

ADAPTS = {
    "prompt": "the prompt", "few_shot": "the prompt: worked examples", "rag": "the prompt: rules found, of all tenants",
    "rag_strict": "the prompt: rules found, of the tenant", "orchestrated": "the prompts of three nodes",
    "lora": "weights, once for its tenants", "full": "all weights, once for its tenants",
    "hypernetwork": "weights, for each tenant", "hypernetwork_rag": "weights, for each tenant, and facts found",
}  # fmt: skip
"""What changes when a rule does, by arm."""
PARTS: Mapping[str, Sequence[str]] = {
    "base": ("model",),
    "prompt": ("model", "prompt"),
    "few_shot": ("model", "prompt", "examples"),
    "rag": ("model", "prompt", "index", "embedder"),
    "rag_strict": ("model", "prompt", "index", "embedder", "reranker"),
    "orchestrated": ("model", "server", "client", "planner", "executor", "validator", "prompts"),
    "lora": ("model",),
    "full": ("model",),
    "hypernetwork": ("model", "hypernetwork"),
    "hypernetwork_rag": ("model", "hypernetwork", "index", "embedder"),
    "code": ("code",),
    "teacher": ("code",),
}
"""What must run and be kept in step, by arm; counted by hand, beside the tools and the runtime that all have."""
USUAL = ("prompt", "few_shot", "rag_strict", "orchestrated")
REQUESTS, CHANGES = (100, 10_000, 1_000_000), (0, 100)
RESAMPLES = 2_000
NONE = "n/a"


def document(measured: Measured) -> Document:
    sizes = measured.sizes
    about = (
        f"Every arm on the same tasks, base and machine: {sizes.tasks} of seen tenants, {sizes.fewer} of each other "
        f"kind, {sizes.latency} one at a time for seconds. Intervals are 95% bootstraps over tasks, of leaks over "
        "tenants, of forgetting over workflows."
    )
    blocks: list[Block] = [adaptation(measured), orchestration(measured), *paying(measured), crowd(measured)]
    seen = {name: reduced(method.runs[SEEN], method.alone) for name, method in measured.methods.items()}
    long = {name: reduced(_every(method), ()) for name, method in measured.methods.items()}
    drawn = [*plots({"all kinds of task": long}), *plots({SEEN: seen})[1:]]
    drawn += [against_tenants(measured)] if measured.crowds else []
    return Document(
        f"{measured.workflow.name}: the tables of the sources", about, (*blocks, *drawn, Notes(tuple(notes(measured))))
    )


def adaptation(measured: Measured) -> Table:
    """A row a way of adapting."""
    roles = [f"{role}: success %" for role in measured.roles]
    headings = (
        "arm", "what adapts", "rule changed: s", "CPU s", "MB", "tokens read/step", "tokens written/step",
        "s/step, median", *roles, "forgets, points", "others' rules in prompts %", "others' canaries read %", "said %",
    )  # fmt: skip
    rows = []
    for name, adapts in ADAPTS.items():
        method = measured.methods.get(name)
        if method is None:
            rows.append((name, adapts, *[NONE] * (len(headings) - 2)))
            continue
        rows.append((
            name, adapts, *_spent(method.update), f"{method.megabytes:.1f}", *_step(method),
            *(_success(method.runs.get(role)) for role in measured.roles),
            method.forgets.percent() if isinstance(method.forgets, Interval) else NONE,
            _share(sum(bool(foreign(run)) for run in method.runs[SEEN]), len(method.runs[SEEN])), *_leaks(method.leaks),
        ))  # fmt: skip
    return Table(headings, tuple(rows), "Ways to adapt an agent")


def orchestration(measured: Measured) -> Table:
    """A row a way of running one step."""
    kinds = list(next(iter(measured.methods.values())).kinds)
    headings = (
        "arm", "success % [95%]", "s/step, median", "tokens read/step", "tokens written/step", "model calls/step",
        *(f"{kind} %" for kind in kinds), "moving parts",
    )  # fmt: skip
    rows = []
    for name in PARTS:
        method = measured.methods.get(name)
        if method is None:
            rows.append((name, *[NONE] * (len(headings) - 1)))
            continue
        read, wrote, seconds = _step(method)
        runs = method.runs[SEEN]
        failed = (_share(sum(method.kinds[kind].values()), len(runs)) for kind in kinds)
        calls = _mean(_calls(runs), runs, 1) if name not in SCRIPTS else "0"
        rows.append((name, _success(runs), seconds, read, wrote, calls, *failed, str(len(PARTS[name]))))
    return Table(headings, tuple(rows), "Orchestrated beside compiled")


def paying(measured: Measured) -> Iterator[Table]:
    """After how many requests compiling has paid, and what costs least at which volume."""
    priced = {name: found for name, one in measured.methods.items() if (found := _priced(name, one)) is not None}
    rows = [
        (usual, compiled, *(_requests(break_even(priced[usual], priced[compiled], rate)) for rate in (0.0, 0.001)))
        for usual in USUAL
        for compiled in COMPILED
        if usual in priced and compiled in priced
    ]
    headings = ("in place of", "compile to", "pays after requests", "with a rule changed every 1,000")
    yield Table(headings, tuple(rows), "When compiling has paid")
    chosen = {name: one for name, one in priced.items() if name in ADAPTS}
    if chosen:
        picked = [
            (f"{requests:,}", str(changes), best.name, f"{best.total(requests, changes):,.0f}")
            for requests in REQUESTS
            for changes in CHANGES
            for best in [pick(list(chosen.values()), requests, changes)]
        ]
        headings = ("requests", "changes of rules", "costs least of those not shown to be worse", "seconds in all")
        yield Table(headings, tuple(picked), "What to pick")


def crowd(measured: Measured) -> Table:
    """A row an arm: what it does as tenants become many, and what is kept for the largest number of them."""
    counts = list(measured.sizes.crowds)
    headings = ("arm", *(f"{count:,} tenants: success %" for count in counts), "new tenant: s", "kept for all: MB")
    rows = []
    for name in ADAPTS:
        method = measured.methods.get(name)
        shares = (_success(measured.crowds.get(count, {}).get(name)) for count in counts)
        rows.append((name, *shares, *((NONE, NONE) if method is None else _kept(name, method, measured))))
    return Table(headings, tuple(rows), "From one tenant to many")


def _kept(name: str, method: Method, measured: Measured) -> tuple[str, str]:
    """Seconds for a tenant that is new, and megabytes of adapters for the largest crowd."""
    if not name.startswith("hypernetwork"):
        return _spent(method.update)[0], f"{method.megabytes:.1f}"
    if isinstance(measured.made, str):
        return NONE, NONE
    made = measured.made
    return f"{made.seconds / made.tenants:.3g}", f"{method.megabytes + made.tenants * made.megabytes:.1f}"


def against_tenants(measured: Measured) -> Lines:
    every = list(measured.crowds.values())
    points = {
        name: tuple(point_of(float(place), reduced(runs[name], ()).runs) for place, runs in enumerate(every))
        for name in every[0]
    }
    return Lines(
        "Success against the number of tenants",
        "tenants",
        "success",
        points,
        about="Of the arms that read more when there are more tenants. 95% bootstrap intervals over tasks.",
        labels=tuple(f"{count:,}" for count in measured.crowds),
        shares=True,
    )


def notes(measured: Measured) -> Iterator[str]:
    for compiled in COMPILED:
        for other in ("orchestrated", "prompt"):
            if compiled in measured.methods and other in measured.methods:
                yield _beside(compiled, measured.methods[compiled], other, measured.methods[other])
    for name, method in measured.methods.items():
        if isinstance(method.leaks, Leaks) and method.leaks.words:
            some = (f"{task} of {own} met {other}'s" for task, own, other in method.leaks.words[:3])
            yield f"{name} leaks: {'; '.join(some)}"
        if name == "teacher" and not all(map(succeeded, method.runs[SEEN])):
            failed = [run.task for run in method.runs[SEEN] if not succeeded(run)]
            yield f"the teacher fails its own goal check in {len(failed)} tasks, such as {failed[0]}: mend it first"
    yield from _blind(measured)
    same = ", ".join(name for name in measured.methods if name in ADAPTS and name not in CROWDED)
    yield f"{same}: success by number of tenants is {NA}nothing that they read for a tenant depends on the others"
    yield from (f"{role}: {split}" for role, split in measured.roles.items() if split.startswith(NA))
    yield from (f"{name}: left out, {why}" for name, why in measured.left_out.items())
    reasons: dict[str, list[str]] = {}
    for name, method in measured.methods.items():
        for said in (method.leaks, method.update, method.forgets):
            if isinstance(said, str):
                reasons.setdefault(said, []).append(name)
    yield from (f"{', '.join(names)}: {said}" for said, names in reasons.items())


def _blind(measured: Measured) -> Iterator[str]:
    """A hypernetwork that is not shown to do more under a tenant's own rules than under another's."""
    mine, other = (measured.methods.get(name) for name in ("hypernetwork", "another"))
    if mine is None or other is None:
        return
    role = "new tenants" if "new tenants" in mine.runs else SEEN
    right, wrong = successes(mine.runs[role]), successes(other.runs[role])
    difference = paired_difference(right, wrong)
    if difference.low <= 0:
        said = verdict("under the right rules it", "under another tenant's", difference, len(right))
        yield f"**the hypernetwork ignores its context, as far as {role} show**: {said}"


def _beside(first: str, one: Method, second: str, other: Method) -> str:
    """Speed and success of a compiled arm beside another."""
    fast, slow = (float(np.median(step_seconds(method.alone))) for method in (one, other))
    mine, theirs = (successes(method.runs[SEEN]) for method in (one, other))
    times = slow / fast if fast > 0 else math.nan
    said = verdict(first, second, paired_difference(mine, theirs), len(mine))
    return f"{first}'s median step takes {fast:.3f} s, {second}'s {slow:.3f} s: {times:.1f} times; {said}"


def _priced(name: str, method: Method) -> Priced | None:
    """A request costs what its steps take one at a time."""
    if not isinstance(method.update, Spent) or not method.alone:
        return None
    request = sum(step_seconds(method.alone)) / len(method.alone)
    return Priced(name, method.once, method.update.seconds, request, successes(method.runs[SEEN]))


def _step(method: Method) -> tuple[str, str, str]:
    """Tokens read and written and median seconds of a step, each with its interval over tasks."""
    read = _mean([turn.prompt_tokens for turn in _turns(method.runs[SEEN])], method.runs[SEEN])
    wrote = _mean([written(turn) for turn in _turns(method.runs[SEEN])], method.runs[SEEN])
    return read, wrote, _median(method.alone)


def _turns(runs: Sequence[Trajectory]) -> list[Message]:
    return [turn for run in runs for turn in run.messages if turn.role == "assistant"]


def _mean(values: Sequence[float | None], runs: Sequence[Trajectory], digits: int = 0) -> str:
    """Of a value for each turn."""
    tasks = [run.task for run in runs for turn in run.messages if turn.role == "assistant"]
    known = [(value, task) for value, task in zip(values, tasks, strict=True) if value is not None]
    if not known:
        return NONE
    found = bootstrap([value for value, _ in known], [task for _, task in known], resamples=RESAMPLES)
    return f"{found.mean:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


def _median(runs: Sequence[Trajectory]) -> str:
    """Of seconds a step, resampled by task."""
    tasks = [seconds for run in runs if (seconds := step_seconds([run]))]
    if not tasks:
        return NONE
    random = np.random.default_rng(0)
    drawn = [np.median(np.concatenate([tasks[n] for n in random.integers(len(tasks), size=len(tasks))]))
             for _ in range(RESAMPLES)]  # fmt: skip
    low, high = np.percentile(drawn, [2.5, 97.5])
    return f"{np.median(np.concatenate(tasks)):.3f} [{low:.3f}, {high:.3f}]"


def _calls(runs: Sequence[Trajectory]) -> list[float]:
    """Calls of the model for each turn."""
    once = {"model_calls": 1}
    costs = (json.loads(run.meta[META]) if META in run.meta else [once] * run.steps for run in runs)
    return [cost["model_calls"] for run in costs for cost in run]


def _share(count: int, of: int) -> str:
    """Of runs, one a task, in percent."""
    return bootstrap([1.0] * count + [0.0] * (of - count), resamples=RESAMPLES).percent() if of else NONE


def _success(runs: Sequence[Trajectory] | None) -> str:
    if not runs:
        return NONE
    return bootstrap([float(succeeded(run)) for run in runs], [run.task for run in runs]).percent()


def _spent(update: Spent | str) -> tuple[str, str]:
    if isinstance(update, str):
        return NONE, NONE
    return f"{update.seconds:.3g}", NONE if update.cpu_seconds is None else f"{update.cpu_seconds:.3g}"


def _leaks(found: Leaks | str) -> tuple[str, str]:
    return (NONE, NONE) if isinstance(found, str) else (found.read.percent(), found.said.percent())


def _requests(count: float) -> str:
    return "never" if math.isinf(count) else f"{math.ceil(count):,}"


def _every(method: Method) -> list[Trajectory]:
    return [run for runs in method.runs.values() for run in runs]


def totals(measured: Measured) -> Mapping[str, Any]:
    """The numbers for `report.json`, beside the page."""
    return {
        "workflow": measured.workflow.name,
        "roles": dict(measured.roles),
        "left_out": dict(measured.left_out),
        "success": {
            name: {role: sum(map(succeeded, runs)) / max(1, len(runs)) for role, runs in method.runs.items()}
            for name, method in measured.methods.items()
        },
    }
