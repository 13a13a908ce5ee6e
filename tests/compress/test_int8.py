import numpy as np
import onnx
import onnx.helper
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from compress.int8 import (
    DynamicInt8Linear,
    Int8Embedding,
    dynamic_quantize,
    dynamic_quantized_linear,
    quantize_per_channel,
)
from compress.quantize_config import QuantizeConfig


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("axis", [0, 1])
def test_weights_are_within_half_a_step(axis: int) -> None:
    weight = random(6, 9) * torch.logspace(-3, 3, 9)
    weight[2] = 0
    weight[:, 4] = 0
    values, scale = quantize_per_channel(weight, axis)
    assert values.dtype == torch.int8
    assert scale.shape == (weight.shape[axis],)
    assert int(values.min()) >= -127
    steps = scale.unsqueeze(1 - axis)
    assert bool(((values * steps - weight).abs() <= steps * 0.5001).all())
    nonzero = weight.abs().amax(dim=1 - axis) > 0
    assert bool((values.abs().amax(dim=1 - axis)[nonzero] == 127).all())  # the range is used
    assert bool((scale[~nonzero] == 1).all())


def onnx_dynamic_quantize(x: Tensor) -> list[np.ndarray]:
    node = onnx.helper.make_node("DynamicQuantizeLinear", ["x"], ["y", "scale", "zero"])
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, None)],
        [
            onnx.helper.make_tensor_value_info("y", onnx.TensorProto.UINT8, None),
            onnx.helper.make_tensor_value_info("scale", onnx.TensorProto.FLOAT, None),
            onnx.helper.make_tensor_value_info("zero", onnx.TensorProto.UINT8, None),
        ],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)])
    return ReferenceEvaluator(model).run(None, {"x": x.numpy()})


@pytest.mark.parametrize(
    "x",
    [
        random(40, 30),
        random(40, 30, seed=1) * 1e-4,
        random(40, 30).abs() + 5,  # the range must reach down to zero
        -random(40, 30).abs() - 5,
        torch.tensor([[-1.0, -0.5, 0.0, 0.5, 1.0, 127.5, 126.5]]),  # halves round to even
    ],
    ids=["normal", "small", "positive", "negative", "halves"],
)
def test_activations_match_onnx(x: Tensor) -> None:
    values, scale, zero = dynamic_quantize(x)
    expected = onnx_dynamic_quantize(x)
    assert float(scale) == float(expected[1])
    assert int(zero) == int(expected[2])
    assert np.array_equal(values.numpy(), expected[0].astype(np.int32))


@pytest.mark.parametrize("shape", [(5, 24), (2, 5, 24), (1, 1, 24), (40, 24)])
def test_integer_product_is_exact(shape: tuple[int, ...]) -> None:
    x = random(*shape) + 0.5
    weight, scale = quantize_per_channel(random(24, 17, seed=1), axis=1)
    values, x_scale, zero = dynamic_quantize(x)
    product = (values.long() - zero.long()).numpy() @ weight.long().numpy()  # int64: exact
    expected = torch.from_numpy(product).float() * (x_scale * scale)
    found = dynamic_quantized_linear(x, weight, scale)
    assert found.shape == (*shape[:-1], 17)
    assert found.equal(expected)


def test_extreme_values_do_not_overflow() -> None:
    x = torch.cat([torch.zeros(1, 4096), torch.full((1, 4096), 1.0)])
    weight = torch.full((4096, 2), 127, dtype=torch.int8)
    found = dynamic_quantized_linear(x, weight, torch.ones(2))
    assert found[0].tolist() == [0, 0]
    assert found[1].tolist() == pytest.approx([4096 * 127] * 2)


@pytest.mark.parametrize("weight_range", ["full", "reduced"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_settings_of_the_weights(per_channel: bool, weight_range: str) -> None:
    config = QuantizeConfig(per_channel=per_channel, weight_range=weight_range)
    weight = random(17, 24) * torch.logspace(-2, 0, 17).unsqueeze(1)
    layer = DynamicInt8Linear(24, 17, bias=False, per_channel=per_channel)
    layer.quantize_(weight, None, config)
    level = 64 if weight_range == "reduced" else 127
    assert layer.scale.shape == ((17,) if per_channel else ())
    largest = layer.weight.abs().amax(0).int()
    assert int(largest.max()) == level
    assert bool((largest == level).all()) == per_channel
    step = weight.abs().amax(1 if per_channel else (0, 1), keepdim=True) / level
    assert bool(((layer.dequantize() - weight).abs() <= step * 0.5001).all())
    x = random(5, 24)
    near = nn.functional.linear(x, layer.dequantize())
    assert layer(x).shape == near.shape
    assert float((layer(x) - near).abs().max()) < 0.03 * float(near.abs().max())


def test_zeros_give_zeros() -> None:
    weight, scale = quantize_per_channel(random(8, 8), axis=1)
    assert not dynamic_quantized_linear(torch.zeros(3, 8), weight, scale).any()


def test_linear_is_near_the_float_layer() -> None:
    source = nn.Linear(64, 32)
    made = DynamicInt8Linear(64, 32, bias=True)
    made.weight, made.scale = quantize_per_channel(source.weight.t(), axis=1)
    made.weight = made.weight.contiguous()
    made.bias = source.bias.detach()
    x = random(100, 64)
    expected = source(x).detach()
    error = (made(x) - expected).square().mean().sqrt() / expected.std()
    assert 0 < float(error) < 0.02


def test_embedding_rows_have_their_own_scale() -> None:
    table = random(5, 16) * torch.logspace(-4, 4, 5).unsqueeze(1)
    made = Int8Embedding(5, 16)
    made.weight, made.scale = quantize_per_channel(table, axis=0)
    ids = torch.tensor([[0, 4], [2, 2]])
    found = made(ids)
    assert found.shape == (2, 2, 16)
    error = (found - table[ids]).abs().amax(-1) / table[ids].abs().amax(-1)
    assert bool((error <= 0.5001 / 127).all())


def test_operator_traces() -> None:
    torch.library.opcheck(
        dynamic_quantized_linear,
        (random(3, 8), *quantize_per_channel(random(8, 8, seed=1), axis=1)),
        test_utils=("test_schema", "test_faketensor"),
    )
