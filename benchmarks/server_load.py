"""`engrain serve` under load: many conversations of many tenants, with callers that misbehave among them.

Tenants of a clinic, new to the agent, whose fee for a missed visit is a number that no other has: the sign by which an
answer shows whose it is. Each asks for something that ends with that fee; a conversation is the teacher's, up to each
of its last turns, which the agent must take. What it says there is written down beforehand, one after the other, by the
same server; under load every answer is compared with that and searched for signs. Then SIGTERM comes while all are
talking: whatever was accepted must be answered. Last a kill -9, and how long a new server takes until it answers.

    python benchmarks/server_load.py AGENT [--seconds 600]

AGENT is `benchmarks/clinic` compiled to a hypernetwork. How well it reads the fee is in the table, beside the rest.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from clinic.workflow import FAMILY, WORLD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from worlds.tasks import walk
from worlds.workflow import tenants as drawn
from worlds.workflow import workflow as flow_of

from engrain.formats.openai import plain_message
from engrain.keys import add_key
from engrain.trajectory import Message

TURNS, MOST_TOKENS = 2, 320
"""Of a conversation, its last ones; and of a turn."""
FEE, FIRST = "absence fee", 100
"""The rule that is a tenant's sign, and the first one's number; numbers that all have three digits."""
SIGN = re.compile(rf"{WORLD.shown[FEE]}: (\d+)")
Plain = dict[str, Any]
"""A message as OpenAI's clients send it."""


def scripts(tenants: int) -> dict[str, tuple[list[str], list[Message]]]:
    """By tenant, the bullets of its profile, and a task of one item in which the fee is charged."""
    found = {}
    for number, (tenant, rules) in enumerate(drawn(WORLD, 7, tenants).items()):
        flow = flow_of(WORLD, {tenant: {**rules, FEE: FIRST + number}})
        for task in flow.tasks("held_out", 0):
            turns = walk(WORLD, task)
            if len(task.goal["items"]) == 1 and SIGN.search(turns[-3].reasoning if len(turns) > 2 else ""):
                found[tenant] = list(flow.tenants[tenant].rules), [Message(role="user", content=task.request), *turns]
                break
    return found


def write_profile(profiles: Path, tenant: str, rules: Sequence[str]) -> None:
    (profiles / f"{tenant}.md").write_text("".join(f"- {rule}\n" for rule in rules))


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

    def __init__(self, agent: Path, keys: Path, profiles: Path, options: Sequence[str] = ()) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [Path(sys.executable).with_name("engrain"), "serve", agent, "--keys", keys, "--tenants", profiles]
        self.process = subprocess.Popen([*map(str, command), "--port", str(self.port), "--parallel", "16", *options])
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

    def __init__(self, root: str, keys: dict[str, str], scripts: Mapping[str, Sequence[Message]]) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=128)
        self.client = httpx.AsyncClient(base_url=root, timeout=300, limits=limits)
        self.keys, self.scripts = keys, scripts
        self.expected: dict[str, list[str]] = {}

    async def turn(self, tenant: str, messages: list[Plain]) -> tuple[int, Plain]:
        body = {"model": FAMILY, "messages": messages, "max_tokens": MOST_TOKENS}
        headers = {"Authorization": f"Bearer {self.keys[tenant]}"}
        answer = await self.client.post("/v1/chat/completions", json=body, headers=headers)
        return answer.status_code, answer.json()

    async def conversation(self, tenant: str, seen: Seen | None = None) -> list[str] | None:
        """What was said at each of its turns; None if an answer never came."""
        script, said = self.scripts[tenant], []
        turns = [at for at, message in enumerate(script) if message.role == "assistant"]
        for at in turns[-TURNS:]:
            messages = [plain_message(one) for one in script[:at]]
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
            answer = body["choices"][0]["message"]
            calls = [call["function"] for call in answer.get("tool_calls") or []]
            said.append(json.dumps([answer.get("reasoning_content"), answer["content"], calls]))
        return said

    def signs(self, tenant: str, said: Sequence[str]) -> tuple[int, int]:
        """How often a conversation says its tenant's sign where it should, and how often another's."""
        own = str(FIRST + list(self.scripts).index(tenant))
        found = [sign for turn in said for sign in SIGN.findall(turn)]
        others = {str(FIRST + number) for number in range(len(self.scripts))} - {own}
        return sum(sign == own for sign in found), sum(sign in others for sign in found)

    async def talk(self, rng: random.Random, until: Callable[[], bool], seen: Seen) -> None:
        """One conversation after the other, compared with what was said before."""
        while not until():
            tenant = rng.choice(list(self.expected))
            said = await self.conversation(tenant, seen)
            if said is None:
                continue
            seen.counts[
                "conversations as before" if said == self.expected[tenant] else "conversations that DIFFER"
            ] += 1
            own, others = self.signs(tenant, said)
            before, _ = self.signs(tenant, self.expected[tenant])
            seen.counts["signs: the tenant's own"] += own
            seen.counts["signs: MISSED that were said before"] += max(0, before - own)
            seen.counts["signs: ANOTHER TENANT'S"] += others

    async def misbehave(self, rng: random.Random, until: Callable[[], bool], seen: Seen) -> None:
        """Each kind of bad caller in turn, with the status that it must get."""
        key = next(iter(self.keys.values()))
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        good = {"model": FAMILY, "messages": [plain_message(next(iter(self.scripts.values()))[0])]}

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
    made = scripts(tenants)
    with tempfile.TemporaryDirectory() as folder:
        profiles, keys = Path(folder) / "profiles", {}
        profiles.mkdir()
        for tenant, (rules, _) in made.items():
            write_profile(profiles, tenant, rules)
            keys[tenant] = add_key(Path(folder) / "keys.json", tenant)
        keys["nobody"] = add_key(Path(folder) / "keys.json", "nobody")
        said = {tenant: script for tenant, (_, script) in made.items()}
        asyncio.run(_measure(path, Path(folder), keys, said, seconds, conversations))


async def _measure(
    path: Path,
    folder: Path,
    keys: dict[str, str],
    scripts: Mapping[str, Sequence[Message]],
    seconds: float,
    conversations: int,
) -> None:
    console = Console()
    server = Running(path, folder / "keys.json", folder / "profiles")
    callers, served = Callers(server.root, keys, scripts), list(scripts)
    for tenant in track(served, "what each is told", console=Console(stderr=True)):
        callers.expected[tenant] = await callers.conversation(tenant) or []
    reading = sum(callers.signs(tenant, said)[0] > 0 for tenant, said in callers.expected.items())
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
    table.add_row("tenants whose own sign was said, one at a time", f"{reading} of {len(served)}")
    for name, count in sorted(seen.counts.items()):
        table.add_row(name, f"{count:,}")
    half = [rss for when, rss in seen.rss if when > seconds / 2]
    table.add_row("MiB of the server: start, half time, end", f"{seen.rss[0][1]:.0f}, {half[0]:.0f}, {half[-1]:.0f}")

    last, stopping = Seen(), time.perf_counter()
    asked = [asyncio.ensure_future(callers.conversation(tenant, last)) for tenant in served[:conversations]]
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
    again = Callers(server.root, keys, scripts)
    said = await again.conversation(served[0])
    right = "as before" if said == callers.expected[served[0]] else "DIFFERENT"
    table.add_row("kill -9 and a new server: seconds to a first answer", f"{time.perf_counter() - began:.1f}, {right}")
    server.process.terminate()
    server.process.wait()
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
