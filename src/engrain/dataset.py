"""Data sets of trajectories: import from any known format, deduplicate, split, write.

A record that cannot be read is never repaired in silence: it raises `DataError` with file, line and field, or goes to
`on_bad`, which counts it. Splits are by context, never by row: no context has trajectories on both sides.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from engrain.errors import DataError
from engrain.files import replacing
from engrain.formats.node import Node, parse_json
from engrain.formats.openai import from_openai, to_openai
from engrain.formats.sgd import DialogueReader, read_services, schema_beside
from engrain.formats.sharegpt import from_sharegpt, to_sharegpt
from engrain.trajectory import Trajectory

FORMATS = ("engrain", "openai", "sharegpt", "sgd")


def import_file(
    path: Path,
    format: str | None = None,
    schemas: Path | None = None,
    *,
    results: int = 3,
    on_bad: Callable[[DataError], None] | None = None,
) -> Iterator[Trajectory]:
    """Trajectories of a `.jsonl` file, or of a JSON list, either of them gzipped or not.

    `format` is one of `FORMATS`, told from the first record if None. For SGD, `schemas` is the services' schema file
    (found beside the data if None) and `results` the rows that a tool result keeps. A bad record raises `DataError`,
    or goes to `on_bad` and is left out. A file that cannot be read at all always raises.
    """
    if format is not None and format not in FORMATS:
        raise DataError(f"unknown format {format!r}; choose one of {', '.join(FORMATS)}", file=str(path))
    read: Callable[[Node, str], Trajectory] | None = None
    empty = True
    for line, text in _records(path):
        empty, node = False, Node(None, str(path), line)
        try:
            node = Node(parse_json(node, _decoded(node, text)), str(path), line)
            format = format or _detect(node)
        except DataError as error:
            _report(error, on_bad)
            continue
        read = read or _reader(format, path, schemas, results)
        try:
            trajectory = _named(read(node, text), node, text, path)
        except DataError as error:
            _report(error, on_bad)
            continue
        yield trajectory
    if empty:
        raise DataError("no records in it; expected one JSON object a line", file=str(path))


def _report(error: DataError, on_bad: Callable[[DataError], None] | None) -> None:
    if on_bad is None:
        raise error
    on_bad(error)


def _reader(format: str, path: Path, schemas: Path | None, results: int) -> Callable[[Node, str], Trajectory]:
    if format == "sgd":
        if schemas is not None and schemas.is_dir():
            schemas = schemas / "schema.json"
        services = read_services(schemas or schema_beside(path))
        dialogue = DialogueReader(services, split=_stem(path), results=results)
        return lambda node, text: dialogue(node)
    if format == "engrain":
        return lambda node, text: Trajectory.from_json(text, file=node.file, line=node.line)
    return lambda node, text: (from_openai if format == "openai" else from_sharegpt)(node)


def _detect(node: Node) -> str:
    keys = node.mapping().keys()
    for key, format in (("schema", "engrain"), ("turns", "sgd"), ("conversations", "sharegpt"), ("messages", "openai")):
        if key in keys:
            return format
    raise node.error(
        "cannot tell the format: expected a field `schema` (ours), `turns` (SGD), `conversations` "
        f"(ShareGPT) or `messages` (OpenAI), got {', '.join(keys) or 'none'}; give the format"
    )


def _named(trajectory: Trajectory, node: Node, text: str, path: Path) -> Trajectory:
    """With an id, and known to be writable: JSON can escape half of a surrogate pair, which UTF-8 cannot hold."""
    try:
        if "\\u" in text:
            trajectory.to_json().encode()
    except UnicodeEncodeError as error:
        raise node.error("text holds an escaped half of a surrogate pair, which cannot be written as UTF-8") from error
    return trajectory if trajectory.id else trajectory.model_copy(update={"id": f"{_stem(path)}:{node.line}"})


def _stem(path: Path) -> str:
    return path.name.split(".")[0]


def _records(path: Path) -> Iterator[tuple[int, str]]:
    """Line number and JSON text of every record."""
    lines, first = _lines(path), True
    for number, line in lines:
        if first and line.lstrip().startswith("["):
            yield from _list_items(path, number, line + "".join(rest for _, rest in lines))
        elif line.strip():
            yield number, line
        first = first and not line.strip()


def _decoded(node: Node, text: str) -> str:
    """`text`, unless its bytes were not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise node.error("not UTF-8 text; convert the file") from error
    return text


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines by number. Bytes that are not UTF-8 come as surrogates, so that one bad line does not end the reading."""
    number = 0
    try:
        with path.open("rb") as plain:
            file = gzip.GzipFile(fileobj=plain) if plain.read(2) == b"\x1f\x8b" else plain
            plain.seek(0)
            for number, line in enumerate(file, 1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8", errors="surrogateescape")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"damaged gzip file ({error}); fetch it again", file=str(path), line=number) from error
    except OSError as error:
        raise DataError(f"cannot read it: {error.strerror or error}", file=str(path)) from error


def _list_items(path: Path, line: int, text: str) -> Iterator[tuple[int, str]]:
    """The items of one JSON list, each with the line on which it starts."""
    decoder, position = json.JSONDecoder(), text.index("[") + 1
    counted = 0
    while True:
        position += len(text[position:]) - len(text[position:].lstrip(" \t\r\n,"))
        line, counted = line + text.count("\n", counted, position), position
        if text[position : position + 1] == "]":
            return
        try:
            _, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise DataError(f"not a JSON list of records: {error}", file=str(path), line=line) from error
        yield line, text[position:end]
        position = end


def export_file(path: Path, trajectories: Iterable[Trajectory], format: str = "engrain") -> int:
    """Write a JSONL file in our own, the OpenAI or the ShareGPT format, whole or not at all; returns how many."""
    writers: dict[str, Callable[[Trajectory], str]] = {
        "engrain": Trajectory.to_json,
        "openai": lambda trajectory: json.dumps(to_openai(trajectory), ensure_ascii=False),
        "sharegpt": lambda trajectory: json.dumps(to_sharegpt(trajectory), ensure_ascii=False),
    }
    if format not in writers:
        raise DataError(f"cannot write format {format!r}; choose one of {', '.join(writers)}", file=str(path))
    count = 0
    with replacing(path) as file:
        for trajectory in trajectories:
            file.write(writers[format](trajectory) + "\n")
            count += 1
    return count


def content_digest(trajectory: Trajectory) -> str:
    """Digest of what training sees: context, tools, texts, calls and mask, but no ids, times or tokens."""
    messages = [
        [
            message.role,
            message.content,
            message.reasoning,
            message.name,
            message.trained,
            [[call.name, call.arguments] for call in message.tool_calls],
        ]
        for message in trajectory.messages
    ]
    content = [trajectory.workflow, trajectory.tenant, trajectory.tools, messages]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def deduplicate(trajectories: Iterable[Trajectory]) -> Iterator[Trajectory]:
    """The first trajectory of each content."""
    seen: set[str] = set()
    for trajectory in trajectories:
        digest = content_digest(trajectory)
        if digest not in seen:
            seen.add(digest)
            yield trajectory


def context_key(trajectory: Trajectory) -> str:
    """What an adapter would be made for: the workflow's tenant, or the tools and instructions where there is none."""
    if trajectory.tenant:
        return f"{trajectory.workflow}/{trajectory.tenant}"
    system = [message.content for message in trajectory.messages if message.role == "system"]
    return hashlib.sha256(json.dumps([trajectory.workflow, trajectory.tools, system]).encode()).hexdigest()


