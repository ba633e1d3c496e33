"""How a base writes an agent's turn, learnt by asking its chat template to render a few turns that we know.

No family is named in this module. The template renders a call of `probename` with known arguments, and the text around
name and arguments is the base's native marks: `<tool_call>{"name": "` before the name for ChatML/Hermes,
`[TOOL_CALLS] [{"name": "` for Mistral, `{"name": "` for Llama 3, `name[ARGS]{…}` and others likewise. The same pieces
serve parsing and the decoding grammar, so that whatever is rendered can be parsed and reached.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engrain.codec import any_of
from engrain.errors import RenderError
from engrain.trajectory import Message, ToolCall

if TYPE_CHECKING:
    from engrain.tool import Tool

LONGEST_TEXT = 8000
"""Characters of reasoning, and of an answer, that the grammar allows."""
_ID = "\ufdd1"  # a Unicode noncharacter: stands for the call id in `between` and `tail`
_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "lenient": True}


@dataclass(frozen=True)
class CallMarks:
    """A turn with calls is `head name mid arguments (between name mid arguments)* tail`."""

    head: str
    mid: str
    between: str | None
    """None where the template takes one call a turn."""
    tail: str
    preamble: bool
    """Whether text before the first call is rendered."""


@dataclass(frozen=True)
class TurnFormat:
    """Marks of reasoning, None where the template has no place for it, and of calls, None where it has no tools."""

    reasoning: tuple[str, str] | None
    calls: CallMarks | None

    def pieces(self) -> list[str]:
        calls = self.calls
        marks = [*(self.reasoning or ()), *([calls.head, calls.mid, calls.between or "", calls.tail] if calls else [])]
        return [mark for mark in marks if mark]

    def tags(self) -> set[str]:
        """Marks in angle or square brackets, whether or not the base has tokens for them."""
        return {tag for piece in self.pieces() for tag in re.findall(r"<[^\s\"{}<>]+>|\[[^\s\"{}\[\]]+\]", piece)}


def detect(complete: Callable[[dict[str, Any]], str | None]) -> TurnFormat:
    """Learn the marks. `complete` renders one assistant turn without its stop mark; None if the template refuses."""
    answer, thought = "probeanswer", "probethought"
    bare = complete({"content": answer}) or answer
    thinking = complete({"content": answer, "reasoning_content": thought}) or ""
    reasoning = None
    if 0 <= thinking.find(thought) < thinking.find(answer):
        start = thinking.find(thought)
        reasoning = (thinking[:start], thinking[start + len(thought) : thinking.find(answer)])
    return TurnFormat(reasoning, _detect_calls(complete, bare.partition(answer)[0], answer))


def probe_tool() -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"probekey": {"type": "string"}}}
    function = {"name": "probename", "description": "probe", "parameters": parameters}
    return {"type": "function", "function": function}


def probe_conversations(form: TurnFormat) -> Iterator[list[Message]]:
    """Conversations in which templates are known to rewrite history: two requests, each with a step and an answer."""
    for system in (True, False):
        for reasoning in ("probethought", "") if form.reasoning else ("",):
            messages = [Message(role="system", content="probesystem")] if system else []
            for turn in range(2):
                messages.append(Message(role="user", content=f"probequestion{turn}"))
                if form.calls:
                    call = ToolCall(id=f"probeid{turn:02d}", name="probename", arguments='{"probekey": "x"}')
                    result = Message(role="tool", content="proberesult", tool_call_id=call.id, name="probename")
                    messages += [Message(role="assistant", reasoning=reasoning, tool_calls=[call]), result]
                messages.append(Message(role="assistant", reasoning=reasoning, content=f"probeanswer{turn}"))
            yield messages


def probe_call(name: str, number: int) -> dict[str, Any]:
    return {"type": "function", "id": f"probeid{number:02d}",
            "function": {"name": name, "arguments": {f"probekey{number}": "probe value"}}}  # fmt: skip


def _detect_calls(complete: Callable[[dict[str, Any]], str | None], lead: str, answer: str) -> CallMarks | None:
    first, second = (probe_call(name, number) for number, name in enumerate(("probename", "othername")))
    one = _around(complete({"content": "", "tool_calls": [first]}), first)
    if one is None:
        return None
    head, mid, tail = one
    # An empty thinking block that the template adds on its own belongs to the reasoning marks.
    head = head.removeprefix(lead) if lead.strip() else head
    both, between = complete({"content": "", "tool_calls": [first, second]}) or "", None
    left, right = _around(both, first), _around(both, second)
    if left and right:
        end = left[2].find(second["function"]["name"])
        between, tail = left[2][:end], right[2]
    spoken = _around(complete({"content": answer, "tool_calls": [first]}), first)
    preamble = spoken is not None and answer in spoken[0] and spoken[0].endswith(head.lstrip())
    ids = [call["id"] for call in (first, second)]
    for call_id in ids:
        between, tail = between and between.replace(call_id, _ID), tail.replace(call_id, _ID)
    return None if any(call_id in head + mid for call_id in ids) else CallMarks(head, mid, between, tail, preamble)


def _around(text: str | None, call: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """The text before the call's name, between name and arguments, and after the arguments."""
    name, arguments = call["function"]["name"], json.dumps(call["function"]["arguments"])
    match = re.search(rf"(.*?){name}(.*?){re.escape(arguments)}(.*)", text or "", re.DOTALL)
    return (match[1], match[2], match[3]) if match else None


