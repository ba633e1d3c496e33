"""The records of one task, and what a call does to them."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from engrain.errors import ToolFailure
from engrain.task import Task

if TYPE_CHECKING:
    from worlds.world import World


class Store:
    """Rows by record and identifier, under the family's own keys. `writes` is what was done, in order."""

    def __init__(self, world: World, task: Task) -> None:
        self.world = world
        self.rows: dict[str, dict[str, dict[str, Any]]] = deepcopy(task.start["rows"])
        self.given: dict[str, str] = task.start["given"]
        self.writes: list[tuple[str, dict[str, Any]]] = []

    def do(self, tool: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """`tool` is a key of `World.tools`. Raises `ToolFailure` for a record that does not exist."""
        world = self.world
        if tool == "hand_over":
            self.writes.append((tool, arguments))
            return {"ok": True}
        record = world.actions[tool].on if tool in world.actions else tool
        name = arguments[world.shown[f"{record}.id"]]
        row = self.rows.get(record, {}).get(name)
        if row is None:
            raise ToolFailure("missing_record", f"no {world.shown[record]} {name}")
        if tool not in world.actions:
            return {world.shown[f"{record}.id"]: name} | {world.shown[f"{record}.{at}"]: row[at] for at in row}
        self.writes.append((tool, arguments))
        action = world.actions[tool]
        row.update(action.sets)
        answers = {world.shown[f"{tool}.{at}"]: self.given[f"{tool}.{at} {name}"] for at in action.gives}
        return answers or {"ok": True}


def run(tool: str) -> Callable[..., dict[str, Any]]:
    """The function of a tool: the state first, then its arguments."""

    def call(store: Store, /, **arguments: Any) -> dict[str, Any]:
        return store.do(tool, arguments)

    return call


def written(writes: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """What was done, in order, to be compared."""
    return [json.dumps([tool, arguments], sort_keys=True) for tool, arguments in writes]
