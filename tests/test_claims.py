"""The tables of the sources hold numbers or reasons, and what is wrong with an arm is said."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from test_facts import bags

from engrain import arms, claims
from engrain.agent import load_agent
from engrain.budget import Budget
from engrain.claim_tables import NONE, adaptation, crowd, document, notes, orchestration, paying, totals
from engrain.claims import Measured, Sizes, measure
from engrain.compiled_policy import CompiledPolicy
from engrain.evaluate import Plan
from engrain.facts import foreign
from engrain.page import Table, read_page, write_report
from engrain.spent import Spent
from engrain.workflow import load_workflow

SIZES = Sizes(tasks=4, fewer=2, latency=1, budget=Budget(steps=6, seconds=1e6), crowds=(1, 3))
NUMBER = re.compile(r"-?[\d,.]+(e-?\d+)?( \[-?[\d.]+, -?[\d.]+\])?|never")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sources")


@pytest.fixture(scope="module")
def measured(agent: Path, hyper_agent: Path, library: Path, place: Path) -> Iterator[Measured]:
    """Of hardly trained agents, whose turns are cut off after a few tokens; without the orchestrated arm, which has its
    own tests."""
    with pytest.MonkeyPatch.context() as patch:
        defaults = {**(CompiledPolicy.__init__.__kwdefaults__ or {}), "max_new": 8}
        patch.setattr(CompiledPolicy.__init__, "__kwdefaults__", defaults)
        patch.setattr(arms, "_need", lambda name, extra, *modules: None)
        for module in (arms, claims):
            patch.setattr(module, "MiniLM", lambda: bags)
        patch.setattr(claims, "ARMS", tuple(name for name in claims.ARMS if name != "orchestrated"))
        agents = [load_agent(agent), load_agent(hyper_agent)]
        yield measure(load_workflow(library), agents, SIZES, place, parallel=4)


def test_every_cell_is_a_number_or_not_applicable_for_a_reason_that_is_told(measured: Measured) -> None:
    tables = [adaptation(measured), orchestration(measured), *paying(measured), crowd(measured)]
    assert [table.caption for table in tables][:2] == ["Ways to adapt an agent", "Orchestrated beside compiled"]
    for table in tables:
        assert table.rows and {len(row) for row in table.rows} == {len(table.headings)}
        for row in table.rows:
            told = {head: cell for head, cell in zip(table.headings, row, strict=True)
                    if not re.match("arm|what adapts|in place|compile to|costs least", head)}  # fmt: skip
            assert all(cell == NONE or NUMBER.fullmatch(cell) for cell in told.values()), told
    text = "\n".join(notes(measured))
    for reason in ("no agent for arm 'full'", "has no facts", "has no split 'long40'", "no suite of general probes"):
        assert reason in text, reason


def test_what_is_finished_is_not_run_again(measured: Measured, agent: Path, library: Path, place: Path) -> None:
    kept = {file: file.stat().st_mtime_ns for file in place.rglob("*.jsonl")}
    first = measured.methods["lora"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CompiledPolicy, "__call__", lambda self, episodes: pytest.fail("it ran again"))
        patch.setattr(claims, "ARMS", ("lora", "teacher"))
        again = measure(load_workflow(library), [load_agent(agent)], SIZES, place, parallel=4)
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert again.methods["lora"].update == first.update and again.methods["lora"].runs == first.runs


def test_a_leaking_retriever_is_caught(measured: Measured) -> None:
    loose, strict = (measured.methods[name] for name in ("rag", "rag_strict"))
    assert any(map(foreign, loose.runs["seen tenants"])) and not any(map(foreign, strict.runs["seen tenants"]))
    assert not isinstance(loose.leaks, str) and not isinstance(strict.leaks, str)
    assert loose.leaks.read.mean > 0 and strict.leaks.read.mean == 0
    text = "\n".join(notes(measured))
    assert "rag leaks: " in text and "rag_strict leaks: " not in text


def test_a_hypernetwork_that_ignores_its_context_is_caught(measured: Measured) -> None:
    assert "the hypernetwork ignores its context" in "\n".join(notes(measured))
    good = replace(measured.methods["hypernetwork"], runs=measured.methods["teacher"].runs)
    reads = replace(measured, methods={**measured.methods, "hypernetwork": good})
    assert "ignores its context" not in "\n".join(notes(reads))


def test_a_teacher_with_a_bug_is_caught(measured: Measured) -> None:
    assert "mend it first" not in "\n".join(notes(measured))
    wrong = replace(measured.methods["teacher"], runs=measured.methods["lora"].runs)
    buggy = replace(measured, methods={**measured.methods, "teacher": wrong})
    assert "the teacher fails its own goal check in 4 tasks" in "\n".join(notes(buggy))


def test_an_update_costs_what_the_arm_has_to_do(measured: Measured) -> None:
    spent = {name: method.update for name, method in measured.methods.items()}
    assert spent["prompt"] == Spent(0.0, 0.0) and isinstance(spent["base"], str)
    lora, hyper = spent["lora"], spent["hypernetwork"]
    assert isinstance(lora, Spent) and isinstance(hyper, Spent)
    assert lora.seconds > hyper.seconds > 0


def test_a_crowd_is_read_by_retrieval_alone(measured: Measured) -> None:
    assert list(measured.crowds) == [1, 3] and set(measured.crowds[3]) == {"rag", "rag_strict"}
    assert not any(map(foreign, measured.crowds[1]["rag"])) and any(map(foreign, measured.crowds[3]["rag"]))
    rows = {row[0]: row[1:] for row in crowd(measured).rows}
    assert rows["prompt"][:2] == (NONE, NONE) and NONE not in rows["rag"]
    assert not isinstance(measured.made, str) and measured.made.tenants == 3
    network = measured.methods["hypernetwork"].megabytes
    assert float(rows["hypernetwork"][-1]) == pytest.approx(network + 3 * measured.made.megabytes, abs=0.05)


def test_without_tenants_there_is_no_crowd(measured: Measured, agent: Path, library: Path, place: Path) -> None:
    workflow = replace(load_workflow(library), tenants={})
    plan = Plan(("held_out",), 2)
    runs, made = claims._crowds(workflow, [load_agent(agent)], None, plan, SIZES, place / "none", lambda *_: None)
    assert not runs and isinstance(made, str) and "no tenants" in made
    assert document(replace(measured, crowds=runs, made=made)).blocks


def test_the_page_can_be_read_back(measured: Measured, tmp_path: Path) -> None:
    write_report(tmp_path, totals(measured), document(measured))
    page = read_page(tmp_path / "report.json")
    assert [block.caption for block in page.blocks if isinstance(block, Table)][:2] == [
        "Ways to adapt an agent", "Orchestrated beside compiled"
    ]  # fmt: skip
    assert json.loads((tmp_path / "report.json").read_text())["success"]["teacher"]["seen tenants"] == 1
    assert (tmp_path / "report.html").stat().st_size > 10_000
