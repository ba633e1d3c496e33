"""The official `openai` client and Inspect AI against `engrain serve`, each with tool-calling tasks of tenants whose
profiles and keys were written after the server had started; with `--vllm`, also against `engrain serve` before vLLM
with our plug-in, and against vLLM itself.

    python benchmarks/clients.py AGENT
    ENGRAIN_RANK=256 recipes/serve_vllm/start AGENT PROFILES --port 8001 --dtype float32
    python benchmarks/clients.py AGENT --vllm http://127.0.0.1:8001/v1 --profiles PROFILES

AGENT is `benchmarks/clinic` compiled to a hypernetwork, PROFILES an empty directory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from clinic.workflow import FAMILY, WORLD
from inspect_ai import Task as InspectTask
from inspect_ai import eval as inspect_eval
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import get_model
from openai import OpenAI
from rich.console import Console
from rich.table import Table
from server_load import Running, write_profile
from worlds.workflow import tenants as drawn
from worlds.workflow import workflow as flow_of

from engrain.errors import EngrainError
from engrain.formats.openai import plain_message
from engrain.inspect_ai.task import goal, run
from engrain.keys import add_key
from engrain.policy import Episode, OneByOne
from engrain.rollout import rollout
from engrain.task import Task
from engrain.trajectory import Message, ToolCall
from engrain.workflow import Workflow


class Official(OneByOne):
    """The official client as a policy: chat completions with tools."""

    def __init__(self, url: str, key: str, model: str) -> None:
        self.name, self._model = f"openai:{model}", model
        self._client = OpenAI(base_url=url, api_key=key, timeout=300, max_retries=0)

    def _turn(self, episode: Episode) -> Message | Exception:
        tools: Any = [tool.schema() for tool in episode.tools]
        messages: Any = [plain_message(message) for message in episode.trajectory.messages]
        try:
            answer = self._client.chat.completions.create(
                model=self._model, messages=messages, tools=tools, temperature=0
            )
        except Exception as error:
            return error
        said = answer.choices[0].message
        calls = [
            ToolCall(id=call.id, name=call.function.name, arguments=call.function.arguments)
            for call in said.tool_calls or []
            if call.type == "function"
        ]
        thoughts = getattr(said, "reasoning_content", None) or getattr(said, "reasoning", None) or ""
        return Message(role="assistant", content=said.content or "", reasoning=thoughts, tool_calls=calls)


@dataclass(frozen=True)
class Place:
    """Something to talk to. `admit` makes a tenant known to it and gives its key."""

    name: str
    url: str
    model: Callable[[str], str]
    admit: Callable[[str, Sequence[str]], str]


def by_official(place: Place, flow: Workflow, tasks: list[Task], key: str) -> tuple[int, int]:
    """Tasks whose goal was reached, and calls of tools."""
    policy = Official(place.url, key, place.model(tasks[0].tenant))
    done = list(rollout(flow, tasks, policy, parallel=1))
    reached = sum(one.outcome is not None and one.outcome.success for one in done)
    return reached, sum(message.role == "tool" for one in done for message in one.messages)


def by_inspect(place: Place, flow: Workflow, tasks: list[Task], key: str, logs: str) -> tuple[int, int]:
    """The same, as Inspect counts. Raises `EngrainError` if Inspect gave up."""
    # Inspect asks for strict tools, which vLLM hands to its guidance backend in a form that this does not read
    model = get_model(
        f"openai-api/engrain/{place.model(tasks[0].tenant)}", base_url=place.url, api_key=key, strict_tools=False
    )
    samples = [Sample(id=one.id, input=one.request, metadata={"task": one.model_dump()}) for one in tasks]
    task = InspectTask(dataset=MemoryDataset(samples), solver=run(flow, "none"), scorer=goal())
    (log,) = inspect_eval(task, model=model, display="none", log_dir=logs)
    if log.status != "success" or not log.samples:
        raise EngrainError(f"Inspect: {log.status} {log.error.message if log.error else ''}")
    reached = sum((one.scores or {})["goal"].value == "C" for one in log.samples)
    return reached, sum(message.role == "tool" for one in log.samples for message in one.messages)


def main(
    path: Annotated[Path, typer.Argument(help="an agent with a hypernetwork, of benchmarks/clinic")],
    number: Annotated[int, typer.Option("-n", help="tasks of each tenant")] = 5,
    vllm: Annotated[str, typer.Option(help="URL of vLLM with the plug-in, up to /v1")] = "",
    profiles: Annotated[Path | None, typer.Option(help="where that vLLM reads profiles")] = None,
) -> None:
    table = Table("place", "client", "goals reached", "calls of tools", title=f"{number} tasks of each new tenant")
    newcomers = iter(drawn(WORLD, 11, 6).items())
    with tempfile.TemporaryDirectory() as folder:
        places = [_ours(path, Path(folder), profiles=None, upstream="")]
        if vllm and profiles is not None:
            places += [_ours(path, Path(folder), profiles, vllm), _theirs(vllm, profiles)]
        for place, stop in places:
            for client in ("openai", "Inspect"):
                tenant, rules = next(newcomers)
                flow = flow_of(WORLD, {tenant: rules})
                tasks = list(islice(flow.tasks("held_out", 0), number))
                key = place.admit(tenant, list(flow.tenants[tenant].rules))
                try:
                    if client == "openai":
                        reached, calls = by_official(place, flow, tasks, key)
                    else:
                        reached, calls = by_inspect(place, flow, tasks, key, f"{folder}/logs")
                except EngrainError as error:
                    table.add_row(place.name, client, f"gave up: {error}"[:200], "")
                else:
                    table.add_row(place.name, client, f"{reached} of {number}", f"{calls}")
            stop()
    Console().print(table)


def _ours(path: Path, folder: Path, profiles: Path | None, upstream: str) -> tuple[Place, Callable[[], None]]:
    """`engrain serve`, started with one tenant that is not asked about."""
    own = profiles or folder / "profiles"
    own.mkdir(exist_ok=True)
    keys = folder / ("upstream.json" if upstream else "keys.json")
    add_key(keys, "first")
    server = Running(path, keys, own, ["--upstream", upstream] if upstream else [])

    def admit(tenant: str, rules: Sequence[str]) -> str:
        write_profile(own, tenant, rules)
        return add_key(keys, tenant)

    def stop() -> None:
        server.process.terminate()
        server.process.wait()

    name = "engrain serve --upstream vLLM" if upstream else "engrain serve"
    return Place(name, f"{server.root}/v1", lambda tenant: FAMILY, admit), stop


def _theirs(url: str, profiles: Path) -> tuple[Place, Callable[[], None]]:
    def admit(tenant: str, rules: Sequence[str]) -> str:
        write_profile(profiles, tenant, rules)
        return "none"

    return Place("vLLM with the plug-in", url, lambda tenant: f"{FAMILY}/{tenant}", admit), lambda: None


if __name__ == "__main__":
    typer.run(main)
