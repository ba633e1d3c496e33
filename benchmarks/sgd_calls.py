"""Exact match of service calls on dialogues that people paraphrased: SGD dev, services seen in training or not.

At each gold call turn the model reads the gold history and decodes one turn, constrained to a call of the dialogue's
tools or an answer. A call is right if the method and every argument are. Intervals are 95% bootstraps over dialogues,
not calls. So that "always call" does not pay, gold answer turns are decoded too and calls made there are counted.
With `--schemas v1` (to v5) the services are worded as in SGD-X: the same dialogues and meaning, other names. Nothing
here reads a test split. The data (CC BY-SA 4.0) stays where it is.

    python benchmarks/sgd_calls.py AGENT --data ../shared/data/sgd/dev.jsonl.gz -o sgd.json
    python benchmarks/sgd_calls.py AGENT --services unseen --schemas v5
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sgd_rewordings import Rewording

from engrain.adapter import Adapter
from engrain.agent import MANIFEST, load_agent
from engrain.context import Context
from engrain.dataset import import_file
from engrain.engine import Engine, Request
from engrain.files import replacing
from engrain.formats.sgd import read_services, schema_beside
from engrain.model import Base, load_base
from engrain.renderer import Renderer
from engrain.score import Interval, matches
from engrain.sections import tool_section
from engrain.tool import Tool
from engrain.trajectory import Message, ToolCall, Trajectory

Source = Literal["categorical", "utterance", "result", "canonicalised"]
SOURCES: tuple[Source, ...] = ("categorical", "utterance", "result", "canonicalised")
ERRORS_SHOWN = 20


@dataclass(frozen=True)
class Turn:
    """A gold assistant turn: the history before it, and where each argument of its call can be read."""

    history: Trajectory
    gold: Message
    sources: dict[str, Source]


Read = Callable[[Turn, Turn], Sequence[dict[str, Any]]]


@dataclass(frozen=True)
class Arm:
    """A model under test. Models load when their turn comes, and one at a time is in memory."""

    name: str
    load: Callable[[], Base]
    renderer: Callable[[], Renderer]
    tools_in_prompt: bool = False
    adapters: Callable[[Base], Callable[[Context], Adapter]] | None = None
    """Of a hypernetwork that reads schemas."""
    read: Read = lambda turn, other: ()
    """What that reads, of a turn or of one with other services."""


def load_arms(path: Path) -> dict[str, Arm]:
    """The arms of an agent directory; of a plain base directory, those of the base alone."""
    if (path / MANIFEST).exists():
        agent = load_agent(path)
        arms = [
            Arm("base", agent.load_base, lambda: agent.renderer),
            Arm("base+tools", agent.load_base, lambda: agent.renderer, tools_in_prompt=True),
        ]
        if agent.manifest.kind == "hypernetwork":
            arms += [
                Arm(name, agent.load_base, lambda: agent.renderer, adapters=agent.adapters, read=read)
                for name, read in READ.items()
            ]
        else:
            kept = bool(agent.manifest.config.get("keep_tools"))
            arms.append(Arm("compiled", agent.load, lambda: agent.renderer, kept))
    else:
        base = load_base(path)
        arms = [
            Arm("base", lambda: base, lambda: Renderer(base.tokenizer)),
            Arm("base+tools", lambda: base, lambda: Renderer(base.tokenizer), tools_in_prompt=True),
        ]
    return {arm.name: arm for arm in arms}


READ: dict[str, Read] = {
    "compiled": lambda turn, other: turn.history.tool_schemas(),
    "another's schemas": lambda turn, other: other.history.tool_schemas(),
    "no schemas": lambda turn, other: (),
}
"""What a hypernetwork reads, by arm: its controls see whether it reads at all."""


def gold_turns(trajectory: Trajectory) -> list[Turn]:
    """Every assistant turn that follows a user turn: the others (answers after a result) cannot be calls in SGD."""
    enums = {
        (tool["function"]["name"], name)
        for tool in trajectory.tool_schemas()
        for name, value in tool["function"]["parameters"]["properties"].items()
        if "enum" in value
    }
    turns, said, results = [], "", ""
    for index, message in enumerate(trajectory.messages):
        if message.role == "assistant" and trajectory.messages[index - 1].role == "user":
            history = trajectory.model_copy(update={"messages": trajectory.messages[:index]})
            sources: dict[str, Source] = {}
            for call in message.tool_calls:
                for name, value in json.loads(call.arguments).items():
                    sources[name] = source(str(value), (call.name, name) in enums, said, results)
            turns.append(Turn(history, message, sources))
        if message.role == "tool":
            results += f"\n{message.content}"
        elif message.role != "system":
            said += f"\n{message.content.lower()}"
    return turns


def source(value: str, categorical: bool, said: str, results: str) -> Source:
    """Where a value can be read: the first that holds."""
    if categorical:
        return "categorical"
    if value.lower() in said:
        return "utterance"
    return "result" if value in results else "canonicalised"


def offered(trajectory: Trajectory) -> list[Tool]:
    """The dialogue's tools, for the grammar; they are never run."""
    return [
        Tool(f["name"], f["description"], json.dumps(f["parameters"]), _never)
        for f in (schema["function"] for schema in trajectory.tool_schemas())
    ]


