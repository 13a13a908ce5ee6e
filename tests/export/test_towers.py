"""Models of texts and images: the whole and its towers, each a graph."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers

from compress.checkpoint import Checkpoint
from compress.loading import open_checkpoint
from compress.quantize import quantize
from compress.quantize_config import QuantizeConfig
from compress.signature import transformer_signature
from export.bundle import open_bundle
from export.graph import ExportConfig, build_graph
from export.parts import parts
from export.publish import export_onnx
from tests.compress.test_prune import apply_plan, random_plan
from tests.export.graphs import run_graph
from tests.tiny import tiny_tokenizer

TASK = "zero-shot-image-classification"
OUTPUTS = ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds")
LAYERS = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}


@functools.cache
def tiny_clip(family: str = "clip") -> Any:
    """Return a seeded model of two towers."""
    tokens = {"vocab_size": len(tiny_tokenizer()), "max_position_embeddings": 64}
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    config = transformers.AutoConfig.for_model(
        family,
        text_config=LAYERS | tokens | ids | {"projection_dim": 16},
        vision_config=LAYERS | {"image_size": 12, "patch_size": 4, "projection_dim": 16},
        projection_dim=16,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForZeroShotImageClassification.from_config(config)
    with torch.no_grad():
        for value in model.parameters():
            if value.dim() > 1:
                value.mul_(3)
    return model.eval()


@functools.cache
def clip(family: str = "clip") -> Checkpoint:
    model = tiny_clip(family)
    return Checkpoint(model, TASK, transformer_signature(model, model, None))


@functools.cache
def graph(name: str) -> ir.Model:
    return build_graph(parts(clip())[name], ExportConfig())


def test_names_are_the_ecosystems() -> None:
    made = parts(clip())
    assert {name: part.signature.names for name, part in made.items()} == {
        "model": ("input_ids", "pixel_values", "attention_mask"),
        "text_model": ("input_ids", "attention_mask"),
        "vision_model": ("pixel_values",),
    }
    assert {name: part.signature.outputs for name, part in made.items()} == {
        "model": OUTPUTS,
        "text_model": ("text_embeds",),
        "vision_model": ("image_embeds",),
    }
    shapes = [str(value.shape) for value in graph("model").graph.inputs]
    assert shapes == [
        "[text_batch_size,sequence]",
        "[image_batch_size,3,12,12]",
        "[text_batch_size,sequence]",
    ]
    assert str(graph("model").graph.outputs[0].shape) == "[image_batch_size,text_batch_size]"


@pytest.mark.parametrize("name", ["model", "text_model", "vision_model"])
def test_graphs_equal_pytorch_at_any_number_of_texts_and_images(name: str) -> None:
    part = parts(clip())[name]
    for batch, sequence in ((1, 1), (2, 7), (4, 12)):
        sample = part.signature.sample(batch, sequence, ragged=True)
        found, expected = run_graph(graph(name), sample), part.predict(sample)
        assert set(found) == set(expected)
        for output, value in expected.items():
            np.testing.assert_allclose(found[output], value, rtol=1e-3, atol=2e-5)
    if name == "model":
        assert found["logits_per_image"].shape == (5, 4)


def test_towers_are_those_of_the_whole() -> None:
    sample = clip().signature.sample(3, 9, ragged=True)
    whole = clip().predict(sample)
    for name, output in (("text_model", "text_embeds"), ("vision_model", "image_embeds")):
        value = run_graph(graph(name), sample)[output]
        unit = value / np.linalg.norm(value, axis=1, keepdims=True)
        np.testing.assert_allclose(unit, whole[output], rtol=1e-3, atol=2e-5)


def test_text_that_was_trained_without_a_mask_takes_none() -> None:
    class Tokenizer:
        model_input_names = ("input_ids",)

    model = tiny_clip("siglip")
    assert transformer_signature(model, model, None).names[-1] == "attention_mask"
    names = transformer_signature(model, model, Tokenizer()).names
    assert names == ("input_ids", "pixel_values")


@pytest.mark.parametrize("processor", [True, False], ids=["processor", "none"])
def test_directory_with_and_without_a_processor(processor: bool, tmp_path: Path) -> None:
    tiny_clip().save_pretrained(tmp_path / "model")
    if processor:
        size = {"height": 12, "width": 12}
        images = transformers.CLIPImageProcessorPil(size=size, crop_size=size)
        transformers.CLIPProcessor(images, tiny_tokenizer()).save_pretrained(tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    assert checkpoint.task == TASK
    assert checkpoint.output == "logits_per_image"
    bundle, report = export_onnx(checkpoint, tmp_path / "out", ExportConfig())
    assert report.passed
    assert list(bundle.graphs) == ["model", "text_model", "vision_model"]
    opened = open_bundle(tmp_path / "out")
    assert opened.max_length == 64
    assert type(opened.processor) is type(checkpoint.processor)
    assert (opened.processor is not None) == processor
    if processor:
        assert any(check.case == "real text" for check in report.checks)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_pruned_and_int8(tmp_path: Path) -> None:
    pruned = apply_plan(clip(), random_plan(clip()))
    made = quantize(pruned, QuantizeConfig()).checkpoint
    bundle, _ = export_onnx(made, tmp_path / "out", ExportConfig())
    assert bundle.size_bytes < export_onnx(clip(), tmp_path / "float", ExportConfig())[0].size_bytes
