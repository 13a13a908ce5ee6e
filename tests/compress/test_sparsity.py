import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from calib_data.errors import ConfigError, DataError, ModelError
from compress.adapter_plan import AdapterConfig
from compress.adapters import add_adapter, merge_adapter
from compress.checkpoint import Checkpoint, weights_sha256
from compress.distill import DistillConfig, distill
from compress.finetune import FinetuneConfig, finetune
from compress.loading import open_checkpoint
from compress.moments import Moment
from compress.quantize import quantize
from compress.quantize_config import QuantizeConfig
from compress.sparsity import (
    METHODS,
    SparsityConfig,
    _layers,
    _sparsify_,
    hold_zeros,
    sparsify,
    zero_share,
)
from compress.training import TrainConfig
from tests.tiny import FAMILIES, SampledBatches, tiny_batches, tiny_checkpoint, write


def weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return the weights of the layers that are made sparse as (in, out)."""
    found = {}
    for name in _layers(checkpoint):
        module: Any = checkpoint.backbone.get_submodule(name)
        weight = module.weight.detach()
        found[name] = weight.t() if isinstance(module, torch.nn.Linear) else weight
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_each_layer_loses_its_share(family: str, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(family)
    before = weights_sha256(checkpoint.module)
    batches: Any = SampledBatches(checkpoint, 2)
    result = sparsify(checkpoint, batches, SparsityConfig(share=0.25))
    assert weights_sha256(checkpoint.module) == before
    for name, weight in weights(result.checkpoint).items():
        assert float((weight == 0).float().mean()) == pytest.approx(0.25, abs=0.01), name
    assert result.report["zeros"] == zero_share(result.checkpoint) == pytest.approx(0.25, abs=0.01)
    assert not checkpoint.sparse
    again = open_checkpoint(write(result.checkpoint, tmp_path / "out"))
    assert again.sparse
    assert weights_sha256(again.module) == weights_sha256(result.checkpoint.module)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_two_of_four_inputs_are_zero(family: str, method: str) -> None:
    checkpoint = tiny_checkpoint(family)
    batches: Any = SampledBatches(checkpoint, 2)
    sparse = sparsify(checkpoint, batches, SparsityConfig(pattern="2:4", method=method)).checkpoint
    for weight in weights(sparse).values():
        fours = (weight == 0).reshape(-1, 4, weight.shape[1])
        assert bool((fours.sum(dim=1) == 2).all())


def inputs(rows: int = 400, width: int = 64) -> Tensor:
    """Return vectors (rows, width) whose entries depend on each other."""
    random = torch.Generator().manual_seed(0)
    common = torch.randn(rows, width // 4, generator=random)
    mixed = common @ torch.randn(width // 4, width, generator=random)
    return mixed + 0.3 * torch.randn(rows, width, generator=random) + 0.5


def error_of(method: str, pattern: str = "free") -> float:
    """Return how far a layer's outputs are off that `method` made sparse, squared and relative."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 48)
    x = inputs()
    with torch.no_grad():
        y = layer(x)
        extended = torch.cat([x, torch.ones(len(x), 1)], dim=1)
        moment = Moment(extended.T @ extended, len(x))
        _sparsify_(layer, moment, SparsityConfig(pattern=pattern, method=method))
        return float((layer(x) - y).square().mean() / y.square().mean())


@pytest.mark.parametrize("pattern", ["free", "2:4"])
def test_those_that_stay_make_up_for_the_others(pattern: str) -> None:
    errors = {method: error_of(method, pattern) for method in METHODS}
    assert errors["sparsegpt"] < 0.5 * errors["wanda"]
    assert errors["sparsegpt"] < 0.5 * errors["magnitude"]


def test_wanda_looks_at_the_inputs_magnitude_does_not() -> None:
    layer = torch.nn.Linear(4, 1, bias=False)
    gram = torch.diag(torch.tensor([100.0, 1.0, 1.0, 1.0]))
    kept = {}
    for method in ("wanda", "magnitude"):
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([[0.2, 0.5, 1.0, 0.4]]))
        _sparsify_(layer, Moment(gram, 9), SparsityConfig(method=method))
        kept[method] = layer.weight.detach()[0].tolist()
    assert kept["wanda"] == pytest.approx([0.2, 0.0, 1.0, 0.0])
    assert kept["magnitude"] == pytest.approx([0.0, 0.5, 1.0, 0.0])


