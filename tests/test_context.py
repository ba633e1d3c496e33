"""Contexts: equal meaning has an equal digest, and an edit touches nothing but its rule."""

from __future__ import annotations

import json
import random
import re
import textwrap
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from engrain import markdown
from engrain.context import Context, Rule, Section
from engrain.context_files import read_context, read_section
from engrain.errors import InputError, WorkflowError
from engrain.sections import examples_section, phase_section, tool_section
from engrain.tool import from_function
from engrain.trajectory import Message, ToolCall, Trajectory, write_trajectories

ACME = Section("tenant", "acme", ("refunds over  40 need\n finance", "returns within 30 days"))
PAY = Section("tool", "pay", ("pay(order: string): refund an order",))


def test_order_and_white_space_do_not_change_the_digest_and_meaning_does():
    turned = Section("tenant", "acme", ("returns within 30 days", "refunds over 40 need finance"))
    assert Context((ACME, PAY)).digest() == Context((PAY, turned)).digest()
    assert Context((ACME, PAY)).rules == Context((PAY, turned)).rules
    changed = Section("tenant", "acme", ("returns within 31 days", "refunds over 40 need finance"))
    assert Context((ACME,)).digest() != Context((changed,)).digest()


def test_a_rule_is_the_same_for_two_tenants_and_not_for_two_kinds():
    other = Section("tenant", "brown", ("returns within 30 days",))
    shared = set(Context((ACME,)).rules) & set(Context((other,)).rules)
    assert {rule.text for rule in shared} == {"returns within 30 days"}
    assert Rule("tenant", "x").digest != Rule("tool", "x").digest


def test_edits_leave_every_other_rule_alone():
    context = Context((ACME, PAY))
    rule = Rule("tenant", "returns within 30 days")
    assert set(context.without(rule).rules) == set(context.rules) - {rule}
    edited = context.replacing(rule, "returns within 60 days")
    assert set(edited.rules) == set(context.rules) - {rule} | {Rule("tenant", "returns within 60 days")}
    assert edited.replacing(Rule("tenant", "returns within 60 days"), rule.text).digest() == context.digest()


def test_an_unknown_rule_is_an_error():
    with pytest.raises(InputError, match="no tool rule 'returns"):
        Context((ACME, PAY)).without(Rule("tool", "returns within 30 days"))


# Markdown


def test_each_form_of_markdown_is_rules_with_what_they_stand_under():
    text = """
    - Be brief,
      and kind.
    * Gold customers:
      1. up to 500. Not more
      2. no PIN
    - Refunds need a reason.
      - Except for gold.

    # Refunds
    Over 300 ask
    finance.

    Limits are:

    1. 40 for basic
    2. 60 for silver

    ## Late parcels:
    >10 days: credit 10.

    <!-- - Not a
    rule. -->
    [VIP]: Credit 20.
    ---

    # Returns
    ```
    within  30 days
    ```
    """
    assert markdown.rules(text) == (
        "Be brief, and kind.",
        "Gold customers: up to 500. Not more",
        "Gold customers: no PIN",
        "Refunds need a reason.",
        "Refunds need a reason: Except for gold.",
        "Refunds: Over 300 ask finance.",
        "Refunds: Limits are: 40 for basic",
        "Refunds: Limits are: 60 for silver",
        "Refunds: Late parcels: >10 days: credit 10.",
        "Refunds: Late parcels: [VIP]: Credit 20.",
        "Returns: within 30 days",
    )


WORD = st.from_regex(r"[a-zA-Z0-9$%(\"'é_<>]{0,3}[a-zA-Z0-9%é_]{1,8}[,.:;)?!]?", fullmatch=True)
LINE = st.lists(WORD.filter(lambda word: not re.fullmatch(r"0*1[.)]", word)), min_size=1, max_size=12).map(" ".join)
TEXT = LINE.filter(lambda text: not re.match(r"[0-9]+[.)]( |$)", text))  # would be a number of a list
PROFILE = st.dictionaries(TEXT.filter(lambda text: text[-1] not in ".:;"), st.lists(TEXT, min_size=1), max_size=4)


