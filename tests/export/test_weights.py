import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from export.weights import changed_epsilons, changed_weights
from tests.export.graphs import checkpoint_of, graph_of


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(20, 30)
        self.second = nn.Linear(20, 30)


def graph(**arrays: np.ndarray) -> ir.Model:
    values = [ir.val(name, const_value=ir.tensor(array)) for name, array in arrays.items()]
    for value in values:
        value.dtype, value.shape = value.const_value.dtype, value.const_value.shape  # type: ignore[union-attr]
    return ir.Model(ir.Graph([], [], nodes=[], initializers=values), ir_version=10)


def shares(**arrays: np.ndarray) -> dict[str, float]:
    return dict(changed_weights(BLOCK, graph(**arrays)))


BLOCK = Block()
FIRST, SECOND = (m.weight.detach().numpy() for m in (BLOCK.first, BLOCK.second))
BIAS = BLOCK.first.bias.detach().numpy()


def test_same_weights_in_any_layout() -> None:
    both = np.concatenate([FIRST, SECOND])
    biases = np.concatenate([BIAS, BLOCK.second.bias.detach().numpy()])
    found = shares(a=FIRST, b=FIRST.T, c=both, d=both.T, e=BIAS, f=BIAS[:, None], g=biases)
    assert found == dict.fromkeys("abcdefg", 0.0)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("merged", [False, True])
def test_one_changed_number_shows(transposed: bool, merged: bool) -> None:
    array = np.concatenate([FIRST, SECOND]) if merged else FIRST.copy()
    array[3, 4] *= 1.01
    assert 0 < shares(a=array.T if transposed else array)["a"] < 0.1


def test_changed_bias_and_row_show() -> None:
    bias, rows = BIAS.copy(), FIRST.copy()
    bias[2] = np.nextafter(bias[2], 1)
    rows[5] *= 1.01
    found = shares(a=bias, b=rows)
    assert found["a"] == pytest.approx(1 / 30)
    assert found["b"] == pytest.approx(1 / 30)


def test_what_was_computed_anew_is_not_judged() -> None:
    folded = np.concatenate([FIRST * 0.25, SECOND])  # a query's scale, folded in
    zeros = np.zeros((40, 20), np.float32)
    assert shares(a=FIRST * 1.01, b=folded, c=zeros, d=np.array([1.0, 0.0], np.float32)) == {}


def test_epsilon_shows() -> None:
    module, model = checkpoint_of("bert").module, graph_of("bert")
    found = dict(changed_epsilons(module, model))
    assert len(found) == 5
    assert not any(found.values())
    node = next(n for n in model.graph if n.op_type == "LayerNormalization")
    node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-6)
    assert [name for name, off in changed_epsilons(module, model) if off] == [
        f"epsilon of {node.name}"
    ]


def test_every_weight_of_a_graph_is_found() -> None:
    for int8 in (False, True):
        found = dict(changed_weights(checkpoint_of("bert", int8).module, graph_of("bert", int8)))
        assert len(found) >= 39
        assert not any(found.values())
