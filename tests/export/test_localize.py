from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from compress.checkpoint import Checkpoint
from compress.quantize import dequantized
from export.graph import MODULE, ExportConfig, build_graph
from export.linearize import linearize_
from export.localize import _layouts, first_divergence
from export.parts import parts
from tests.export.graphs import cached_graph_of, checkpoint_of, edit, graph_of, initializer, save
from tests.tiny import tiny_checkpoint


def test_right_graph_diverges_nowhere(tmp_path: Path) -> None:
    checkpoint = checkpoint_of("bert")
    sample = checkpoint.signature.sample(3, 9, ragged=True)
    path = save(graph_of("bert"), tmp_path)
    assert first_divergence(checkpoint, path, sample) is None


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit", "llama"])
def test_first_of_several_is_named(name: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(name)
    norm, module = {
        "bert": ("layer.{}.output.LayerNorm.weight", "encoder.layer.0.output.LayerNorm (Layer"),
        "gpt2": ("h.{}.ln_2.weight", "transformer.h.0.ln_2 (Layer"),
        "vit": ("layers.{}.layernorm_before.weight", "vit.layers.0.layernorm_before (Layer"),
        "llama": ("layers.{}.post_attention_layernorm.weight", "model.layers.0.post_attention_"),
    }[name]
    model = graph_of(name)
    for layer in (1, 0):
        edit(initializer(model, norm.format(layer)), lambda a: a.__imul__(1.5))
    with torch.no_grad():
        sample = checkpoint.signature.sample(3, 9)
        found = first_divergence(checkpoint, save(model, tmp_path), sample)
    assert found is not None
    assert found.startswith(module), found
    assert "graph mean" in found
    assert "source mean" in found


def divergence(checkpoint: Checkpoint, path: Path, int8: bool = False) -> str:
    exact = dequantized(checkpoint) if int8 else checkpoint
    (part,) = parts(exact).values()
    case = part.signature.sample(3, 9, ragged=True)
    found = first_divergence(part, path, case)
    assert found is not None
    return found


@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
def test_decoder_with_a_cache(int8: bool, tmp_path: Path) -> None:
    """Names come without the wrapper's own; what a batch of prompts is padded with does not count."""
    model = cached_graph_of("gpt2", int8)
    if int8:
        linearize_(model)
    edit(initializer(model, "h.1.mlp.c_proj.bias"), lambda a: a.__imul__(1.1))
    found = divergence(checkpoint_of("gpt2", int8), save(model, tmp_path), int8)
    assert found.startswith(
        "transformer.h.1.mlp.c_proj (Add" if int8 else "transformer.h.1.mlp.c_proj ("
    )
    assert "graph mean" in found


def test_part_whose_value_never_leaves_it(tmp_path: Path) -> None:
    """Of a classifier's encoder only the pooled first token leaves; the layers inside stand for it."""
    model = graph_of("classifier")
    node = next(n for n in model.graph if n.op_type == "Attention")
    node.attributes["scale"] = ir.AttrFloat32("scale", 0.5)
    found = divergence(checkpoint_of("classifier"), save(model, tmp_path))
    assert found.startswith("bert.encoder.layer.0.attention.self ("), found


def test_layer_that_runs_twice(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint("albert")
    model = build_graph(checkpoint, ExportConfig())
    path = save(model, tmp_path)
    (part,) = parts(checkpoint).values()
    case = part.signature.sample(3, 9, ragged=True)
    assert first_divergence(part, path, case) is None
    norm = next(
        n
        for n in model.graph
        if n.op_type == "LayerNormalization"
        and "full_layer_layer_norm" in n.metadata_props.get(MODULE, "")
    )
    norm.attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.1)
    found = divergence(checkpoint, save(model, tmp_path))
    assert "full_layer_layer_norm (LayerNormalization)" in found, found


def test_module_of_another_layout(tmp_path: Path) -> None:
    """Numbers count, not how the graph's fusion lays them out."""
    arrays = np.arange(24.0).reshape(1, 2, 3, 4)
    flat = arrays.swapaxes(1, 2).reshape(1, 3, 8)
    assert any(np.array_equal(made, flat) for made in _layouts(arrays, flat.shape))
    assert any(np.array_equal(made, arrays) for made in _layouts(flat, arrays.shape))
    assert list(_layouts(arrays, (1, 3, 9))) == []
    assert list(_layouts(arrays.astype(np.int64), flat.shape)) == []
