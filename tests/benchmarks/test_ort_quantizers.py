import json
import sys
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest

import benchmarks.ort_quantizers as program
from benchmarks.confined import Outcome
from benchmarks.ort_quantizers import BASELINE, Entry, entries, judge, judged, made, make
from benchmarks.ort_table import row, table
from benchmarks.quantizers import ORT, OURS, StoredBatches, by_onnxpress, by_onnxruntime, store
from calib_data.batches import Batches
from calib_data.errors import DataError
from calib_data.sources import open_data
from compress.checkpoint import Checkpoint
from compress.loading import open_checkpoint
from export.sessions import open_session, run
from tests.tiny import SENTENCES, SampledBatches, tiny_checkpoint, write_sentence_encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small sentence encoder, data for it, its float graphs, and batches to calibrate with."""
    from export.graph import ExportConfig, build_graph
    from export.serialize import write_model

    path = tmp_path_factory.mktemp("encoder")
    write_sentence_encoder(path / "model")
    lines = [f'"{a}","{b}",{i % 5}' for i, (a, b) in enumerate(pairwise(SENTENCES))]
    (path / "pairs.csv").write_text("\n".join(lines[:12]))
    checkpoint = open_checkpoint(str(path / "model"))
    write_model(build_graph(checkpoint, ExportConfig()), path / "float.onnx")
    examples = open_data(str(path / "pairs.csv"), "sentence1,sentence2,score")
    batches = Batches(examples, checkpoint.processor, batch_size=4, field="text")
    store(batches, dict.fromkeys(checkpoint.signature.names, 0), path / "calibration.npz", 24)
    return path


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Checkpoint:
    return open_checkpoint(str(folder / "model"))


def test_stored_batches_are_the_batches_at_one_length(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint("bert")
    batches = SampledBatches(checkpoint, sequence=16)
    pads = dict.fromkeys(checkpoint.signature.names, 0) | {"input_ids": 7}
    store(batches, pads, tmp_path / "data.npz", 20)
    stored = StoredBatches(tmp_path / "data.npz")
    assert (len(stored), stored.fingerprint) == (len(batches), batches.fingerprint)
    for _ in range(2):  # it is read anew
        for ours, theirs in zip(stored, batches, strict=True):
            assert list(ours) == list(checkpoint.signature.names)
            assert all(ours[name][:, :16].equal(theirs[name]) for name in ours)
            assert all((ours[name][:, 16:] == pads[name]).all() for name in ours)
            assert ours["input_ids"].shape == (4, 20)
    with pytest.raises(DataError, match="the data gives no pixels"):
        store(batches, {"pixels": 0}, tmp_path / "other.npz", 20)


@pytest.mark.parametrize("name", [name for name in ORT if name != "dynamic"])
def test_onnx_runtime_quantizes_our_graph(name: str, folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "new" / "model.onnx"
    by_onnxruntime(folder / "float.onnx", target, folder / "calibration.npz", ORT[name])()
    kinds = {node.op_type for node in onnx.load(target).graph.node}
    assert kinds & {"MatMulInteger", "DynamicQuantizeLinear", "QuantizeLinear"}
    batch = next(StoredBatches(folder / "calibration.npz").arrays())
    expected = run(open_session(folder / "float.onnx"), batch)["sentence_embedding"]
    found = run(open_session(target), batch)["sentence_embedding"]
    assert np.sum(found * expected, axis=1).min() > 0.5
    assert not np.array_equal(found, expected)


def test_a_graph_that_cannot_be_opened_is_a_row(
    folder: Path, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    target = tmp_path / "model.onnx"
    # it takes the Attention of ONNX for the one of its own that it has an int8 version of
    by_onnxruntime(folder / "float.onnx", target, folder / "calibration.npz", ORT["dynamic"])()
    entry = Entry("ort-dynamic", target, {})
    assert judged(entry, tmp_path) is None
    judge(entry, checkpoint, None, tmp_path)
    found = judged(entry, tmp_path)
    assert isinstance(found, str)
    assert "cannot be opened by ONNX Runtime" in found
    assert str(tmp_path) not in found
    assert row("ort-dynamic", target, {}, found, {}, [])["failure"] == found


def test_ours_is_what_the_stage_makes_of_the_same_batches(folder: Path, tmp_path: Path) -> None:
    data = folder / "calibration.npz"
    by_onnxpress(str(folder / "model"), tmp_path / "static", data, OURS["static"])()
    found = open_checkpoint(str(tmp_path / "static"))
    assert found.quantization is not None
    assert found.quantization["scheme"] == "static"
    assert found.lineage[-1]["data"] == StoredBatches(data).fingerprint


def test_a_float_graph_comes_before_what_is_made_of_it() -> None:
    graphs, foreign = {"other": Path("a.onnx")}, {"theirs": Path("b.onnx")}
    every = list(entries("model", Path("data.npz"), Path("out"), graphs, foreign))
    names = [entry.name for entry in every]
    assert names[0] == BASELINE
    assert len(set(names)) == len(names) == 4 + len(OURS) + 3 * len(ORT)
    files = {entry.file for entry in every}
    for entry in every:
        for step in entry.steps.values():
            source = step.args[0]  # type: ignore[attr-defined]
            assert not isinstance(source, Path) or source in files


def test_a_step_that_fails_is_a_row_and_ends_its_graph(tmp_path: Path) -> None:
    entry = Entry("some/graph", tmp_path / "graph.onnx", {"quantize": _fails, "export": _works})
    make(entry, tmp_path, memory=2**33, seconds=60)
    found = made(entry, tmp_path)
    assert list(found) == ["quantize"]
    assert found["quantize"].failure == "ValueError: no such luck"
    once = (tmp_path / "some" / "graph.made.json").stat().st_mtime_ns
    make(entry, tmp_path, memory=2**33, seconds=60)
    assert (tmp_path / "some" / "graph.made.json").stat().st_mtime_ns == once, "tried again"


def _fails() -> object:
    raise ValueError("no such luck")


def _works() -> object:
    return lambda: None


def test_the_table_tells_times_as_shares_and_failures_as_reasons(tmp_path: Path) -> None:
    graph = tmp_path / "int8.onnx"
    graph.write_bytes(bytes(2_000_000))
    rounds = [[0.010, 0.012, 0.011]] * 6
    half = [[0.005, 0.006, 0.0055]] * 6
    times = {"8 × 128": {BASELINE: rounds, "int8": half}}
    outcomes = {"quantize": Outcome(1.5, 2**30)}
    rows = [
        row(BASELINE, graph, {}, 86.72, times, [BASELINE]),
        row("int8", graph, outcomes, 86.5, times, [BASELINE]),
        row("lost", tmp_path / "none.onnx", {"quantize": Outcome(None, 2**33, "out of memory at 8 GB")},
            None, times, [BASELINE]),
    ]  # fmt: skip
    lines = list(table(json.loads(json.dumps(rows)), [BASELINE]))
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|")
    assert lines[2:] == [
        "| ours/float | 86.72 | 2.0 |  |  | 11.00 | 1.00 (1.00–1.00) |",
        "| int8 | 86.50 | 2.0 | 1.5 | 1.00 | 5.50 | 0.50 (0.50–0.50) |",
        "| lost | out of memory at 8 GB |  |  | 8.00 |  |  |",
    ]


@pytest.mark.slow
def test_the_program_makes_judges_and_times(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def two(
        model: str, data: Path, out: Path, graphs: dict[str, Path], foreign: dict[str, Path]
    ) -> Iterator[Entry]:
        yield Entry(BASELINE, graphs["given"], {})
        target = out / "ours" / "int8.onnx"
        making = partial(by_onnxruntime, graphs["given"], target, data, ORT["dynamic-products"])
        yield Entry("ours/int8", target, {"quantize": making})

    monkeypatch.setattr(program, "entries", two)
    pairs, columns = str(folder / "pairs.csv"), "sentence1,sentence2,score"
    words = [str(folder / "model"), "--data", pairs, "--columns", columns, "--eval", pairs]
    words += ["--eval-columns", columns, "--graph", f"given={folder / 'float.onnx'}"]
    words += ["--shapes", "2x8", "--seconds", "0.01", "-o", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["ort_quantizers", *words])
    program.main()
    found = json.loads((tmp_path / "comparison.json").read_text())
    rows = {r["graph"]: r for r in found["rows"]}
    assert rows["ours/int8"]["steps"]["quantize"]["seconds"] > 0
    assert rows["ours/int8"]["bytes"] < 0.6 * rows[BASELINE]["bytes"]
    for r in rows.values():
        assert r["failure"] is None
        assert -100 <= r["quality"] <= 100
        assert r["latency"]["2 × 8"]["median_seconds"] > 0
    table = capsys.readouterr().out
    assert table.count("\n") == 2 + 2
    monkeypatch.setattr(sys, "argv", ["ort_quantizers", *words, "--steps", "make"])
    program.main()
    assert capsys.readouterr().out == table, "what was known is told again"
