import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import onnxruntime as ort
import pytest
import torch
from torch import Tensor

from compress.weight_only import (
    WeightOnlyLinear,
    dequantize_blocks,
    pack,
    quantize_blocks,
    round_rows,
    unpack,
    weight_only_linear,
)

BITS = pytest.mark.parametrize("bits", [4, 8])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def restored(weight: Tensor, bits: int, block_size: int = 32) -> Tensor:
    made = quantize_blocks(weight, bits, block_size)
    return dequantize_blocks(*made, bits, block_size, weight.shape[1])


@BITS
@pytest.mark.parametrize("count", [1, 7, 32])
def test_packing_round_trips(bits: int, count: int) -> None:
    values = torch.randint(0, 2**bits, (3, count), dtype=torch.uint8)
    packed = pack(values, bits)
    assert packed.shape == (3, -(-count * bits // 8))
    assert unpack(packed, bits, count).equal(values)


def test_first_value_is_in_the_low_bits() -> None:
    assert pack(torch.tensor([1, 2, 3], dtype=torch.uint8), 4).tolist() == [0x21, 0x03]


@BITS
@pytest.mark.parametrize(("inputs", "block_size"), [(64, 32), (100, 32), (100, 16), (5, 32)])
def test_shapes_are_those_of_matmul_nbits(bits: int, inputs: int, block_size: int) -> None:
    weight, scale, zero_point = quantize_blocks(random(7, inputs), bits, block_size)
    blocks = -(-inputs // block_size)
    assert weight.shape == (7, blocks, block_size * bits // 8)
    assert scale.shape == (7, blocks)
    assert zero_point.shape == (7, -(-blocks * bits // 8))
    assert weight.dtype == zero_point.dtype == torch.uint8
    empty = WeightOnlyLinear(inputs, 7, True, bits, block_size).state_dict()
    assert [empty[n].shape for n in ("packed", "scale", "zero_point")] == [
        weight.shape,
        scale.shape,
        zero_point.shape,
    ]


def rounded_to_range(weight: Tensor, bits: int) -> Tensor:
    """Return the plain asymmetric rounding of each block of 32: its range in equal steps."""
    blocks = weight.unflatten(1, (-1, 32))
    low, high = blocks.amin(2, keepdim=True).clamp(max=0), blocks.amax(2, keepdim=True).clamp(min=0)
    step = (high - low) / (2**bits - 1)
    zero = (-low / step).round()
    return (((blocks / step).round() + zero).clamp(0, 2**bits - 1) - zero).mul(step).flatten(1)


@BITS
def test_nearer_than_plain_rounding(bits: int) -> None:
    weight = random(96, 256) * torch.logspace(-3, 3, 96).unsqueeze(1)
    errors = [
        ((made - weight).square().mean(1) / weight.square().mean(1)).sqrt()
        for made in (restored(weight, bits), rounded_to_range(weight, bits))
    ]
    assert bool((errors[0] <= errors[1]).all())
    assert float(errors[0].mean()) < {4: 0.96, 8: 0.99}[bits] * float(errors[1].mean())


@BITS
def test_what_can_be_held_is_held(bits: int) -> None:
    values = torch.randint(0, 2**bits, (5, 64), generator=torch.Generator().manual_seed(0))
    values[:, ::32], values[:, 1::32] = 0, 2**bits - 1  # the whole range, in every block
    for offset in (0, 3, 2**bits - 1):
        weight = (values - offset) * 0.25
        assert torch.allclose(restored(weight, bits), weight, rtol=1e-6, atol=1e-6)
    for constant in (0.0, 0.3, -7.0):
        weight = torch.full((2, 40), constant)
        assert torch.allclose(restored(weight, bits), weight, rtol=1e-6)


def test_large_weights_are_fitted_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = quantize_blocks(random(33, 64), 4, 32)
    monkeypatch.setattr("compress.weight_only._NUMBERS", 200)
    for part, expected in zip(quantize_blocks(random(33, 64), 4, 32), whole):
        assert part.equal(expected)


def test_rows_are_rounded_block_by_block() -> None:
    x = random(3, 5, 50) * torch.logspace(-6, 6, 5).unsqueeze(1)
    x[0, 0] = 0
    made = round_rows(x, 32)
    assert made[0, 0].eq(0).all()
    for part, rounded in zip(x.split(32, dim=2), made.split(32, dim=2)):
        largest = part.abs().amax(2, keepdim=True)
        assert bool(((rounded - part).abs() <= largest / 127 * 0.5001).all())


def runtime(x: Tensor, module: WeightOnlyLinear) -> np.ndarray:
    """Return what ONNX Runtime's operator makes of the same tensors."""
    tensors = {n: t.numpy() for n, t in module.state_dict().items()}
    order = ["packed", "scale", "zero_point", "", "bias" if "bias" in tensors else ""]
    node = onnx.helper.make_node(
        "MatMulNBits", ["x", *order], ["y"], domain="com.microsoft", accuracy_level=4,
        K=module.in_features, N=module.out_features, bits=module.bits, block_size=module.block_size,
    )  # fmt: skip
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, None)],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(t, n) for n, t in tensors.items()],
    )
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x.numpy()})[0]


@BITS
@pytest.mark.parametrize("block_size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "bias"),
    [
        (1, 64, 32, True),
        (5, 96, 17, False),
        (3, 100, 33, True),
        (2, 33, 1, False),
        (70, 300, 65, True),
    ],
)
def test_equals_onnx_runtime(
    bits: int, block_size: int, rows: int, inputs: int, outputs: int, bias: bool
) -> None:
    module = WeightOnlyLinear(inputs, outputs, bias, bits, block_size)
    module.quantize_(random(outputs, inputs, seed=1))
    if bias:
        module.bias = random(outputs, seed=2)
    x = random(2, rows, inputs, seed=3) + 0.5
    x[0, 0, : inputs // 2] *= 1e4
    x[1, 0] = 0
    expected = module(x).numpy()
    size = np.abs(x.numpy()).max(-1, keepdims=True) * inputs**0.5
    assert (np.abs(runtime(x, module) - expected) <= 5e-6 * (size + 1)).all()
    # which is no accident: the rounding of activations is far larger
    plain = torch.nn.functional.linear(x, module.dequantize(), module.bias).numpy()
    assert not (np.abs(plain - expected) <= 1e-4 * (size + 1)).all()


def test_zeros_give_the_bias() -> None:
    module = WeightOnlyLinear(8, 3, True, 4, 32)
    module.quantize_(random(3, 8))
    module.bias = random(3)
    assert module(torch.zeros(2, 8)).equal(module.bias.expand(2, 3))


def test_half_precision_stays_in_it() -> None:
    module = WeightOnlyLinear(64, 8, True, 4, 32)
    module.quantize_(random(8, 64))
    x = random(5, 64, seed=1) * 1000
    found = module.half()(x.half())
    assert found.dtype == torch.float16
    error = (found.float() - module.float()(x)).square().mean().sqrt() / found.float().std()
    assert float(error) < 0.02


def test_operator_traces() -> None:
    tensors = quantize_blocks(random(6, 40), 4, 32)
    for bias in (None, random(6)):
        torch.library.opcheck(
            weight_only_linear,
            (random(3, 40), *tensors, bias, 4, 32),
            test_utils=("test_schema", "test_faketensor"),
        )