def test_layers_can_be_left_dense() -> None:
    checkpoint = tiny_checkpoint("bert")
    batches: Any = SampledBatches(checkpoint, 1)
    config = SparsityConfig(skip=("*.intermediate.dense",))
    sparse = sparsify(checkpoint, batches, config).checkpoint
    for name, weight in weights(sparse).items():
        assert bool((weight == 0).any()) == (not name.endswith("intermediate.dense"))


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_training_keeps_the_zeros(ema: float) -> None:
    checkpoint = tiny_checkpoint("bert", "text-classification")
    sparse = sparsify(checkpoint, tiny_batches(8), SparsityConfig()).checkpoint
    zeros = {name: weight == 0 for name, weight in weights(sparse).items()}
    batches = tiny_batches(16, label=[0, 1] * 8)
    train = TrainConfig(steps=6, learning_rate=1e-2, ema=ema)
    tuned = finetune(sparse, batches, FinetuneConfig(train=train)).checkpoint
    healed = distill(checkpoint, sparse, batches, DistillConfig(train=train)).checkpoint
    for trained in (tuned, healed):
        for name, weight in weights(trained).items():
            assert bool((weight[zeros[name]] == 0).all())
            assert not bool((weight[~zeros[name]] == 0).any())
        moved = (weights(trained)[name] - weights(sparse)[name] for name in zeros)
        assert all(float(change.abs().max()) > 0 for change in moved)
        assert trained.sparse
    # without that they do not stay: the check can fail
    dense = finetune(
        Checkpoint(**{**vars(sparse), "lineage": ()}), batches, FinetuneConfig(train=train)
    ).checkpoint
    assert zero_share(dense) < 0.1


def test_a_model_that_is_not_sparse_is_left_alone() -> None:
    checkpoint = tiny_checkpoint("bert")
    name = _layers(checkpoint)[0]
    weight: Any = checkpoint.backbone.get_submodule(name).weight
    with torch.no_grad():
        weight[0] = 0
    with hold_zeros(checkpoint):
        weight.sum().backward()
    assert bool((weight.grad == 1).all())


def test_merging_would_fill_the_zeros() -> None:
    checkpoint = tiny_checkpoint("bert")
    sparse = sparsify(checkpoint, tiny_batches(8), SparsityConfig()).checkpoint
    adapted = add_adapter(sparse, AdapterConfig("lora"))
    with pytest.raises(ModelError, match="merging fills the zeros"):
        merge_adapter(adapted)


def test_bad_calls_are_refused() -> None:
    for share in (0.0, 1.0, math.nan):
        with pytest.raises(ConfigError, match="--sparsity must be above 0 and below 1"):
            SparsityConfig(share=share)
    with pytest.raises(ConfigError, match="a half of the weights"):
        SparsityConfig(share=0.3, pattern="2:4")
    with pytest.raises(ConfigError, match=r"--pattern must be one of free, 2:4"):
        SparsityConfig(pattern="4:8")
    with pytest.raises(ConfigError, match="--method must be one of"):
        SparsityConfig(method="best")
    checkpoint = tiny_checkpoint("bert")
    batches = tiny_batches(4)
    with pytest.raises(ConfigError, match=r"--skip dense matches no layer"):
        sparsify(checkpoint, batches, SparsityConfig(skip=("dense",)))
    with pytest.raises(ModelError, match="no attention or feed-forward layer"):
        sparsify(checkpoint, batches, SparsityConfig(skip=("*",)))
    with pytest.raises(ModelError, match="quantized already"):
        sparsify(quantize(checkpoint, QuantizeConfig()).checkpoint, batches, SparsityConfig())
    empty: Any = SampledBatches(checkpoint, 0)
    with pytest.raises(DataError, match="no calibration batch"):
        sparsify(checkpoint, empty, SparsityConfig())
    odd = tiny_checkpoint("bert", intermediate_size=66)
    with pytest.raises(ModelError, match=r"66 inputs, which 2:4 does not divide; pass --skip"):
        sparsify(odd, batches, SparsityConfig(pattern="2:4"))
