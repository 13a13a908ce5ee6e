"""Weights whose sums fit, judged by a model of the instruction that cuts them off."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from calib_data.errors import ConfigError
from compress.int8_range import fits_in_pairs, nearest, round_to_levels, weight_scale
from compress.quantize_config import QuantizeConfig


def as_vpmaddubsw_adds(x: NDArray[np.integer], weight: NDArray[np.integer]) -> NDArray[np.int64]:
    """Return x (rows, in) uint8 @ weight (in, out) int8 as processors without VNNI add it up.

    Two neighbours are added with saturation in 16 bits, the rest in 32 (Intel SDM, VPMADDUBSW).
    """
    if x.shape[1] % 2:
        x, weight = np.pad(x, ((0, 0), (0, 1))), np.pad(weight, ((0, 1), (0, 0)))
    total = np.zeros((x.shape[0], weight.shape[1]), np.int64)
    for i in range(0, x.shape[1], 2):
        pair = x[:, i : i + 2].astype(np.int64) @ weight[i : i + 2].astype(np.int64)
        total += pair.clip(-(2**15), 2**15 - 1)
    return total


def heavy(inputs: int, outputs: int) -> torch.Tensor:
    """Return weights (in, out) with heavy tails, some of one sign and some of zeros."""
    made = torch.Generator().manual_seed(inputs)
    weight = torch.randn(inputs, outputs, generator=made) ** 3
    weight[:, 0], weight[:, 1], weight[:, 2], weight[:, 3] = 1.0, -1.0, 0.0, weight[:, 3].abs()
    return weight


def worst_inputs(weight: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Return for each output the inputs that make its pairs largest, and smallest."""
    high = np.where(weight.T > 0, 255, 0)
    return np.concatenate([high, 255 - high, np.full((1, len(weight)), 255)]).astype(np.uint8)


def moment(inputs: int) -> torch.Tensor:
    x = torch.randn(64, inputs, generator=torch.Generator().manual_seed(1)) + 1
    return x.T @ x / 64


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("inputs", [1, 2, 25, 64])
@pytest.mark.parametrize("kept", ["exact", "full", "reduced"])
def test_sums_are_exact(kept: str, inputs: int, per_channel: bool, rounding: str) -> None:
    weight = heavy(inputs, 12)
    scale = weight_scale(weight, kept, per_channel=per_channel)
    second = moment(inputs) if rounding == "gptq" else None
    found = round_to_levels(weight, scale, kept, second)
    assert found.dtype == torch.int8
    values = found.numpy()
    x = worst_inputs(values)
    exact = x.astype(np.int64) @ values.astype(np.int64)
    right = np.array_equal(as_vpmaddubsw_adds(x, values), exact)
    assert right == fits_in_pairs(found)
    if kept != "full":
        assert right
    elif per_channel and inputs > 1:  # with one scale for all, no heavy weights may be neighbours
        assert not right


@pytest.mark.parametrize(("pair", "fits"), [
    ((64, 64), True), ((127, 1), True), ((127, -127), True), ((-127, -1), True), ((-64, -64), True),
    ((65, 64), False), ((-65, -64), False), ((127, 2), False),
])  # fmt: skip
def test_the_bound_is_the_instructions(pair: tuple[int, int], fits: bool) -> None:
    weight = np.array(pair, np.int8).reshape(2, 1)
    x = worst_inputs(weight)
    exact = x.astype(np.int64) @ weight.astype(np.int64)
    if fits:
        assert np.array_equal(as_vpmaddubsw_adds(x, weight), exact)
    assert fits_in_pairs(torch.from_numpy(weight)) == fits


def test_pairs_are_the_neighbours_of_an_even_input() -> None:
    assert fits_in_pairs(torch.tensor([[1], [127], [127], [1]], dtype=torch.int8))
    assert not fits_in_pairs(torch.tensor([[127], [127], [1], [1]], dtype=torch.int8))


def test_what_is_too_much_is_shared() -> None:
    wanted = torch.tensor([[100.0], [60.0], [-127.0], [-21.0], [90.0], [-90.0]])
    found = nearest(wanted, torch.ones(1), "exact").flatten().tolist()
    assert found == [84, 44, -117, -11, 90, -90]


def test_exact_is_nearer_than_seven_bits() -> None:
    weight = torch.randn(384, 64, generator=torch.Generator().manual_seed(0))

    def error(kept: str) -> float:
        scale = weight_scale(weight, kept)
        return float((nearest(weight, scale, kept) * scale - weight).square().mean())

    assert error("full") < error("exact") < error("reduced") / 1.5


@pytest.mark.parametrize("scheme", ["dynamic", "static"])
def test_exact_is_the_default_whatever_the_processor(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for found in ({"architecture": "x86_64", "avx2": True}, {"architecture": "aarch64"}):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found)
        assert QuantizeConfig(scheme).weight_range == "exact"


def test_the_former_setting_is_read() -> None:
    def read(**values: Any) -> QuantizeConfig:
        return QuantizeConfig.from_json({"scheme": "static", **values})

    assert read(reduce_range=True).weight_range == "reduced"
    assert read(reduce_range=False).weight_range == "full"
    assert read(reduce_range=None).weight_range == "exact"
    assert read(weight_range="full").to_json()["weight_range"] == "full"
    with pytest.raises(ConfigError, match="former name"):
        read(reduce_range=True, weight_range="full")
    with pytest.raises(ConfigError, match="true or false"):
        read(reduce_range="yes")
    with pytest.raises(ConfigError, match="must be one of exact, full, reduced"):
        read(weight_range="most")
    with pytest.raises(ConfigError, match="has no --weight-range"):
        QuantizeConfig("weight-only", weight_range="exact")