def _never(**arguments: Any) -> None:
    raise AssertionError("benchmark tools are not run")


@dataclass(frozen=True)
class Decoded:
    turns: list[Message]
    prompt_tokens: int
    completion_tokens: int
    overlong: int
    seconds: float


def decode(arm: Arm, turns: Sequence[Turn], *, parallel: int, max_new: int, max_context: int) -> Decoded:
    """One turn of the model for each gold turn. A prompt that does not fit the context gives an empty turn."""
    base, renderer = arm.load(), arm.renderer()
    limit = min(max_context, getattr(base.model.config, "max_position_embeddings", max_context))
    engine = Engine(base.model, renderer, base.tokenizer, parallel=parallel, max_context=limit)
    adapter_of = arm.adapters(base) if arm.adapters is not None else None
    requests: dict[int, Request] = {}
    for number, turn in enumerate(turns):
        shown = turn.history if arm.tools_in_prompt else turn.history.model_copy(update={"tools": "[]"})
        grammar, adapter = renderer.grammar(offered(turn.history)), None
        if adapter_of is not None:
            other = next((one for one in turns[number:] if one.history.tools != turn.history.tools), turns[0])
            adapter = adapter_of(Context(tuple(map(tool_section, arm.read(turn, other)))))
        request = Request(renderer.prompt(shown), grammar, max_new, seed=str(number), adapter=adapter)
        if len(request.prompt) + max_new <= limit:
            requests[number] = request
    started = time.perf_counter()
    got = [Message(role="assistant", error="overlong") for _ in turns]
    generated = 0
    order = sorted(requests, key=lambda number: len(requests[number].prompt))
    batches = range(0, len(order), parallel)
    for first in track(batches, arm.name, console=Console(stderr=True)):
        batch = order[first : first + parallel]
        for number, completion in zip(batch, engine.decode([requests[number] for number in batch]), strict=True):
            generated += len(completion.ids)
            got[number] = (
                renderer.parse(completion.ids)
                if not completion.error
                else Message(role="assistant", error=completion.error)
            )
    engine.close()
    prompt_tokens = sum(len(request.prompt) for request in requests.values())
    return Decoded(got, prompt_tokens, generated, len(turns) - len(requests), time.perf_counter() - started)


