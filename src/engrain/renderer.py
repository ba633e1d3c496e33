"""Trajectory <-> token ids, through the base's own chat template and native tool marks.

Invariant: *the tokens served are the tokens trained*. A conversation is split where the agent begins and stops to
write (prompt | completion | bridge | completion ...) and each piece is tokenised apart, by `rows` for training and by
`prompt` for decoding, so that `rows(t)[0].ids == prompt(t[:k]) + completion + ...` token for token. Loss is on
completions only: reasoning, calls, answers and the stop token.

Text in messages and tool schemas never becomes a mark, whatever it spells (see `codec`).

A template that rewrites history is not an error: a trajectory then makes one row for each stretch that is not rewritten
(see `split`), at worst one row a turn. Reasoning for a base without a place for it is
an error unless `Renderer(..., reasoning=False)` drops it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from engrain import toolformat
from engrain.codec import BREAK, Codec
from engrain.errors import RenderError
from engrain.split import Chunk, Splitter
from engrain.toolformat import in_schema_order
from engrain.trajectory import Message, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from engrain.context import Context
    from engrain.tool import Tool

Rejected = Counter[str]
Json = Any


@dataclass(frozen=True, eq=False)
class Choices:
    """What a teacher would write in the place of each masked token of a row: its likeliest tokens, the best first."""

    tokens: np.ndarray
    """Integers, masked tokens by choices; without the row's first token, which nothing predicts."""
    logprobs: np.ndarray
    """Nats, of the same shape."""


@dataclass(frozen=True)
class Rival:
    """Another context under which a row would go on otherwise, such as its own with one rule edited."""

    context: Context
    at: int
    """The place of the first token that would be another; not 0, which nothing predicts."""


@dataclass(frozen=True)
class Row:
    """One training sequence. `mask[i]`: token `i` carries loss, that is, it is predicted from those before it."""

    ids: list[int]
    mask: list[bool]
    context: Context | None = None
    """What the adapter is made for while this row is trained on; a constant source does not look."""
    choices: Choices | None = None
    """For distillation."""
    rival: Rival | None = None
    """For the swap margin."""
    turns: tuple[tuple[int, int], ...] = ()
    """Of an activated row: where each turn that is said again at its end stands in it."""


def _failure(reason: str, expected: str, got: str, fix: str) -> RenderError:
    return RenderError(f"{reason}: expected {expected}; got {got}; {fix}")


def _no_constant(text: str) -> Json:
    raise ValueError(f"{text} is not JSON")


def _loads(text: str) -> Json:
    return json.loads(text, parse_constant=_no_constant)


def _map_strings(value: Json, change: Any) -> Json:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): _map_strings(item, change) for key, item in value.items()}
    return [_map_strings(item, change) for item in value] if isinstance(value, list) else value


