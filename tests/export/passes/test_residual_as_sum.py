import numpy as np
import pytest

from export.passes.residual_as_sum import residual_as_sum_
from tests.export.graphs import (
    checkpoint_of,
    graph_of,
    operators,
    optimized_operators,
    run_graph,
    save,
)


@pytest.mark.parametrize(("name", "count"), [("bert", 5), ("gpt2", 5), ("vit", 4)])
def test_outputs_stay_bit_for_bit(name: str, count: int) -> None:
    model = graph_of(name, target="portable")
    sample = checkpoint_of(name).signature.sample(3, 9, ragged=True)
    before = run_graph(model, sample)
    adds = operators(model)["Add"]
    assert residual_as_sum_(model) == count
    assert operators(model)["Sum"] == count
    assert operators(model)["Add"] == adds - count
    assert residual_as_sum_(model) == 0
    for output, value in run_graph(model, sample).items():
        assert np.array_equal(value, before[output])


def test_models_without_layer_norm_are_left_alone() -> None:
    assert residual_as_sum_(graph_of("llama", target="portable")) == 0


def test_the_slow_fusion_does_not_match(tmp_path) -> None:  # type: ignore[no-untyped-def]
    fused = optimized_operators(save(graph_of("bert", target="portable"), tmp_path), tmp_path)
    assert fused["SkipLayerNormalization"] > 0
    apart = optimized_operators(save(graph_of("bert"), tmp_path), tmp_path)
    assert apart["SkipLayerNormalization"] == 0
