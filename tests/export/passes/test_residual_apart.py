from pathlib import Path

import numpy as np
import pytest

from export.passes.residual_apart import residual_apart_
from tests.export.graphs import (
    checkpoint_of,
    graph_of,
    operators,
    optimized_operators,
    run_graph,
    save,
)


@pytest.mark.parametrize(("name", "count"), [("bert", 5), ("gpt2", 1), ("vit", 1)])
def test_outputs_stay_bit_for_bit(name: str, count: int, tmp_path: Path) -> None:
    model = graph_of(name, target="portable")
    sample = checkpoint_of(name).signature.sample(3, 9, ragged=True)
    before, adds = run_graph(model, sample), operators(model)["Add"]
    assert residual_apart_(model) == count
    assert residual_apart_(model) == 0
    assert operators(model)["Add"] == adds
    for output, value in run_graph(model, sample).items():
        assert np.array_equal(value, before[output])
    found = optimized_operators(save(model, tmp_path), tmp_path)
    assert found["SkipLayerNormalization"] == 0


def test_models_without_layer_norm_are_left_alone() -> None:
    assert residual_apart_(graph_of("llama", target="portable")) == 0


def test_fusion_is_what_would_happen(tmp_path: Path) -> None:
    fused = optimized_operators(save(graph_of("bert", target="portable"), tmp_path), tmp_path)
    assert fused["SkipLayerNormalization"] > 0
    apart = optimized_operators(save(graph_of("bert"), tmp_path), tmp_path)
    assert apart["SkipLayerNormalization"] == 0
