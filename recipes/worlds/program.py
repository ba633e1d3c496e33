"""The procedure as a plain program: what a team writes that has no model. It reads a request by the patterns that its
requests are known to come in, and carries it out as the teacher does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from engrain.task import Task
from engrain.trajectory import Message
from worlds.clerk import decide
from worlds.spec import Number, Values
from worlds.tasks import CLOSINGS, Rules
from worlds.world import World

ITEM = re.compile(r"^\(\w+\) (.*)$", re.MULTILINE)
UNREAD = Message(role="assistant", content="not understood")


def program(world: World, rules: Mapping[str, Rules]) -> Callable[[str, Sequence[Message]], Message]:
    """(tenant, messages) -> the next turn."""
    patterns = {kind: [pattern(phrase, spec.slots) for phrase in spec.phrases] for kind, spec in world.kinds.items()}
    requester = re.compile(rf"\b{world.letters[world.family.requester]}\d+\b")

    def turn(tenant: str, messages: Sequence[Message]) -> Message:
        request = next(message.content for message in messages if message.role == "user")
        who = requester.search(request)
        items = [item(said, who[0]) for said in split(request)] if who else []
        if not who or None in items:
            return UNREAD
        goal = {"requester": who[0], "items": items, "rules": dict(rules[tenant])}
        return decide(world, Task(id="", request=request, tenant=tenant, goal=goal), messages)

    def item(said: str, who: str) -> dict[str, Any] | None:
        for kind, spec in world.kinds.items():
            for known in patterns[kind]:
                if found := known.fullmatch(said):
                    named = found.groupdict()
                    asked = {
                        slot: int(named[slot]) if isinstance(values, Number) else named[slot]
                        for slot, values in spec.slots.items()
                    }
                    return {"kind": kind, "about": named.get("id", who), "asked": asked, "said": said}
        return None

    return turn


def split(request: str) -> list[str]:
    """The words of each item: marked lines, or what follows the greeting."""
    if items := ITEM.findall(request):
        return items
    said = request.partition(": ")[2]
    for closing in filter(None, CLOSINGS):
        said = said.removesuffix(closing).rstrip()
    return [said.removesuffix(".")]


def pattern(phrase: str, slots: Mapping[str, Values]) -> re.Pattern[str]:
    """`[a|b] with {id}` as `vary` may have written it."""
    held = {"id": r"[A-Z]\d+"} | {
        slot: r"\d+" if isinstance(values, Number) else ".+?" for slot, values in slots.items()
    }
    parts = re.split(r"(\[[^\]]*\]|\{\w+\}| +)", phrase)
    written = ""
    for part in parts:
        if part.startswith("["):
            written += f"(?:{'|'.join(re.escape(one) for one in part[1:-1].split('|'))})"
        elif part.startswith("{"):
            written += f"(?P<{part[1:-1]}>{held[part[1:-1]]})"
        else:
            written += r" *" if part.isspace() else re.escape(part)
    return re.compile(written)
