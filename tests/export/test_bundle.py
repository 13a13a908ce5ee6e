import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from transformers import AutoTokenizer

from calib_data.errors import ModelError
from compress.checkpoint import Checkpoint
from compress.files import sha256_file
from compress.loading import open_checkpoint
from export import bundle as bundles
from export.bundle import OnnxBundle, open_bundle, read_graph, write_bundle
from export.graph import ExportConfig, build_graph
from export.sessions import open_session, run
from tests.export.graphs import checkpoint_of, graph_of
from tests.tiny import SENTENCES, write_sentence_encoder


def make(folder: Path, *names: str) -> OnnxBundle:
    """Write a bundle of the named tiny models, each a graph; the first is called `model`."""
    folder.mkdir()
    names = names or ("bert",)
    graphs = [
        ("model" if name == names[0] else name, checkpoint_of(name), graph_of(name))
        for name in names
    ]
    checkpoint = checkpoint_of(names[0]).with_stage("source", model="tiny")
    return write_bundle(graphs, checkpoint, ExportConfig().to_json(), folder)


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_bundle_opens_as_it_was_written(name: str, tmp_path: Path) -> None:
    made, checkpoint = make(tmp_path / "out", name), checkpoint_of(name)
    bundle = open_bundle(tmp_path / "out")
    assert bundle == made
    assert bundle.task == checkpoint.task
    assert bundle.max_length == checkpoint.max_length
    assert bundle.signature == checkpoint.signature
    assert bundle.graph.output == checkpoint.output
    assert bundle.graph.files["model.onnx"].sha256 == sha256_file(bundle.graph.path)
    assert [entry["stage"] for entry in bundle.lineage] == ["source", "export"]
    assert ExportConfig.from_json(bundle.lineage[-1]["settings"]) == ExportConfig()
    assert bundle.size_bytes == bundle.graph.path.stat().st_size
    bundle.verify()
    session = open_session(bundle.graph.path)
    sample = bundle.signature.sample(2)
    assert set(run(session, sample)) >= set(bundle.signature.outputs)


def test_bundle_of_several_graphs(tmp_path: Path) -> None:
    make(tmp_path / "out", "bert", "vit")
    bundle = open_bundle(tmp_path / "out")
    assert {name: graph.path.name for name, graph in bundle.graphs.items()} == {
        "model": "model.onnx",
        "vit": "vit.onnx",
    }
    assert bundle.graphs["vit"].signature == checkpoint_of("vit").signature
    assert bundle.graphs["vit"].output == "logits"
    assert bundle.signature == checkpoint_of("bert").signature
    sizes = [graph.path.stat().st_size for graph in bundle.graphs.values()]
    assert [graph.size_bytes for graph in bundle.graphs.values()] == sizes
    assert bundle.size_bytes == sum(sizes)


