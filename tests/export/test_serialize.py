import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import psutil
import pytest

from export.graph import ExportConfig, build_graph
from export.serialize import EXTERNAL_DATA_BYTES, _varint, write_model
from tests.export.graphs import checkpoint_of, graph_of, run_graph
from tests.tiny import tiny_checkpoint


@pytest.mark.parametrize(("name", "int8"), [("vit", False), ("classifier", True), ("llama", False)])
def test_file_holds_what_the_model_holds(name: str, int8: bool, tmp_path: Path) -> None:
    model = graph_of(name, int8)
    write_model(model, tmp_path / "ours.onnx")
    ir.save(model, tmp_path / "theirs.onnx")
    onnx.checker.check_model(str(tmp_path / "ours.onnx"))
    ours, theirs = (onnx.load(tmp_path / f"{who}.onnx") for who in ("ours", "theirs"))
    weights = [{t.name: t for t in proto.graph.initializer} for proto in (ours, theirs)]
    assert weights[0].keys() == weights[1].keys()
    for key, tensor in weights[0].items():
        assert tensor.raw_data == weights[1][key].raw_data
        assert (tensor.dims, tensor.data_type) == (weights[1][key].dims, weights[1][key].data_type)
    for proto in (ours, theirs):
        proto.graph.ClearField("initializer")
    assert ours == theirs


def test_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = graph_of("vit")
    before = {name: v.const_value for name, v in model.graph.initializers.items()}
    write_model(model, tmp_path / "model.onnx")
    assert {name: v.const_value for name, v in model.graph.initializers.items()} == before


def test_large_weights_go_beside_the_graph(tmp_path: Path) -> None:
    model = graph_of("vit")
    write_model(model, tmp_path / "whole.onnx")
    write_model(model, tmp_path / "split.onnx", external_over=1000)
    assert (tmp_path / "split.onnx.data").stat().st_size > 1000
    sample = checkpoint_of("vit").signature.sample(2)
    for name, array in run_graph(tmp_path / "whole.onnx", sample).items():
        np.testing.assert_array_equal(run_graph(tmp_path / "split.onnx", sample)[name], array)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_model_past_what_protobuf_holds(tmp_path: Path) -> None:
    """2.6 GB of weights, most of them a vocabulary: the last rows lie beyond 2 GiB of the file."""
    if shutil.disk_usage(tmp_path).free < 12e9:
        pytest.skip("less than 12 GB of disk are free")
    if psutil.virtual_memory().available < 16e9:
        pytest.skip("less than 16 GB of memory are free")
    rows = 1_250_000
    checkpoint = tiny_checkpoint("bert", vocab_size=rows, hidden_size=512, num_hidden_layers=1)
    sample = checkpoint.signature.sample(3, 17, ragged=True)
    sample["input_ids"][0, -3:] = rows - 1
    expected = checkpoint.predict(sample)
    path = tmp_path / "model.onnx"
    write_model(build_graph(checkpoint, ExportConfig()), path)
    del checkpoint
    assert path.stat().st_size < 10e6
    assert path.with_name("model.onnx.data").stat().st_size > EXTERNAL_DATA_BYTES
    onnx.checker.check_model(str(path))
    for name, found in run_graph(path, sample, optimize=True).items():
        # rounding over sums of 512; a row from the wrong place would be off by about 1
        np.testing.assert_allclose(found, expected[name], atol=1e-5)
    path.with_name("model.onnx.data").unlink()


def test_lengths_are_written_as_protobuf_wants_them() -> None:
    assert [_varint(n) for n in (0, 127, 128, 300)] == [b"\0", b"\x7f", b"\x80\x01", b"\xac\x02"]