def written(profile: dict[str, list[str]], rng: random.Random) -> str:
    """The profile in a random order, with random kinds of lists and random widths of lines."""
    parts: list[str] = []
    for heading in rng.sample(sorted(profile), len(profile)):
        rules = rng.sample(profile[heading], len(profile[heading]))
        numbered, blank = rng.random() < 0.5, rng.random() < 0.5
        parts.append(f"# {heading}")
        for number, rule in enumerate(rules, 1):
            mark = f"{number}. " if numbered else "- "
            width = rng.randint(8, 80)
            lines = textwrap.wrap(rule, width, break_long_words=False, break_on_hyphens=False)
            parts += [mark + f"\n{' ' * len(mark)}".join(lines)] + [""] * blank
    return "\n".join(parts)


@given(profile=PROFILE, seed=st.integers(0, 10**6))
def test_order_lists_and_line_width_do_not_change_the_digest(profile: dict[str, list[str]], seed: int):
    expected = {f"{heading}: {rule}" for heading, rules in profile.items() for rule in rules}
    section = Section("tenant", "acme", markdown.rules(written(profile, random.Random(seed))))
    assert set(section.rules) == expected
    assert Context((section,)).digest() == Context((Section("tenant", "acme", tuple(sorted(expected))),)).digest()
    assert set(markdown.rules(section.markdown())) == expected


@pytest.mark.parametrize("old, new", [("300", "301"), ("Do not", "Do"), ("# Refunds", "# Returns"), ("## Gold\n", "")])
def test_a_changed_number_negation_or_heading_changes_the_digest(old: str, new: str, tmp_path: Path):
    text = "# Refunds\n- Over 300 ask finance.\n- Do not refund food.\n\n## Gold\n- No limit.\n"
    path, digests = tmp_path / "acme.md", []
    for one in (text, text.replace(old, new), text.replace("- ", "*   ").replace("ask ", "ask\n    ")):
        path.write_text(one)
        digests.append(read_context(path).digest())
    assert digests[0] != digests[1] and digests[0] == digests[2]


# Files

MANY = """\
---
split: held_out
---
<!-- ours -->
# tenant acme
## Refunds
- over 300 ask finance
# tool pay
Never twice.
```json
{"type": "object", "description": "Refund an order.", "properties": {"order": {"type": "string"}}}
```
# phase act
1. take one step
# task
Refund A12.
# examples
- refund A12 -> pay(order: A12)
"""


def test_a_file_holds_one_section_or_many(tmp_path: Path):
    path = tmp_path / "profile.md"
    path.write_text("\ufeff---\nname: acme\nsplit: seen\n---\n- one\n  more\n- two\n", encoding="utf-8")
    assert read_section(path) == Section("tenant", "acme", ("one more", "two"), {"split": "seen"})
    assert read_context(path, "phase") == Context((Section("phase", "acme", ("acme: one more", "acme: two"), SEEN),))
    path.write_text(MANY)
    assert [(one.kind, one.name, one.rules) for one in read_context(path).sections] == [
        ("tenant", "acme", ("Refunds: over 300 ask finance",)),
        ("tool", "pay", ("pay: Refund an order", "pay.order (string)", "pay: Never twice.")),
        ("phase", "act", ("act: take one step",)),
        ("task", "", ("Refund A12.",)),
        ("examples", "", ("refund A12 -> pay(order: A12)",)),
    ]
    assert read_section(path) == Section("tenant", "acme", ("Refunds: over 300 ask finance",), {"split": "held_out"})
    head, *parts = MANY.split("\n# ")
    before = read_context(path).digest()
    path.write_text("\n# ".join([head, *reversed([part.rstrip() for part in parts])]))
    assert read_context(path).digest() == before


SEEN = {"split": "seen"}


def test_a_context_written_as_markdown_reads_back(tmp_path: Path):
    path = tmp_path / "context.md"
    path.write_text(MANY)
    context = read_context(path)
    path.write_text("\n".join(f"# {one.kind} {one.name}".rstrip() + f"\n{one.markdown()}" for one in context.sections))
    assert read_context(path).digest() == context.digest()