def test_bundle_without_a_whole_model_names_its_graphs(tmp_path: Path) -> None:
    path = make(tmp_path / "out", "bert", "vit").path / "onnxpress.json"
    manifest = json.loads(path.read_text())
    del manifest["graphs"]["model"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(ModelError, match="no graph that is the whole model, but vit"):
        assert open_bundle(tmp_path / "out").signature


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
    stored = {p.key: p.value for p in onnx.load(bundle.graph.path).metadata_props}
    assert json.loads(stored["onnxpress.lineage"]) == bundle.lineage


def test_weights_go_beside_a_graph_that_is_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make(tmp_path / "whole", "bert", "vit")
    monkeypatch.setattr(bundles, "EXTERNAL_DATA_BYTES", 10_000)
    split = make(tmp_path / "split", "bert", "vit")
    for name, checkpoint in (("model", checkpoint_of("bert")), ("vit", checkpoint_of("vit"))):
        small, large = split.graphs[name], whole.graphs[name]
        data = split.path / f"{name}.onnx.data"
        assert set(small.files) == {f"{name}.onnx", data.name}
        assert set(large.files) == {f"{name}.onnx"}
        assert data.stat().st_size > 2 * small.size_bytes / 3
        assert small.size_bytes == small.path.stat().st_size + data.stat().st_size
        assert small.size_bytes == pytest.approx(large.size_bytes, rel=0.05)
        sample = checkpoint.signature.sample(2)
        found, expected = (run(open_session(graph.path), sample) for graph in (small, large))
        for output, value in expected.items():
            assert np.array_equal(found[output], value)
    open_bundle(split.path).verify()


def test_factory_examples_are_kept(tmp_path: Path) -> None:
    checkpoint = open_checkpoint("tests.compress.factories:mixer")
    graph = build_graph(checkpoint, ExportConfig())
    write_bundle([("model", checkpoint, graph)], checkpoint, {}, tmp_path)
    signature = open_bundle(tmp_path).signature
    assert all(a.equal(b) for a, b in zip(signature.examples, checkpoint.signature.examples))
    sample, expected = signature.sample(3), checkpoint.signature.sample(3)
    assert all(sample[name].equal(expected[name]) for name in expected)


def test_sentence_encoder_keeps_its_limit(tmp_path: Path) -> None:
    checkpoint: Checkpoint = open_checkpoint(write_sentence_encoder(tmp_path / "model"))
    (tmp_path / "out").mkdir()
    graphs = [("model", checkpoint, graph_of("bert"))]
    made = write_bundle(graphs, checkpoint, {}, tmp_path / "out")
    assert made.max_length == 48
    assert open_bundle(tmp_path / "out").processor.model_max_length == 48


# --- what is not as it was written ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 99}, "newer than 1"),
        ({"format": None}, "manifest"),
        ({"format": "one"}, "manifest"),
        ({"graphs": []}, "manifest"),
        ({"graphs": {"model": {}}}, "damaged: KeyError"),
        ({"graphs": {"../model": {"signature": {}, "output": "", "files": {}}}}, "outside"),
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


def test_foreign_directories_are_refused(tmp_path: Path) -> None:
    (make(tmp_path / "out").path / "onnxpress.json").unlink()
    with pytest.raises(ModelError, match="is no ONNX bundle"):
        open_bundle(tmp_path / "out")
    with pytest.raises(ModelError, match="is no ONNX bundle"):
        open_bundle(tmp_path / "absent")


@pytest.mark.parametrize("name", ["vit.onnx", "vit.onnx.data"])
def test_files_that_are_missing_cut_or_changed_are_noticed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundles, "EXTERNAL_DATA_BYTES", 10_000)
    path = make(tmp_path / "out", "bert", "vit").path / name
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelError, match=f"{name} was changed after its export"):
        open_bundle(tmp_path / "out").verify()
    path.write_bytes(content[:-5])
    with pytest.raises(ModelError, match=f"{name} has .* bytes, and .* were written"):
        open_bundle(tmp_path / "out")
    path.unlink()
    with pytest.raises(ModelError, match=f"{name} is missing"):
        open_bundle(tmp_path / "out")


def moved(graph: Path, location: str) -> Path:
    """Let a graph look for its external data elsewhere."""
    model = onnx.load(graph, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    onnx.save(model, graph)
    return graph


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("../model.onnx.data", "outside"),
        ("{folder}/model.onnx.data", "outside"),
        ("link.data", "outside"),
        ("absent.data", "absent.data, which is missing"),
        ("short.data", "needs"),
    ],
)
def test_external_data_must_be_whole_and_in_the_bundle(
    location: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundles, "EXTERNAL_DATA_BYTES", 10_000)
    path = make(tmp_path / "out").graph.path
    read_graph(path)
    outside = tmp_path / "model.onnx.data"
    outside.write_bytes((path.parent / "model.onnx.data").read_bytes())
    (path.parent / "link.data").symlink_to(outside)
    (path.parent / "short.data").write_bytes(outside.read_bytes()[:1000])
    moved(path, location.format(folder=tmp_path))
    with pytest.raises(ModelError, match=message) as caught:
        read_graph(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match="cannot be opened") as caught:
        open_session(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"not a graph", None], ids=["empty", "noise", "cut"])
def test_what_is_no_graph_is_one_line(content: bytes | None, tmp_path: Path) -> None:
    path = make(tmp_path / "out").graph.path
    path.write_bytes(path.read_bytes()[:-5000] if content is None else content)
    with pytest.raises(ModelError, match="cannot be read as a graph") as caught:
        read_graph(path)
    assert "\n" not in str(caught.value)
