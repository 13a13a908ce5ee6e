from dataclasses import dataclass, replace

import numpy as np
import onnx
import onnx.helper
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from calib_data.errors import DataError
from compress.histogram import Histogram
from compress.input_stats import InputStats
from compress.quantize_config import QuantizeConfig
from compress.static_int8 import (
    StaticInt8Linear,
    input_range,
    static_quantize,
    static_quantized_linear,
)

PLAIN = QuantizeConfig("static", weight_range="full")
KINDS = {"uint8": torch.uint8, "int8": torch.int8}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Range(InputStats):
    """Statistics of which only the range matters."""

    def range(
        self, ranges: str, percentile: float, levels: int, symmetric: bool
    ) -> tuple[float, float]:
        bound = max(-self.low, self.high)
        return (-bound, bound) if symmetric else (self.low, self.high)


def seen(low: float, high: float, width: int = 24) -> InputStats:
    return Range(low, high, torch.ones(width), torch.zeros(width), None, 10, Histogram())


def made(
    config: QuantizeConfig = PLAIN, bias: bool = True, stats: InputStats | None = None
) -> StaticInt8Linear:
    per_channel, activations = bool(config.per_channel), str(config.activations)
    layer = StaticInt8Linear(24, 17, bias, activations, per_channel)
    values = random(17, seed=2) if bias else None
    layer.quantize_(random(17, 24, seed=1), values, config, stats or seen(-2.0, 3.0))
    return layer


def onnx_quantize(x: Tensor, scale: Tensor, zero: Tensor) -> np.ndarray:
    node = onnx.helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"])
    kinds = {torch.uint8: onnx.TensorProto.UINT8, torch.int8: onnx.TensorProto.INT8}
    infos = {"x": onnx.TensorProto.FLOAT, "s": onnx.TensorProto.FLOAT, "z": kinds[zero.dtype]}
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [onnx.helper.make_tensor_value_info(name, kind, None) for name, kind in infos.items()],
        [onnx.helper.make_tensor_value_info("y", kinds[zero.dtype], None)],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)])
    feeds = {"x": x.numpy(), "s": scale.numpy(), "z": zero.numpy()}
    return np.asarray(ReferenceEvaluator(model).run(None, feeds)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_are_rounded_as_onnx_says(kind: str) -> None:
    scale, zero = input_range(seen(-2.0, 3.0), PLAIN, KINDS[kind])
    halves = scale * torch.arange(-300, 300) / 2  # to even, and out of range on both sides
    x = torch.cat([random(400), halves])
    found = static_quantize(x, scale, zero)
    assert np.array_equal(found.numpy(), onnx_quantize(x, scale, zero).astype(np.float32))
    assert found.min() == torch.iinfo(zero.dtype).min
    assert found.max() == torch.iinfo(zero.dtype).max


@pytest.mark.parametrize(
    ("low", "high", "zero"), [(-2.0, 3.0, 102), (1.0, 5.0, 0), (-5.0, -1.0, 255), (0.0, 0.0, 0)]
)
def test_zero_is_one_of_the_steps(low: float, high: float, zero: int) -> None:
    scale, found = input_range(seen(low, high), PLAIN, torch.uint8)
    assert int(found) == zero
    assert static_quantize(torch.zeros(1), scale, found) == zero
    covered = (float(scale) * (0 - zero), float(scale) * (255 - zero))
    assert covered[0] <= min(low, 0) + scale / 2
    assert covered[1] >= max(high, 0) - scale / 2
    scale, found = input_range(seen(low, high), PLAIN, torch.int8)
    assert int(found) == 0
    assert float(scale) == pytest.approx(max(-low, high) / 127 or 1.0)


@pytest.mark.parametrize("bounds", [(0.0, np.inf), (-np.inf, 1.0), (np.nan, 1.0), (-3e38, 3e38)])
def test_range_without_bounds_is_refused(bounds: tuple[float, float]) -> None:
    with pytest.raises(DataError, match="which no scale covers; leave out"):
        made(stats=seen(*bounds))


def test_layer_that_never_ran_is_refused() -> None:
    layer = StaticInt8Linear(24, 17, bias=False)
    with pytest.raises(DataError, match="saw no input"):
        layer.quantize_(random(17, 24), None, PLAIN, None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("shape", [(5, 24), (2, 5, 24), (1, 24), (24,)])
def test_whole_layer_is_exact(
    kind: str, bias: bool, per_channel: bool, shape: tuple[int, ...]
) -> None:
    layer = made(replace(PLAIN, activations=kind, per_channel=per_channel), bias)
    assert layer.scale.shape == ((17,) if per_channel else ())
    x = random(*shape) + 0.5
    values = static_quantize(x, layer.input_scale, layer.input_zero_point).long()
    sums = (values - layer.input_zero_point.long()).numpy() @ layer.weight.long().numpy()
    if layer.bias is not None:
        sums = sums + layer.bias.long().numpy()  # int64: exact
    expected = torch.from_numpy(sums).float() * (layer.input_scale * layer.scale)
    found = layer(x)
    assert found.shape == (*shape[:-1], 17)
    assert found.equal(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_layer_is_near_the_float_layer(kind: str) -> None:
    x = random(200, 24).clamp(-2, 3)
    layer = made(replace(PLAIN, activations=kind))
    exact = nn.functional.linear(x, random(17, 24, seed=1), random(17, seed=2))
    assert 0 < float((layer(x) - exact).square().mean().sqrt() / exact.std()) < 0.02
    weights = nn.functional.linear(x, layer.dequantize(), layer.dequantized_bias())
    assert 0 < float((weights - exact).square().mean().sqrt() / exact.std()) < 0.01


def test_reduced_range_cannot_overflow_in_pairs() -> None:
    layer = made(replace(PLAIN, weight_range="reduced"))
    assert int(layer.weight.abs().max()) == 64
    assert 2 * 255 * int(layer.weight.abs().max()) < 2**15
    assert int(made().weight.abs().max()) == 127


def test_bias_fits_into_32_bits() -> None:
    weight, bias = random(17, 24, seed=1), random(17, seed=2)
    weight[3], weight[4] = 0, 1e-12
    bias[3], bias[4] = 0.37, 12345.0
    for per_channel in (True, False):
        layer = StaticInt8Linear(24, 17, bias=True, per_channel=per_channel)
        layer.quantize_(weight, bias, PLAIN, seen(-2.0, 3.0))
        held = layer.dequantized_bias()
        assert held is not None
        assert layer.bias is not None
        assert int(layer.bias.abs().max()) <= 2**30 * (1 + 1e-6)
        step = layer.input_scale * layer.scale
        assert bool(((held - bias).abs() <= 0.5001 * step + 1e-6 * bias.abs()).all())
    layer.quantize_(torch.zeros(17, 24), torch.zeros(17), PLAIN, seen(-2.0, 3.0))
    assert not layer(random(3, 24)).any()


def test_rows_do_not_depend_on_each_other() -> None:
    layer, x = made(), random(6, 24)
    x[3] *= 1000
    assert torch.stack([layer(row) for row in x]).equal(layer(x))


def test_operator_traces() -> None:
    layer = made()
    parts = (layer.weight, layer.scale, layer.bias, layer.input_scale, layer.input_zero_point)
    torch.library.opcheck(
        static_quantized_linear,
        (random(3, 24), *parts),
        test_utils=("test_schema", "test_faketensor"),
    )
