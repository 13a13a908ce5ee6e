import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from transformers import AutoTokenizer

from calib_data.errors import ModelError
from compress.files import sha256_file
from compress.loading import open_checkpoint
from export import bundle as bundles
from export.bundle import OnnxBundle, open_bundle, write_bundle
from export.graph import ExportConfig, build_graph
from export.sessions import open_session, run
from tests.export.graphs import checkpoint_of, graph_of
from tests.tiny import SENTENCES, write_sentence_encoder


def make(folder: Path, name: str = "bert") -> OnnxBundle:
    folder.mkdir()
    checkpoint = checkpoint_of(name).with_stage("source", model="tiny")
    return write_bundle(graph_of(name), checkpoint, ExportConfig().to_json(), folder)


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_bundle_opens_as_it_was_written(name: str, tmp_path: Path) -> None:
    made, checkpoint = make(tmp_path / "out", name), checkpoint_of(name)
    bundle = open_bundle(tmp_path / "out")
    assert bundle == made
    assert bundle.task == checkpoint.task
    assert bundle.max_length == checkpoint.max_length
    assert bundle.signature == checkpoint.signature
    assert bundle.manifest["sha256"] == sha256_file(bundle.model_path)
    assert [entry["stage"] for entry in bundle.lineage] == ["source", "export"]
    assert ExportConfig.from_json(bundle.lineage[-1]["settings"]) == ExportConfig()
    assert bundle.size_bytes == bundle.model_path.stat().st_size
    session = open_session(bundle.model_path)
    sample = bundle.signature.sample(2)
    assert set(run(session, sample)) == set(bundle.signature.outputs)


def test_tokenizer_is_usable(tmp_path: Path) -> None:
    bundle = make(tmp_path / "out")
    expected = checkpoint_of("bert").processor(SENTENCES[:3], padding=True)["input_ids"]
    assert bundle.processor(SENTENCES[:3], padding=True)["input_ids"] == expected
    assert bundle.processor.model_max_length == 64
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(SENTENCES[0])["input_ids"]


def test_images_without_a_processor(tmp_path: Path) -> None:
    assert make(tmp_path / "out", "vit").processor == checkpoint_of("vit").processor


def test_lineage_is_in_the_graph(tmp_path: Path) -> None:
    bundle = make(tmp_path / "out")
    stored = {p.key: p.value for p in onnx.load(bundle.model_path).metadata_props}
    assert json.loads(stored["onnxpress.lineage"]) == bundle.lineage


def test_weights_go_beside_a_graph_that_is_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make(tmp_path / "whole")
    monkeypatch.setattr(bundles, "EXTERNAL_DATA_BYTES", 10_000)
    split = make(tmp_path / "split")
    data = split.path / "model.onnx.data"
    assert not (whole.path / "model.onnx.data").exists()
    assert data.stat().st_size > 4 * split.model_path.stat().st_size / 5
    assert split.size_bytes == split.model_path.stat().st_size + data.stat().st_size
    assert split.size_bytes == pytest.approx(whole.size_bytes, rel=0.05)
    sample = split.signature.sample(2)
    found, expected = (run(open_session(b.model_path), sample) for b in (split, whole))
    for name, value in expected.items():
        assert np.array_equal(found[name], value)


def test_factory_examples_are_kept(tmp_path: Path) -> None:
    checkpoint = open_checkpoint("tests.compress.factories:mixer")
    write_bundle(build_graph(checkpoint, ExportConfig()), checkpoint, {}, tmp_path)
    signature = open_bundle(tmp_path).signature
    assert all(a.equal(b) for a, b in zip(signature.examples, checkpoint.signature.examples))
    sample, expected = signature.sample(3), checkpoint.signature.sample(3)
    assert all(sample[name].equal(expected[name]) for name in expected)


def test_sentence_encoder_keeps_its_limit(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_sentence_encoder(tmp_path / "model"))
    (tmp_path / "out").mkdir()
    made = write_bundle(graph_of("bert"), checkpoint, {}, tmp_path / "out")
    assert made.max_length == 48
    assert open_bundle(tmp_path / "out").processor.model_max_length == 48


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 99}, "newer than 1"),
        ({"format": None}, "manifest"),
        ({"format": "one"}, "manifest"),
        (None, "not a bundle's manifest"),
    ],
)
def test_foreign_manifests_are_refused(
    changes: dict[str, Any] | None, message: str, tmp_path: Path
) -> None:
    path = make(tmp_path / "out").path / "onnxpress.json"
    values = {} if changes is None else json.loads(path.read_text()) | changes
    path.write_text(json.dumps(values))
    with pytest.raises(ModelError, match=message) as caught:
        open_bundle(tmp_path / "out")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["model.onnx", "onnxpress.json"])
def test_foreign_directories_are_refused(missing: str, tmp_path: Path) -> None:
    (make(tmp_path / "out").path / missing).unlink()
    with pytest.raises(ModelError, match="is no ONNX bundle"):
        open_bundle(tmp_path / "out")
    with pytest.raises(ModelError, match="is no ONNX bundle"):
        open_bundle(tmp_path / "absent")
