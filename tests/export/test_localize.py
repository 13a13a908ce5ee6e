import copy
from pathlib import Path

import pytest
import torch

from export.localize import first_divergence
from export.parity import FLOAT
from tests.export.graphs import checkpoint_of, edit, graph_of, initializer, save


def test_right_graph_diverges_nowhere(tmp_path: Path) -> None:
    checkpoint = checkpoint_of("bert")
    double = copy.deepcopy(checkpoint.module).double()
    sample = checkpoint.signature.sample(3, 9, ragged=True)
    path = save(graph_of("bert"), tmp_path)
    assert first_divergence(checkpoint, double, path, sample, FLOAT) is None


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
    double = copy.deepcopy(checkpoint.module).double()
    with torch.no_grad():
        sample = checkpoint.signature.sample(3, 9)
        found = first_divergence(checkpoint, double, save(model, tmp_path), sample, FLOAT)
    assert found is not None
    assert found.startswith(module), found
    assert "graph mean" in found
    assert "source mean" in found
