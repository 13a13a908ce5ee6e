"""Layers, query heads and all else that a plan can take: pruned equals masked, over the families."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calib_data.errors import ConfigError, ModelError
from compress.apply_plan import apply_plan, mask_units_
from compress.blocks import find_groups, query_groups
from compress.checkpoint import Checkpoint, weights_sha256
from compress.loading import open_checkpoint
from compress.plan import PrunePlan
from compress.signature import named_outputs
from compress.stacks import layer_stacks
from tests.compress.test_prune import random_plan, worst
from tests.tiny import FAMILIES, tiny_checkpoint, write

# families whose layers can be dropped one by one; ALBERT's may share their weights
DEEP = [family for family in FAMILIES if family != "albert"]
GROUPED = ["gemma", "llama", "mistral", "qwen2", "qwen3"]
THREE = {
    "num_hidden_layers": 3,
    "bart": {"encoder_layers": 3, "decoder_layers": 3},
    "t5": {"num_layers": 3, "num_decoder_layers": 3},
}


def deep_checkpoint(family: str, task: str = "feature-extraction") -> Checkpoint:
    """Return a checkpoint of three layers, or of three in each of two stacks."""
    own: Any = THREE.get(family, {})
    return tiny_checkpoint(family, task, **{"num_hidden_layers": 3, **own})


def some_layers(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Return other layers for each stack, its first among them in every other one."""
    stacks = layer_stacks(checkpoint.backbone)
    # ModernBERT's first layer alone has no norm of its own, so it has to stay
    first = checkpoint.config.model_type == "modernbert"
    return {stack: (0, 2) if index % 2 or first else (1, 2) for index, stack in enumerate(stacks)}


def masked_outputs(checkpoint: Checkpoint, plan: PrunePlan, sample: Any) -> dict[str, np.ndarray]:
    masked = copy.deepcopy(checkpoint.module)
    mask_units_(masked, plan)
    with torch.no_grad():
        return {name: value.numpy() for name, value in named_outputs(masked, sample).items()}


def same(one: Checkpoint, other: Checkpoint) -> bool:
    sample = one.signature.sample(2, 8, ragged=True)
    mine, theirs = one.predict(sample), other.predict(sample)
    return all((mine[name] == theirs[name]).all() for name in one.signature.outputs)


@pytest.mark.parametrize("family", DEEP)
def test_dropped_layers_equal_skipped_ones(family: str, tmp_path: Path) -> None:
    checkpoint = deep_checkpoint(family)
    before = weights_sha256(checkpoint.module)
    layers = some_layers(checkpoint)
    plan = PrunePlan(random_plan(checkpoint).keep, layers)
    pruned = apply_plan(checkpoint, plan)

    sample = checkpoint.signature.sample(batch=3, sequence=9, ragged=True)
    expected = masked_outputs(checkpoint, plan, sample)
    assert worst(pruned.predict(sample), expected) < 1e-5
    units_alone = masked_outputs(checkpoint, PrunePlan(plan.keep), sample)
    assert worst(units_alone, expected) > 1e-3  # the layers did matter
    assert [len(stack) for stack in layer_stacks(pruned.backbone).values()] == [2] * len(layers)
    assert weights_sha256(checkpoint.module) == before
    assert len(layer_stacks(checkpoint.backbone)[next(iter(layers))]) == 3
    assert same(pruned, open_checkpoint(write(pruned, tmp_path / "pruned")))


def test_the_structure_goes_by_the_new_numbers() -> None:
    checkpoint = deep_checkpoint("bert")
    name = "encoder.layer.{}.neurons"
    keep = {name.format(i): tuple(range(8 * (i + 1))) for i in range(3)}
    pruned = apply_plan(checkpoint, PrunePlan(keep, {"encoder.layer": (0, 2)}))
    assert dict(pruned.structure) == {name.format(0): 8, name.format(1): 24}
    again = apply_plan(pruned, PrunePlan(layers={"encoder.layer": (1,)}))
    assert dict(again.structure) == {name.format(0): 24}


@pytest.mark.parametrize("family", ["bert", "t5", "gpt2"])
def test_a_stack_is_dropped_from_by_itself(family: str) -> None:
    checkpoint = deep_checkpoint(family)
    stack = list(layer_stacks(checkpoint.backbone))[-1]
    pruned = apply_plan(checkpoint, PrunePlan(layers={stack: (1,)}))
    sizes = {name: len(found) for name, found in layer_stacks(pruned.backbone).items()}
    assert sizes == {name: 1 if name == stack else 3 for name in sizes}


@pytest.mark.parametrize("family", DEEP)
def test_the_whole_plan_is_the_identity(family: str) -> None:
    checkpoint = deep_checkpoint(family)
    groups = (*find_groups(checkpoint.backbone), *query_groups(checkpoint.backbone))
    stacks = layer_stacks(checkpoint.backbone)
    plan = PrunePlan(
        {group.key: tuple(range(group.units)) for group in groups},
        {stack: tuple(range(len(layers))) for stack, layers in stacks.items()},
    )
    whole = apply_plan(checkpoint, plan)
    assert weights_sha256(whole.module) == weights_sha256(checkpoint.module)
    assert whole.structure == {}
    assert same(whole, checkpoint)