def _flexible(piece: str) -> str:
    """A regular expression for a mark, in any whitespace. Hex escapes mean the same to Python and to llguidance."""
    call_id = "[A-Za-z0-9_-]*"
    words = re.split(r"\s+", piece)
    exact = ("".join(c if c.isalnum() else call_id if c == _ID else _hex(c) for c in word) for word in words)
    return r"\s*".join(exact)


def _hex(character: str) -> str:
    return f"\\x{ord(character):02x}" if ord(character) < 128 else character


def parse(text: str, form: TurnFormat) -> Message:
    """A turn's text, without its stop mark, as a Message. Surrounding whitespace of reasoning and content is dropped.

    A call that is begun but malformed leaves the text as content, with `error="malformed_call"`.
    """
    reasoning, rest = _parse_reasoning(text, form.reasoning)
    marks = form.calls
    begin = None
    if marks:
        head = re.compile(_flexible(marks.head))
        begin = head.search(rest) if marks.preamble else head.match(rest.lstrip())
        rest = rest if marks.preamble else rest.lstrip()
    if not (marks and begin):
        return Message(role="assistant", content=rest.strip(), reasoning=reasoning)
    calls = _parse_calls(rest, begin.end(), marks)
    if calls is None:
        return Message(role="assistant", content=rest.strip(), reasoning=reasoning, error="malformed_call")
    return Message(role="assistant", content=rest[: begin.start()].strip(), reasoning=reasoning, tool_calls=calls)


def parse_begun(text: str, form: TurnFormat) -> Message:
    """As `parse`, of a turn that is still being written: reasoning and content of which no more text takes any back."""
    reasoning, rest, body = "", text, text.lstrip()
    if form.reasoning:
        opening, closing = (mark.strip() for mark in form.reasoning)
        if opening.startswith(body):
            return Message(role="assistant")
        if body.startswith(opening):
            reasoning, closed, rest = body.removeprefix(opening).partition(closing)
            if not closed:
                return Message(role="assistant", reasoning=_certain(reasoning, closing))
    head = form.calls.head.strip() if form.calls else ""
    content = rest.lstrip().partition(head)[0] if head else rest
    return Message(role="assistant", reasoning=reasoning.strip(), content=_certain(content, head))


def _certain(text: str, mark: str) -> str:
    """Text without what may yet become the mark, or half a character, or be followed by nothing but white space."""
    longest = next((n for n in range(min(len(mark), len(text)), 0, -1) if text.endswith(mark[:n])), 0)
    return text[: len(text) - longest].rstrip("\ufffd").strip()


def _parse_reasoning(text: str, marks: tuple[str, str] | None) -> tuple[str, str]:
    if marks:
        opening, closing = (mark.strip() for mark in marks)
        body = text.lstrip()
        if body.startswith(opening) and closing in body:
            reasoning, _, rest = body.removeprefix(opening).partition(closing)
            return reasoning.strip(), rest
    return "", text


def _parse_calls(text: str, at: int, marks: CallMarks) -> list[ToolCall] | None:
    middle = re.compile(rf"([A-Za-z0-9_.-]+){_flexible(marks.mid)}")
    between = re.compile(_flexible(marks.between)) if marks.between is not None else None
    tail = re.compile(_flexible(marks.tail))
    calls: list[ToolCall] = []
    while name := middle.match(text, at):
        try:
            value, end = json.JSONDecoder().raw_decode(text, name.end())
        except ValueError:
            return None
        if not isinstance(value, dict):
            return None
        calls.append(ToolCall(id=f"call_{len(calls)}", name=name[1], arguments=text[name.end() : end]))
        again = between.match(text, end) if between else None
        if again is None:
            last = tail.match(text, end)
            return calls if last and not text[last.end() :].strip() else None
        at = again.end()
    return None


