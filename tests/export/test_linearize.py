import numpy as np
import pytest

from compress.quantize import dequantized
from export.linearize import linearize_
from tests.export.graphs import checkpoint_of, graph_of, operators, run_graph


@pytest.mark.parametrize(
    ("name", "target"),
    [("bert", "cpu"), ("bert", "portable"), ("gpt2", "cpu"), ("llama", "cpu"), ("vit", "cpu")],
)
def test_linearized_graph_equals_the_dequantized_model(name: str, target: str) -> None:
    checkpoint, model = checkpoint_of(name, int8=True), graph_of(name, True, target)
    products = operators(model)["MatMulInteger"]
    assert linearize_(model) == products > 0
    sample = checkpoint.signature.sample(3, 9, ragged=True)
    found, rounded = run_graph(model, sample), checkpoint.predict(sample)
    for output, value in dequantized(checkpoint).predict(sample).items():
        np.testing.assert_allclose(found[output], value, rtol=1e-3, atol=1e-5)
        assert not np.allclose(rounded[output], value, rtol=1e-3, atol=1e-5)


def test_float_graph_has_nothing_to_linearize() -> None:
    assert linearize_(graph_of("bert")) == 0
