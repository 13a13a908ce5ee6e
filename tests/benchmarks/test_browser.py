"""The page in a real browser: no console error, plots drawn, switches that work."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks.render import render_html
from tests.benchmarks.reports import make_report

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-sync", "--disable-background-networking", "--disable-component-update"),
    *("--enable-logging=stderr", "--v=0"),
]

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")

# Presses every button once, as a reader would, and leaves what came of it for the test to read.
PRESS = """
const root = document.documentElement;
const names = () => [...document.querySelector("tbody").rows].map((row) => row.cells[0].dataset.key);
const [, latency, , size] = document.querySelectorAll("thead button");
size.click(); root.dataset.ascending = names();
size.click(); root.dataset.descending = names();
latency.click(); latency.click(); root.dataset.last = names().at(-1);
const dark = getComputedStyle(document.body).backgroundColor;
document.getElementById("theme").click();
root.dataset.switched = root.dataset.theme && getComputedStyle(document.body).backgroundColor !== dark;
root.dataset.overflow = root.scrollWidth > root.clientWidth;
root.dataset.downloadable = JSON.parse(document.getElementById("data").textContent).schema;
"""


def open_page(page: str, directory: Path, width: int) -> tuple[dict[str, str], str]:
    """Return the data attributes of the page after its scripts, and the browser's log."""
    # A window of the browser has a least width; a frame has none.
    (directory / "page.html").write_text(page, encoding="utf-8")
    assert CHROMIUM is not None
    done = subprocess.run(
        [
            *(CHROMIUM, *FLAGS, f"--user-data-dir={directory / 'profile'}"),
            *(f"--window-size={width},1000", "--dump-dom", (directory / "page.html").as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    root = re.search(r"<html[^>]*>", done.stdout)
    assert root is not None
    return dict(re.findall(r'data-([a-z]+)="([^"]*)"', root.group())), done.stderr


@pytest.mark.parametrize("width", [1440, 500])
def test_the_page_works_in_chromium(tmp_path: Path, width: int) -> None:
    page = render_html(make_report()).replace("</body>", f"<script>{PRESS}</script></body>")
    found, log = open_page(page, tmp_path, width)
    assert "CONSOLE" not in log
    assert found["ready"] == "1"
    assert found["plots"] == "5"  # of the two scatter plots, the one that fits
    assert found["ascending"].split(",") == ["broken", "int8 pruned", "int8", "float", "PyTorch"]
    assert found["descending"].split(",") == ["PyTorch", "float", "int8", "int8 pruned", "broken"]
    assert found["last"] == "broken"  # what was not measured stays at the end
    assert found["switched"] == "true"
    assert found["overflow"] == "false"
    assert found["downloadable"] == "1"


def test_a_script_error_would_be_noticed(tmp_path: Path) -> None:
    page = render_html(make_report()).replace('"use strict";', '"use strict"; undefined_name;')
    found, log = open_page(page, tmp_path, 1440)
    assert "CONSOLE" in log
    assert "ready" not in found
