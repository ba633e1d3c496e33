"""The page says what the report says whatever its words, draws no number that is missing, and sorts in a browser."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engrain.cli import invoke
from engrain.errors import InputError
from engrain.page import (
    Distribution,
    Document,
    Lines,
    Notes,
    Point,
    Table,
    filled,
    html,
    markdown,
    write_report,
)
from engrain.page.axis import axis, written
from engrain.page.cells import interval, missing, number, numeric

ROOT = Path(__file__).parents[1]
EVIL = "<script>document.title = 'owned'</script>\"'&"
NAN = math.nan
TABLE = Table(
    ("arm", "success % [95%]", "tokens", "s/step"),
    (
        ("lora", "66.1 [62.0, 70.2]", "1,234", "0.144"),
        (EVIL, "9.5 [5.0, 14.0]", "987", "nan"),
        ("prompt", "98 %", "30,100", "1.5"),
        ("teacher", "—", "n/a", "not applicable: a script"),
    ),
    "Arms",
)
STEPS = Lines(
    "Success against steps",
    "steps",
    "success",
    {
        "lora": (Point(0, 0.9, 0.8, 1.0, 40), Point(1, NAN, NAN, NAN), Point(2, 0.5, None, None, 10)),
        EVIL: (Point(0, 0.1, 0.0, 0.3, 40), Point(1, 0.2, 0.1, 0.4, 9), Point(2, None)),
    },
    labels=("1", "2-5", ">5"),
    shares=True,
)
TENANTS = Lines("Memory", "tenants", "MiB", {"lora": tuple(Point(x, 60 + 3 * x) for x in (1, 10, 1000))})
SURE = Lines("Calibration", "p", "success", {"lora": (Point(0.3, 0.4, 0.2, 0.6, 5),)}, shares=True, diagonal=True)
MANY = Lines(
    "Many", "tenants", "success", {f"arm {k}": (Point(1, k / 9), Point(5, 0.5)) for k in range(9)}, shares=True
)
SECONDS = Distribution("Seconds a step", "seconds", {"lora": (0.08, 0.1, 0.12), EVIL: (2.0, 3.0), "none": (NAN,)})
REPORT = Document(
    f"desk {EVIL}", "300 tasks", (TABLE, STEPS, TENANTS, SURE, MANY, SECONDS, Notes((f"{EVIL} failed: 3 x budget",)))
)


def plots(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r'<svg class="plot".*?</svg>', page, re.DOTALL)]


# Words


def test_words_are_text_and_nothing_is_asked_of_the_network() -> None:
    page = html(REPORT)
    assert page.count("<script>") == 1 and EVIL not in page and page.count(escape(EVIL)) >= 5
    assert not re.search(r"https?:|\bsrc=|\bhref=|url\(|@import|<link|<iframe", page)
    assert "default-src 'none'" in page and "script-src 'sha256-" in page
    assert page.startswith("<!doctype html>") and "300 tasks" in page and "3 x budget" in page


@pytest.mark.parametrize(
    ("cell", "value"),
    [("66.1 [62.0, 70.2]", 66.1), ("1,234", 1234), ("98 %", 98), ("-31.2 [-43.8, -18.8]", -31.2), ("\u22123", -3),
     ("< 0.1", 0.1), ("1e-3", 0.001), ("100.0, 99.4", 100), ("12,5", 12), ("held_out", None), ("1.2.3", None)],
)  # fmt: skip
def test_cells_are_worth_the_number_that_they_begin_with(cell: str, value: float | None) -> None:
    assert number(cell) == value and not missing(cell)


def test_what_is_missing_is_said_and_does_not_make_a_column_text() -> None:
    for cell in ("", "—", "-", "n/a", "nan", "nan [nan, nan]", "n/a: no model", "not applicable: why"):
        assert missing(cell)
    assert numeric(["1", "—", "nan"]) and not numeric(["1", "lora"]) and not numeric(["", "n/a"])
    assert interval("66.1 [62.0, 70.2]") == (66.1, 62.0, 70.2) and interval("98 %") is None
    assert "nan" not in markdown(REPORT) and "| n/a |" in markdown(REPORT)


def test_markdown_has_the_tables_and_notes() -> None:
    text = markdown(
        Document("desk", "about", (Table(("a", "b"), (("x|y", "1"),), "First"), Notes(("one", "two")), SURE))
    )
    assert text == "# desk\n\nabout\n\n## First\n\n| a | b |\n| --- | --- |\n| x\\|y | 1 |\n\n- one\n- two\n"


# Plots


def test_missing_points_are_gaps() -> None:
    lora, other = plots(html(Document("", "", (STEPS,))))[0].findall("./g[@class]")
    assert [len(series.findall("./g[@class='point']")) for series in (lora, other)] == [2, 2]
    assert lora.findall("./polyline") == [] and len(other.findall("./polyline")) == 1
    assert len(lora.findall(".//path[@class='whisker']")) == 1
    tips = [one.text for one in lora.findall(".//title")]
    assert tips == ["lora, 1: 90.0% [80.0, 100.0], n = 40", "lora, >5: 50.0%, n = 10"]


def test_each_plot_says_its_numbers_in_words() -> None:
    page = html(REPORT)
    for plot in plots(page):
        names = str(plot.get("aria-labelledby")).split()
        assert [plot.findtext("title"), plot.findtext("desc")] != [None, None]
        assert all(page.count(f'id="{name}"') == 1 for name in names)
    steps = plots(page)[0]
    assert "lora: 1: 90.0% [80.0, 100.0], n = 40; 2-5: n/a; >5: 50.0%, n = 10." in str(steps.findtext("desc"))
    assert "none: n/a" in str(plots(page)[-1].findtext("desc"))


def test_many_series_have_a_panel_each_and_an_arm_keeps_its_colour() -> None:
    page = html(Document("", "", (MANY, Lines("", "", "", {"arm 3": (Point(1, 2), Point(2, 3))}))))
    drawn = plots(page)
    assert len(drawn) == 10 and all(len(plot.findall("./g[@class='behind']/polyline")) == 8 for plot in drawn[:9])
    colours = [str(plot.find("./g[@class='behind']/../g[2]").get("class")) for plot in drawn[:9]]  # pyright: ignore
    assert colours == [f"series s{place % 8}" for place in range(9)]
    dashed = [plot.find("./g[2]/polyline").get("stroke-dasharray") for plot in drawn[:9]]  # pyright: ignore
    assert dashed[0] is None and dashed[8] is not None
    assert drawn[9].findall("./g[@class='series s3']")


numbers = st.one_of(
    st.none(), st.sampled_from([NAN, math.inf, -math.inf, 0.0]), st.floats(1e-9, 1e9), st.floats(-1e9, -1e-9)
)


@given(
    st.lists(st.builds(Point, st.floats(-1e9, 1e9), numbers, numbers, numbers, st.integers(0, 9)), max_size=6),
    st.lists(numbers.filter(lambda value: value is not None), max_size=6),
)
def test_whatever_comes_every_coordinate_is_a_number_on_the_plot(points: list[Point], values: list[Any]) -> None:
    blocks = (Lines("t", "x", "y", {"a": tuple(points)}), Distribution("t", "s", {"a": tuple(values)}))
    for plot in plots(html(Document("", "", blocks))):
        _, _, width, height = map(float, str(plot.get("viewBox")).split())
        for element in plot.iter():
            assert not re.search(r"nan|inf|None", " ".join(element.attrib.values()))
            for one, most in (("cx", width), ("cy", height), ("x1", width), ("y2", height)):
                assert -10 <= float(element.get(one, 0)) <= most + 10
            for pair in element.get("points", "").split():
                x, y = map(float, pair.split(","))
                assert -10 <= x <= width + 10 and -10 <= y <= height + 10


def test_ticks_are_round_and_scales_logarithmic_where_values_range_widely() -> None:
    assert axis([0.13, 0.87], 0, 1, zero=True).ticks == pytest.approx((0, 0.2, 0.4, 0.6, 0.8, 1.0))
    assert axis([1, 1000], 0, 1).ticks == pytest.approx((1, 10, 100, 1000))
    wide = axis([1, 1000], 0, 300)
    assert wide.logarithmic and wide(10) == pytest.approx(100) and not axis([1, 19], 0, 1).logarithmic
    assert axis([5, 5], 0, 1).low < 5 < axis([5, 5], 0, 1).high and axis([], 0, 1).ticks
    assert [written(value) for value in (0, 0.05, 12.5, 999.9, 1000, 27644, 1e6)] == [
        "0", "0.05", "12.5", "1,000", "1,000", "27.6k", "1M"
    ]  # fmt: skip


# Files


def test_the_page_is_made_again_from_the_report_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_report(tmp_path, {"cells": {"lora": NAN}, "more": [1]}, REPORT)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["cells"] == {"lora": None} and report["more"] == [1]
    page = (tmp_path / "report.html").read_text()
    (tmp_path / "report.html").unlink()
    assert invoke(["report", str(tmp_path)]) == 0 and (tmp_path / "report.html").read_text() == page
    assert capsys.readouterr().out == f"written: {tmp_path}/report.html\n"
    assert (tmp_path / "report.md").read_text() == markdown(REPORT)


@pytest.mark.parametrize(
    ("text", "problem"),
    [(None, "cannot be read"), ("{", "not JSON"), ("{}", "has no 'page'"), ("[]", "has no 'page'"),
     ('{"page": {"title": "", "about": "", "blocks": [{"kind": "pie"}]}}', "page.blocks.0")],
)  # fmt: skip
def test_a_report_without_a_page_is_the_users_to_mend(
    text: str | None, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / "report.json").write_text(text)
    assert invoke(["report", str(tmp_path)]) == 2 and problem in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_marked_tables_are_those_of_committed_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_report(tmp_path, {}, Document("", "", (Table(("a",), (("1",),)), SURE, Table(("b",), (("2",),)))))
    (tmp_path / "report.json").rename(tmp_path / "arms.json")
    readme = tmp_path / "README.md"
    before = (
        "# Us\n<!-- report:arms -->old<!-- /report:arms -->\nand\n<!-- report:arms:2 --><!-- /report:arms:2 -->\nend\n"
    )
    readme.write_text(before)
    assert invoke(["report", str(tmp_path), "--into", str(readme)]) == 0
    after = readme.read_text()
    assert after == (
        "# Us\n<!-- report:arms -->\n| a |\n| --- |\n| 1 |\n<!-- /report:arms -->\nand\n"
        "<!-- report:arms:2 -->\n| b |\n| --- |\n| 2 |\n<!-- /report:arms:2 -->\nend\n"
    )
    assert filled(after, tmp_path) == filled(after.replace("| 1 |", "| 99 |"), tmp_path) == after
    for text, problem in (
        ("<!-- report:arms -->", "only 0 are closed"),
        ("<!-- report:gone --><!-- /report:gone -->", "gone.json: cannot be read"),
        ("<!-- report:arms:3 --><!-- /report:arms:3 -->", "has 2 tables, no 3"),
    ):
        with pytest.raises(InputError, match=problem):
            filled(text, tmp_path)
    assert invoke(["report", str(tmp_path), "--into", str(tmp_path / "none.md")]) == 2
    assert "no such file" in capsys.readouterr().err


def test_the_readme_has_the_tables_of_its_committed_reports() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert filled(readme, ROOT / "docs" / "reports") == readme, "run: engrain report docs/reports --into README.md"


# A browser

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ACTS = """
const said = [], table = document.querySelector("table");
const column = (place) => [...table.tBodies[0].rows].map((row) => row.cells[place].textContent.slice(0, 8));
for (const place of [1, 1, 1, 2, 3, 0]) {
  const heading = table.tHead.rows[0].cells[place];
  heading.querySelector("button").click();
  said.push([heading.getAttribute("aria-sort"), column(place)]);
}
const root = document.documentElement, ground = () => getComputedStyle(document.body).backgroundColor;
const before = ground();
document.getElementById("theme").click();
const after = ground();
root.style.width = "280px";
document.body.dataset.said = JSON.stringify({
  sorted: said, before, after, title: document.title, loaded: performance.getEntriesByType("resource").length,
  width: document.body.scrollWidth, box: document.querySelector(".scroll").scrollWidth,
  order: table.querySelectorAll("[aria-sort=ascending], [aria-sort=descending]").length,
});
"""


def browse(page: Path, *options: str) -> tuple[str, str]:
    """The page's DOM after its scripts, and what the browser logged."""
    assert BROWSER is not None
    command = [
        *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
        *("--enable-logging=stderr", f"--user-data-dir={page.parent / 'browser'}", "--virtual-time-budget=2000"),
        *(*options, "--dump-dom", page.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, done.stderr


@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_a_browser_shows_sorts_and_turns_dark_without_a_word_of_complaint(tmp_path: Path) -> None:
    write_report(tmp_path, {}, REPORT)
    dom, log = browse(tmp_path / "report.html")
    assert "CONSOLE" not in log and "data-place" in dom  # our script ran under its own policy

    page = re.sub(r"<meta http-equiv.*?>\n", "", html(REPORT))
    (tmp_path / "acted.html").write_text(page.replace("</body>", f"<script>{ACTS}</script></body>"))
    dom, log = browse(tmp_path / "acted.html", "--blink-settings=preferredColorScheme=1")
    assert "CONSOLE" not in log
    found = re.search(r'data-said="(.*?)"', dom)
    assert found
    said = json.loads(unescape(found[1]))
    success, tokens, seconds, arms = (said["sorted"][place] for place in (0, 3, 4, 5))
    assert success == ["ascending", ["9.5 [5.0", "66.1 [62", "98 %", "—"]]
    assert said["sorted"][1] == ["descending", ["98 %", "66.1 [62", "9.5 [5.0", "—"]]
    assert said["sorted"][2] == ["none", ["66.1 [62", "9.5 [5.0", "98 %", "—"]]
    assert tokens == ["ascending", ["987", "1,234", "30,100", "n/a"]]
    assert seconds[1][:2] == ["0.144", "1.5"] and set(seconds[1][2:]) == {"n/a", "not appl"}
    assert arms == ["ascending", ["<script>", "lora", "prompt", "teacher"]] and said["order"] == 1
    assert said["before"] == "rgb(255, 255, 255)" and said["after"] == "rgb(20, 23, 28)"
    assert said["title"] == REPORT.title and said["loaded"] == 0
    assert said["width"] <= 280 < said["box"]  # the table scrolls in its box, not the page

    (tmp_path / "broken.html").write_text(html(REPORT).replace("</body>", "<script>alert(1)</script></body>"))
    _, log = browse(tmp_path / "broken.html")
    assert "CONSOLE" in log and "Content Security Policy" in log  # a script of others is refused, and we would see it
