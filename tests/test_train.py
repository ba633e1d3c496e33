from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import random_rows, tiny
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from engrain import checkpoint
from engrain.adapter import Adapter, ConstantAdapter, Factors, delta_weight
from engrain.batch import collate
from engrain.context import Context, Section
from engrain.errors import EngrainError, InputError, ModelError
from engrain.gradients import Gradients, Sum, accumulate, passes, share_rows
from engrain.learner import attention_length
from engrain.model import PACKED, Base, adapted, attention, load_base, sites
from engrain.objective import row_loss
from engrain.renderer import Row
from engrain.train import TrainConfig, train

CONFIG = TrainConfig(tokens=6000, batch_tokens=200, lr=1e-2, precision="fp32", threads=1)


@pytest.fixture(autouse=True)
def _threads_are_given_back() -> object:
    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before


def base(architecture: str = "llama", **changes: Any) -> Base:
    return Base(tiny(architecture, **changes), PreTrainedTokenizerBase())


def lines(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def loss_of(model: PreTrainedModel, rows: Sequence[Row]) -> float:
    with attention(model, PACKED), torch.no_grad():
        loss, count = row_loss(model, None, collate(rows))
    return loss.item() / count


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_full_training_learns(tmp_path: Path, precision: str) -> None:
    ours, rows = base(), random_rows(60)
    before = loss_of(ours.model, rows)
    result = train(ours, None, rows, replace(CONFIG, precision=precision), tmp_path)
    assert before > 4 and loss_of(ours.model, rows) < 1.5
    assert result.tokens >= 6000 and result.steps == len(lines(tmp_path))
    assert all(parameter.dtype == torch.float32 for parameter in ours.model.parameters())


def test_an_adapter_learns_and_the_base_stays(tmp_path: Path) -> None:
    ours, rows = base("qwen3"), random_rows(60)
    frozen, before = weights(ours.model).clone(), loss_of(ours.model, rows)
    source = ConstantAdapter(sites(ours.model), 8)
    train(ours, source, rows, replace(CONFIG, lr=2e-2), tmp_path)
    assert torch.equal(weights(ours.model), frozen)
    with adapted(ours.model, source(()).detach()):
        assert loss_of(ours.model, rows) < 0.6 * before
    assert all(delta_weight(source(()), site).any() for site in source.sites)


class Stacked(torch.nn.Module):
    """The simplest source that reads its contexts: a LoRA of its own for each name."""

    def __init__(self, known: Mapping[str, tuple[int, int]], names: int) -> None:
        super().__init__()
        self.own = torch.nn.ModuleList(ConstantAdapter(known, 4) for _ in range(names))

    def forward(self, contexts: Sequence[Context]) -> Adapter:
        made = [self.own[int(one.sections[0].name)](()) for one in contexts]
        factors = {
            site: Factors(torch.stack([one.factors[site].a for one in made]),
                          torch.stack([one.factors[site].b for one in made]))
            for site in made[0].factors
        }  # fmt: skip
        return Adapter(factors, made[0].alpha, made[0].rank)


def test_a_source_that_reads_its_contexts_learns_what_a_constant_cannot(tmp_path: Path) -> None:
    """The same prompt is answered with another token for each context."""
    contexts = [Context((Section("tenant", str(number), ("-",)),)) for number in range(4)]
    rows = [Row([5, 9, 20 + number], [False, False, True], contexts[number]) for number in range(4)] * 10
    ends = []
    for source_of in (lambda known: ConstantAdapter(known, 4), lambda known: Stacked(known, 4)):
        ours = base()
        torch.manual_seed(0)
        source = source_of(sites(ours.model))
        result = train(
            ours,
            source,
            rows,
            replace(CONFIG, lr=1e-2, tokens=9000, batch_tokens=60, threads=1),
            tmp_path / str(len(ends)),
        )
        ends.append(result.loss)
    assert ends[0] > 1.3 and ends[1] < 0.5  # four answers, equally often: ln 4


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    results = []
    for flag in (False, True):
        ours, source = base(), None
        with torch.random.fork_rng():
            torch.manual_seed(0)
            source = ConstantAdapter(sites(ours.model), 4)
        config = replace(CONFIG, tokens=1500, gradient_checkpointing=flag)
        train(ours, source, random_rows(40), config, tmp_path / str(flag))
        results.append(weights(source))
        assert not any(getattr(module, "gradient_checkpointing", False) for module in ours.model.modules())
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at it itself
def test_compiled_layers_train_the_same_and_are_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a backend that needs no C++ compiler; what probes see is not compiled."""
    compile_ = torch.nn.Module.compile
    made, looks = [], []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **how: (made.append(self), compile_(self, backend="aot_eager", **how))
    )
    ends = []
    for compiled in (False, True):
        ours = base()
        config = replace(CONFIG, tokens=1500, compiled=compiled, threads=1, probe_every_steps=1)
        probe = lambda step, model: looks.append(torch.compiler.is_compiling()) or {}  # noqa: E731
        train(ours, None, random_rows(40), config, tmp_path / str(compiled), probe=probe)
        ends.append(weights(ours.model))
        assert all(module._compiled_call_impl is None for module in ours.model.modules())
    torch.testing.assert_close(ends[0], ends[1], atol=1e-4, rtol=1e-3)
    assert len(made) == 2 and looks and not any(looks)
    with pytest.raises(InputError, match="compiled"):
        train(base(), ConstantAdapter(sites(base().model), 2), random_rows(9), replace(CONFIG, compiled=True), tmp_path)


def test_batches_and_accumulation_and_threads_give_the_same_steps(tmp_path: Path) -> None:
    """One batch of 400 tokens, two of 200, or shares of two threads: the same gradients up to rounding."""
    rows = [Row([(s + 5 * i) % 64 for i in range(20)], [False] * 10 + [True] * 10) for s in range(40)]
    ends = []
    for name, change in (
        ("whole", {"batch_tokens": 800}),
        ("halves", {"batch_tokens": 400, "accumulate": 2}),
        ("threads", {"batch_tokens": 800, "threads": 3}),
    ):
        ours = base()
        train(ours, None, rows, replace(CONFIG, tokens=4000, lr=1e-3, **change), tmp_path / name)
        ends.append((weights(ours.model), [line["grad_norm"] for line in lines(tmp_path / name)]))
    for end, norms in ends[1:]:
        torch.testing.assert_close(end, ends[0][0], atol=1e-4, rtol=1e-3)
        assert norms == pytest.approx(ends[0][1], rel=1e-3)


def test_gradients_over_processes_are_the_gradients() -> None:
    model, rows = tiny("mistral"), random_rows(9)
    into = list(model.parameters())
    with attention(model, PACKED):
        row_loss(model, None, collate(rows))[0].backward()
        work = partial(accumulate, lambda batch: nullcontext(row_loss(model, None, batch)), into=into, pass_tokens=60)
        with Gradients(lambda rows, stopping: work(rows, stopping=stopping), into, 2, 2) as gradients:
            found = gradients(rows, threading.Event())
    assert found is not None and found.terms == int(collate(rows).mask.sum())
    for parameter, gradient in zip(into, found.gradients, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-3, rtol=1e-4)


def test_a_training_process_that_fails_or_dies_is_an_error() -> None:
    here, rows = os.getpid(), random_rows(4)

    def failing(rows: Sequence[Row], stopping: threading.Event) -> Sum | None:
        if os.getpid() == here:
            return Sum(0.0, 0, [])
        raise InputError("told so")

    def dying(rows: Sequence[Row], stopping: threading.Event) -> Sum | None:
        return Sum(0.0, 0, []) if os.getpid() == here else os.kill(os.getpid(), signal.SIGKILL)

    with Gradients(failing, [], 2, 2) as gradients:
        for _ in range(2):  # it goes on after an error
            with pytest.raises(InputError, match="told so"):
                gradients(rows, threading.Event())
    with Gradients(dying, [], 2, 2) as gradients:
        for _ in range(2):
            with pytest.raises(EngrainError, match="a training process ended"):
                gradients(rows, threading.Event())


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 4))
def test_shares_and_passes_lose_nothing(lengths: list[int], threads: int) -> None:
    rows = [Row([number] * length, [True] * length) for number, length in enumerate(lengths)]
    shares = share_rows(rows, threads)
    assert sorted(row.ids[0] for share in shares for row in share) == list(range(len(rows)))
    loads = [sum(len(row.ids) for row in share) for share in shares]
    assert len(shares) < threads or max(loads) - min(loads) <= max(lengths)
    runs = list(passes(rows, 40))
    assert [row for run in runs for row in run] == rows
    assert all(sum(len(row.ids) for row in run) <= 40 for run in runs)


def test_long_rows_are_shared_by_what_attention_costs(tiny_base: Path) -> None:
    rows = [Row([0] * length, [True] * length) for length in (300, *[100] * 6)]
    assert [len(share) for share in share_rows(rows, 2)] == [3, 4]
    assert [len(share) for share in share_rows(rows, 2, twice=100)] == [1, 6]
    inner = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128  # multiplications of a layer for a token
    assert attention_length(load_base(tiny_base).model) == inner / 64


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked")
@pytest.mark.parametrize("lengths", [(40, 3), (20, 21)])
def test_uneven_rows_are_not_shared_and_the_sum_is_the_same(lengths: tuple[int, int]) -> None:
    rows = [Row([number] * length, [True] * length) for number, length in enumerate(lengths)]
    into = torch.zeros(3)
    seen: list[tuple[int, int]] = []

    def work(share: Sequence[Row], _: threading.Event) -> Sum:
        seen.append((len(share), torch.get_num_threads()))
        tokens = sum(len(row.ids) for row in share)
        return Sum(float(tokens), tokens, [into + tokens])

    with Gradients(work, [into], workers=2, threads=2) as gradients:
        found = gradients(rows, threading.Event())
    assert found is not None and found.terms == sum(lengths) and found.gradients[0].tolist() == [sum(lengths)] * 3
    assert seen == ([(2, 2)] if max(lengths) == 40 else [(1, 1)])


def test_the_learning_rate_rises_and_falls_to_a_tenth() -> None:
    config = TrainConfig(tokens=1000, lr=2.0, warmup=0.1)
    assert config.lr_at(50) == pytest.approx(1.0)
    assert config.lr_at(100) == pytest.approx(2.0)
    assert config.lr_at(550) == pytest.approx(1.1)
    assert config.lr_at(1000) == config.lr_at(1300) == pytest.approx(0.2)


def test_only_matrices_that_are_not_embeddings_decay(tmp_path: Path) -> None:
    """With gradients clipped to nothing, decay is all that moves weights."""
    ours = base()
    before = {name: parameter.detach().clone() for name, parameter in ours.model.named_parameters()}
    config = replace(CONFIG, tokens=200, weight_decay=0.5, clip=1e-30)
    train(ours, None, random_rows(20), config, tmp_path)
    shrunk = {name for name, p in ours.model.named_parameters() if p.norm() < 0.999 * before[name].norm()}
    assert shrunk == {name for name in before if "proj" in name}


def test_embeddings_can_be_trained_more_slowly(tmp_path: Path) -> None:
    """A first step of AdamW moves every weight that has a gradient by the learning rate."""
    moved: dict[float, dict[str, float]] = {}
    for share in (1.0, 0.1):
        ours = base()
        before = {name: parameter.detach().clone() for name, parameter in ours.model.named_parameters()}
        config = replace(CONFIG, tokens=20, weight_decay=0.0, embedding_lr=share)
        train(ours, None, random_rows(20), config, tmp_path / str(share))
        named = ours.model.named_parameters()
        moved[share] = {name: float((p.detach() - before[name]).abs().max()) for name, p in named}
    for name, most in moved[1.0].items():
        assert moved[0.1][name] == pytest.approx(most * (0.1 if "embed" in name else 1.0), rel=0.02)


def test_tied_embeddings_of_tokens_that_do_not_occur_stay(tmp_path: Path) -> None:
    """As outputs they have gradients too, which AdamW would make steps of the learning rate."""
    ours = base()
    embeddings = cast(torch.Tensor, ours.model.get_input_embeddings().weight)
    before = embeddings.detach().clone()
    rows = [Row([3, 5, 3, 5, 3, 5], [False, *[True] * 5]), Row([7, 3, 7, 3], [False, True, True, True])]
    train(ours, None, rows, replace(CONFIG, tokens=200), tmp_path)
    moved = embeddings.ne(before).any(1).nonzero().flatten().tolist()
    assert ours.model.config.tie_word_embeddings and moved == [3, 5, 7]


def test_the_caller_gets_the_model_back_as_it_was(tmp_path: Path) -> None:
    ours = base()
    torch.manual_seed(5)
    expected = torch.get_rng_state()
    attention_before = ours.model.config._attn_implementation
    train(ours, None, random_rows(10), replace(CONFIG, tokens=200), tmp_path)
    assert not ours.model.training
    assert ours.model.config._attn_implementation == attention_before
    assert all(parameter.grad is None for parameter in ours.model.parameters())
    assert torch.equal(torch.get_rng_state(), expected)


# Resuming

SCRIPT = """
import sys
from dataclasses import replace
from pathlib import Path
from models import random_rows
from safetensors.torch import save_file
from test_train import RESUMED, base, weights
from engrain.train import train
out, ours = Path(sys.argv[1]), base()
train(ours, None, random_rows(50), RESUMED, out)
save_file({"end": weights(ours.model)}, out / "end")
"""
RESUMED = replace(CONFIG, tokens=9000, precision="bf16", accumulate=2, checkpoint_every_steps=3, threads=2)


def start(out: Path) -> subprocess.Popen[bytes]:
    here = Path(__file__).parent
    path = os.pathsep.join([str(here.parent / "src"), str(here)])
    command = [sys.executable, "-c", SCRIPT, str(out)]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> None:
    _, error = process.communicate(timeout=200)
    assert process.returncode == 0, error.decode()


def wait_for_steps(process: subprocess.Popen[bytes], out: Path, steps: int) -> None:
    metrics = out / "metrics.jsonl"
    while process.poll() is None and (not metrics.exists() or metrics.read_text().count("\n") < steps):
        time.sleep(0.002)


def same_steps(one: Path, two: Path) -> bool:
    keys = ("step", "tokens", "loss", "lr", "grad_norm")
    logged = [[tuple(line[key] for key in keys) for line in lines(out)] for out in (one, two)]
    return logged[0] == logged[1] and [step for step, *_ in logged[0]] == list(range(1, len(logged[0]) + 1))


def test_killed_and_resumed_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for steps in (5, 13):  # two kills, at whatever step the process has reached by then
        process = start(cut)
        wait_for_steps(process, cut, steps)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    assert not (cut / "end").exists() and any((cut / "checkpoints").iterdir())
    finish(start(cut))
    ours = base()
    train(ours, None, random_rows(50), RESUMED, whole)
    assert torch.equal(load_file(cut / "end")["end"], weights(ours.model))
    assert same_steps(whole, cut)


@pytest.mark.parametrize("kind", ["lora", "dropout"])
def test_a_crash_between_checkpoints_leaves_no_trace(tmp_path: Path, kind: str) -> None:
    def run(out: Path, crash_at: int | None = None) -> torch.Tensor:
        def probe(step: int, model: PreTrainedModel) -> dict[str, float]:
            if step == crash_at:
                raise MemoryError
            return {}

        ours = base(attention_dropout=0.1 if kind == "dropout" else 0.0)
        source = ConstantAdapter(sites(ours.model), 4) if kind == "lora" else None
        config = replace(RESUMED, tokens=6000, threads=1 if kind == "dropout" else 2, probe_every_steps=1)
        train(ours, source, random_rows(50), config, out, probe=probe)
        return weights(source or ours.model)

    torch.manual_seed(1)
    whole = run(tmp_path / "whole")
    torch.manual_seed(1)
    with pytest.raises(MemoryError):
        run(tmp_path / "cut", crash_at=11)
    assert torch.equal(run(tmp_path / "cut"), whole)  # what the source starts from no longer matters
    assert same_steps(tmp_path / "whole", tmp_path / "cut")


def test_a_finished_run_is_not_repeated(tmp_path: Path) -> None:
    ours, rows = base(), random_rows(20)
    first = train(ours, None, rows, CONFIG, tmp_path)
    again = base()
    second = train(again, None, rows, CONFIG, tmp_path)
    assert torch.equal(weights(ours.model), weights(again.model))
    assert (first.steps, first.tokens, first.loss) == (second.steps, second.tokens, second.loss)


@pytest.mark.parametrize("change", ["settings", "rows", "kind", "base"])
def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, change: str) -> None:
    rows = random_rows(20)
    config = replace(CONFIG, tokens=400)
    train(base(), None, rows, config, tmp_path)
    ours = base()
    source = ConstantAdapter(sites(ours.model), 2) if change == "kind" else None
    config = replace(config, lr=1.0) if change == "settings" else config
    rows = rows[1:] if change == "rows" else rows
    ours = replace(ours, digest="other") if change == "base" else ours
    with pytest.raises(ModelError, match="choose another output"):
        train(ours, source, rows, config, tmp_path)


def test_how_often_to_save_may_change_between_runs(tmp_path: Path) -> None:
    rows = random_rows(20)
    train(base(), None, rows, replace(CONFIG, tokens=400), tmp_path)
    train(base(), None, rows, replace(CONFIG, tokens=400, checkpoint_every_s=1.0, threads=2), tmp_path)


def test_ctrl_c_saves_and_the_rest_follows(tmp_path: Path) -> None:
    rows, whole = random_rows(30), base()
    train(whole, None, rows, CONFIG, tmp_path / "whole")

    def interrupt(step: int, model: PreTrainedModel) -> dict[str, float]:
        if step == 4:
            signal.raise_signal(signal.SIGINT)
        return {}

    cut, handler = base(), signal.getsignal(signal.SIGINT)
    config = replace(CONFIG, probe_every_steps=1)
    with pytest.raises(KeyboardInterrupt):
        train(cut, None, rows, config, tmp_path / "cut", probe=interrupt)
    assert signal.getsignal(signal.SIGINT) is handler
    assert [entry.name for entry in (tmp_path / "cut" / "checkpoints").iterdir()] == ["step-000000004"]
    resumed = base()
    train(resumed, None, rows, config, tmp_path / "cut")
    assert torch.equal(weights(resumed.model), weights(whole.model))


def test_a_full_disk_stops_the_run_and_keeps_the_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, rows = checkpoint.save_file, random_rows(20)

    def full_after_the_first(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if "step-000000002" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path)

    config = replace(CONFIG, checkpoint_every_steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full_after_the_first)
        with pytest.raises(InputError, match="No space left on device"):
            train(base(), None, rows, config, tmp_path)
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == ["step-000000001"]
    train(base(), None, rows, config, tmp_path)
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, len(lines(tmp_path)) + 1))


# What a run says, and what it refuses


def test_training_ends_early_when_a_probe_found_enough(tmp_path: Path) -> None:
    config = replace(CONFIG, tokens=6000, threads=1, probe_every_steps=2)
    ours, rows = Base(tiny("llama"), PreTrainedTokenizerBase(), "tiny"), random_rows(40)
    found: list[int] = []

    def probe(step: int, model: PreTrainedModel) -> dict[str, float]:
        found.append(step)
        return {"right": step / 4}

    result = train(ours, None, rows, config, tmp_path, probe=probe, enough=lambda values: values["right"] >= 1)
    assert found == [2, 4] and result.steps == 4 and result.tokens < 6000
    assert [line for line in (tmp_path / "checkpoints").iterdir() if "4" in line.name]


def test_a_probe_is_logged_and_changes_nothing(tmp_path: Path) -> None:
    seen: list[tuple[bool, str | None]] = []

    def probe(step: int, model: PreTrainedModel) -> dict[str, float]:
        seen.append((model.training, model.config._attn_implementation))
        return {"noise": torch.rand(()).item()}

    plain, probed, rows = base(attention_dropout=0.2), base(attention_dropout=0.2), random_rows(20)
    config = replace(CONFIG, tokens=1200, probe_every_steps=2)
    train(plain, None, rows, config, tmp_path / "plain")
    train(probed, None, rows, config, tmp_path / "probed", probe=probe)
    assert torch.equal(weights(plain.model), weights(probed.model))
    assert set(seen) == {(False, "sdpa")}
    logged = [line["step"] for line in lines(tmp_path / "probed") if "noise" in line]
    assert logged == list(range(2, 2 * len(seen) + 1, 2)) and seen


def test_metrics_say_what_was_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(base(), None, random_rows(20), replace(CONFIG, tokens=600), tmp_path)
    for line in lines(tmp_path):
        assert set(line) == {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_s", "seconds"}
    assert capsys.readouterr().out == ""


def test_rows_without_targets_are_refused(tmp_path: Path) -> None:
    for rows in ([], [Row([1, 2], [True, False])]):
        with pytest.raises(InputError, match="trained token"):
            train(base(), None, rows, CONFIG, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path: Path) -> None:
    ours = base()
    with torch.no_grad():
        next(ours.model.parameters()).fill_(float("nan"))
    with pytest.raises(InputError, match="lower lr"):
        train(ours, None, random_rows(20), CONFIG, tmp_path)
    assert not list((tmp_path / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("change", [{"tokens": 0}, {"lr": 0.0}, {"batch_tokens": -1}, {"precision": "fp8"}])
def test_settings_out_of_range_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        replace(CONFIG, **change)
