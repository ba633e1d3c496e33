"""Every command on real files; every mistake is one line on stderr with its exit code, and nothing half-written."""

from __future__ import annotations

import errno
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from engrain.adapter import delta_weight, load_peft
from engrain.agent import load_agent
from engrain.cli import invoke
from engrain.context_files import read_context
from engrain.model import linear, load_base
from engrain.trajectory import read_trajectories

Capture = pytest.CaptureFixture[str]


def ok(capsys: Capture, *arguments: object) -> str:
    """stdout of a command that succeeds."""
    capsys.readouterr()
    code = invoke([str(argument) for argument in arguments])
    done = capsys.readouterr()
    assert code == 0, done.err
    return done.out


def refused(capsys: Capture, *arguments: object, code: int = 2) -> str:
    """The one line of a command that fails."""
    capsys.readouterr()
    assert invoke([str(argument) for argument in arguments]) == code
    done = capsys.readouterr()
    lines = [line for line in done.err.strip().split("\n") if line.startswith("error: ")]
    assert len(lines) == 1 and done.out == "" and "Traceback" not in done.err, done
    return lines[0]


# Commands


def test_a_new_workflow_records_and_every_run_reaches_its_goal(tmp_path: Path, capsys: Capture) -> None:
    ok(capsys, "new", tmp_path / "desk")
    made = json.loads(ok(capsys, "record", tmp_path / "desk", "-o", tmp_path / "runs.jsonl", "-n", 30, "--json"))
    assert made["kept"] == 30 and made["refused"] == {}
    runs = list(read_trajectories(tmp_path / "runs.jsonl"))
    assert {run.tenant for run in runs} == {"north", "south"}
    lengths = {run.steps for run in runs}
    assert lengths == {2, 3}  # some books are not lent: the rule about last copies matters
    again = json.loads(ok(capsys, "record", tmp_path / "desk", "-o", tmp_path / "runs.jsonl", "-n", 30, "--json"))
    assert again["resumed"] == 30
    assert "already exists" in refused(capsys, "new", tmp_path / "desk")


def test_every_split_of_the_new_workflow_can_be_recorded(library: Path, tmp_path: Path, capsys: Capture) -> None:
    for split in ("train", "held_out"):
        out = tmp_path / f"{split}.jsonl"
        assert "12 of 12 runs" in ok(capsys, "record", library, "-o", out, "-n", 12, "--split", split)
    assert "unknown split 'x'" in refused(capsys, "record", library, "-o", tmp_path / "x.jsonl", "--split", "x")


def test_import_reads_several_formats_and_drops_duplicates(runs: Path, tmp_path: Path, capsys: Capture) -> None:
    chat = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    packed = tmp_path / "chat.jsonl.gz"
    packed.write_bytes(gzip.compress(json.dumps(chat).encode()))
    out = tmp_path / "all.jsonl"
    made = json.loads(ok(capsys, "import", packed, runs, runs, "-o", out, "--json"))
    assert made["written"] == len(list(read_trajectories(out))) and made["duplicates"] >= 40
    ok(capsys, "import", runs, "-o", out, "--calls-only")
    trained = [m for one in read_trajectories(out) for m in one.messages if m.role == "assistant" and m.trained]
    assert trained and all(message.tool_calls for message in trained)


