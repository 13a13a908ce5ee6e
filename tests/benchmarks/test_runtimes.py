import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, save

from benchmarks.config import BenchmarkConfig
from benchmarks.measure import benchmark
from benchmarks.runtimes import RUNTIMES, Place
from benchmarks.summary import notes
from benchmarks.worker import Variant
from calib_data.errors import ConfigError, ModelError
from onnxpress.cli import onnxpress_group
from tests.tiny import tiny_checkpoint, write, write_sentence_encoder


def write_graph(directory: Path) -> Path:
    """Write model.onnx: output = 2 × x."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "g", [x], [y])
    save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10),
        directory / "model.onnx",
    )
    return directory


@pytest.mark.parametrize("name", ["model.onnx", ""])
def test_a_graph_opens_from_a_file_and_a_directory(tmp_path: Path, name: str) -> None:
    loaded = RUNTIMES["onnx"].open(str(write_graph(tmp_path) / name), Place())
    feed = loaded.prepare({"x": np.ones((2, 3), np.float32), "labels": np.zeros(2)})
    assert list(feed) == ["x"]
    assert loaded.collect(loaded.run(feed))["y"].tolist() == [[2, 2, 2]] * 2
    assert loaded.providers == ("CPUExecutionProvider",)


def test_a_graph_in_half_precision_takes_the_sample_of_the_others(tmp_path: Path) -> None:
    path = tmp_path / "half.onnx"
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT16, ["batch", 2]) for n in "xy"]
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])], "g", [value[0]], [value[1]]
    )
    save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)]), path)
    loaded = RUNTIMES["onnx"].open(str(path), Place())
    sample = np.array([[1.0, 2.5]], np.float32)
    (found,) = loaded.collect(loaded.run(loaded.prepare({"x": sample}))).values()
    assert found.dtype == np.float16
    assert found.tolist() == sample.tolist()


def test_what_is_not_there_is_told_before_measuring(tmp_path: Path) -> None:
    for runtime in ("onnx", "pytorch"):
        with pytest.raises(ModelError):
            benchmark([Variant("missing", str(tmp_path / "missing"), runtime)])


def test_opening_a_graph_imports_no_torch(tmp_path: Path) -> None:
    """The memory of a graph's worker is a figure of the report; PyTorch would be 200 MB of it."""
    code = (
        "import sys; from benchmarks.runtimes import RUNTIMES, Place; "
        f"RUNTIMES['onnx'].open({str(write_graph(tmp_path))!r}, Place()); "
        "print(*{'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not done.stdout.strip()


def test_a_checkpoint_and_its_bundle_are_measured_alike(tmp_path: Path) -> None:
    from compress.loading import open_checkpoint
    from export.graph import ExportConfig
    from export.publish import export_onnx

    source = write_sentence_encoder(tmp_path / "source")
    export_onnx(open_checkpoint(str(source)), tmp_path / "bundle", ExportConfig())
    (tmp_path / "pairs.tsv").write_text(
        "the cat sat\ta cat sat\t4.5\na red bird\tone python module\t0.5\nis it blue\tgreen\t2\n"
    )
    report = benchmark(
        [
            Variant("PyTorch", str(source), "pytorch"),
            Variant("graph", str(tmp_path / "bundle"), "onnx"),
        ],
        config=BenchmarkConfig(
            shapes=((2, 8),),
            rounds=8,
            seconds=0.01,
            warm_up_seconds=0.1,
            threads=(1,),
            precision=9,
            eval=str(tmp_path / "pairs.tsv"),
            columns="text,text_pair,score",
        ),
    )
    base, graph = report.variants
    assert (base.status, graph.status) == ("ok", "ok"), graph.reason
    assert graph.latency[0].agreement == pytest.approx(1, abs=1e-4)
    assert {x.metric: x.value for x in graph.quality} == pytest.approx(
        {x.metric: x.value for x in base.quality}, abs=1e-3
    )
    assert graph.quality[0].metric == "spearman"
    assert graph.quality[0].interval is not None
    assert graph.providers == ["CPUExecutionProvider"]
    assert set(graph.sha256) == {"model.onnx"}
    assert str(tmp_path) not in str(report.to_json())


def test_a_model_with_a_tokenizer_of_its_own_is_judged_by_that(tmp_path: Path) -> None:
    from compress.checkpoint import save_checkpoint
    from compress.loading import open_checkpoint
    from compress.vocabulary import prune_vocabulary

    source = write_sentence_encoder(tmp_path / "source")
    pairs = [("the cat sat", "a cat sat", 4.5), ("a red bird", "one bird", 0.5), ("blue", "red", 2)]
    lines = "".join(f"{a}\t{b}\t{score}\n" for a, b, score in pairs)
    (tmp_path / "pairs.tsv").write_text(lines)
    texts = [text for a, b, _ in pairs for text in (a, b)]
    small = prune_vocabulary(open_checkpoint(str(source)), texts).checkpoint
    (tmp_path / "small").mkdir()
    save_checkpoint(small, tmp_path / "small")
    assert len(small.processor) < len(open_checkpoint(str(source)).processor)
    names = ("source", "small")
    report = benchmark(
        [Variant(name, str(tmp_path / name), "pytorch") for name in names],
        config=BenchmarkConfig(
            shapes=((1, 4),), rounds=8, seconds=0.01, warm_up_seconds=0.1, threads=(1,), precision=9,
            eval=str(tmp_path / "pairs.tsv"), columns="text,text_pair,score",
        ),
    )  # fmt: skip
    base, own = report.variants
    assert own.status == "ok", own.reason
    assert own.quality[0].value == pytest.approx(base.quality[0].value, abs=1e-3)
    # outputs for one batch, whose tokens mean other words to it, are not compared
    assert [each.metric for each in own.quality] == ["spearman"]
    assert len(base.quality) > 1
    assert own.latency[0].agreement is None
    assert not [note for note in notes(report) if "small" in note and "output" in note]


@pytest.mark.exhaustive
def test_a_decoder_with_cache_is_measured_like_its_checkpoint(tmp_path: Path) -> None:
    from compress.loading import open_checkpoint
    from export.graph import ExportConfig
    from export.publish import export_onnx

    source = write(tiny_checkpoint("llama", "text-generation"), tmp_path / "source")
    export_onnx(open_checkpoint(source), tmp_path / "bundle", ExportConfig())
    (tmp_path / "text.txt").write_text("the cat sat\na red bird flew over the large tree\ngreen\n")
    variants = [
        Variant("PyTorch", str(source), "pytorch"),
        Variant("graph", str(tmp_path / "bundle"), "onnx"),
    ]
    config = BenchmarkConfig(
        shapes=((2, 8),), rounds=8, seconds=0.01, warm_up_seconds=0.1, threads=(1,), precision=9
    )
    for baseline in ("PyTorch", "graph"):  # whose inputs are those that all are timed on
        evaluated = replace(config, eval=str(tmp_path / "text.txt"), metrics=("perplexity",))
        report = benchmark(variants, baseline, config if baseline == "graph" else evaluated)
        assert [v.status for v in report.variants] == ["ok", "ok"], report.variants
        other = next(v for v in report.variants if v.name != baseline)
        assert other.latency[0].agreement == pytest.approx(1, abs=1e-4)
        values = [q.value for v in report.variants for q in v.quality]
        assert len(values) == (2 if baseline == "PyTorch" else 0)
        assert values[:1] == pytest.approx(values[1:], rel=1e-4)


def test_several_graphs_are_measured_where_one_is_the_whole(tmp_path: Path) -> None:
    from export.bundle import write_bundle
    from tests.export.graphs import checkpoint_of, graph_of

    for whole in (True, False):
        folder = tmp_path / str(whole)
        folder.mkdir()
        names = ("model", "vision_model") if whole else ("encoder_model", "decoder_model_merged")
        graphs = [(name, checkpoint_of("vit"), graph_of("vit")) for name in names]
        bundle = write_bundle(graphs, checkpoint_of("vit"), {}, folder)
    with pytest.raises(ModelError, match="but encoder_model, decoder_model_merged"):
        RUNTIMES["onnx"].describe(str(folder))
    source = RUNTIMES["onnx"].describe(str(tmp_path / "True"))
    assert source.output == "logits"
    assert source.size_bytes < bundle.size_bytes
    assert set(source.sha256) == {"model.onnx"}


def test_a_graph_that_was_changed_is_not_measured(tmp_path: Path) -> None:
    from export.bundle import write_bundle
    from tests.export.graphs import checkpoint_of, graph_of

    bundle = write_bundle([("model", checkpoint_of("vit"), graph_of("vit"))], checkpoint_of("vit"),
                          {}, tmp_path)  # fmt: skip
    bundle.graph.path.write_bytes(bundle.graph.path.read_bytes()[:-1] + b"x")
    with pytest.raises(ModelError, match="changed after its export"):
        RUNTIMES["onnx"].describe(str(tmp_path))


def test_a_graph_of_another_tool_is_weighed_with_its_data(tmp_path: Path) -> None:
    import onnx

    path = write_graph(tmp_path) / "model.onnx"
    alone = RUNTIMES["onnx"].describe(str(path))
    assert (alone.signature, alone.task, alone.size_bytes) == (None, "", path.stat().st_size)
    weight = onnx.numpy_helper.from_array(np.ones((3, 3), np.float32), "w")
    model = onnx.load(path)
    model.graph.initializer.append(weight)
    onnx.save(model, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    found = RUNTIMES["onnx"].describe(str(path))
    assert set(found.sha256) == {"model.onnx", "w.bin"}
    assert found.size_bytes == path.stat().st_size + 36
    outside = onnx.load(path, load_external_data=False)
    outside.graph.initializer[0].external_data[0].value = "../w.bin"
    path.write_bytes(outside.SerializeToString())
    with pytest.raises(ModelError):
        RUNTIMES["onnx"].describe(str(path))


def test_a_graph_of_another_tool_is_no_baseline(tmp_path: Path) -> None:
    path = write_graph(tmp_path) / "model.onnx"
    with pytest.raises(ConfigError, match="does not say what its inputs mean"):
        benchmark([Variant("foreign", str(path))])


def test_a_graph_of_another_tool_is_judged_by_what_it_shares(tmp_path: Path) -> None:
    """Hidden states under another name are pooled; where nothing fits, nothing is claimed."""
    import onnx

    from compress.loading import open_checkpoint
    from export.graph import ExportConfig
    from export.publish import export_onnx

    write_sentence_encoder(tmp_path / "model")
    bundle, _ = export_onnx(
        open_checkpoint(tmp_path / "model"), tmp_path / "bundle", ExportConfig()
    )
    graph = onnx.load(bundle.path / "model.onnx")
    hidden = graph.graph.output[0].name
    del graph.graph.output[1:]
    graph.graph.node.append(helper.make_node("Identity", [hidden], ["theirs"]))
    graph.graph.output[0].name = "theirs"
    onnx.save(graph, tmp_path / "hidden.onnx")
    graph.graph.node[-1].op_type = "Shape"
    graph.graph.output[0].CopyFrom(helper.make_tensor_value_info("theirs", TensorProto.INT64, [3]))
    onnx.save(graph, tmp_path / "shape.onnx")
    (tmp_path / "text.txt").write_text("the cat sat\na red bird flew over the large tree\ngreen\n")
    variants = [
        Variant("PyTorch", str(tmp_path / "model"), "pytorch"),
        Variant("hidden", str(tmp_path / "hidden.onnx")),
        Variant("shape", str(tmp_path / "shape.onnx")),
    ]
    config = BenchmarkConfig(
        shapes=((2, 8),),
        rounds=8,
        seconds=0.01,
        warm_up_seconds=0.1,
        threads=(1,),
        max_time=1,
        eval=str(tmp_path / "text.txt"),
    )
    report = benchmark(variants, config=config)
    _, pooled, stranger = report.variants
    assert (pooled.status, stranger.status) == ("ok", "ok"), (pooled.reason, stranger.reason)
    assert pooled.latency[0].agreement == pytest.approx(1, abs=1e-4)
    assert {x.metric for x in pooled.quality} >= {"cosine_fidelity"}
    assert all(x.value == pytest.approx(1, abs=1e-4) for x in pooled.quality)
    assert (stranger.latency[0].agreement, stranger.quality) == (None, [])
    assert any(
        "No output of shape can be compared with one of PyTorch" in note for note in notes(report)
    )


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler: g++")
def test_a_compiled_model_and_a_plain_graph_stand_beside_the_others(tmp_path: Path) -> None:
    write_sentence_encoder(tmp_path / "model")
    line = [
        "benchmark",
        "report",
        f"ours={tmp_path / 'model'}/../plain/model.onnx",
        "--rounds",
        "8",
    ]
    (tmp_path / "plain").mkdir()
    import onnx_ir as ir

    from compress.loading import open_checkpoint
    from export.graph import plain_graph

    graph = plain_graph(open_checkpoint(str(tmp_path / "model")))
    assert {n.domain for n in graph.graph} <= {"", "pkg.onnxscript.torch_lib"}
    ir.save(graph, tmp_path / "plain" / "model.onnx")
    line += ["--baseline", str(tmp_path / "model"), "--also", "compiled", "--also", "plain"]
    line += ["--shapes", "2x8", "--max-time", "1", "--json", "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(onnxpress_group, line)
    assert done.exit_code == 0, done.output
    variants = {v["name"]: v for v in json.loads(done.stdout)["variants"]}
    assert list(variants) == ["PyTorch", "PyTorch, compiled", "plain ONNX", "ours"]
    assert variants["PyTorch, compiled"]["providers"] == ["torch:cpu, compiled"]
    for name in ("PyTorch, compiled", "plain ONNX", "ours"):
        assert variants[name]["status"] == "ok", variants[name]["reason"]
        assert variants[name]["latency"][0]["agreement"] > 0.999