def ratio(hits: Sequence[float], groups: Sequence[str], resamples: int = 10_000) -> Interval:
    """The mean of `hits`, and its 95% interval when whole groups are resampled."""
    if not hits:
        return Interval(float("nan"), float("nan"), float("nan"))
    names = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    index = [names[group] for group in groups]
    total, right = np.bincount(index).astype(float), np.bincount(index, weights=np.asarray(hits, dtype=float))
    draws = np.random.default_rng(0).multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    low, high = np.percentile((draws @ right) / (draws @ total), [2.5, 97.5])
    return Interval(float(np.mean(hits)), float(low), float(high))


def measure(calls: Sequence[Turn], answers: Sequence[Turn], decoded: Decoded) -> dict[str, Any]:
    """Everything about one arm. `decoded.turns` are those of `calls`, then those of `answers`."""
    got_calls, got_answers = decoded.turns[: len(calls)], decoded.turns[len(calls) :]
    dialogues = [turn.history.id for turn in calls]
    exact = [float(matches(turn.gold, got)) for turn, got in zip(calls, got_calls, strict=True)]
    right: dict[str, Counter[bool]] = defaultdict(Counter)
    methods, spurious = [], 0
    for turn, got in zip(calls, got_calls, strict=True):
        gold, call = turn.gold.tool_calls[0], (got.tool_calls or [ToolCall(id="", name="")])[0]
        same = gold.name == call.name
        methods.append(float(same))
        want, have = json.loads(gold.arguments), json.loads(call.arguments) if same else {}
        spurious += len(have.keys() - want.keys())
        for name, value in want.items():
            right[turn.sources[name]][have.get(name) == value] += 1
    arguments = {
        kind: {"accuracy": right[kind][True] / max(1, right[kind].total()), "count": right[kind].total()}
        for kind in SOURCES
    }
    return {
        "exact": vars(ratio(exact, dialogues)),
        "hits": exact,
        "method": vars(ratio(methods, dialogues)),
        "called": float(np.mean([bool(got.tool_calls) for got in got_calls])),
        "arguments": arguments,
        "spurious_arguments": spurious,
        "false_calls": vars(
            ratio([float(bool(got.tool_calls)) for got in got_answers], [turn.history.id for turn in answers])
        ),
        "unfinished": dict(Counter(got.error for got in decoded.turns if got.error)),
        "overlong": decoded.overlong,
        "prompt_tokens": decoded.prompt_tokens / max(1, len(decoded.turns) - decoded.overlong),
        "completion_tokens": decoded.completion_tokens,
        "seconds": decoded.seconds,
        "errors": [
            {
                "dialogue": turn.history.id,
                "said": turn.history.messages[-1].content,
                "gold": _shown(turn.gold),
                "got": _shown(got),
            }
            for turn, got, hit in zip(calls, got_calls, exact, strict=True)
            if not hit
        ][:ERRORS_SHOWN],
    }


def _shown(message: Message) -> str:
    return " ".join(f"{call.name}({call.arguments})" for call in message.tool_calls) or message.content


def table(report: dict[str, Any]) -> Table:
    made = Table(
        title=f"SGD dev, {report['services']} services, schemas {report['schemas']}: {report['calls']} call turns of "
        f"{report['dialogues']} dialogues",
        caption=f"Percent with 95% intervals over dialogues. Arguments by where they can be read. False calls: on "
        f"{report['answers']} turns where an answer is due. Prompt: mean tokens.",
    )
    for heading in ("arm", "exact", "method", "categ.", "uttered", "result", "canon.", "false calls", "prompt", "s"):
        made.add_column(heading, justify="left" if heading == "arm" else "right", no_wrap=True)
    for name, one in report["arms"].items():
        made.add_row(
            name,
            Interval(**one["exact"]).percent(),
            Interval(**one["method"]).percent(),
            *(f"{one['arguments'][kind]['accuracy'] * 100:.1f}" for kind in SOURCES),
            Interval(**one["false_calls"]).percent(),
            f"{one['prompt_tokens']:.0f}",
            f"{one['seconds']:.0f}",
        )
    return made


