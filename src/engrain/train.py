"""The one training loop: full fine-tuning and pretraining (`source=None`), or any `AdapterSource`.

Invariant: what a step trains on is a pure function of (rows, seed, step), and a checkpoint holds everything else, so a
run that is killed and resumed ends with the same bits as one that was not (on the same machine, threads and versions).

Not covered: several processes; `accelerate` places the model on one device and supplies mixed precision.
"""

from __future__ import annotations

import hashlib
import signal
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from engrain.batch import pack
from engrain.checkpoint import latest_checkpoint, save_checkpoint
from engrain.errors import InputError
from engrain.learned import LearnedSource
from engrain.learner import Learner, Position, Probe, TrainConfig
from engrain.metrics import Metrics
from engrain.model import Base
from engrain.objective import Objective, row_loss

if TYPE_CHECKING:
    from engrain.renderer import Row


@dataclass(frozen=True)
class TrainResult:
    steps: int
    tokens: int
    loss: float
    """Nats a token, smoothed over the last steps."""
    seconds: float


def train(
    base: Base,
    source: nn.Module | None,
    rows: Sequence[Row],
    config: TrainConfig,
    out: Path,
    *,
    objective: Objective = row_loss,
    probe: Probe | None = None,
    enough: Callable[[Mapping[str, Any]], bool] = lambda found: False,
) -> TrainResult:
    """Train the base's own weights (`source=None`) or the parameters of an `AdapterSource`, in place.

    It ends after its tokens, or once what the probe found is `enough`. Writes `metrics.jsonl` and `checkpoints/` under
    `out`, and resumes from what is there. Ctrl-C saves a checkpoint and raises `KeyboardInterrupt`. The caller saves
    the result (`save_base`, `save_peft`).
    """
    if not any(any(row.mask[1:]) for row in rows):
        raise InputError(f"none of {len(rows)} rows has a trained token; check the data and the loss mask")
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng())
        torch.manual_seed(config.seed)
        learner = Learner(base, source, config, objective)
        digest, folder = _digest(base, source, rows, config, learner.trained), out / "checkpoints"
        found = latest_checkpoint(folder, digest)
        at = learner.restore(found) if found else Position()
        saved = at.step if found else -1
        metrics = stack.enter_context(Metrics(out / "metrics.jsonl", at.step, config.tokens))
        stopping = stack.enter_context(_interrupts())
        stack.enter_context(learner.training())
        save_due = _Timer(config.checkpoint_every_s, config.checkpoint_every_steps)
        probe_due = _Timer(config.probe_every_s, config.probe_every_steps)
        began, earlier, first = time.monotonic(), at.seconds, at.tokens
        stream = _batches(rows, config, at)
        while at.tokens < config.tokens and not stopping.is_set():
            started = time.monotonic()
            batches = [next(stream) for _ in range(config.accumulate)]
            seen = sum(len(rows[index].ids) for _, _, batch in batches for index in batch)
            lr = config.lr_at(at.tokens + seen)
            stepped = learner.step([rows[index] for _, _, batch in batches for index in batch], lr, stopping)
            if stepped is None:  # nothing was changed
                break
            loss, norm = stepped
            epoch, number, _ = batches[-1]
            now = time.monotonic()
            smooth = loss if at.step == 0 else 0.95 * at.loss + 0.05 * loss
            at = Position(at.step + 1, at.tokens + seen, epoch, number, smooth, earlier + now - began)
            line = {"step": at.step, "tokens": at.tokens, "loss": loss, "lr": lr, "grad_norm": norm}
            metrics.write(line | {"tokens_per_s": round(seen / (now - started), 1), "seconds": round(at.seconds, 3)})
            metrics.show(at.tokens, at.loss, (at.tokens - first) / (now - began))
            if probe is not None and probe_due(at.step) and (values := learner.look(probe, at.step)):
                metrics.write({"step": at.step, "tokens": at.tokens, **values})
                if enough(values):
                    break
            if save_due(at.step):
                save_checkpoint(folder, learner.checkpoint(at, digest))
                saved = at.step
        if at.step != saved:
            save_checkpoint(folder, learner.checkpoint(at, digest))
        if stopping.is_set():
            raise KeyboardInterrupt
    return TrainResult(at.step, at.tokens, at.loss, at.seconds)


class _Timer:
    """True when so many seconds or steps have passed since it last was."""

    def __init__(self, seconds: float | None, steps: int | None) -> None:
        self._seconds, self._steps, self._last = seconds, steps, time.monotonic()

    def __call__(self, step: int) -> bool:
        late = self._seconds is not None and time.monotonic() - self._last >= self._seconds
        due = late or (self._steps is not None and step % self._steps == 0)
        if due:
            self._last = time.monotonic()
        return due


def _batches(rows: Sequence[Row], config: TrainConfig, at: Position) -> Iterator[tuple[int, int, list[int]]]:
    """Endless (epoch, next bin, row indices), from a position on."""
    epoch, start = at.epoch, at.bin
    while True:
        bins = pack(rows, config.batch_tokens, config.seed * 1_000_003 + epoch)
        for number in range(start, len(bins)):
            yield epoch, number + 1, bins[number]
        epoch, start = epoch + 1, 0


def _digest(
    base: Base, source: nn.Module | None, rows: Sequence[Row], config: TrainConfig, trained: Mapping[str, Tensor]
) -> str:
    """Of all that decides the weights: base, source, rows and settings."""
    free = ("checkpoint_every_s", "checkpoint_every_steps", "probe_every_s", "probe_every_steps", "threads", "compiled")
    settings = {name: value for name, value in asdict(config).items() if name not in free}
    shapes = {name: tuple(parameter.shape) for name, parameter in trained.items()}
    known = {} if source is None else vars(source)
    numbers = {name: value for name, value in known.items() if type(value) in (int, float)}
    if isinstance(source, LearnedSource):
        numbers |= {**asdict(source.settings), "encoder": source.encoder.digest}
    total = hashlib.sha256(repr((base.digest, type(source).__name__, numbers, shapes, settings)).encode())
    for row in rows:
        context = row.context.digest() if row.context is not None else ""
        taught = b"" if row.choices is None else row.choices.tokens.tobytes() + row.choices.logprobs.tobytes()
        other = b"" if row.rival is None else f"{row.rival.context.digest()} {row.rival.at}".encode()
        total.update(array("l", row.ids).tobytes() + bytes(row.mask) + context.encode() + taught + other + b"|")
    return total.hexdigest()


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets, so that a step is never cut in two; a second Ctrl-C raises at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(*_: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