def query_plan(checkpoint: Checkpoint, with_pairs: bool) -> PrunePlan:
    """Return a plan that keeps one query head, another in each layer, of each key/value head."""
    keep: dict[str, tuple[int, ...]] = {}
    for index, group in enumerate(query_groups(checkpoint.backbone)):
        shared = group.units // group.runs
        keep[group.key] = tuple(i * shared + (i + index) % shared for i in range(group.runs))
        if with_pairs:
            keep[f"{group.name}.heads"] = (index % group.runs,)
    return PrunePlan(keep)


@pytest.mark.parametrize("with_pairs", [False, True])
@pytest.mark.parametrize("family", GROUPED)
def test_query_heads_go_evenly(family: str, with_pairs: bool, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(family, "text-generation")
    plan = query_plan(checkpoint, with_pairs)
    pruned = apply_plan(checkpoint, plan)
    sample = checkpoint.signature.sample(batch=3, sequence=9, ragged=True)
    expected = masked_outputs(checkpoint, plan, sample)
    assert worst(pruned.predict(sample), expected) < 1e-5
    assert worst(checkpoint.predict(sample), expected) > 1e-3
    assert not query_groups(pruned.backbone)  # each key/value head has one query head now
    assert same(pruned, open_checkpoint(write(pruned, tmp_path / "pruned")))
    prompt = {"input_ids": torch.tensor([[5, 6, 7]]), "max_new_tokens": 3, "do_sample": False}
    assert pruned.module.generate(**prompt).shape == (1, 6)  # type: ignore[operator]


def test_query_heads_are_pruned_again() -> None:
    checkpoint = tiny_checkpoint("llama", num_attention_heads=8, hidden_size=32)
    keys = [group.key for group in query_groups(checkpoint.backbone)]
    twice = PrunePlan({keys[0]: (1, 2, 5, 7)}), PrunePlan({keys[0]: (0, 3)})
    once = apply_plan(checkpoint, PrunePlan({keys[0]: (1, 7)}))
    both = apply_plan(apply_plan(checkpoint, twice[0]), twice[1])
    assert weights_sha256(both.module) == weights_sha256(once.module)
    assert dict(both.structure) == dict(once.structure) == {keys[0]: 2}


def test_query_heads_go_along_with_their_key_value_head(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint("llama", num_attention_heads=8, hidden_size=32)
    queries, pairs = (f"layers.1.self_attn.{kind}" for kind in ("queries", "heads"))
    fewer = apply_plan(checkpoint, PrunePlan({queries: (0, 1, 2, 5, 6, 7)}))
    both = apply_plan(fewer, PrunePlan({pairs: (1,)}))
    assert dict(both.structure) == {queries: 3, pairs: 1}
    assert same(both, open_checkpoint(write(both, tmp_path / "both")))
    at_once = apply_plan(checkpoint, PrunePlan({queries: (5, 6, 7), pairs: (1,)}))
    assert weights_sha256(both.module) == weights_sha256(at_once.module)
    assert dict(at_once.structure) == dict(both.structure)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma", "t5"])
def test_the_cache_follows_dropped_layers(family: str) -> None:
    task = "text2text-generation" if family == "t5" else "text-generation"
    checkpoint = deep_checkpoint(family, task)
    pruned = apply_plan(checkpoint, PrunePlan(layers=some_layers(checkpoint)))
    ids = torch.tensor([[5, 6, 7, 8]])
    greedy = {"max_new_tokens": 4, "do_sample": False, "min_new_tokens": 4}
    cached, plain = (
        pruned.module.generate(ids, use_cache=use, **greedy)  # type: ignore[operator]
        for use in (True, False)
    )
    assert cached.equal(plain)


def refused(family: str, layers: Mapping[str, tuple[int, ...]], **changes: Any) -> Checkpoint:
    return apply_plan(tiny_checkpoint(family, **changes), PrunePlan(layers=layers))


def test_layers_that_share_weights_stay() -> None:
    with pytest.raises(ModelError, match=r"albert does not set the layers .* alone"):
        refused("albert", {"encoder.albert_layer_groups": (0,)})
    with pytest.raises(ConfigError, match="no stack of the model's"):
        refused("albert", {"encoder.albert_layer_groups": (0,)}, num_hidden_layers=4)


def test_a_layer_that_is_built_by_its_place_stays() -> None:
    with pytest.raises(ModelError, match=r"builds layers.0 without attn_norm.*keep layer 0"):
        refused("modernbert", {"layers": (1,)})


def test_stages_of_different_widths_stay() -> None:
    with pytest.raises((ModelError, ConfigError)):
        refused("swin", {"encoder.layers": (1,)})


def test_what_is_frozen_stays_frozen() -> None:
    checkpoint = deep_checkpoint("bert")
    checkpoint.module.encoder.layer[2].requires_grad_(False)  # type: ignore[index, union-attr]
    pruned = apply_plan(checkpoint, PrunePlan(layers={"encoder.layer": (0, 2)}))
    frozen = {name for name, value in pruned.module.named_parameters() if not value.requires_grad}
    assert frozen
    assert all(name.startswith("encoder.layer.1.") for name in frozen)
