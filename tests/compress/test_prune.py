import copy
from collections.abc import Mapping

import numpy as np
import pytest
import torch

from calib_data.errors import ConfigError, ModelError
from compress.apply_plan import apply_plan, mask_units_
from compress.blocks import find_groups
from compress.checkpoint import Checkpoint, parameter_count, weights_sha256
from compress.plan import PrunePlan
from compress.prune import PruneConfig, prune
from compress.quantize import quantize
from compress.quantize_config import QuantizeConfig
from compress.signature import named_outputs
from compress.sparsity import SparsityConfig, sparsify, zero_share
from tests.tiny import FAMILIES, tiny_batches, tiny_checkpoint


def random_plan(checkpoint: Checkpoint, seed: int = 0) -> PrunePlan:
    """Return a plan that keeps other units, and another number of them, in every group."""
    random = torch.Generator().manual_seed(seed)
    keep = {}
    for index, group in enumerate(find_groups(checkpoint.backbone)):
        count = max(1, group.units * (1 + index % 3) // 4 - index)
        chosen = torch.randperm(group.units, generator=random)[:count]
        keep[group.key] = tuple(sorted(chosen.tolist()))
    return PrunePlan(keep)


def worst(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> float:
    """Return the largest difference of any output, relative to the output's size."""
    return max(float(np.abs(first[n] - second[n]).max() / np.abs(second[n]).max()) for n in second)


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_equals_masked(family: str) -> None:
    checkpoint = tiny_checkpoint(family)
    before = weights_sha256(checkpoint.module)
    plan = random_plan(checkpoint)
    masked = copy.deepcopy(checkpoint.module)
    mask_units_(masked, plan)
    pruned = apply_plan(checkpoint, plan)

    sample = checkpoint.signature.sample(batch=3, sequence=9, ragged=True)
    with torch.no_grad():
        expected = {k: v.numpy() for k, v in named_outputs(masked, sample).items()}
    assert worst(pruned.predict(sample), expected) < 5e-6
    assert worst(checkpoint.predict(sample), expected) > 1e-3  # the units did matter
    # the numbers are gone, not only silent
    assert dict(pruned.structure) == {key: len(units) for key, units in plan.keep.items()}
    assert [g.units for g in find_groups(pruned.module)] == [len(u) for u in plan.keep.values()]
    removed = parameter_count(checkpoint.module) - parameter_count(pruned.module)
    assert removed > 0.1 * parameter_count(checkpoint.module)
    assert weights_sha256(checkpoint.module) == before


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_pruning_twice_equals_pruning_once(family: str) -> None:
    checkpoint = tiny_checkpoint(family)
    first = random_plan(checkpoint)
    once = apply_plan(checkpoint, first)
    again = {key: units[: max(1, len(units) - 1)] for key, units in first.keep.items()}
    twice = apply_plan(once, PrunePlan({k: tuple(range(len(u))) for k, u in again.items()}))
    assert weights_sha256(twice.module) == weights_sha256(
        apply_plan(checkpoint, PrunePlan(again)).module
    )
    assert dict(twice.structure) == {key: len(units) for key, units in again.items()}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_cached_generation_works_after_pruning(family: str) -> None:
    pruned = apply_plan(
        checkpoint := tiny_checkpoint(family, "text-generation"), random_plan(checkpoint)
    )
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        whole = pruned.module(ids).logits[:, -1]
        start = pruned.module(ids[:, :3], use_cache=True)
        step = pruned.module(ids[:, 3:], past_key_values=start.past_key_values).logits[:, -1]
    torch.testing.assert_close(step, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_zero_ratio_is_identity(family: str) -> None:
    checkpoint = tiny_checkpoint(family)
    result = prune(checkpoint, tiny_batches(), PruneConfig(heads=0, ffn=0))
    assert weights_sha256(result.checkpoint.module) == weights_sha256(checkpoint.module)
    assert result.checkpoint.structure == {}


def test_shares_are_removed_and_reported() -> None:
    checkpoint = tiny_checkpoint("bert")
    before = weights_sha256(checkpoint.module)
    told: list[None] = []
    batches = tiny_batches()
    config = PruneConfig(heads=0.25, ffn=0.5, round_to=8)
    result = prune(checkpoint, batches, config, lambda: told.append(None))
    report = result.report
    kept = {"heads": 0, "neurons": 0}
    for key, layer in report["layers"].items():
        kept[key.rpartition(".")[2]] += layer["kept"]
    assert kept == {"heads": 6, "neurons": 64}
    assert report["parameters_after"] == parameter_count(result.checkpoint.module)
    assert report["parameters_before"] == parameter_count(checkpoint.module)
    assert len(told) == 2 * len(batches)  # importance, then what reconstruction needs to see
    assert all(fit["after"] < fit["before"] for fit in report["reconstruction"].values())
    assert weights_sha256(checkpoint.module) == before
    assert all(p.grad is None for p in checkpoint.module.parameters())
    entry = result.checkpoint.lineage[-1]
    assert (entry["stage"], entry["parent"], entry["data"]) == (
        "prune",
        before,
        batches.fingerprint,
    )
    assert PruneConfig.from_json(entry["settings"]) == config


def test_same_seed_same_plan() -> None:
    checkpoint = tiny_checkpoint("bert")
    plans = [
        prune(checkpoint, tiny_batches(), PruneConfig(round_to=1, seed=seed)).report["plan"]
        for seed in (0, 0, 1)
    ]
    assert plans[0] == plans[1]
    assert plans[0] != plans[2]


def test_important_units_stay() -> None:
    checkpoint = tiny_checkpoint("bert", seed=1)
    group = find_groups(checkpoint.module)[0]
    mask_units_(checkpoint.module, PrunePlan({group.key: tuple(range(0, 64, 2))}))  # odd ones: dead
    report = prune(checkpoint, tiny_batches(), PruneConfig(heads=0, ffn=0.25, round_to=1)).report
    assert report["plan"]["keep"] == {group.key: ",".join(map(str, range(0, 64, 2)))}


def test_quantized_input_is_refused() -> None:
    checkpoint = quantize(tiny_checkpoint("bert"), QuantizeConfig()).checkpoint
    with pytest.raises(ModelError, match="prune first, then quantize"):
        prune(checkpoint, tiny_batches(), PruneConfig())


@pytest.mark.parametrize("family", ["mpnet", "t5"])
def test_heads_of_shared_biases_are_refused(family: str) -> None:
    checkpoint = tiny_checkpoint(family)
    with pytest.raises(ModelError, match=r"shares a bias per head.*pass --heads 0"):
        prune(checkpoint, tiny_batches(), PruneConfig(heads=0.25))


def test_neurons_of_shared_bias_models_are_removed() -> None:
    result = prune(tiny_checkpoint("mpnet"), tiny_batches(), PruneConfig(heads=0, ffn=0.25))
    assert sum(layer["kept"] for layer in result.report["layers"].values()) == 96


def test_plan_for_another_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not have"):
        apply_plan(tiny_checkpoint("bert"), random_plan(tiny_checkpoint("gpt2")))


def test_a_sparse_model_is_cut_but_not_fitted() -> None:
    checkpoint, batches = tiny_checkpoint("bert"), tiny_batches(8)
    sparse = sparsify(checkpoint, batches, SparsityConfig(share=0.5)).checkpoint
    with pytest.raises(ModelError, match="prune before --sparsity, or pass --no-reconstruct"):
        prune(sparse, batches, PruneConfig(ffn=0.5))
    pruned = prune(sparse, batches, PruneConfig(ffn=0.5, reconstruct=False)).checkpoint
    assert pruned.sparse
    assert zero_share(pruned) > 0.3
