"""SGD-X (Lee et al., 2022, arXiv:2110.06800): the same dialogues under schemas that say the same in other words.

Services, intents and slots keep their order in each of the five rewordings, so a dialogue is carried over by place:
names of tools and arguments change, in calls, results and schemas; utterances, values and meaning do not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from engrain.formats.sgd import Toolset, read_services, toolset
from engrain.trajectory import Message, ToolCall, Trajectory

Service = Mapping[str, Any]


@dataclass(frozen=True)
class Rewording:
    """Services by name, and beside each what it is called and says in the reworded schema."""

    pairs: Mapping[str, tuple[Service, Service]]

    @classmethod
    def between(cls, schema: Path, reworded: Path) -> Rewording:
        """Raises `ValueError` if the two files do not have the same services, intents and slots by place."""
        before, after = read_services(schema), read_services(reworded)
        pairs = dict(zip(before, zip(before.values(), after.values(), strict=True), strict=True))
        for name, (one, other) in pairs.items():
            for part in ("intents", "slots"):
                if len(one[part]) != len(other[part]):
                    raise ValueError(f"{name} has {len(one[part])} {part}, reworded {len(other[part])}")
        return cls(pairs)

    def __call__(self, trajectory: Trajectory) -> Trajectory:
        named = trajectory.meta["services"].split(",")
        tools, renamed = self._tools(tuple(named)), _Names([self.pairs[name] for name in named])
        services = ", ".join(self.pairs[name][1]["service_name"] for name in named)
        system = trajectory.messages[0]
        first = system.model_copy(update={"content": system.content.replace(", ".join(named), services)})
        messages = [first, *(renamed.message(message, tools) for message in trajectory.messages[1:])]
        return trajectory.model_copy(update={"messages": messages, "tools": tools.schemas})

    def _tools(self, named: tuple[str, ...]) -> Toolset:
        return toolset([dict(self.pairs[name][1]) for name in named])


@dataclass(frozen=True)
class _Names:
    """What the intents and slots of a dialogue's services are called now. A name that two of them share goes by the
    first that has it with the tool at hand."""

    services: Sequence[tuple[Service, Service]]

    @cached_property
    def intents(self) -> dict[str, tuple[str, dict[str, str]]]:
        """By old name: the new one, and its service's slots."""
        found: dict[str, tuple[str, dict[str, str]]] = {}
        for one, other in self.services:
            slots = {old["name"]: new["name"] for old, new in zip(one["slots"], other["slots"], strict=True)}
            for old, new in zip(one["intents"], other["intents"], strict=True):
                found.setdefault(old["name"], (new["name"], slots))
        return found

    def message(self, message: Message, tools: Toolset) -> Message:
        if message.role == "tool":
            name, slots = self.intents[message.name]
            rows = [{slots.get(key, key): value for key, value in row.items()} for row in json.loads(message.content)]
            return message.model_copy(update={"name": name, "content": json.dumps(rows, ensure_ascii=False)})
        return message.model_copy(update={"tool_calls": [self.call(call, tools) for call in message.tool_calls]})

    def call(self, call: ToolCall, tools: Toolset) -> ToolCall:
        name, slots = self.intents[call.name]
        given = {slots[key]: value for key, value in json.loads(call.arguments).items()}
        ordered = {key: given[key] for key in tools.order[name] if key in given}
        if len(ordered) < len(given):
            raise ValueError(f"{call.name} became {name}, which has no {sorted(given.keys() - ordered.keys())}")
        return call.model_copy(update={"name": name, "arguments": json.dumps(ordered, ensure_ascii=False)})
