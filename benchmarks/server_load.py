"""`engrain serve` under load: many conversations of many tenants, with callers that misbehave among them.

What each tenant's conversation must say is written down beforehand, one after the other, by the same server; under load
every answer is compared with that, so one that is lost, or crossed with another tenant's, shows. Tenants ask the same
and differ in their rules alone, and their answers must differ for this to mean anything: the share of pairs of tenants
with different answers stands in the table. Then SIGTERM comes while all are talking: whatever was accepted must be
answered. Last a kill -9, and how long a new server takes until it answers.

    python benchmarks/server_load.py AGENT [--seconds 600]

AGENT is one with a hypernetwork; its quality does not matter here.
"""

from __future__ import annotations

import asyncio
import json
import random
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from itertools import combinations, islice
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from engrain.agent import load_agent
from engrain.keys import add_key
from engrain.workflow import load_workflow

TURNS = 3
"""Of a conversation: a request, and two answers of tools."""
MOST_TOKENS = 48


@dataclass
class Seen:
    """What callers saw."""

    taken: list[float] = field(default_factory=list)
    """Seconds of each answer."""
    counts: Counter[str] = field(default_factory=Counter)
    rss: list[tuple[float, float]] = field(default_factory=list)
    """Seconds since the start, and MiB of the server."""


