"""vLLM's plug-in: `model="<agent>/<tenant>"` is the adapter that the agent's hypernetwork makes for that tenant's
rules, when the first request for it comes.

    ENGRAIN_AGENT=agents/mine ENGRAIN_TENANTS=profiles/ VLLM_PLUGINS=engrain VLLM_ALLOW_RUNTIME_LORA_UPDATING=1

vLLM keeps what a name once meant, so a name may end in the first digits of the context's digest, as in
`<agent>/<tenant>@9f86d081`: it is resolved only while the profile says so, and another profile has another name.
Invariant: an adapter lies under a path that its context, its maker and its rank determine, and is never written twice;
vLLM keys its prefix cache by that path.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from engrain.adapter import compress, save_peft
from engrain.adapters import Adapters
from engrain.agent import Agent, load_agent
from engrain.context import Context
from engrain.context_files import read_section
from engrain.errors import EngrainError, InputError
from engrain.model import base_digest
from engrain.remote import check_servable

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

RANK = 64
"""Of the adapters, unless `ENGRAIN_RANK` says otherwise; vLLM's `--max-lora-rank` must be as large."""
_NAME = re.compile(r"(?P<agent>[\w.-]+)/(?P<tenant>[A-Za-z0-9][\w.-]{0,63})(@(?P<digest>[0-9a-f]{8,64}))?", re.ASCII)
_log = logging.getLogger("engrain.vllm_plugin")


class Emitter:
    """Names to directories of adapters. Raises `InputError` if the agent is none with a hypernetwork."""

    def __init__(self, agent: Agent, tenants: Path, folder: Path, rank: int = RANK) -> None:
        self.agent, self._tenants, self._folder, self._rank = agent, tenants, folder, rank
        check_servable(agent)
        self._adapters: Adapters = agent.adapters(agent.load_base())
        self._lock = Lock()

    def __call__(self, name: str) -> Path | None:
        """Where the adapter of this name lies, made if need be; None if the name means nothing here."""
        if (context := self._context(name)) is None:
            return None
        made_of = f"{self.agent.digest()} {context.digest()} {self._rank}"
        path = self._folder / hashlib.sha256(made_of.encode()).hexdigest()
        with self._lock:
            if not path.is_dir():
                if strange := self._adapters.strange([context]):
                    _log.warning("%s: %s; its rules would be better in the prompt", name, strange)
                adapter, lost = compress(self._adapters(context), self._rank)
                save_peft(adapter, path, str(self.agent.base_path.resolve()))
                _log.info("%s: made %s, %.2g%% of its energy lost at rank %d", name, path, 100 * lost, self._rank)
        return path

    def check_base(self, path: str) -> None:
        """Raises `InputError` if what vLLM serves is not the base that the adapters are for."""
        if base_digest(Path(path)) != self.agent.manifest.base.digest:
            raise InputError(f"vLLM serves {path}, and {self.agent.path} needs the base {self.agent.base_path}; give "
                             "that as --model")  # fmt: skip

    def _context(self, name: str) -> Context | None:
        match = _NAME.fullmatch(name)
        if match is None or match["agent"] != self.agent.manifest.workflow:
            return None
        profile = self._tenants / f"{match['tenant']}.md"
        if not profile.is_file():
            return None
        context = Context((replace(read_section(profile), name=match["tenant"]),))
        return context if context.digest().startswith(match["digest"] or "") else None


class Resolver:
    """Names to vLLM's requests. It opens the agent at the first one: only the process that speaks HTTP ever does."""

    def __init__(self) -> None:
        self._emit: Emitter | None = None
        self._opening = asyncio.Lock()

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """None, which vLLM answers with 404, for a name that means nothing here."""
        from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

        try:
            async with self._opening:
                if self._emit is None:
                    emit = await asyncio.to_thread(from_environment)
                    emit.check_base(base_model_name)
                    self._emit = emit
            path = await asyncio.to_thread(self._emit, lora_name)
        except EngrainError as error:
            _log.error("%s: %s", lora_name, error)
            return None
        return None if path is None else LoRARequest(lora_name, 1, str(path))  # vLLM gives it a number of its own


def register() -> None:
    """Called by vLLM in each of its processes."""
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry  # pyright: ignore[reportMissingImports]

    LoRAResolverRegistry.register_resolver("engrain", type("EngrainResolver", (Resolver, LoRAResolver), {})())


def from_environment() -> Emitter:
    """Raises `InputError` if a variable is missing."""
    missing = [name for name in ("ENGRAIN_AGENT", "ENGRAIN_TENANTS") if not os.environ.get(name)]
    if missing:
        raise InputError(f"{missing[0]} is not set; give the agent's directory and that of the tenants' profiles")
    folder = Path(os.environ.get("ENGRAIN_ADAPTERS", "/dev/shm/engrain"))
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    agent = load_agent(Path(os.environ["ENGRAIN_AGENT"]))
    return Emitter(agent, Path(os.environ["ENGRAIN_TENANTS"]), folder, int(os.environ.get("ENGRAIN_RANK", RANK)))
