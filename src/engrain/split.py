"""A conversation's text, split where the agent begins and where it stops: context | completion | context | ...

The reference is `by_prefix`: render up to every turn, with and without it. That is two renders a turn. `by_epoch` cuts
one full render at the base's own marks instead (content is guarded, so marks in it are the template's) and is used only
as far as it agrees with the reference: on probe conversations when the template is learnt and, for a template that
rewrites history, on the first turn of every shape between two requests. Where it disagrees, `by_prefix` decides.

A *stretch* is a part whose every prompt is a true prefix of what follows. A template that rewrites history (Qwen3 drops
old reasoning, Mistral moves the tools) makes several.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from engrain.errors import RenderError
from engrain.trajectory import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Json = Any
Objects = list[Json]
"""Messages as a chat template takes them."""
_USER: Objects = [{"role": "user", "content": "probequestion"}]


class Chunk(NamedTuple):
    """A piece of text that is tokenised apart: a completion if it has a message, else context."""

    text: str
    message: Message | None = None


class Splitter:
    """A chat template, with what ends a prompt and what ends a turn, learnt by asking it."""

    stop: str
    """The mark that ends an agent's turn."""
    stable: bool = True
    """Whether no probe conversation had its history rewritten."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, marks: re.Pattern[str]) -> None:
        self._tokenizer, self._marks = tokenizer, marks
        self._known = lru_cache(4096)(lambda text, open: self.render(*json.loads(text), open=open))
        self._quick = True
        prompt = self.render(_USER, [], open=True)
        added = prompt.removeprefix(self.render(_USER, [], open=False))
        self._opening = added if added != prompt and marks.search(added) else ""
        self._openings: set[str] = set()
        """What ends a prompt: the generation prompt, or, where there is none, the last mark and what follows it."""
        answer = self._region(prompt, [*_USER, {"role": "assistant", "content": "probeanswer"}], [])
        ends = marks.findall(answer)
        if not ends or not answer.rstrip().endswith(ends[-1]) or "probeanswer" not in answer.partition(ends[-1])[0]:
            raise RenderError(
                f"untrained stop token: expected an assistant turn that ends with a special token; got {answer!r}; "
                "end the assistant turn of the chat template with the end-of-turn token"
            )
        self.stop = ends[-1]

    @property
    def opening(self) -> str:
        """What opens every turn. Raises `RenderError` if nothing does, or not always the same."""
        if len(self._openings) != 1 or "" in self._openings:
            raise RenderError(f"expected a chat template that opens each of the agent's turns alike, got "
                              f"{sorted(self._openings)}; compile without activation")  # fmt: skip
        return next(iter(self._openings))

    def render(self, objects: Objects, tools: list[Json], *, open: bool) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                objects, tools=tools or None, tokenize=False, add_generation_prompt=open
            )
        except Exception as error:  # templates raise whatever they like
            raise RenderError(
                f"template refused: expected messages that the base's chat template accepts; got {error}; "
                "change the messages, or use another base"
            ) from error
        return str(text)

    def complete(self, turn: Json, tools: list[Json]) -> str | None:
        """One assistant turn without its stop mark; None if the template refuses it."""
        try:
            region = self._region(self.render(_USER, tools, open=True), [*_USER, {"role": "assistant", **turn}], tools)
        except RenderError:
            return None
        text, stop, _ = region.partition(self.stop)
        return text if stop else None

    def learn(self, conversations: Iterable[tuple[Sequence[Message], Objects, list[Json]]]) -> set[str]:
        """See on probe conversations whether history is rewritten and full renders can be cut; the context's marks."""
        references = []
        for messages, objects, tools in conversations:
            try:
                stretches = self.by_prefix(messages, objects, tools, open=True)
            except RenderError:
                continue  # for example a template without a system role
            references.append((messages, objects, tools, stretches))
            self.stable = self.stable and len(stretches) == 1
        context = [
            chunk.text
            for *_, stretches in references
            for number, part in enumerate(stretches)
            for chunk in (part[1:] if number else part)  # a later stretch begins with turns of the one before
            if chunk.text and not chunk.message
        ]
        for text in context:
            mark = next(reversed(list(self._marks.finditer(text))), None)
            opening = (
                self._opening
                if self._opening and text.endswith(self._opening)
                else text[mark.start() :]
                if mark
                else ""
            )
            self._openings.add(opening)
        self._quick = bool(references) and "" not in self._openings
        for messages, objects, tools, stretches in references:
            self._quick = self._quick and self.by_epoch(messages, objects, tools, open=True) in (None, stretches)
        return {mark for text in context for mark in self._marks.findall(text)}

    def stretches(
        self, messages: Sequence[Message], objects: Objects, tools: list[Json], *, open: bool
    ) -> list[list[Chunk]]:
        """The conversation in stretches; if `open`, with what leads to the next turn at the end."""
        quick = self.by_epoch(messages, objects, tools, open=open) if self._quick else None
        return quick or self.by_prefix(messages, objects, tools, open=open)

    def by_prefix(
        self, messages: Sequence[Message], objects: Objects, tools: list[Json], *, open: bool
    ) -> list[list[Chunk]]:
        stretches: list[list[Chunk]] = []
        done = ""
        turns = [index for index, message in enumerate(messages) if message.role == "assistant"]
        for index in [*turns, len(messages)] if open else turns:
            prompt = self._prompt(objects[:index], tools)
            if not stretches or not prompt.startswith(done):
                stretches.append([])
                done = ""
            stretches[-1].append(Chunk(prompt[len(done) :]))
            if index < len(messages):
                text, stop, _ = self._region(prompt, objects[: index + 1], tools).partition(self.stop)
                if not stop:
                    raise RenderError(
                        f"untrained stop token: expected the turn to end with {self.stop!r}; got {text[-80:]!r}; "
                        "end every assistant turn of the chat template with it"
                    )
                stretches[-1].append(Chunk(text + stop, messages[index]))
                done = prompt + text + stop
        return stretches

    def by_epoch(
        self, messages: Sequence[Message], objects: Objects, tools: list[Json], *, open: bool
    ) -> list[list[Chunk]] | None:
        """As `by_prefix`, from one render for all (stable templates) or one up to every user message after a turn."""
        stretches: list[list[Chunk]] = []
        done, begun = "", 0
        for end in [len(messages)] if self.stable else _epochs(messages):
            last = open and end == len(messages)
            text = self.render(objects[:end], tools, open=last)
            cuts = self._cut(text, objects[:end], last)
            if cuts is None or not (self.stable or self._agrees(text, cuts, objects, tools, begun)):
                return None
            if not stretches or not text.startswith(done):
                stretches.append([])
                done = ""
            at = len(done)
            for index, (start, stop) in cuts.items():
                if index >= begun:
                    stretches[-1] += [Chunk(text[at:start]), Chunk(text[start:stop], messages[index])]
                    at = stop
            stretches[-1] += [Chunk(text[at:])] if last else []
            done, begun = text[:at], end
        return stretches

    def _cut(self, text: str, objects: Objects, open: bool) -> dict[int, tuple[int, int]] | None:
        """Where each assistant turn is in a full render: from the last opening before its stop, to its stop."""
        cuts: dict[int, tuple[int, int]] = {}
        at = 0
        for index, message in enumerate(objects):
            if message["role"] == "assistant":
                first = min((found for o in self._openings if (found := text.find(o, at)) >= 0), default=-1)
                stop = text.find(self.stop, first + 1)
                if first < 0 or stop < 0:
                    return None
                start = max(f + len(o) for o in self._openings if (f := text.rfind(o, at, stop)) >= 0)
                at = stop + len(self.stop)
                cuts[index] = (start, at)
        return cuts if not open or text[at:].endswith(tuple(self._openings)) else None

    def _agrees(
        self, text: str, cuts: dict[int, tuple[int, int]], objects: Objects, tools: list[Json], begun: int
    ) -> bool:
        """Whether rendering up to the first turn of each shape gives the same cuts."""
        seen = set()
        for index, (start, stop) in cuts.items():
            turn = objects[index]
            shape = (objects[index - 1]["role"], "reasoning_content" in turn, turn["content"] == "",
                     len(turn.get("tool_calls", ())), bool(seen))  # fmt: skip
            if index >= begun and shape not in seen:
                seen.add(shape)
                full = self._known(json.dumps([objects[: index + 1], tools]), False)
                if self._prompt(objects[:index], tools) != text[:start] or not full.startswith(text[:stop]):
                    return False
        return True

    def _prompt(self, objects: Objects, tools: list[Json]) -> str:
        return self._known(json.dumps([objects, tools]), True)

    def _region(self, prompt: str, objects: Objects, tools: list[Json]) -> str:
        """What the last of `objects` adds after the prompt, and whatever follows it."""
        full = self._known(json.dumps([objects, tools]), False)
        if not full.startswith(prompt):
            raise RenderError(
                f"no generation prompt: expected an assistant turn to begin with {prompt[-40:]!r}; got {full[-80:]!r};"
                " fix add_generation_prompt in the chat template"
            )
        return full[len(prompt) :]


def _epochs(messages: Sequence[Message]) -> list[int]:
    """Where to render up to: before each user message that follows a turn, and the end."""
    turned = False
    ends = []
    for index, message in enumerate(messages):
        if turned and message.role in ("user", "system"):
            ends.append(index)
            turned = False
        turned = turned or message.role == "assistant"
    return [*ends, len(messages)]