MALFORMED = {
    "empty": ("", "no rules found in the tenant section 'bad'; write"),
    "only a heading": ("# Refunds\n", "no rules found"),
    "an empty section": ("# tenant acme\n- one\n# task\n", "no rules found in the task section; write"),
    "open front matter": ("---\nname: acme\n- one\n", "close it"),
    "odd front matter": ("---\n- acme\n---\n- one\n", "'key: value' lines, got list"),
    "front matter no YAML": ("---\nname: [acme\n---\n- one\n", "not YAML"),
    "a stray title": ("---\nname: x\n---\n# tenant acme\n- one\n# Refunds\n- two\n", ":6: .*write '## Refunds'"),
    "a title without a name": ("# tenant acme\n- one\n# tool\n- two\n", ":3: expected '# tenant NAME'"),
    "text before": ("- one\n# tenant acme\n- two\n", ":1: text before the first section; move it"),
    "a section twice": ("# tenant acme\n- one\n# tenant acme\n- two\n", ":3: a second '# tenant acme'; put"),
    "JSON cut off": ('# tool pay\n\n```json\n{"type": \n```\n', ":3: not JSON .*; write the tool's"),
    "no object": ("# tool pay\n```json\n[1]\n```\n", ":2: expected a tool's schema as a JSON object, got list"),
    "no schema": (
        '# tool pay\n```\n{"order": "A12"}\n```\n',
        ":2: tool 'pay': expected a JSON Schema of type 'object'",
    ),
    "another name": ('# tool pay\n```\n{"name": "buy", "parameters": {"type": "object"}}\n```\n', ":2: .*give both"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_file_is_named_with_its_fix(case: str, tmp_path: Path):
    text, message = MALFORMED[case]
    path = tmp_path / "bad.md"
    path.write_text(text)
    with pytest.raises(WorkflowError, match=message) as caught:
        read_context(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_or_has_other_sections_is_named(tmp_path: Path):
    with pytest.raises(WorkflowError, match=r"gone\.md: cannot read the tenant profile"):
        read_context(tmp_path / "gone.md")
    (tmp_path / "binary.md").write_bytes(b"\xff\xfe")
    with pytest.raises(WorkflowError, match=r"binary\.md: cannot read"):
        read_section(tmp_path / "binary.md")
    (tmp_path / "two.md").write_text("# tenant a\n- one\n# tenant b\n- two\n")
    with pytest.raises(WorkflowError, match=r"two\.md: expected one tenant section, got 2"):
        read_section(tmp_path / "two.md")


# Schemas


class Line(BaseModel):
    sku: str = Field(pattern="^A[0-9]$", description="The item.")
    count: Annotated[int, Field(ge=1, le=9)] = 1


def place(lines: list[Line], mode: Literal["slow", "fast"] | None = None, note: str = "3", days: int | str = 3) -> None:
    """Place an order.

    Args:
        note: Words for
            the packer.
    """


def test_a_schema_does_not_depend_on_tools_that_were_read_before():
    def other(days: str | int = 3) -> None:
        """Another."""

    def same(days: int | str = 3) -> None:
        """The same."""

    kinds = [from_function(one).schema()["function"]["parameters"] for one in (other, same, other)]
    orders = [[branch["type"] for branch in kind["properties"]["days"]["anyOf"]] for kind in kinds]
    assert orders == [["string", "integer"], ["integer", "string"], ["string", "integer"]]


def test_a_schema_is_a_rule_for_the_tool_and_one_for_each_parameter():
    assert tool_section(from_function(place).schema()).rules == (
        "place: Place an order",
        "place.lines (array of object, required)",
        "place.lines[] (object)",
        'place.lines[].sku (string, required): The item; pattern "^A[0-9]$"',
        "place.lines[].count (integer): default 1; maximum 9; minimum 1",
        "place.mode (string): one of fast, slow",
        'place.note (string): Words for the packer; default "3"',
        "place.days (integer or string): default 3",
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
SCHEMA = st.recursive(
    st.fixed_dictionaries(
        {"type": st.sampled_from(["string", "integer", "boolean"])},
        optional={
            "description": st.text(st.characters(codec="ascii"), max_size=20),
            "default": JSON,
            "enum": st.lists(JSON, min_size=1, max_size=3),
            "minimum": st.integers(),
            "format": st.sampled_from(["date", "email"]),
        },
    ),
    lambda inner: (
        st.fixed_dictionaries({"type": st.just("array"), "items": inner})
        | st.fixed_dictionaries(
            {"type": st.just("object"), "properties": st.dictionaries(st.sampled_from("abcd"), inner, min_size=1)}
        )
    ),
    max_leaves=6,
)


def tool_of(properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": "pay", "description": "Pay.", "parameters": parameters}}


def turned(value: Any) -> Any:
    """The same with the keys of every object in the opposite order."""
    if isinstance(value, dict):
        return {key: turned(value[key]) for key in reversed(value)}
    return [turned(one) for one in value] if isinstance(value, list) else value


@given(properties=st.dictionaries(st.sampled_from("abcd"), SCHEMA, min_size=1))
def test_the_order_of_keys_does_not_change_a_tool_and_a_removed_keyword_does(properties: dict[str, Any]):
    digest = Context((tool_section(tool_of(properties)),)).digest()
    assert Context((tool_section(turned(tool_of(properties))),)).digest() == digest
    for name, schema in properties.items():
        for key in schema.keys() & {"default", "enum", "minimum", "format"}:
            less = {**properties, name: {other: schema[other] for other in schema if other != key}}
            assert Context((tool_section(tool_of(less)),)).digest() != digest


def test_values_that_only_look_alike_differ_and_nothing_of_a_schema_is_lost():
    alike = [3, "3", True, "true", None, "null", [3], "[3]", "a, b", 3.5]
    rules = {tool_section(tool_of({"x": {"default": value}})).rules for value in alike}
    assert len(rules) == len(alike)
    odd = {"allOf": [{"minimum": 3}], "x-unit": "euro", "additionalProperties": {"type": "string"}}
    [_, rule] = tool_section(
        tool_of({"x": {"oneOf": [{"type": "string", "maxLength": 3}, {"type": "null"}], **odd}})
    ).rules
    assert all(word in rule for word in ('"minimum": 3', "x-unit euro", '"maxLength": 3', "additionalProperties {"))


def test_schemas_of_other_makers_and_files_of_them(tmp_path: Path):
    parameters = {"type": "object", "properties": {"order": {"type": "string"}}}
    ours = tool_section(tool_of(parameters["properties"]))
    for key in ("parameters", "inputSchema", "input_schema"):
        assert tool_section({"name": "pay", "description": "Pay.", key: parameters}) == ours
    assert tool_section({"name": "stop"}).rules == ("stop",)
    path = tmp_path / "tools.json"
    path.write_text(json.dumps([tool_of(parameters["properties"]), {"name": "stop"}]))
    assert read_context(path) == Context((ours, tool_section({"name": "stop"})))
    for bad, message in {"{": "not JSON", "3": "got int", "{}": "expected a tool schema with name"}.items():
        path.write_text(bad)
        with pytest.raises(WorkflowError, match=rf"tools\.json: .*{message}"):
            read_context(path)


# Phases and demonstrations


def test_a_phase_is_its_instructions_and_its_tools():
    section = phase_section("act", "Take a step.\n\n    - Then\n      answer.", ("pay", "find"))
    assert section == Section("phase", "act", ("act: Take a step.", "act: Then answer.", "act: call only find, pay"))
    assert phase_section("act", "", ()).rules == ()


def run(*turns: Message) -> Trajectory:
    request = Message(role="user", content="refund\n A12")
    return Trajectory(id="a", messages=[Message(role="system", content="hello"), request, *turns])


def call(name: str, arguments: str) -> Message:
    return Message(role="assistant", reasoning="because", tool_calls=[ToolCall(id="c", name=name, arguments=arguments)])


def test_a_demonstration_is_its_request_and_its_actions(tmp_path: Path):
    turns = (
        call("find", '{"order": "A12"}'),
        Message(role="tool", content="5 euros"),
        call("pay", '{"b": [1], "a": "x y"}'),
        call("pay", "broken"),
        Message(role="assistant", content="done\nnow"),
    )
    whole = 'refund A12 -> find(order: A12) -> pay(a: "x y", b: [1]) -> pay(broken) -> done now'
    assert examples_section([run(*turns)]).rules == (whole,)
    assert examples_section([run(*turns)], steps=1).rules == ("refund A12 -> find(order: A12)",)
    write_trajectories(tmp_path / "runs.jsonl", [run(*turns)])
    assert read_context(tmp_path / "runs.jsonl").rules == (Rule("examples", whole),)
    for runs, message in (([run()], "has no action"), ([], "no runs found")):
        write_trajectories(tmp_path / "runs.jsonl", runs)
        with pytest.raises(InputError, match=rf"runs\.jsonl: .*{message}"):
            read_context(tmp_path / "runs.jsonl")
    with pytest.raises(InputError, match="'a' has no action and shows nothing; leave it out"):
        examples_section([run()])
    with pytest.raises(InputError, match="has no request"):
        examples_section([Trajectory(id="a", messages=[])])
