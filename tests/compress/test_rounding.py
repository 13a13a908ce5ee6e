import pytest
import torch
from torch import Tensor, nn

from calib_data.errors import ConfigError, DataError
from compress.input_stats import InputStats, Tally
from compress.int8 import DynamicInt8Linear
from compress.quantize import dequantized, quantize
from compress.quantize_config import QuantizeConfig
from compress.rounding import _factor, corrected_bias, gptq, learned_moment
from compress.static_int8 import StaticInt8Linear
from compress.weight_only import WeightOnlyLinear
from tests.tiny import SampledBatches, tiny_checkpoint

SCHEMES = [
    QuantizeConfig(),
    QuantizeConfig("static"),
    QuantizeConfig("weight-only"),
    QuantizeConfig("weight-only", bits=8, block_size=16),
    QuantizeConfig("weight-only", block_size=256),
]
NAMES = ["dynamic", "static", "4 bit", "8 bit", "one block"]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dependent_inputs(rows: int = 600, width: int = 200) -> Tensor:
    """Return vectors (rows, width) around a mean, whose entries depend on each other."""
    return (
        random(rows, width // 4) @ random(width // 4, width, seed=1) * 0.2
        + random(rows, width, seed=2) * torch.logspace(-1, 0.5, width)
        + random(width, seed=3)
    )


def stats_of(x: Tensor) -> InputStats:
    tally = Tally(moments=True)
    tally.add(x)
    return tally.stats()


def module_for(config: QuantizeConfig, width: int, outputs: int, bias: bool = True):
    if config.scheme == "dynamic":
        return DynamicInt8Linear(width, outputs, bias)
    if config.scheme == "static":
        return StaticInt8Linear(width, outputs, bias, "uint8")
    return WeightOnlyLinear(width, outputs, bias, config.bits, config.block_size)


def output_error(x: Tensor, weight: Tensor, numbers: Tensor, scale: Tensor) -> float:
    return float((x @ (numbers * scale - weight)).square().mean())


def test_outputs_are_nearer_than_by_nearest_rounding() -> None:
    x, weight = dependent_inputs(), random(200, 50, seed=4)
    scale = weight.abs().amax(0) / 7
    nearest = (weight / scale).round()
    found = gptq(weight, scale, -7, 7, x.T @ x / len(x))
    assert found.equal(found.round())
    assert float(found.abs().max()) <= 7
    assert output_error(x, weight, found, scale) < 0.5 * output_error(x, weight, nearest, scale)
    # the weights themselves are further off
    assert float((found * scale - weight).norm()) > float((nearest * scale - weight).norm())


def test_equals_the_textbook_one_column_at_a_time() -> None:
    """Optimal brain surgery in its plain form: invert what is left of H after every input."""
    x, weight = dependent_inputs(width=140), random(140, 6, seed=4)  # more than one stride
    moment = x.T @ x / len(x)
    scale = weight.abs().amax(0) / 7
    damped = moment.double() + 0.01 * moment.diagonal().mean() * torch.eye(140)
    left = moment.diagonal().argsort(descending=True).tolist()
    work, expected = weight.double().clone(), torch.zeros(140, 6)
    while left:
        inverse = torch.linalg.inv(damped[left][:, left])
        first = left[0]
        expected[first] = (work[first] / scale).round().clamp(-7, 7)
        error = work[first] - expected[first] * scale
        work[left] -= torch.outer(inverse[:, 0] / inverse[0, 0], error)
        left = left[1:]
    assert float((gptq(weight, scale, -7, 7, moment) != expected).float().mean()) < 0.01


def test_independent_inputs_are_rounded_to_nearest() -> None:
    weight = random(64, 9)
    scale = weight.abs().amax() / 127
    found = gptq(weight, scale, -127, 127, torch.diag(torch.rand(64) + 0.1))
    assert found.equal((weight / scale).round())


def test_bounds_of_each_weight_hold() -> None:
    weight = random(40, 8)
    low = -torch.randint(0, 4, (40, 8)).float()
    x = dependent_inputs(width=40)
    found = gptq(weight, torch.full((40, 8), 0.3), low, low + 3, x.T @ x)
    assert bool(((found >= low) & (found <= low + 3)).all())
    assert bool((found == low).any() and (found == low + 3).any())


def test_inputs_that_were_never_seen_are_rounded_to_nearest() -> None:
    x, weight = dependent_inputs(), random(200, 5, seed=4)
    dead = [0, 31, 199]
    x[:, dead] = 0
    scale = weight.abs().amax(0) / 7
    found = gptq(weight, scale, -7, 7, x.T @ x / len(x))
    assert found[dead].equal((weight / scale).round()[dead])
    assert gptq(weight, scale, -7, 7, torch.zeros(200, 200)).equal((weight / scale).round())


def test_more_inputs_than_vectors_seen() -> None:
    x, weight = dependent_inputs(rows=30), random(200, 50, seed=4)
    scale = weight.abs().amax(0) / 127
    found = gptq(weight, scale, -127, 127, x.T @ x / len(x))
    nearest = (weight / scale).round()
    assert output_error(x, weight, found, scale) < output_error(x, weight, nearest, scale)


def test_factor_is_that_of_the_damped_moment() -> None:
    x = dependent_inputs()
    moment = x.T @ x / len(x)
    upper = _factor(moment)
    assert upper.equal(upper.triu())
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(200)
    torch.testing.assert_close(upper @ upper.T, damped, rtol=1e-4, atol=1e-4)


def test_moment_that_is_not_quite_positive_is_damped_more() -> None:
    moment = torch.eye(20)
    moment[0, 1] = moment[1, 0] = 1.05
    assert _factor(moment).isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_moment_that_is_no_number_is_refused(value: float) -> None:
    moment = torch.eye(20)
    moment[3, 3] = value
    with pytest.raises(DataError, match="no finite second moment"):
        gptq(random(20, 4), torch.ones(4), -7, 7, moment)


@pytest.mark.parametrize("config", SCHEMES, ids=NAMES)
def test_every_module_rounds_by_the_moment(config: QuantizeConfig) -> None:
    x, weight, bias = dependent_inputs(), random(50, 200, seed=4), random(50, seed=5)
    errors = []
    for rounding in ("nearest", "gptq"):
        made = module_for(config, 200, 50)
        settings = QuantizeConfig.from_json(config.to_json() | {"rounding": rounding})
        made.quantize_(weight, bias.clone(), settings, stats_of(x))
        errors.append(float((x @ (made.dequantize() - weight).T).square().mean()))
        assert errors[-1] < 0.05 * float((x @ weight.T).square().mean())
    assert 0 < errors[1] < 0.6 * errors[0]


@pytest.mark.parametrize("config", SCHEMES, ids=NAMES)
def test_bias_takes_the_mean_error(config: QuantizeConfig) -> None:
    x, weight, bias = dependent_inputs(), random(50, 200, seed=4), random(50, seed=5)
    expected = (x @ weight.T + bias).mean(0)
    off = []
    for corrects in (False, True):
        made = module_for(config, 200, 50)
        settings = QuantizeConfig.from_json(config.to_json() | {"bias_correction": corrects})
        made.quantize_(weight, bias.clone(), settings, stats_of(x))
        found = (x @ made.dequantize().T + made.dequantized_bias()).mean(0)
        off.append(float((found - expected).abs().max()))
    assert off[1] < 0.02 * off[0]


def test_mean_is_left_to_the_bias_that_takes_it() -> None:
    stats = stats_of(dependent_inputs())
    assert stats.moment is not None
    both = QuantizeConfig(rounding="gptq", bias_correction=True)
    about_zero = learned_moment(both, stats, None)
    assert about_zero is not None
    assert about_zero.equal(stats.moment)
    about_mean = learned_moment(both, stats, random(50))
    covariance = torch.cov(dependent_inputs().T, correction=0)
    torch.testing.assert_close(about_mean, covariance, atol=5e-3, rtol=0)


def test_inputs_that_never_vary() -> None:
    x, weight, bias = random(1, 200).repeat(40, 1) * 100, random(50, 200, seed=4), random(50)
    settings = QuantizeConfig(rounding="gptq", bias_correction=True)
    made = module_for(settings, 200, 50)
    made.quantize_(weight, bias, settings, stats_of(x))
    found = x[:1] @ made.dequantize().T + made.bias
    torch.testing.assert_close(found, x[:1] @ weight.T + bias, rtol=1e-4, atol=1e-2)


def test_layer_without_a_bias_stays_so() -> None:
    settings = QuantizeConfig(bias_correction=True)
    made = module_for(settings, 200, 50, bias=False)
    made.quantize_(random(50, 200), None, settings, stats_of(dependent_inputs()))
    assert made.bias is None


def test_without_statistics_is_refused() -> None:
    weight = random(4, 8)
    with pytest.raises(ConfigError, match="calibrate"):
        learned_moment(QuantizeConfig(rounding="gptq"), None, None)
    with pytest.raises(ConfigError, match="calibrate"):
        corrected_bias(random(4), weight, weight, QuantizeConfig(bias_correction=True), None)


@pytest.mark.parametrize("family", ["bart", "gpt2", "llama", "swin"])
@pytest.mark.parametrize("scheme", ["dynamic", "weight-only"])
def test_models_come_nearer(family: str, scheme: str) -> None:
    checkpoint = tiny_checkpoint(family)
    batches = SampledBatches(checkpoint, count=12)
    sample = checkpoint.signature.sample(batch=8, sequence=16, seed=3, ragged=True)
    name = checkpoint.output
    exact = checkpoint.predict(sample)[name]
    modules = checkpoint.backbone.named_modules()
    tables = [n for n, module in modules if type(module) is nn.Embedding]
    errors = []
    for settings in ({}, {"rounding": "gptq", "bias_correction": True}):
        config = QuantizeConfig.from_json({"scheme": scheme, "skip": tables, **settings})
        made = dequantized(quantize(checkpoint, config, batches).checkpoint)
        errors.append(float(((made.predict(sample)[name] - exact) ** 2).mean()))
    assert errors[1] < 0.9 * errors[0]
