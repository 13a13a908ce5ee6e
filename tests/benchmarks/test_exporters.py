from pathlib import Path

import pytest

from benchmarks.exporters import export_plainly, measure
from export.graph import ExportConfig, build_graph
from export.serialize import write_model
from export.sessions import open_session, run
from tests.tiny import tiny_checkpoint


def test_our_graph_is_timed_against_the_plain_one(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint("bert", "feature-extraction")
    plain, ours = tmp_path / "plain.onnx", tmp_path / "ours.onnx"
    export_plainly(checkpoint, plain)
    write_model(build_graph(checkpoint, ExportConfig()), ours)
    sample = checkpoint.signature.sample(3, 7)
    found = next(iter(run(open_session(plain), sample).values()))
    assert found == pytest.approx(checkpoint.predict(sample)["last_hidden_state"], abs=1e-5)
    inputs = {"3 × 7": {name: value.numpy() for name, value in sample.items()}}
    lines = measure([str(plain), str(ours)], inputs, rounds=6, threads=1, seconds=0.01)
    cells = [[cell.strip() for cell in line.split("|")] for line in lines[2:]]
    assert [row[1:3] for row in cells] == [
        ["3 × 7", "plain"],
        ["3 × 7", f"{tmp_path.name}/ours.onnx"],
    ]
    assert cells[0][4] == "1.000"
    assert float(cells[1][3]) > 0
