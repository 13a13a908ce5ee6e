import numpy as np
import pytest

from export.passes.batched_rotary import batched_rotary_
from export.passes.flat_attention import flat_attention_
from tests.export.graphs import checkpoint_of, graph_of, operators, run_graph


@pytest.mark.parametrize(("name", "count"), [("bert", 2), ("vit", 2)])
@pytest.mark.parametrize("int8", [False, True])
def test_outputs_stay_and_heads_are_split_inside(name: str, count: int, int8: bool) -> None:
    model = graph_of(name, int8, target="portable")
    sample = checkpoint_of(name).signature.sample(3, 9, ragged=True)
    before = run_graph(model, sample)
    assert flat_attention_(model) == count
    assert flat_attention_(model) == 0
    nodes = [node for node in model.graph if node.op_type == "Attention"]
    assert [node.attributes["q_num_heads"].value for node in nodes] == [4] * count
    for name_, value in run_graph(model, sample).items():
        np.testing.assert_allclose(value, before[name_], rtol=1e-4, atol=2e-6)


def test_dead_shape_arithmetic_goes_away() -> None:
    split, flat = (operators(graph_of("bert", target=t)) for t in ("portable", "cpu"))
    # two at each norm keep the residual apart
    assert flat["Reshape"] == 2 * flat["LayerNormalization"]
    assert split["Reshape"] == 4 * 2  # queries, keys, values and results of two layers
    assert split["Transpose"] > flat["Transpose"] == 0


def test_grouped_and_rotated_heads_stay_right() -> None:
    model = graph_of("llama", target="portable")
    sample = checkpoint_of("llama").signature.sample(3, 9, ragged=True)
    before = run_graph(model, sample)["logits"]
    flat_attention_(model)
    np.testing.assert_allclose(run_graph(model, sample)["logits"], before, rtol=1e-4, atol=2e-6)


def test_graphs_without_attention_are_left_alone() -> None:
    model = graph_of("bert", target="portable", opset=20)
    assert flat_attention_(model) == 0
    assert batched_rotary_(model) == 0