def test_compile_run_adapter_eval(library: Path, runs: Path, tiny_base: Path, tmp_path: Path, capsys: Capture) -> None:
    agent = tmp_path / "agent"
    made = json.loads(
        ok(
            capsys, "compile", library, "-o", agent, "--data", runs, "--base", tiny_base, "--tokens", 2000,
            "--rank", 2, "--json",
        )
    )  # fmt: skip
    assert made["kind"] == "lora" and made["config"]["rank"] == 2

    trace = tmp_path / "trace.jsonl"
    shown = ok(capsys, "run", agent, "Please lend me Emma.", "--tenant", "north", "--trace", trace)
    assert "request" in shown and "steps," in shown
    [run] = read_trajectories(trace)
    assert run.tenant == "north" and run.messages[1].content == "Please lend me Emma."
    done = json.loads(ok(capsys, "run", agent, "--sample", 1, "--json"))
    assert done[0]["split"] == "held_out" and done[0]["outcome"]["success"] in (True, False)

    ok(capsys, "adapter", agent, "-o", tmp_path / "peft")
    assert {path.name for path in (tmp_path / "peft").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert "already exists" in refused(capsys, "adapter", agent, "-o", tmp_path / "peft")
    assert "lora agent" in refused(capsys, "adapter", agent, "-o", tmp_path / "p2", "--context", "x.md")
    assert "--to hypernetwork" in refused(capsys, "run", agent, "hello", "--tenant", "x.md", "--workflow", library)

    ok(capsys, "export", agent, "--merged", "--dtype", "float32", "-o", tmp_path / "merged")
    merged, own, ids = load_base(tmp_path / "merged"), load_agent(agent).load(), torch.arange(20)[None]
    assert torch.equal(merged.model(ids).logits, own.model(ids).logits)
    assert merged.tokenizer.chat_template == own.tokenizer.chat_template
    assert "--merged" in refused(capsys, "export", agent, "-o", tmp_path / "m2")
    assert "token ids" not in ok(capsys, "export", agent, "--gguf", "-o", tmp_path / "gguf")  # it splits text as GPT-2
    assert [path.name for path in (tmp_path / "gguf").iterdir()] == ["model.gguf"]

    evaluation = ("eval", agent, "--arms", "lora", "-n", 1, "--latency", 1, "--steps", 1, "-o", tmp_path / "report")
    report = json.loads(ok(capsys, *evaluation, "--json"))
    assert report["cells"]["lora"]["held_out"]["score"]["tasks"] == 1
    assert "held_out" in ok(capsys, *evaluation) and (tmp_path / "report" / "report.md").exists()


def test_a_hypernetwork_serves_a_profile_in_a_file(
    library: Path, runs: Path, tiny_base: Path, tmp_path: Path, capsys: Capture
) -> None:
    agent, profile = tmp_path / "agent", tmp_path / "new.md"
    profile.write_text("---\nname: east\n---\n- lend nothing on Sundays\n- lend for 9 days\n")
    compile_ = ("compile", library, "-o", agent, "--data", runs, "--base", tiny_base, "--to", "hypernetwork")
    ok(capsys, *compile_, "--tokens", 3000, "--rank", 2)
    ok(capsys, "run", agent, "Please lend me a book", "--tenant", profile, "--workflow", library)
    written = ok(capsys, "adapter", agent, "--context", profile, "-o", tmp_path / "peft")
    assert "rank 3 adapter" in ok(capsys, "adapter", agent, "--context", profile, "-o", tmp_path / "p3", "--rank", 3)
    assert "give --context" in refused(capsys, "adapter", agent, "-o", tmp_path / "p4")
    made = load_agent(agent)
    exported, own = load_peft(tmp_path / "peft"), made.adapters(made.load_base())(read_context(profile))
    assert own.rank > 2 + 10 and f"rank {own.rank} adapter" in written  # that of each token beside the shared term
    for site in own.factors:
        assert torch.equal(delta_weight(exported, site), delta_weight(own, site))
    ok(capsys, "export", agent, "--merged", "--context", profile, "-o", tmp_path / "merged")
    base, (site, *_) = made.load_base(), own.factors
    exact = linear(base.model, site).weight + delta_weight(own, site)
    torch.testing.assert_close(linear(load_base(tmp_path / "merged").model, site).weight, exact, rtol=1e-2, atol=1e-3)


def test_serving_needs_to_know_who_calls(agent: Path, library: Path, tmp_path: Path, capsys: Capture) -> None:
    key = ok(capsys, "key", "north", "--keys", tmp_path / "keys.json").strip()
    assert key.startswith("engrain-") and key not in (tmp_path / "keys.json").read_text()
    assert "--keys FILE" in refused(capsys, "serve", agent)
    assert "0.0.0.0 is 'north'" in refused(capsys, "serve", agent, "--tenant", "north", "--host", "0.0.0.0")
    assert "unknown tenant" in refused(capsys, "serve", agent, "--tenant", "none", "--workflow", library)
    nowhere = ("--keys", tmp_path / "none.json", "--workflow", library)
    assert "engrain key" in refused(capsys, "serve", agent, *nowhere)
    assert "no such directory" in refused(capsys, "serve", agent, *nowhere, "--tenants", tmp_path / "none")


def test_base_show(tiny_base: Path, capsys: Capture) -> None:
    facts = json.loads(ok(capsys, "base", "show", tiny_base, "--json"))
    assert facts["architecture"] == "LlamaForCausalLM" and facts["licence"] == "apache-2.0"
    assert facts["linear sites"] == 14
    assert "A random model." in ok(capsys, "base", "show", tiny_base)


def test_help_and_version(capsys: Capture) -> None:
    shown = ok(capsys, "--help")
    assert all(name in shown for name in ("new", "record", "import", "compile", "run", "adapter", "eval", "base"))
    assert ok(capsys, "--version").startswith("engrain 0.")
    assert "No such command" in refused(capsys, "frobnicate")
    assert "Missing" in refused(capsys, "compile")
    assert "--tokens" in refused(capsys, "compile", "w", "-o", "a", "--tokens", "-3")


# Mistakes: one line, exit code 2, nothing written

Break = Callable[[Path], None]


def rewrite(name: str, old: str, new: str) -> Break:
    def change(workflow: Path) -> None:
        file = workflow / name
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new))

    return change


