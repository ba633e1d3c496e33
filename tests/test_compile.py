"""From a workflow to an agent directory that loads, runs, resumes and refuses what was tampered with."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from engrain.adapter import delta_weight
from engrain.agent import MANIFEST, find_base, load_agent
from engrain.budget import Budget
from engrain.compile import compile_workflow
from engrain.compile_config import CompileConfig
from engrain.context import Context, Section
from engrain.errors import InputError, ModelError, WorkflowError
from engrain.hypernetwork import load_hypernetwork, save_hypernetwork
from engrain.policy import Episode
from engrain.rollout import rollout
from engrain.sections import tool_section
from engrain.source import by_phase, compiled_form
from engrain.trajectory import Message, ToolCall, Trajectory, read_trajectories, write_trajectories
from engrain.work import work_directory
from engrain.workflow import load_workflow

SMALL = CompileConfig(tokens=4000, rank=4, batch_tokens=1024)


def test_agent_is_whole_and_says_what_it_is(agent: Path, tiny_base: Path) -> None:
    manifest = load_agent(agent).manifest
    assert manifest.kind == "lora" and manifest.workflow == "library" and manifest.tenants == ["north", "south"]
    assert manifest.data.trajectories == 40 and manifest.data.rows == 40 and manifest.training["tokens"] >= 4000
    assert manifest.licences == {"base": "apache-2.0", "data": "runs by script"}
    assert sorted(manifest.tools.values()) == ["find_book", "lend_book"]
    assert manifest.seconds > 0 and (manifest.cpu_seconds or 0) > 0
    assert not work_directory(agent).exists()
    assert not (agent / "base").exists() and find_base(agent, manifest.base) == tiny_base.resolve()
    assert (agent / "adapter" / "adapter_model.safetensors").is_file()


def test_agent_runs_without_instructions(agent: Path, library: Path) -> None:
    workflow = load_workflow(library)
    tasks = [next(workflow.tasks("held_out", 1))]
    [trajectory] = rollout(workflow, tasks, load_agent(agent).policy(workflow, parallel=1), parallel=1)
    system, *_, last = trajectory.messages
    assert workflow.procedure not in system.content and trajectory.tools == "[]"
    assert last.token_ids or trajectory.outcome is not None


def test_the_adapter_is_what_was_trained(agent: Path, tiny_base: Path) -> None:
    """The merged model differs from the base; the base as loaded does not."""
    from engrain.model import load_base

    ids = torch.arange(12)[None]
    loaded = load_agent(agent)
    with torch.no_grad():
        plain = load_base(tiny_base).model(ids).logits
        assert torch.equal(loaded.load_base().model(ids).logits, plain)
        assert (loaded.load().model(ids).logits - plain).abs().max() > 1e-3


def test_full_fine_tuning_makes_a_model_and_no_adapter(
    library: Path, runs: Path, tiny_base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "full"
    config = CompileConfig(tokens=2000, to="full", batch_tokens=1024)
    compile_workflow(library, out, config, data=runs, base=tiny_base, with_base=True)
    loaded = load_agent(out)
    assert loaded.manifest.kind == "full" and not (out / "adapter").exists()
    assert find_base(out, loaded.manifest.base) == out / "base"
    assert loaded.load().digest != loaded.load_base().digest == loaded.manifest.base.digest


def test_a_hypernetwork_makes_an_adapter_for_a_tenant_that_was_not_trained(
    library: Path, runs: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engrain.agent.LONGEST_CONTEXT", 780)  # a model that is hardly trained rambles on
    out = tmp_path / "hyper"
    config = CompileConfig(tokens=6000, to="hypernetwork", rank=2, batch_tokens=1024)
    compile_workflow(library, out, config, data=runs, base=tiny_base)
    agent, workflow = load_agent(out), load_workflow(library)
    assert agent.manifest.kind == "hypernetwork" and not (out / "adapter").exists()
    base = agent.load_base()
    adapters = agent.adapters(base)
    south = workflow.context("south")
    edited = south.replacing(south.rules[0], "lend nothing on Sundays")
    one, other = adapters(south), adapters(edited)
    policy, phase = agent.policy(workflow), workflow.phases[0]
    for tenant in workflow.tenants:  # each its own adapter, in any order
        task = next(workflow.tasks("held_out", 1)).model_copy(update={"tenant": tenant})
        got = policy._adapter_of(Episode(task, Trajectory(id="t", messages=[]), phase, (), workflow))
        wanted = adapters(workflow.context(tenant))
        assert got is not None and all(torch.equal(got.factors[site].a, wanted.factors[site].a) for site in got.factors)
    assert one is adapters(workflow.context("south")) is not other
    terms = [delta_weight(each, "model.layers.0.self_attn.o_proj") for each in (one, other)]
    assert terms[0].any() and not torch.equal(*terms)  # it was trained, and it reads the rules

    new = workflow.with_tenant(Section("tenant", "east", ("lend nothing on Sundays",)))
    tasks = [task.model_copy(update={"tenant": "east"}) for task in islice(workflow.tasks("held_out", 1), 2)]
    done = list(rollout(new, tasks, agent.policy(new), parallel=2, budget=Budget(steps=2)))
    assert all(message.token_ids for run in done for message in run.messages if message.role == "assistant")
    assert not any("in_prompt" in run.meta for run in done)
    with pytest.raises(InputError, match="only for a context"):
        agent.load()

    taken = CompileConfig(tokens=0, to="hypernetwork", start=out / "hypernetwork")
    same = compile_workflow(library, tmp_path / "same", taken, data=runs, base=tiny_base).adapters(base)(south)
    assert all(torch.equal(same.factors[site].b, one.factors[site].b) for site in one.factors)
    more = replace(taken, tokens=1000, batch_tokens=512)
    other = compile_workflow(library, tmp_path / "more", more, data=runs, base=tiny_base).adapters(base)(south)
    assert not all(torch.equal(other.factors[site].b, one.factors[site].b) for site in one.factors)

    strict = load_hypernetwork(out / "hypernetwork", base)
    strict.novelty.threshold.fill_(-1.0)  # any context is too strange
    save_hypernetwork(out / "hypernetwork", strict, base)
    again = list(rollout(new, tasks, agent.policy(new), parallel=2, budget=Budget(steps=2)))
    assert all("novelty" in run.meta["in_prompt"] and "Sundays" in run.messages[0].content for run in again)


def test_a_hypernetwork_of_steps_swaps_adapters_between_phases(
    library: Path, runs: Path, tiny_base: Path, tmp_path: Path
) -> None:
    workflow = load_workflow(library)
    whole = [compiled_form(one, workflow) for one in read_trajectories(runs)]
    for one in whole[:5]:
        parts = dict(by_phase(one, workflow))
        trained = [
            turn for part in parts.values() for turn in part.messages if turn.role == "assistant" and turn.trained
        ]
        turns = [message for message in one.messages if message.role == "assistant"]
        assert sorted(map(str, trained)) == sorted(map(str, turns))
        assert all(part.messages[-1].trained for part in parts.values()) and len(parts) > 1

    config = CompileConfig(tokens=6000, to="hypernetwork", rank=2, batch_tokens=1024, contexts="step")
    made = compile_workflow(library, tmp_path / "hyper", config, data=runs, base=tiny_base)
    assert made.manifest.data.rows > len(whole)
    policy, used = load_agent(tmp_path / "hyper").policy(workflow), set[tuple[str, int]]()
    inner = policy._adapter_of
    policy._adapter_of = lambda episode: used.add((episode.phase.name, id(inner(episode)))) or inner(episode)
    first, *_ = workflow.phases
    episode = Episode(next(workflow.tasks("held_out", 1)), whole[0], first, (), workflow)
    for phase in workflow.phases:
        episode.phase = phase
        policy._request(episode)
    assert len(used) == len({adapter for _, adapter in used}) == len(workflow.phases) > 1


def test_a_hypernetwork_of_tools_reads_the_schemas_of_each_run(
    library: Path, runs: Path, tiny_base: Path, tmp_path: Path
) -> None:
    schemas = json.loads(load_workflow(library).schemas("full"))

    def called(name: str) -> list[dict[str, Any]]:
        return [{**schemas[0], "function": {**schemas[0]["function"], "description": name}}, *schemas[1:]]

    def with_tools(run: Trajectory, described: str) -> Trajectory:
        return run.model_copy(update={"tools": json.dumps(called(described))})

    every, config = (
        list(read_trajectories(runs)),
        CompileConfig(tokens=6000, to="hypernetwork", contexts="tools", rank=2, batch_tokens=1024),
    )
    logs = tmp_path / "logs.jsonl"
    write_trajectories(logs, every)
    with pytest.raises(InputError, match="differ, got 1"):
        compile_workflow(logs, tmp_path / "out", config, base=tiny_base)
    write_trajectories(logs, (with_tools(run, ("Find.", "Look it up.")[n % 2]) for n, run in enumerate(every)))
    agent = compile_workflow(logs, tmp_path / "out", config, base=tiny_base)
    adapters, site = agent.adapters(agent.load_base()), "model.layers.0.self_attn.o_proj"
    known, changed = (Context(tuple(map(tool_section, called(name)))) for name in ("Find.", "Seek a volume."))
    assert not torch.equal(delta_weight(adapters(known), site), delta_weight(adapters(changed), site))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tokens": 0}, "nothing without training tokens"),
        ({"tokens": -1}, "at least 0"),
        ({"start": Path("nowhere")}, "only a hypernetwork"),
        ({"start": Path("nowhere"), "to": "hypernetwork"}, "nowhere has no hypernetwork.safetensors"),
    ],
)
def test_a_start_that_cannot_be_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        CompileConfig(**options)


def test_a_hypernetwork_of_one_tenant_is_refused(library: Path, runs: Path, tiny_base: Path, tmp_path: Path) -> None:
    north = tmp_path / "north.jsonl"
    write_trajectories(north, [one for one in read_trajectories(runs) if one.tenant == "north"])
    with pytest.raises(InputError, match="2 tenants"):
        compile_workflow(library, tmp_path / "out", CompileConfig(to="hypernetwork"), data=north, base=tiny_base)


def test_without_data_the_teacher_records(library: Path, tiny_base: Path, tmp_path: Path) -> None:
    config = CompileConfig(tokens=30_000, rank=2, batch_tokens=8192)
    made = compile_workflow(library, tmp_path / "agent", config, base=tiny_base).manifest
    assert made.data.trajectories > 64
    assert 0.8 < made.data.tokens / 30_000 < 1.3


def test_an_agent_names_the_place_of_a_base_unless_it_is_the_bundled_one(
    agent: Path, library: Path, runs: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def named(path: Path) -> list[str | None]:
        config = json.loads((path / "adapter" / "adapter_config.json").read_text())
        return [load_agent(path).manifest.base.path, config["base_model_name_or_path"]]

    assert named(agent) == [str(tiny_base.resolve())] * 2
    monkeypatch.setattr("engrain.compile.BUNDLED", tiny_base)
    monkeypatch.setattr("engrain.agent.BUNDLED", tiny_base)
    compile_workflow(library, tmp_path / "agent", SMALL, data=runs, base=tiny_base)
    assert named(tmp_path / "agent") == ["", None]


def test_an_interrupted_compile_goes_on_to_the_same_weights(
    agent: Path, library: Path, runs: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "agent"

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("engrain.compile._save", interrupt)
        with pytest.raises(KeyboardInterrupt):
            compile_workflow(library, out, SMALL, data=runs, base=tiny_base)
    assert not out.exists() and work_directory(out).is_dir()
    with pytest.raises(InputError, match="unfinished compile with rank=4, now 8"):
        compile_workflow(library, out, CompileConfig(tokens=4000, rank=8, batch_tokens=1024), data=runs, base=tiny_base)
    resumed = compile_workflow(library, out, SMALL, data=runs, base=tiny_base)
    weights = "adapter/adapter_model.safetensors"
    assert resumed.manifest.files[weights] == load_agent(agent).manifest.files[weights]
    assert not work_directory(out).exists()


def test_logs_compile_without_a_workflow(runs: Path, tiny_base: Path, tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {}}}}}
    logs = tmp_path / "logs.jsonl"
    with logs.open("w") as file:
        for trajectory in read_trajectories(runs):
            file.write(trajectory.model_copy(update={"tools": json.dumps([tool])}).to_json() + "\n")
    made = compile_workflow(logs, tmp_path / "agent", SMALL, base=tiny_base).manifest
    assert list(made.tools.values()) == ["f"] and made.tenants == []
    kept = CompileConfig(tokens=2000, rank=2, batch_tokens=1024, keep_tools=True)
    with_tools = compile_workflow(logs, tmp_path / "kept", kept, base=tiny_base).manifest
    assert with_tools.data.tokens > made.data.tokens


def test_compiled_form_drops_instructions_and_orders_arguments(library: Path) -> None:
    workflow = load_workflow(library)
    call = ToolCall(id="call_0", name="lend_book", arguments='{"days": 7, "title": "Emma"}')
    messages = [
        Message(role="system", content="the whole procedure"),
        Message(role="user", content="Emma?"),
        Message(role="assistant", tool_calls=[call]),
    ]
    trajectory = Trajectory(id="t", tenant="south", messages=messages, tools=workflow.schemas("full"))
    made = compiled_form(trajectory, workflow)
    assert made.tools == "[]" and made.messages[0].content == workflow.system("south", "none")
    assert made.messages[2].tool_calls[0].arguments == '{"title": "Emma", "days": 7}'
    assert [message.role for message in made.messages] == ["system", "user", "assistant"]


# What must not load


@pytest.fixture
def copy(agent: Path, tmp_path: Path) -> Path:
    return shutil.copytree(agent, tmp_path / "copy")


@pytest.mark.parametrize("name", ["adapter/adapter_model.safetensors", "golden.jsonl", "tokenizer/tokenizer.json"])
def test_a_changed_or_missing_file_is_refused(copy: Path, name: str) -> None:
    with (copy / name).open("ab") as file:
        file.write(b" ")
    with pytest.raises(ModelError, match=f"{name} was changed"):
        load_agent(copy)
    (copy / name).unlink()
    with pytest.raises(ModelError, match=f"{name} is missing"):
        load_agent(copy)


def change(copy: Path, **values: object) -> None:
    manifest = json.loads((copy / MANIFEST).read_text())
    (copy / MANIFEST).write_text(json.dumps({**manifest, **values}))


def test_a_malformed_manifest_is_refused(copy: Path) -> None:
    change(copy, kind="magic")
    with pytest.raises(ModelError, match="field 'kind'"):
        load_agent(copy)
    (copy / MANIFEST).write_text("{")
    with pytest.raises(ModelError, match="compile the agent again"):
        load_agent(copy)
    (copy / MANIFEST).unlink()
    with pytest.raises(ModelError, match="made by `engrain compile`"):
        load_agent(copy)


def test_another_base_is_refused(copy: Path, tiny_base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    other = shutil.copytree(tiny_base, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    base = json.loads((copy / MANIFEST).read_text())["base"]
    change(copy, base={**base, "path": str(other)})
    with pytest.raises(ModelError, match="is not the base this agent was compiled on"):
        load_agent(copy).load()
    change(copy, base={**base, "path": str(tmp_path / "gone")})
    with pytest.raises(ModelError, match="put it back"):
        load_agent(copy).load()


def test_other_tokens_than_trained_are_refused(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after an upgrade that renders differently."""
    from engrain.renderer import Renderer, Row

    rows = Renderer.rows
    assert load_agent(copy).renderer.stop_ids
    monkeypatch.setattr(Renderer, "rows", lambda self, one: [Row(r.ids[1:], r.mask[1:]) for r in rows(self, one)])
    with pytest.raises(ModelError, match="gives other tokens than when compiled"):
        _ = load_agent(copy).renderer


