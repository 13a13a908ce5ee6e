"""Graphs that other tools made: matched by name, compared on what both have."""

import functools
import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from calib_data.errors import ModelError
from compress.checkpoint import Checkpoint
from compress.loading import open_checkpoint
from export.foreign import check_foreign, matching_part
from export.graph import ExportConfig, build_graph
from tests.export.graphs import (
    cached_graph_of,
    checkpoint_of,
    edit,
    graph_of,
    initializer,
    save,
    weight_of,
)
from tests.export.test_parity import one_element
from tests.tiny import tiny_checkpoint, tiny_tokenizer, write_sentence_encoder


def without_pooler(model: ir.Model) -> None:
    del model.graph.outputs[1]


@functools.cache
def _without_types() -> bytes:
    checkpoint = checkpoint_of("bert")
    inputs = tuple(i for i in checkpoint.signature.inputs if i.name != "token_type_ids")
    fewer = replace(checkpoint, signature=replace(checkpoint.signature, inputs=inputs))
    return bytes(
        ir.to_proto(build_graph(fewer, ExportConfig(target="portable"))).SerializeToString()
    )


def test_outputs_that_both_have_are_compared(tmp_path: Path) -> None:
    path = save(graph_of("bert"), tmp_path, without_pooler)
    report = check_foreign(checkpoint_of("bert"), path)
    assert report.passed, report.worst()
    assert {c.output for c in report.checks if c.rule == "float"} == {"last_hidden_state"}
    assert {c.graph for c in report.checks} == {"model.onnx"}


def test_graph_without_token_types_is_the_model_without_them(tmp_path: Path) -> None:
    path = tmp_path / "other.onnx"
    path.write_bytes(_without_types())
    assert matching_part(checkpoint_of("bert"), path).signature.names == (
        "input_ids",
        "attention_mask",
    )
    assert check_foreign(checkpoint_of("bert"), path).passed
    model = ir.load(path)
    path = save(
        model, tmp_path, lambda m: one_element(weight_of(m, "encoder.layer.1.output.dense"))
    )
    assert not check_foreign(checkpoint_of("bert"), path).passed


def test_decoder_is_checked_across_calls(tmp_path: Path) -> None:
    path = save(cached_graph_of("gpt2"), tmp_path)
    report = check_foreign(checkpoint_of("gpt2"), path)
    assert report.passed, report.worst()
    assert "across calls" in {check.rule for check in report.checks}
    model = cached_graph_of("gpt2")
    path = save(
        model, tmp_path, lambda m: edit(initializer(m, "wpe.weight"), lambda a: a.__imul__(2))
    )
    assert not check_foreign(checkpoint_of("gpt2"), path).passed


def test_transformer_inside_a_sentence_encoder(tmp_path: Path) -> None:
    encoder = open_checkpoint(str(write_sentence_encoder(tmp_path / "st")))
    plain = Checkpoint(
        encoder.backbone, "feature-extraction",
        replace(encoder.signature, outputs=("last_hidden_state", "pooler_output")),
    )  # fmt: skip
    path = save(build_graph(plain, ExportConfig()), tmp_path)
    assert matching_part(encoder, path).module is encoder.backbone
    assert check_foreign(encoder, path).passed


def rename(values: Any) -> None:
    for index, value in enumerate(values):
        value.name = f"strange_{index}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: rename(m.graph.inputs), "it takes strange_0, which the model does not"),
        (
            lambda m: rename(m.graph.outputs),
            "it gives strange_0, strange_1, and the model gives last_",
        ),
    ],
    ids=["inputs", "outputs"],
)
def test_graph_of_something_else_is_one_line(
    change: Callable[[ir.Model], Any], message: str, tmp_path: Path
) -> None:
    path = save(graph_of("bert"), tmp_path, change)
    with pytest.raises(ModelError, match=message) as caught:
        check_foreign(checkpoint_of("bert"), path)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 4


def test_missing_input_is_one_line(tmp_path: Path) -> None:
    ids = ir.val("input_ids", dtype=ir.DataType.INT64, shape=ir.Shape(["batch", "sequence"]))
    node = ir.node("Identity", [ids])
    node.outputs[0].name = "last_hidden_state"
    graph = ir.Graph([ids], node.outputs, nodes=[node], opset_imports={"": 23})
    path = save(ir.Model(graph, ir_version=10), tmp_path)
    with pytest.raises(ModelError, match="it does not take attention_mask, which the model does"):
        matching_part(checkpoint_of("bert"), path)


def test_no_graph_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(ModelError, match="cannot be read as a graph"):
        check_foreign(checkpoint_of("bert"), tmp_path / "model.onnx")


@pytest.mark.slow
@pytest.mark.skipif(
    "ONNXPRESS_CLIENTS" not in os.environ,
    reason="ONNXPRESS_CLIENTS names no Python with optimum-onnx",
)
@pytest.mark.parametrize(
    ("family", "task", "theirs"),
    [
        ("bert", "feature-extraction", "feature-extraction"),
        ("gpt2", "text-generation", "text-generation-with-past"),
        ("llama", "text-generation", "text-generation-with-past"),
        ("bart", "text2text-generation", "text2text-generation-with-past"),
    ],
)
def test_export_of_optimum(family: str, task: str, theirs: str, tmp_path: Path) -> None:
    source = tmp_path / "model"
    tiny_checkpoint(family, task).backbone.save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name before transformers 5
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    command = Path(os.environ["ONNXPRESS_CLIENTS"]).parent / "optimum-cli"
    arguments = ["export", "onnx", "--model", source, "--task", theirs, tmp_path / "out"]
    subprocess.run([command, *arguments], check=True, capture_output=True)
    checkpoint = open_checkpoint(str(source), task=task)
    names = ("encoder_model", "decoder_model_merged") if family == "bart" else ("model",)
    for name in names:
        report = check_foreign(checkpoint, tmp_path / "out" / f"{name}.onnx")
        assert report.passed, report.worst()
        other = check_foreign(
            tiny_checkpoint(family, task, seed=1), tmp_path / "out" / f"{name}.onnx"
        )
        assert not other.passed