BROKEN: dict[str, tuple[Break, str]] = {
    "missing": (lambda workflow: shutil.rmtree(workflow), "engrain new"),
    "syntax": (rewrite("workflow.py", "def phase_of(", "def phase_of(("), ": SyntaxError"),
    "no object": (rewrite("workflow.py", "workflow = Workflow(", "flow = Workflow("), "expected a module-level"),
    "wrong type": (rewrite("workflow.py", "    check=check,\n)", "    check=check,\n).name"), "got str"),
    "unknown tool": (rewrite("workflow.py", '("find_book",)', '("find_film",)'), "'find_film'"),
    "no docstring": (rewrite("workflow.py", '"""Lend one copy of a book.', '"""'), "lend_book"),
    "tenant": (rewrite("tenants/north.md", '"\n---\n', '"\n'), "front matter"),
    "tenant YAML": (rewrite("tenants/north.md", "name: north", "name: [north"), "not YAML"),
    "no rules": (rewrite("tenants/north.md", "\n- ", "\n# "), "no rules"),
    "teacher": (rewrite("workflow.py", 'wrong = "" if library.loans == expected', 'wrong = "" if False'), "no goal"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_workflow(case: str, library: Path, tiny_base: Path, tmp_path: Path, capsys: Capture) -> None:
    break_it, word = BROKEN[case]
    workflow = shutil.copytree(library, tmp_path / "workflow")
    break_it(workflow)
    arguments = ("compile", workflow, "-o", tmp_path / "agent", "--base", tiny_base, "--tokens", 2000)
    assert word in refused(capsys, *arguments)
    assert not (tmp_path / "agent").exists()


def test_bad_files(library: Path, runs: Path, tiny_base: Path, agent: Path, tmp_path: Path, capsys: Capture) -> None:
    compile_ = ("compile", library, "-o", tmp_path / "agent", "--tokens", 2000)
    assert "make them with `engrain record`" in refused(capsys, *compile_, "--base", tiny_base, "--data", "gone.jsonl")
    bad = tmp_path / "bad.jsonl"
    line = runs.read_text().split("\n")[0]
    bad.write_text(line + "\n" + line.replace('"role": "assistant"', '"role": "wizard"', 1) + "\n")
    assert "bad.jsonl:2: field 'messages.2.role'" in refused(capsys, *compile_, "--base", tiny_base, "--data", bad)

    assert "no config.json" in refused(capsys, *compile_, "--data", runs, "--base", tmp_path / "nowhere")
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (base / "config.json").write_text("{}")
    assert "cannot load the base" in refused(capsys, *compile_, "--data", runs, "--base", base)
    assert "no config.json" in refused(capsys, "base", "show", tmp_path)
    assert not (tmp_path / "agent").exists() and not (tmp_path / "agent.work").exists()

    assert "made by `engrain compile`" in refused(capsys, "run", tmp_path, "hello")
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text('{"id": "a", "request": 3}\n')
    assert "tasks.jsonl:1: field 'request'" in refused(capsys, "run", agent, "--task", tasks)
    assert "cannot read tasks" in refused(capsys, "run", agent, "--task", tmp_path / "gone.jsonl")
    assert "unknown tenant 'west'" in refused(capsys, "run", agent, "hello", "--tenant", "west")
    assert "expected one of" in refused(capsys, "run", agent)
    assert "unknown split" in refused(capsys, "run", agent, "--sample", 1, "--split", "nowhere")
    assert "--workflow" in refused(capsys, "run", agent, "hello", "--workflow", tmp_path / "gone")
    assert "unknown arm" in refused(capsys, "eval", agent, "--arms", "magic", "-o", tmp_path / "report")
    assert "give --temperature" in refused(capsys, "eval", agent, "--trials", 4, "-o", tmp_path / "report")
    assert "URL" in refused(capsys, "record", library, "-o", tmp_path / "r.jsonl", "--teacher", "socrates")
    assert "--model" in refused(
        capsys, "record", library, "-o", tmp_path / "r.jsonl", "--teacher", "http://localhost:1"
    )
    bad.write_text("not JSON\n")
    assert "bad.jsonl:1" in refused(capsys, "import", bad, "-o", tmp_path / "imported.jsonl")
    assert not (tmp_path / "imported.jsonl").exists() and not (tmp_path / "report" / "report.json").exists()


def test_a_damaged_checkpoint_is_named(
    library: Path, runs: Path, tiny_base: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    command = ("compile", library, "-o", tmp_path / "agent", "--data", runs, "--base", tiny_base, "--tokens", 2000)
    with monkeypatch.context() as patch:
        patch.setattr("engrain.compile._save", interrupt)
        assert "goes on from there" in refused(capsys, *command, code=130)
    [tensors] = (tmp_path / "agent.work").rglob("step-*/tensors.safetensors")
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "is damaged" in refused(capsys, *command)
    tensors.write_bytes(whole)
    ok(capsys, *command)


@pytest.mark.parametrize("command", ["record", "compile", "new", "import"])
def test_a_full_disk(
    command: str, library: Path, runs: Path, tiny_base: Path, tmp_path: Path, capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Flushing fails, as it does when the last blocks are gone."""

    def full(_: int) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out = tmp_path / "out"
    commands: dict[str, tuple[object, ...]] = {
        "record": ("record", library, "-o", out, "-n", 3),
        "compile": ("compile", library, "-o", out, "--data", runs, "--base", tiny_base, "--tokens", 2000),
        "new": ("new", out),
        "import": ("import", runs, "-o", out),
    }
    if command == "new":
        monkeypatch.setattr("shutil.copytree", lambda *_, **__: full(0))
    monkeypatch.setattr("os.fsync", full)
    assert "No space left on device" in refused(capsys, *commands[command])
    assert not out.exists()
    assert not list(tmp_path.glob(".*"))


def test_our_own_mistakes_are_one_line_too(
    library: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object, **__: object) -> NoReturn:
        raise RuntimeError("a bug\nof two lines")

    monkeypatch.setattr("engrain.record.record", crash)
    monkeypatch.delenv("ENGRAIN_DEBUG", raising=False)
    line = refused(capsys, "record", library, "-o", tmp_path / "runs.jsonl", code=1)
    assert line.startswith("error: RuntimeError: a bug of two lines; set ENGRAIN_DEBUG=1")
    monkeypatch.setenv("ENGRAIN_DEBUG", "1")
    assert invoke(["record", str(library), "-o", str(tmp_path / "runs.jsonl")]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_while_training_exits_130_and_the_same_command_goes_on(
    library: Path, runs: Path, tiny_base: Path, tmp_path: Path
) -> None:
    """A real process and a real signal."""
    out = tmp_path / "agent"
    command = [sys.executable, "-c", "from engrain.cli import main; main()", "compile", str(library), "-o", str(out)]
    command += ["--data", str(runs), "--base", str(tiny_base), "--tokens", "400000", "--rank", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "agent.work" / "train" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130, err
    last = err.strip().split("\n")[-1]
    assert last.startswith("error: interrupted") and "the same command goes on from there" in last
    assert not out.exists() and list((tmp_path / "agent.work").rglob("step-*"))