def test_changed_tools_are_refused(agent: Path, library: Path, tmp_path: Path) -> None:
    changed = shutil.copytree(library, tmp_path / "changed")
    code = (changed / "workflow.py").read_text()
    (changed / "workflow.py").write_text(code.replace("Lend one copy of a book.", "Lend a book."))
    load_agent(agent).check_workflow(load_workflow(library))
    with pytest.raises(ModelError, match="lend_book"):
        load_agent(agent).check_workflow(load_workflow(changed))


# What must not compile


def test_only_an_agent_is_replaced(library: Path, runs: Path, tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="is not an agent"):
        compile_workflow(library, tmp_path / "precious", SMALL, data=runs, base=tiny_base)
    assert (tmp_path / "precious" / "thesis.txt").exists()


def test_wrong_data_are_named(library: Path, runs: Path, tiny_base: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(InputError, match="no trajectories in it"):
        compile_workflow(library, tmp_path / "agent", SMALL, data=empty, base=tiny_base)
    foreign = tmp_path / "foreign.jsonl"
    foreign.write_text(runs.read_text().replace('"workflow": "library"', '"workflow": "bakery"'))
    with pytest.raises(InputError, match="runs of 'bakery', expected runs of 'library'"):
        compile_workflow(library, tmp_path / "agent2", SMALL, data=foreign, base=tiny_base)
    with pytest.raises(WorkflowError, match="engrain new"):
        compile_workflow(tmp_path / "nowhere", tmp_path / "agent3", SMALL, base=tiny_base)
    with pytest.raises(InputError, match="cannot compile to 'gguf'"):
        CompileConfig(to="gguf")  # pyright: ignore[reportArgumentType]


def test_overlong_rows_are_counted_and_never_cut(library: Path, runs: Path, tiny_base: Path, tmp_path: Path) -> None:
    made = compile_workflow(library, tmp_path / "all", SMALL, data=runs, base=tiny_base).manifest
    longest = made.data.tokens // made.data.rows
    config = CompileConfig(tokens=2000, rank=2, batch_tokens=1024, longest=longest)
    short = compile_workflow(library, tmp_path / "short", config, data=runs, base=tiny_base).manifest
    assert short.data.rejected["overlong"] == made.data.rows - short.data.rows > 0
    with pytest.raises(InputError, match="raise --longest"):
        compile_workflow(library, tmp_path / "none", CompileConfig(tokens=9, longest=3), data=runs, base=tiny_base)


def test_a_full_disk_leaves_nothing_half_written(
    library: Path, runs: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("engrain.adapter.save_file", full)
        with pytest.raises(InputError, match="No space left on device; free space"):
            compile_workflow(library, tmp_path / "agent", SMALL, data=runs, base=tiny_base)
    assert [path.name for path in tmp_path.iterdir()] == ["agent.work"]
    assert compile_workflow(library, tmp_path / "agent", SMALL, data=runs, base=tiny_base).manifest.data.rows == 40


@pytest.mark.parametrize(("tokens", "given", "step"), [(10**7, None, 4096), (10**6, None, 2000), (900, 64, 64)])
def test_a_small_budget_takes_smaller_steps(tokens, given, step):
    assert CompileConfig(tokens=tokens, batch_tokens=given).step_tokens == step