class Running:
    """A server in a process of its own."""

    def __init__(self, agent: Path, keys: Path, profiles: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [Path(sys.executable).with_name("engrain"), "serve", agent, "--keys", keys, "--tenants", profiles]
        self.process = subprocess.Popen([*map(str, command), "--port", str(self.port), "--parallel", "16"])
        self.root = f"http://127.0.0.1:{self.port}"
        began = time.perf_counter()
        while not self._ready():
            if self.process.poll() is not None or time.perf_counter() - began > 120:
                raise SystemExit("the server did not start")
            time.sleep(0.05)
        self.started = time.perf_counter() - began

    def _ready(self) -> bool:
        try:
            return httpx.get(f"{self.root}/readyz", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def rss(self) -> float:
        """MiB."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 2**20


class Callers:
    """All who talk to a server; the same conversations every time."""

    def __init__(self, root: str, model: str, keys: dict[str, str], requests: list[str]) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=128)
        self.client = httpx.AsyncClient(base_url=root, timeout=300, limits=limits)
        self.model, self.keys, self.requests = model, keys, requests
        self.expected: dict[tuple[str, int], list[str]] = {}

    async def turn(self, tenant: str, messages: list[dict[str, Any]]) -> tuple[int, dict[str, Any]]:
        body = {"model": self.model, "messages": messages, "max_tokens": MOST_TOKENS}
        headers = {"Authorization": f"Bearer {self.keys[tenant]}"}
        answer = await self.client.post("/v1/chat/completions", json=body, headers=headers)
        return answer.status_code, answer.json()

    async def conversation(self, tenant: str, request: int, seen: Seen | None = None) -> list[str] | None:
        """What was said in it; None if an answer never came."""
        messages: list[dict[str, Any]] = [{"role": "user", "content": self.requests[request]}]
        said = []
        for _ in range(TURNS):
            began = time.perf_counter()
            try:
                status, body = await self.turn(tenant, messages)
            except httpx.HTTPError as error:
                if seen is not None:
                    seen.counts[f"lost: {type(error).__name__}"] += 1
                return None
            while status == 429:
                if seen is not None:
                    seen.counts["asked to wait"] += 1
                await asyncio.sleep(0.5)
                status, body = await self.turn(tenant, messages)
            if status != 200:
                raise SystemExit(f"{status}: {body}")
            if seen is not None:
                seen.taken.append(time.perf_counter() - began)
            message = body["choices"][0]["message"]
            calls = message.get("tool_calls") or []
            said.append(json.dumps([message["content"], [call["function"] for call in calls]]))
            messages.append(message)
            messages += [{"role": "tool", "tool_call_id": call["id"], "content": "{}"} for call in calls]
            if not calls:
                messages.append({"role": "user", "content": "Go on."})
        return said

    async def talk(self, rng: random.Random, until: Callable[[], bool], seen: Seen) -> None:
        """One conversation after the other, compared with what was said before."""
        while not until():
            tenant, request = rng.choice(list(self.expected))
            said = await self.conversation(tenant, request, seen)
            if said is not None:
                seen.counts["right" if said == self.expected[tenant, request] else "CROSSED"] += 1

    async def misbehave(self, rng: random.Random, until: Callable[[], bool], seen: Seen) -> None:
        """Each kind of bad caller in turn, with the status that it must get."""
        key = next(iter(self.keys.values()))
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        good = {"model": self.model, "messages": [{"role": "user", "content": self.requests[0]}]}

        async def status(body: bytes, headers: dict[str, str]) -> int:
            return (await self.client.post("/v1/chat/completions", content=body, headers=headers)).status_code

        async def vanish() -> int:
            streamed = json.dumps({**good, "stream": True}).encode()
            async with self.client.stream("POST", "/v1/chat/completions", content=streamed, headers=headers) as answer:
                async for _ in answer.aiter_bytes():
                    return answer.status_code
            return 0

        async def read_slowly() -> int:
            streamed = json.dumps({**good, "stream": True, "max_tokens": MOST_TOKENS}).encode()
            async with self.client.stream("POST", "/v1/chat/completions", content=streamed, headers=headers) as answer:
                async for _ in answer.aiter_bytes(64):
                    await asyncio.sleep(0.05)
                return answer.status_code

        long = {**good, "messages": [{"role": "user", "content": "word " * 60_000}]}
        kinds: dict[str, tuple[int, Callable[[], Awaitable[int]]]] = {
            "vanishes mid-stream": (200, vanish),
            "reads slowly": (200, read_slowly),
            "malformed body": (400, lambda: status(b"{nonsense", headers)),
            "prompt too long": (400, lambda: status(json.dumps(long).encode(), headers)),
            "body too large": (413, lambda: status(b" " * (9 * 2**20), headers)),
            "wrong key": (401, lambda: status(json.dumps(good).encode(), headers | {"Authorization": "Bearer x"})),
            "tenant without a profile": (
                403,
                lambda: status(
                    json.dumps(good).encode(), headers | {"Authorization": f"Bearer {self.keys['nobody']}"}
                ),
            ),
        }  # fmt: skip
        while not until():
            for kind, (wanted, call) in kinds.items():
                try:
                    found = await call()
                except httpx.HTTPError as error:
                    found = -1
                    seen.counts[f"{kind}: {type(error).__name__}"] += 1
                right = found == wanted or (found == 429 and wanted == 200)
                seen.counts[f"{kind}: {'as it should' if right else f'{found}, not {wanted}'}"] += 1
                await asyncio.sleep(rng.uniform(0.2, 1.0))


def main(
    path: Annotated[Path, typer.Argument(help="an agent with a hypernetwork")],
    seconds: float = 600,
    conversations: int = 64,
    tenants: int = 200,
) -> None:
    agent = load_agent(path)
    workflow = load_workflow(path / agent.manifest.source)
    requests = [task.request for task in islice(workflow.tasks("held_out", 0), 2)]
    with tempfile.TemporaryDirectory() as folder:
        profiles, keys = Path(folder) / "profiles", {}
        profiles.mkdir()
        rules = sorted({rule for section in workflow.tenants.values() for rule in section.rules})
        rng = random.Random(0)
        for number in range(tenants):
            lines = [f"- {rule}" for rule in rng.sample(rules, min(8, len(rules)))]
            (profiles / f"t{number:03}.md").write_text(
                "\n".join([*lines, f"- the sign of this customer is {number}", ""])
            )
            keys[f"t{number:03}"] = add_key(Path(folder) / "keys.json", f"t{number:03}")
        keys["nobody"] = add_key(Path(folder) / "keys.json", "nobody")
        asyncio.run(_measure(path, workflow.name, Path(folder), keys, requests, seconds, conversations))


async def _measure(
    path: Path, model: str, folder: Path, keys: dict[str, str], requests: list[str], seconds: float, conversations: int
) -> None:
    console = Console()
    server = Running(path, folder / "keys.json", folder / "profiles")
    callers = Callers(server.root, model, keys, requests)
    served = [tenant for tenant in keys if tenant != "nobody"]
    for tenant in track(served, "what each must be told", console=Console(stderr=True)):
        for request in range(len(requests)):
            callers.expected[tenant, request] = await callers.conversation(tenant, request) or []
    pairs = list(combinations(served, 2))
    apart = sum(callers.expected[one, 0] != callers.expected[two, 0] for one, two in pairs) / len(pairs)
    seen, began = Seen(), time.perf_counter()

    def over() -> bool:
        return time.perf_counter() - began > seconds

    async def watch() -> None:
        while not over():
            seen.rss.append((time.perf_counter() - began, server.rss()))
            await asyncio.sleep(min(5.0, seconds / 20))

    talkers = [callers.talk(random.Random(number), over, seen) for number in range(conversations)]
    await asyncio.gather(watch(), callers.misbehave(random.Random(-1), over, seen), *talkers)

    table = Table("what", "found", title=f"{conversations} conversations, {len(served)} tenants, {seconds:g} s")
    quantiles = statistics.quantiles(seen.taken, n=100)
    table.add_row("turns answered", f"{len(seen.taken):,} ({len(seen.taken) / seconds:.1f} a second)")
    table.add_row("seconds a turn, p50, p95, p99", ", ".join(f"{quantiles[n - 1]:.2f}" for n in (50, 95, 99)))
    table.add_row("pairs of tenants with different answers", f"{100 * apart:.1f}%")
    for name, count in sorted(seen.counts.items()):
        table.add_row(name, f"{count:,}")
    half = [rss for when, rss in seen.rss if when > seconds / 2]
    table.add_row("MiB of the server: start, half time, end", f"{seen.rss[0][1]:.0f}, {half[0]:.0f}, {half[-1]:.0f}")

    last, stopping = Seen(), time.perf_counter()
    asked = [asyncio.ensure_future(callers.conversation(tenant, 0, last)) for tenant in served[:conversations]]
    await asyncio.sleep(1.0)
    server.process.send_signal(signal.SIGTERM)
    await asyncio.gather(*asked, return_exceptions=True)
    code = await asyncio.to_thread(server.process.wait, 300)
    broken = {name: count for name, count in last.counts.items() if name.startswith("lost") and "Connect" not in name}
    table.add_row(
        "SIGTERM under load: turns answered, cut off", f"{len(last.taken)}, {sum(broken.values())} {broken or ''}"
    )
    table.add_row("... exit code, after seconds", f"{code}, {time.perf_counter() - stopping:.1f}")

    server = Running(path, folder / "keys.json", folder / "profiles")
    server.process.kill()
    server.process.wait()
    began = time.perf_counter()
    server = Running(path, folder / "keys.json", folder / "profiles")
    again = Callers(server.root, model, keys, requests)
    said = await again.conversation(served[0], 0)
    right = "right" if said == callers.expected[served[0], 0] else "WRONG"
    table.add_row("kill -9 and a new server: seconds to a first answer", f"{time.perf_counter() - began:.1f}, {right}")
    server.process.terminate()
    server.process.wait()
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
