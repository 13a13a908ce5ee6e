import csv
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.render import (
    render_csv,
    render_html,
    render_markdown,
    render_table,
    write_report,
)
from benchmarks.report import BenchmarkReport, read_report
from tests.benchmarks.reports import make_report

EVIL = "</script><script>alert(1)</script>|`[red]$x_1$"


def renamed(name: str) -> BenchmarkReport:
    report = make_report(f"run {name}")
    variants = [replace(v, name=name) if v.name == "int8" else v for v in report.variants]
    return replace(report, variants=variants)


class Page(HTMLParser):
    """What of a page can load or run something."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "action"):
                self.links.append(value or "")
            if name == "id":
                self.ids.append(value or "")


def test_write_report_makes_files_that_agree(tmp_path: Path) -> None:
    report = make_report()
    write_report(report, tmp_path)
    made = sorted(p.name for p in tmp_path.iterdir())
    assert made == ["report.csv", "report.html", "report.json", "report.md"]
    assert read_report(tmp_path / "report.json") == report


def test_every_figure_is_a_line_of_the_csv() -> None:
    rows = list(csv.DictReader(io.StringIO(render_csv(renamed('a "name", with commas')))))
    named = [row for row in rows if row["variant"] == 'a "name", with commas']
    median = next(r for r in named if r["quantity"] == "typical" and r["workload"] == "8 × 128")
    assert 0.032 < float(median["low"]) < float(median["value"]) < float(median["high"]) < 0.033
    assert median["unit"] == "s"
    assert {"size", "speed-up", "spearman", "spearman, difference"} <= {
        r["quantity"] for r in named
    }
    assert [row["quantity"] for row in rows if row["variant"] == "broken"] == ["size"]


def test_markdown_has_the_figures() -> None:
    text = render_markdown(make_report())
    assert "**int8 pruned is 7.9 × faster than PyTorch at 8 × 128" in text
    assert "| int8 | 32.5 ms | 4.40 × (4.35–4.43) | 24.3 MB | 192.9 MB | 86.51 (−0.21) |" in text
    assert "broken could not be measured: its process was killed" in text
    assert "    onnxpress benchmark report int8 -o out" in text
    for line in text.splitlines():
        if line.startswith("| "):
            assert line.endswith(" |")


def test_markdown_tables_survive_odd_names() -> None:
    rows = [x for x in render_markdown(renamed(EVIL)).splitlines() if x.startswith("| &lt;/script")]
    assert rows
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows[:1]}) == 1
    assert len(re.findall(r"(?<!\\)\|", rows[0])) == 8
    assert "<script" not in "".join(rows)


def test_the_page_loads_nothing_and_is_the_same_each_time() -> None:
    html = render_html(make_report())
    assert not re.search(r"https?://|@import|url\((?!#)", html)
    page = Page(html)
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert not {"link", "iframe", "img", "object"} & set(page.tags) - {"link"}
    # latency, load, resources, and wide and narrow: quality and operators
    assert page.tags.count("svg") == 2 + 2 + 2 + 2 + 2
    assert len(page.ids) == len(set(page.ids))
    assert page.tags.count("caption") == page.tags.count("table") == 7
    assert render_html(make_report()) == html


def test_operators_are_told_the_costliest_first() -> None:
    text = render_markdown(make_report())
    assert "| int8 | MatMulInteger | 16.2 ms | 50 % |" in text
    assert "| int8 | others | 0.444 ms | 1 % |" in text
    assert "int8: 9 on CPUExecutionProvider, 0 copies between devices" in text


def test_plots_take_their_colours_from_the_page() -> None:
    html = render_html(make_report())
    drawn = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    assert "var(--accent)" in drawn
    assert not re.search(r"#[0-9a-f]{6}", re.sub(r"(#m[0-9a-f]+)", "", drawn))
    assert "font-family" not in drawn


def test_a_malicious_name_stays_text() -> None:
    html = render_html(renamed(EVIL))
    assert "<script>alert" not in html
    assert Page(html).tags.count("script") == 2
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert data is not None
    assert json.loads(data.group(1))["variants"][2]["name"] == EVIL


@pytest.mark.parametrize("keep", [["PyTorch"], ["PyTorch", "broken"], ["broken", "int8"]])
def test_sparse_reports_render(keep: list[str]) -> None:
    report = make_report()
    variants = [replace(v, quality=[]) for v in report.variants if v.name in keep]
    baseline = "broken" if keep[0] == "broken" else "PyTorch"
    if baseline == "broken":  # then nothing has a factor
        variants = [
            replace(v, latency=[replace(x, speedup=None, agreement=None) for x in v.latency])
            for v in variants
        ]
    report = replace(report, variants=variants, baseline=baseline, command=None)
    assert "Latency" in render_html(report)
    assert "Quality" not in render_markdown(report)


def test_the_terminal_table_shows_all_variants() -> None:
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(render_table(renamed("[red]int8")))
    text = console.export_text()
    for part in ("7.9 ×", "[red]int8", "24.3 MB", "broken could not be measured"):
        assert part in text


def test_training_curves_are_drawn_once_a_stage() -> None:
    report = make_report()
    assert "<h2>Training</h2>" not in render_html(report)
    trained = {"stage": "distill", "metrics": {"curve": [[10, 4.0], [20, 0.25], [30, 0.125]]}}
    variants = [
        replace(v, lineage=[v.lineage[0], trained, *v.lineage[1:]]) if "int8" in v.name else v
        for v in report.variants
    ]
    names = ", ".join(v.name for v in variants if "int8" in v.name)
    assert ", " in names
    page = render_html(replace(report, variants=variants))
    assert f"<figcaption>distill: {names}</figcaption>" in page
    assert re.search(r"from 4\S* to 0.125 in 30 steps", page)
    assert page.count("Training loss of") == 1
    assert len(set(Page(page).ids)) == len(Page(page).ids)