def chosen_dialogues(data: Path, train_schema: Path, results: int, services: str) -> list[Trajectory]:
    """Dialogues all of whose services are in the training schema; or those none of whose are."""
    seen = read_services(train_schema).keys()
    every = import_file(data, "sgd", results=results)
    named = [(set(one.meta["services"].split(",")), one) for one in every]
    return [one for names, one in named if (names <= seen if services == "seen" else not names & seen)]


def main(
    agent: Annotated[Path, typer.Argument(help="An agent directory, or a base directory for the base alone.")],
    data: Annotated[Path, typer.Option(help="SGD dialogues to score on.")] = Path("../shared/data/sgd/dev.jsonl.gz"),
    train_schema: Annotated[Path | None, typer.Option(help="Default: train/schema.json beside the data.")] = None,
    services: Annotated[str, typer.Option(help="seen or unseen in training.")] = "seen",
    schemas: Annotated[str, typer.Option(help="original, or a rewording of SGD-X: v1 to v5.")] = "original",
    arms: Annotated[
        str,
        typer.Option(help="base, base+tools, compiled; of a hypernetwork also another's schemas, no schemas."),
    ] = "base,compiled",
    calls: Annotated[int, typer.Option(help="Call turns to score, drawn by --seed.")] = 1000,
    answers: Annotated[int, typer.Option(help="Answer turns to score for calls that should not be.")] = 300,
    results: Annotated[int, typer.Option(help="Rows that a tool result keeps; as in training.")] = 1,
    seed: int = 0,
    parallel: int = 16,
    threads: Annotated[int, typer.Option(help="More than one rarely helps a small base.")] = 1,
    max_new: int = 160,
    max_context: int = 4096,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Where to write the report as JSON.")] = None,
) -> None:
    """Score the arms on the same turns."""
    torch.set_grad_enabled(False)
    torch.set_num_threads(threads)
    if services not in ("seen", "unseen"):
        raise typer.BadParameter(f"--services is seen or unseen, not {services!r}")
    dialogues = chosen_dialogues(data, train_schema or data.parent / "train" / "schema.json", results, services)
    if schemas != "original":
        reworded = data.parent / "sgd_x" / "data" / schemas / data.name.split(".")[0] / "schema.json"
        dialogues = list(map(Rewording.between(schema_beside(data), reworded), dialogues))
    turns = [turn for one in dialogues for turn in gold_turns(one)]
    draw = random.Random(seed)
    due = [turn for turn in turns if turn.gold.tool_calls]
    free = [turn for turn in turns if not turn.gold.tool_calls]
    chosen = draw.sample(due, min(calls, len(due)))
    others = draw.sample(free, min(answers, len(free)))
    report: dict[str, Any] = {
        "agent": str(agent),
        "data": str(data),
        "services": services,
        "schemas": schemas,
        "seed": seed,
        "results": results,
        "calls": len(chosen),
        "answers": len(others),
        "dialogues": len({turn.history.id for turn in chosen}),
        "available": {"dialogues": len(dialogues), "calls": len(due), "answers": len(free)},
        "arms": {},
    }
    available = load_arms(agent)
    for name in arms.split(","):
        if name in available:
            decoded = decode(
                available[name], [*chosen, *others], parallel=parallel, max_new=max_new, max_context=max_context
            )
            report["arms"][name] = measure(chosen, others, decoded)
    measured = {name: one.pop("hits") for name, one in report["arms"].items()}
    if {"base", "compiled"} <= measured.keys():
        gains = [b - a for a, b in zip(measured["base"], measured["compiled"], strict=True)]
        report["gain"] = vars(ratio(gains, [turn.history.id for turn in chosen]))
    if output is not None:
        with replacing(output) as file:
            json.dump(report, file, indent=1, ensure_ascii=False)
    Console(width=max(Console().width, 120)).print(table(report))


if __name__ == "__main__":
    typer.run(main)
