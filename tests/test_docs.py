"""The README's and the guide's commands, run as they stand through a real bash, on a small model."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import SENTENCES, tiny_checkpoint, write, write_sentence_encoder

ROOT = Path(__file__).parents[1]
MODEL = "sentence-transformers/all-MiniLM-L6-v2"


def commands(name: str) -> list[str]:
    """Return the lines after `$ ` in a document's console blocks that call a program of ours."""
    blocks = re.findall(r"```console\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)
    lines = [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]
    return [line for line in lines if not line.startswith(("make ", "git ", "cd "))]


def write_data(folder: Path) -> None:
    """Write the files that the commands call their own."""
    reviews = "".join(f"{text}\t{len(text) % 2}\n" for text in SENTENCES)
    (folder / "reviews.tsv").write_text(f"sentence\tlabel\n{reviews}")
    (folder / "play.txt").write_text("\n".join(SENTENCES))
    config = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}
    (folder / "gpt.json").write_text(json.dumps(config))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["README.md", "docs/guide.md"])
def test_documented_commands_work(name: str, tmp_path: Path) -> None:
    lines = commands(name)
    assert lines
    write_sentence_encoder(tmp_path / "tiny", num_hidden_layers=4)
    write(tiny_checkpoint("llama", "text-generation"), tmp_path / "my-decoder")
    write_data(tmp_path)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for line in lines:
        # the small model in place of the real one, which takes minutes; all else as documented
        small = line.replace(MODEL, "tiny")
        small = re.sub(r"--steps \d+", "--steps 2", small)
        small = re.sub(r"--data (\S+)", r"--data \1 --max-length 32", small)
        small = re.sub(r"--hidden \d+", "--hidden 16", re.sub(r"--ffn [1-9]\d*", "--ffn 32", small))
        small = small.replace("--ffn 0", "--round-to 8 --ffn 0").replace("8x128", "8x32")
        if "benchmark report" in small and "--shapes" not in small:
            small += " --shapes 1x8,4x16 --max-time 1"
        done = subprocess.run(
            ["bash", "-c", small], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        target = re.search(r"-o (\S+)", line)
        if target:
            assert any((tmp_path / target[1]).iterdir()), line


def test_the_readmes_headline_is_what_the_report_says() -> None:
    def rows(text: str) -> dict[str, list[str]]:
        """Return the first table's cells, without what is in parentheses, by the row's name."""
        lines = itertools.takewhile(
            lambda x: x.startswith("|"), text[text.index("| Variant") :].splitlines()
        )
        cells = [[re.sub(r" \(.*", "", c.strip()) for c in x.split("|")[1:-1]] for x in lines]
        return {name: rest for name, *rest in cells[2:]}

    told = rows((ROOT / "README.md").read_text())
    report = rows(
        (ROOT / "docs" / "results" / "headline" / "minilm-fast" / "report.md").read_text()
    )
    assert len(told) == len(report)
    for name, cells in told.items():
        assert set(cells) <= set(report[name]), name


def test_exit_codes_are_documented() -> None:
    from calib_data import errors
    from onnxpress.cli import onnxpress_group

    guide = (ROOT / "docs" / "guide.md").read_text()
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, errors.OnnxPressError):
            assert f"| {kind.exit_code} |" in guide
            assert re.search(rf"\b{kind.exit_code}\b", onnxpress_group.help or "")


def test_no_document_names_a_place_on_a_machine() -> None:
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("recipes/*")]:
        assert not re.search(r"(?<![\w.])/(home|root|work|tmp)/", path.read_text()), path