def lark(form: TurnFormat, tools: Sequence[Tool], stop: Sequence[int], marks: Mapping[str, int], *,
         answer: bool, calls: int, preamble: bool) -> str:  # fmt: skip
    """The llguidance grammar of one turn. `marks` are the added tokens, written by id wherever they occur."""
    if tools and form.calls is None:
        raise RenderError("no tool marks: expected a chat template that renders tool calls, got one that does not; "
                          "use a base with tool support")  # fmt: skip
    rules, turns = [], []
    if tools and form.calls:
        rules += _call_rules(form.calls, tools, marks, calls)
        spoken = preamble and form.calls.preamble and not _plain_head(form.calls, marks)
        turns += ["ANSWER? call" if spoken else "call"]
    if answer or not tools:
        turns += ["ANSWER"]
    if any("ANSWER" in turn for turn in turns):
        rules += [f"ANSWER: /{answer_pattern(form, marks)}/"]
    if form.reasoning:
        rules += _reasoning_rules(*form.reasoning, marks)
    ends = " | ".join(f"<[{token}]>" for token in stop)
    start = f"start: {'think? ' if form.reasoning else ''}({' | '.join(turns)}) ({ends})"
    return "\n".join([start, *rules]) + "\n"


def answer_pattern(form: TurnFormat, marks: Mapping[str, int]) -> str:
    """What an answer may be. Where calls begin with ordinary text, an answer must differ from it.

    Said with classes, not with llguidance's `~`, which explodes together with a bound.
    """
    head = _plain_head(form.calls, marks) if form.calls else ""
    if not head:
        return f"(?s:.{{1,{LONGEST_TEXT}}})"
    differs = ""
    for character in reversed(head):
        differs = f"({_not(character)}|{_hex(character)}{differs})" if differs else _not(character)
    return rf"\s*{differs}(?s:.{{0,{LONGEST_TEXT}}})"


def _not(character: str) -> str:
    return f"[^{_hex(character)}]"


def _plain_head(call: CallMarks, marks: Mapping[str, int]) -> str:
    """The first word of a call if that is ordinary text: `{"name":` for Llama 3."""
    head = call.head.strip()
    return "" if re.match(any_of(marks), head) else head.split()[0]


def _call_rules(call: CallMarks, tools: Sequence[Tool], marks: Mapping[str, int], most: int) -> list[str]:
    again = "" if call.between is None or most < 2 else f" ({_literal(call.between, marks)} invocation){{0,{most - 1}}}"
    rules = [f"call: {_literal(call.head, marks)} invocation{again} {_literal(call.tail, marks)}",
             f"invocation: {' | '.join(f'tool_{number}' for number in range(len(tools)))}"]  # fmt: skip
    for number, tool in enumerate(tools):
        schema = json.loads(tool.parameters) | {"x-guidance": _JSON_STYLE}
        if "properties" in schema:  # a function takes no other arguments than those it names
            schema.setdefault("additionalProperties", False)
        rules += [f"tool_{number}: {_literal(tool.name + call.mid, marks)} %json {json.dumps(schema)}"]
    return rules


def _reasoning_rules(opening: str, closing: str, marks: Mapping[str, int]) -> list[str]:
    body = closing.lstrip()
    text = f"(?s:.{{1,{LONGEST_TEXT}}})"
    if re.match(any_of(marks), body):  # the text takes the whitespace before the mark: a lexeme does not give any back
        return [f"think: {_literal(opening, marks)} REASONING? {_literal(body, marks)}", f"REASONING: /{text}/"]
    return [f"think: {_literal(opening, marks)} reasoning", f"reasoning[lazy]: /({text})?{_flexible(closing)}/"]


def _literal(piece: str, marks: Mapping[str, int]) -> str:
    """A mark in Lark: added tokens by id, the rest quoted, call ids as any nine letters or digits."""
    parts = re.split(f"({any_of(marks)}|{_ID})", piece)
    written = (
        f"<[{marks[part]}]>" if part in marks else "/[A-Za-z0-9]{9}/" if part == _ID else json.dumps(part)
        for part in parts if part
    )  # fmt: skip
    return " ".join(written)


def in_schema_order(value: Any, schema: Any, root: Any = None) -> Any:
    """`value` with object properties in the schema's order, the one that constrained decoding can produce."""
    root = schema if root is None else root
    while isinstance(schema, dict) and str(schema.get("$ref", "")).startswith("#/"):
        target: Any = root
        for part in schema["$ref"][2:].split("/"):
            target = target.get(part, {}) if isinstance(target, dict) else {}
        schema = target
    if not isinstance(schema, dict):
        return value
    for branch in [*schema.get("anyOf", ()), *schema.get("oneOf", ()), *schema.get("allOf", ())]:
        value = in_schema_order(value, branch, root)
    if isinstance(value, list) and isinstance(schema.get("items"), dict):
        return [in_schema_order(item, schema["items"], root) for item in value]
    properties = schema.get("properties")
    if not (isinstance(value, dict) and isinstance(properties, dict)):
        return value
    ordered = [key for key in properties if key in value] + [key for key in value if key not in properties]
    return {key: in_schema_order(value[key], properties.get(key), root) for key in ordered}