class Renderer:
    """The base's way to write a conversation. Raises `RenderError` for a tokenizer that cannot be trained on safely."""

    stop_ids: tuple[int, ...]
    """Tokens that end an agent's turn."""
    stable: bool
    """Whether the template keeps earlier turns as they were; if not, a trajectory can make several rows."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, reasoning: bool = True, tools: Sequence[Tool] = ()
    ) -> None:
        if not getattr(tokenizer, "chat_template", None) or not getattr(tokenizer, "is_fast", False):
            raise _failure("no chat template", "a fast tokenizer with a chat template", type(tokenizer).__name__,
                           "use an instruction-tuned base, or set tokenizer.chat_template")  # fmt: skip
        self.tokenizer, self.reasoning = tokenizer, reasoning
        self._schemas: dict[str, Json] = {tool.name: json.loads(tool.parameters) for tool in tools}
        self._codec = Codec(tokenizer)
        self._offered = lru_cache(64)(self._read_tools)
        self._arguments = lru_cache(16384)(self._read_arguments)
        self._splitter = Splitter(tokenizer, self._codec.pattern)
        self._learn()

    def rows(self, trajectory: Trajectory) -> list[Row]:
        """One row, or one for each stretch whose history the template does not rewrite.

        Raises `RenderError` if nothing would be learnt or something would be learnt wrongly.
        """
        try:
            stretches = self._stretches(trajectory, open=False)
            rows = [self._row(chunks) for chunks in stretches if any(m and m.trained for _, m in chunks)]
            if not rows:
                raise _failure("empty mask", "at least one trained assistant turn", f"{trajectory.steps} turns, none "
                               "trained", "leave this trajectory out, or set trained=true on a turn")  # fmt: skip
        except RenderError as error:
            raise RenderError(f"{error} (trajectory {trajectory.id!r})") from error
        return rows

    def prompt(self, trajectory: Trajectory) -> list[int]:
        """Tokens up to where the agent writes its next turn. Turns with `token_ids` keep exactly those."""
        ids: list[int] = []
        for text, message in self._stretches(trajectory, open=True)[-1]:
            ids += self._completion(text, message) if message else self._codec.encode(text)
        return ids

    def invocation(self) -> tuple[int, ...]:
        """The tokens that open each of the agent's turns, from which on an activated adapter acts.

        Raises `RenderError` if the template does not open them all alike.
        """
        return tuple(self._codec.encode(self._splitter.opening))

    def parse(self, ids: Sequence[int]) -> Message:
        """A completion, with or without its stop token, as an assistant message; calls are `call_0`, `call_1`, ...

        A call that is begun but malformed leaves all text as content, with `error="malformed_call"`.
        """
        return _unguarded(toolformat.parse(self._codec.decode(ids, self.stop_ids), self.format))

    def parse_begun(self, ids: Sequence[int]) -> Message:
        """What is certain of a completion still being written: beginnings of reasoning and content, no calls."""
        return _unguarded(toolformat.parse_begun(self._codec.decode(ids, self.stop_ids), self.format))

    def grammar(self, tools: Sequence[Tool], answer: bool = True, *, calls: int = 1, preamble: bool = False) -> str:
        """The llguidance grammar of one turn: reasoning if any, then a call among `tools` or an answer, then the stop.

        `calls` is the most calls a turn, where the template takes several; `preamble` allows text before a call.
        """
        return toolformat.lark(self.format, tools, self.stop_ids, self._codec.ids,
                               answer=answer, calls=calls, preamble=preamble)  # fmt: skip

    # Learning the template

    def _learn(self) -> None:
        self.stop_ids = (self._codec.ids[self._splitter.stop],)
        tools = [toolformat.probe_tool()]
        self.format = toolformat.detect(lambda turn: self._splitter.complete(turn, tools))
        self._codec.protect(self.format.tags())
        self._answer = re.compile(toolformat.answer_pattern(self.format, self._codec.ids))
        probes = [
            (c, self._objects(c, "[]"), t) for c in toolformat.probe_conversations(self.format) for t in ([], tools)
        ]
        context = self._splitter.learn(probes)
        own = {*self._codec.pattern.findall("".join(self.format.pieces()))} - context
        self._agent_ids = {self._codec.ids[mark] for mark in own}
        self.stable = self._splitter.stable

    # Messages to text

    def _read_tools(self, text: str) -> tuple[list[Json], dict[str, Json]]:
        schemas = json.loads(text)
        parameters = {s["function"]["name"]: s["function"].get("parameters", {}) for s in schemas if "function" in s}
        return _map_strings(schemas, self._codec.guard), parameters

    def _read_arguments(self, text: str, name: str, tools: str) -> Json:
        """Templates want an object; text that is not one stays text, and fails the round trip if it is trained."""
        try:
            value = _loads(text)
        except ValueError:
            return self._codec.guard(text)
        schema = self._offered(tools)[1].get(name, self._schemas.get(name))
        return _map_strings(in_schema_order(value, schema), self._codec.guard)

    def _objects(self, messages: Sequence[Message], tools: str) -> list[Json]:
        """Messages as templates want them. A call id is kept if it is nine letters or digits, else it is a number."""
        objects: list[Json] = []
        ids: dict[str, str] = {}
        count = 0
        for message in messages:
            one: dict[str, Json] = {"role": message.role, "content": self._codec.guard(message.content)}
            if message.reasoning and self.reasoning:
                one["reasoning_content"] = self._codec.guard(message.reasoning)
            for call in message.tool_calls:
                ids[call.id] = last = call.id if re.fullmatch("[A-Za-z0-9]{9}", call.id) else f"{count:09d}"
                ids[""], count = last, count + 1
                arguments = self._arguments(call.arguments, call.name, tools)
                function = {"name": self._codec.guard(call.name), "arguments": arguments}
                one.setdefault("tool_calls", []).append({"type": "function", "id": last, "function": function})
            if message.role == "tool":
                one["name"] = self._codec.guard(message.name)
                one["tool_call_id"] = ids.get(message.tool_call_id) or ids.get("", "000000000")
            objects.append(one)
        return objects

    def _stretches(self, trajectory: Trajectory, *, open: bool) -> list[list[Chunk]]:
        objects, tools = self._objects(trajectory.messages, trajectory.tools), self._offered(trajectory.tools)[0]
        return self._splitter.stretches(trajectory.messages, objects, tools, open=open)

    # Text to tokens, and what must hold before a turn is trained on

    def _completion(self, text: str, message: Message) -> list[int]:
        ids = list(message.token_ids) if message.token_ids else self._codec.encode(text)
        return ids if ids[-1] in self.stop_ids else [*ids, self.stop_ids[0]]

    def _row(self, chunks: Sequence[Chunk]) -> Row:
        ids: list[int] = []
        mask: list[bool] = []
        for text, message in chunks:
            piece = self._completion(text, message) if message else self._codec.encode(text)
            trained = message is not None and message.trained
            if message is not None and trained:
                self._check(message, piece)
            ids += piece
            mask += [trained] * len(piece)
        return Row(ids, mask)

    def _check(self, message: Message, ids: list[int]) -> None:
        if message.token_ids and message.token_ids[-1] not in self.stop_ids:
            raise _failure("untrained stop token", f"token_ids that end with {self._splitter.stop!r}",
                           "a turn cut short", "set trained=false on it")  # fmt: skip
        alien = [self._codec.names[token] for token in ids[:-1] if token in self._codec.names.keys() - self._agent_ids]
        if alien:
            raise _failure("trained context token", "an agent's turn of text and call marks only", repr(alien[0]),
                           "fix the chat template, or set trained=false on the turn")  # fmt: skip
        if message.tool_calls and self.format.calls is None:
            raise _failure("no tool marks", "a chat template that renders tool calls as JSON", "one that does not",
                           "use a base with tool support")  # fmt: skip
        if message.reasoning and self.reasoning and self.format.reasoning is None:
            raise _failure("no place for reasoning", "turns without any, as this base's template writes none",
                           repr(message.reasoning[:60]), "drop it: Renderer(tokenizer, reasoning=False)")  # fmt: skip
        if message.token_ids:
            return
        parsed = self.parse(ids)
        want, got = self._said(message), self._said(parsed)
        if want != got or parsed.error:
            raise _failure("round trip", f"the turn to parse back as {want}", f"{got}",
                           "keep marks out of the agent's text, or set trained=false on the turn")  # fmt: skip
        self._check_reachable(message)

    def _check_reachable(self, message: Message) -> None:
        """Constrained decoding must be able to produce what is trained."""
        if self.reasoning and len(message.reasoning) > toolformat.LONGEST_TEXT:
            raise _failure("unreachable turn", f"at most {toolformat.LONGEST_TEXT} characters of reasoning",
                           f"{len(message.reasoning)}", "shorten it, or set trained=false on the turn")  # fmt: skip
        if not (message.tool_calls or self._answer.fullmatch(message.content.strip())):
            raise _failure("unreachable turn", f"a call, or 1 to {toolformat.LONGEST_TEXT} characters that are "
                           "unlike a call", repr(message.content[:60]), "set trained=false on the turn")  # fmt: skip
        if any("\x7f" in call.arguments or "\\u007f" in call.arguments.lower() for call in message.tool_calls):
            raise _failure("unreachable turn", "arguments of printable text", "U+007F in them", "remove it")

    def _said(self, message: Message) -> tuple[str, str, list[tuple[str, str]]]:
        """What a turn says: text as the tokenizer normalises it, without outer whitespace; arguments by JSON value."""
        normal = self._codec.normal
        calls = []
        for call in message.tool_calls:
            try:
                arguments = json.dumps(_loads(call.arguments), sort_keys=True, ensure_ascii=False)
            except ValueError:
                arguments = f"not JSON: {call.arguments}"
            calls.append((call.name, normal(arguments)))
        reasoning = message.reasoning.strip() if self.reasoning else ""
        return normal(reasoning), normal(message.content.strip()), calls


def _unguarded(message: Message) -> Message:
    for part in (message, *message.tool_calls):
        for field in ("content", "reasoning", "arguments"):
            if BREAK in getattr(part, field, ""):
                setattr(part, field, getattr(part, field).replace(BREAK, ""))
    return message


def render_dataset(renderer: Renderer, trajectories: Iterable[Trajectory], *, max_tokens: int, strict: bool = True,
                   context_of: Callable[[Trajectory], Context | None] = lambda trajectory: None,
                   ) -> tuple[list[Row], Rejected]:  # fmt: skip
    """All rows of at most `max_tokens`, and how many were left out why: rows are `overlong`, never truncated.

    A trajectory that cannot be rendered raises `RenderError`; if not `strict`, it is counted under the error's reason.
    """
    rows: list[Row] = []
    rejected: Rejected = Counter()
    for trajectory in trajectories:
        try:
            made = renderer.rows(trajectory)
        except RenderError as error:
            if strict:
                raise
            rejected[str(error).partition(":")[0]] += 1
            continue
        kept = [row for row in made if len(row.ids) <= max_tokens]
        rejected.update({"overlong": len(made) - len(kept)} if len(kept) < len(made) else {})
        context = context_of(trajectory)
        rows += kept if context is None else [replace(row, context=context) for row in kept]
    return rows, rejected
