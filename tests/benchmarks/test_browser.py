"""The page in a real browser: no console error, plots drawn, switches that work."""

import os
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
const raw = [...document.querySelectorAll(".raw")];
root.dataset.raw = raw.filter((button) => !button.hidden && button.dataset.parts).length;
const save = URL.createObjectURL;
URL.createObjectURL = (blob) => { root.dataset.bytes = blob.size; return save(blob); };
HTMLAnchorElement.prototype.click = () => {};  // a download would keep the browser from ending
raw[0].click();
root.dataset.downloadable = JSON.parse(document.getElementById("data").textContent).schema;
"""


# A window of the browser has a least width, a frame in it none.
FRAME = """<!doctype html>
<style>body {{ margin: 0 }} iframe {{ border: 0; width: {0}px; height: 9000px }}</style>
<iframe src="page.html" onload="Object.assign(document.documentElement.dataset,
  this.contentDocument.documentElement.dataset)"></iframe>"""


def browse(directory: Path, width: int, *wanted: str) -> subprocess.CompletedProcess[str]:
    """Open the page in its frame, in a browser that leaves what is wanted."""
    assert CHROMIUM is not None
    return subprocess.run(
        [
            *(CHROMIUM, *FLAGS, *wanted, f"--user-data-dir={directory / 'profile'}"),
            *("--allow-file-access-from-files", f"--window-size={max(width, 500)},9000"),
            (directory / "frame.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


def open_page(page: str, directory: Path, width: int) -> tuple[dict[str, str], str]:
    """Return the data attributes of the page after its scripts, and the browser's log."""
    (directory / "page.html").write_text(page, encoding="utf-8")
    (directory / "frame.html").write_text(FRAME.format(width), encoding="utf-8")
    done = browse(directory, width, "--dump-dom")
    root = re.search(r"<html[^>]*>", done.stdout)
    assert root is not None
    return dict(re.findall(r'data-([a-z]+)="([^"]*)"', root.group())), done.stderr


@pytest.mark.parametrize("width", [1440, 390])
def test_the_page_works_in_chromium(tmp_path: Path, width: int) -> None:
    page = render_html(make_report()).replace("</body>", f"<script>{PRESS}</script></body>")
    found, log = open_page(page, tmp_path, width)
    assert "CONSOLE" not in log
    assert found["ready"] == "1"
    assert found["plots"] == "8"  # of the two scatter plots, the one that fits
    assert found["ascending"].split(",") == ["broken", "int8 pruned", "int8", "float", "PyTorch"]
    assert found["descending"].split(",") == ["PyTorch", "float", "int8", "int8 pruned", "broken"]
    assert found["last"] == "broken"  # what was not measured stays at the end
    assert found["switched"] == "true"
    assert found["overflow"] == "false"
    assert found["raw"] == "7"
    assert int(found["bytes"]) > 1000
    picture = (
        Path(os.environ.get("ONNXPRESS_ARTEFACTS", tmp_path)).resolve() / f"report-{width}.png"
    )
    picture.parent.mkdir(parents=True, exist_ok=True)
    browse(tmp_path, width, f"--screenshot={picture}")
    assert picture.stat().st_size > 50_000
    assert found["downloadable"] == "2"


def test_a_script_error_would_be_noticed(tmp_path: Path) -> None:
    page = render_html(make_report()).replace('"use strict";', '"use strict"; undefined_name;')
    found, log = open_page(page, tmp_path, 1440)
    assert "CONSOLE" in log
    assert "ready" not in found