def split_by_context(
    trajectories: Sequence[Trajectory],
    held_out: float,
    seed: int = 0,
    key: Callable[[Trajectory], str] = context_key,
) -> tuple[list[Trajectory], list[Trajectory]]:
    """Trajectories to train on and those of a fraction `held_out` of the contexts (at least one, never all)."""
    contexts = sorted({key(trajectory) for trajectory in trajectories})
    if len(contexts) < 2 or not 0 < held_out < 1:
        raise DataError(
            f"cannot hold out {held_out:g} of {len(contexts)} contexts; expected at least 2 contexts and a "
            f"fraction between 0 and 1"
        )
    count = min(max(1, round(held_out * len(contexts))), len(contexts) - 1)
    chosen = set(random.Random(seed).sample(contexts, count))
    return ([t for t in trajectories if key(t) not in chosen], [t for t in trajectories if key(t) in chosen])


def train_on_calls(trajectory: Trajectory) -> Trajectory:
    """The same trajectory with loss on the turns that call a tool and on no other."""
    messages = [
        message.model_copy(update={"trained": message.trained and bool(message.tool_calls)})
        if message.role == "assistant"
        else message
        for message in trajectory.messages
    ]
    return trajectory.model_copy(update={"messages": messages})


def until_last_call(trajectory: Trajectory) -> Trajectory:
    """The same trajectory up to its last call: what follows teaches no call. Unchanged if there is none."""
    last = max((i for i, message in enumerate(trajectory.messages) if message.tool_calls), default=None)
    if last is None:
        return trajectory
    return trajectory.model_copy(update={"messages": trajectory.messages[: last + 1]})
