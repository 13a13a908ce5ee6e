import json
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from calib_data.errors import DestinationError, ModelError, ParityError
from compress.checkpoint import Checkpoint
from export import publish
from export.bundle import open_bundle
from export.graph import ExportConfig, build_graph
from export.publish import check_bundle, export_onnx
from tests.export.graphs import checkpoint_of, edit, weight_of
from tests.tiny import tiny_checkpoint

CONFIG = ExportConfig()


def broken_graph(checkpoint: Checkpoint, config: ExportConfig) -> ir.Model:
    """Build a graph with one weight that is off by one percent."""
    model = build_graph(checkpoint, config)
    edit(weight_of(model, "vit.layers.1.mlp.fc2"), lambda a: a[3, 4:5].__imul__(1.01))
    return model


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_bundle_is_published_with_its_report(tmp_path: Path) -> None:
    bundle, report = export_onnx(checkpoint_of("vit"), tmp_path / "out", CONFIG)
    assert report.passed
    assert bundle == open_bundle(tmp_path / "out")
    assert names(tmp_path) == ["out"]
    assert names(bundle.path) == ["config.json", "model.onnx", "onnxpress.json", "parity.json"]
    assert json.loads((bundle.path / "parity.json").read_text()) == report.to_json()


def test_failing_gate_publishes_nothing_and_keeps_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = checkpoint_of("vit")
    with monkeypatch.context() as patch:
        patch.setattr(publish, "build_graph", broken_graph)
        with pytest.raises(ParityError, match="first differs at vit") as caught:
            export_onnx(checkpoint, tmp_path / "out", CONFIG)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["out.parity.json"]
    report = json.loads((tmp_path / "out.parity.json").read_text())
    assert report["passed"] is False
    assert report["diverges"].startswith("vit.layers.1.mlp.fc2")

    export_onnx(checkpoint, tmp_path / "out", CONFIG)
    assert names(tmp_path) == ["out"]  # the old report is gone

    before = (tmp_path / "out" / "model.onnx").read_bytes()
    monkeypatch.setattr(publish, "build_graph", broken_graph)
    with pytest.raises(ParityError):
        export_onnx(checkpoint, tmp_path / "out", CONFIG, overwrite=True)
    assert (tmp_path / "out" / "model.onnx").read_bytes() == before


def test_one_failing_graph_of_several_keeps_all_from_being_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_broken(checkpoint: Checkpoint, config: ExportConfig) -> ir.Model:
        model = build_graph(checkpoint, config)
        if "last_hidden_state" in checkpoint.signature.outputs:
            edit(weight_of(model, "backbone.encoder.block.1.layer.1.DenseReluDense.wo"),
                 lambda a: a[3, 4:5].__imul__(1.1))  # fmt: skip
        return model

    monkeypatch.setattr(publish, "build_graph", one_broken)
    with pytest.raises(ParityError):
        export_onnx(tiny_checkpoint("t5", "text2text-generation"), tmp_path / "out", CONFIG)
    assert names(tmp_path) == ["out.parity.json"]
    report = json.loads((tmp_path / "out.parity.json").read_text())
    assert {c["graph"] for c in report["checks"] if not c["passed"]} >= {"encoder_model"}


def test_a_bundle_is_held_against_a_checkpoint(tmp_path: Path) -> None:
    bundle, report = export_onnx(checkpoint_of("vit"), tmp_path / "out", CONFIG)
    assert check_bundle(checkpoint_of("vit"), bundle).passed == report.passed
    with pytest.raises(ModelError, match="holds model; the model becomes encoder_model, decoder_"):
        check_bundle(tiny_checkpoint("t5", "text2text-generation"), bundle)
    bundle.graph.path.write_bytes(bundle.graph.path.read_bytes()[:-1] + b"x")
    with pytest.raises(ModelError, match="changed after its export"):
        check_bundle(checkpoint_of("vit"), bundle)


def test_existing_destination_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unwanted(*_: Any) -> None:
        raise AssertionError("the graph was built for nothing")

    monkeypatch.setattr(publish, "build_graph", unwanted)
    (tmp_path / "out").mkdir()
    with pytest.raises(DestinationError, match="--overwrite"):
        export_onnx(checkpoint_of("vit"), tmp_path / "out", CONFIG)
