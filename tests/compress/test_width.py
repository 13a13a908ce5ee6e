"""Fewer channels of the residual stream: pruned equals masked, and everything follows."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import compress.apply_plan
import compress.width
from calib_data.errors import ConfigError, ModelError
from compress.apply_plan import apply_plan, mask_units_
from compress.checkpoint import Checkpoint, parameter_count, weights_sha256
from compress.heads import Classes, with_head
from compress.loading import open_checkpoint
from compress.plan import PrunePlan
from compress.sizes import StudentShape
from compress.students import make_student
from compress.surgery import resize_
from compress.tasks import get_task
from compress.width import hidden_axes, hidden_size
from tests.compress.test_apply_plan import deep_checkpoint, masked_outputs, same, some_layers
from tests.compress.test_prune import random_plan
from tests.compress.test_resize import encoder_with_projection
from tests.tiny import (
    FAMILIES,
    SampledBatches,
    tiny_batches,
    tiny_checkpoint,
    tiny_model,
    write,
    write_sentence_encoder,
)

KEEP = tuple(channel for channel in range(32) if channel not in (0, 5, 6, 11, 30))


def off(checkpoint: Checkpoint, pruned: Checkpoint, plan: PrunePlan) -> float:
    """Return the largest relative difference between what is pruned and what is masked."""
    sample = checkpoint.signature.sample(3, 9, ragged=True)
    found, worst = pruned.predict(sample), 0.0
    for name, value in masked_outputs(checkpoint, plan, sample).items():
        expected = value
        if value.shape != found[name].shape:
            expected = value[..., list(plan.hidden or ())]
            assert not np.delete(value, plan.hidden or (), axis=-1).any()  # what is masked is zero
        worst = max(worst, float(np.abs(found[name] - expected).max() / np.abs(expected).max()))
    return worst


HEADS = [
    ("bert", "fill-mask"),
    ("bert", "text-classification"),
    ("distilbert", "text-classification"),
    ("roberta", "text-classification"),
    ("modernbert", "text-classification"),
    ("gpt2", "text-generation"),
    ("llama", "text-generation"),
    ("gemma", "text-generation"),
    ("t5", "text2text-generation"),
    ("bart", "text2text-generation"),
    ("vit", "image-classification"),
]


@pytest.mark.parametrize(
    ("family", "task"), [*((family, "feature-extraction") for family in FAMILIES), *HEADS]
)
def test_fewer_channels_equal_silent_ones(family: str, task: str, tmp_path: Path) -> None:
    checkpoint = deep_checkpoint(family, task)
    before = weights_sha256(checkpoint.module)
    layers = {} if family == "albert" else some_layers(checkpoint)
    plan = PrunePlan(random_plan(checkpoint).keep, layers, KEEP)
    pruned = apply_plan(checkpoint, plan)
    assert off(checkpoint, pruned, plan) < 1e-5
    assert weights_sha256(checkpoint.module) == before
    # the width that the plan takes mattered
    sample = checkpoint.signature.sample(3, 9, ragged=True)
    narrow, plain = (
        masked_outputs(checkpoint, PrunePlan(plan.keep, layers, hidden), sample)[checkpoint.output]
        for hidden in (KEEP, None)
    )
    kept = list(KEEP) if narrow.shape[-1] == 32 else slice(None)
    assert np.abs(narrow - plain)[..., kept].max() > 0.01 * np.abs(plain).max()
    assert (hidden_size(pruned.backbone), pruned.structure["hidden"]) == (27, 27)
    assert pruned.hidden_size == 27
    assert same(pruned, open_checkpoint(write(pruned, tmp_path / "pruned"), task=task))


def test_as_many_positions_as_channels_are_told_apart() -> None:
    checkpoint = tiny_checkpoint("gpt2", "text-generation", max_position_embeddings=32)
    pruned = apply_plan(checkpoint, PrunePlan(hidden=KEEP))
    assert pruned.module.transformer.wpe.weight.shape == (32, 27)  # type: ignore[union-attr]
    assert pruned.module.lm_head.weight is pruned.module.transformer.wte.weight  # type: ignore[union-attr]


def test_what_is_kept_is_what_was_there() -> None:
    checkpoint = tiny_checkpoint("bert")
    pruned = apply_plan(checkpoint, PrunePlan(hidden=KEEP))
    whole, cut = checkpoint.module.state_dict(), pruned.module.state_dict()
    table = "embeddings.word_embeddings.weight"
    assert cut[table].equal(whole[table][:, list(KEEP)])
    query = "encoder.layer.0.attention.self.query"
    assert cut[f"{query}.weight"].equal(whole[f"{query}.weight"][:, list(KEEP)])
    assert cut[f"{query}.bias"].equal(whole[f"{query}.bias"])
    assert parameter_count(pruned.module) < parameter_count(checkpoint.module)
    assert pruned.config.hidden_size == 32  # by which the heads' width is set
    layer: Any = pruned.module.encoder.layer[0]  # type: ignore[index, union-attr]
    assert layer.output.LayerNorm.normalized_shape == (27,)
    assert (layer.intermediate.dense.in_features, layer.output.dense.out_features) == (27, 27)


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_pruning_twice_equals_pruning_once(family: str) -> None:
    checkpoint = tiny_checkpoint(family)
    once = apply_plan(checkpoint, PrunePlan(hidden=KEEP[3:20]))
    first = apply_plan(checkpoint, PrunePlan(hidden=KEEP))
    twice = apply_plan(first, PrunePlan(hidden=tuple(range(3, 20))))
    assert weights_sha256(twice.module) == weights_sha256(once.module)
    assert dict(twice.structure) == dict(once.structure) == {"hidden": 17}


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_the_whole_width_is_the_identity(family: str) -> None:
    checkpoint = tiny_checkpoint(family)
    whole = apply_plan(checkpoint, PrunePlan(hidden=tuple(range(32))))
    assert weights_sha256(whole.module) == weights_sha256(checkpoint.module)
    assert whole.structure == {}


@pytest.mark.parametrize("projected", [False, True])
def test_a_sentence_encoder_follows(projected: bool, tmp_path: Path) -> None:
    make = encoder_with_projection if projected else write_sentence_encoder
    checkpoint = open_checkpoint(make(tmp_path / "encoder"))
    plan = PrunePlan(layers={"encoder.layer": (1,)}, hidden=KEEP)
    pruned = apply_plan(checkpoint, plan)
    batch = next(iter(tiny_batches()))
    masked = copy.deepcopy(checkpoint.module)
    mask_units_(masked.backbone, plan)  # type: ignore[arg-type]
    with torch.no_grad():
        expected = masked(**batch)["sentence_embedding"].numpy()
    found = pruned.predict(batch)["sentence_embedding"]
    kept = slice(None) if projected else list(KEEP)
    np.testing.assert_allclose(found, expected[:, kept], rtol=1e-4, atol=1e-6)
    again = open_checkpoint(write(pruned, tmp_path / "pruned"))
    assert (again.predict(batch)["sentence_embedding"] == found).all()
    assert (
        f'"word_embedding_dimension": {27}'
        in (tmp_path / "pruned" / "1_Pooling" / "config.json").read_text()
    )


def test_a_new_head_is_as_wide() -> None:
    plain = tiny_checkpoint("bert")
    pruned = apply_plan(plain, PrunePlan(random_plan(plain).keep, hidden=KEEP))
    made, _ = with_head(pruned, get_task("text-classification"), Classes(2), 0)
    assert made.module.classifier.weight.shape == (2, 27)  # type: ignore[union-attr]
    assert made.structure["hidden"] == 27
    made.predict(made.signature.sample())


def test_a_student_is_made_of_it() -> None:
    teacher = apply_plan(deep_checkpoint("bert"), PrunePlan(hidden=KEEP))
    shallow = make_student(teacher, StudentShape(keep_layers=(0, 2)))
    assert shallow.structure == {"hidden": 27}
    narrow = make_student(
        teacher, StudentShape(hidden=16, heads=2, ffn=32), SampledBatches(teacher)
    )
    assert narrow.structure == {}
    assert narrow.config.hidden_size == 16
    with pytest.raises(ModelError, match=r"hidden size is 27 of 32; pass --hidden"):
        make_student(teacher, StudentShape(ffn=32), SampledBatches(teacher))


def test_channels_that_there_are_not_are_refused() -> None:
    with pytest.raises(ConfigError, match="hidden must be below 32, got 32"):
        apply_plan(tiny_checkpoint("bert"), PrunePlan(hidden=(0, 32)))
    for count in (33, 0, [1]):
        with pytest.raises(ModelError, match=r"cannot hold|cannot be kept of 32"):
            resize_(tiny_model("bert"), {"hidden": count})


def test_models_that_tie_their_sizes_otherwise_are_refused() -> None:
    with pytest.raises(ModelError, match="no one number of heads"):
        apply_plan(tiny_checkpoint("swin"), PrunePlan(hidden=KEEP))
    with pytest.raises(ModelError, match=r"sizes in code.*leave hidden whole"):
        apply_plan(open_checkpoint("tests.compress.factories:steps"), PrunePlan(hidden=(0,)))


def test_a_mistake_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, plan = tiny_checkpoint("bert"), PrunePlan(hidden=KEEP)
    cut = compress.width.keep_channels_

    def careless(model: Any, keep: Any) -> None:
        cut(model, keep)
        with torch.no_grad():
            model.encoder.layer[1].output.LayerNorm.weight.mul_(1.01)

    monkeypatch.setattr(compress.apply_plan, "keep_channels_", careless)
    with pytest.raises(ModelError, match="gives another last_hidden_state than with it silenced"):
        apply_plan(checkpoint, plan)

    def forgetful(model: Any) -> dict[str, tuple[int, ...]]:
        found = hidden_axes(model)
        del found["encoder.layer.1.output.dense.weight"]
        return found

    monkeypatch.setattr(compress.apply_plan, "keep_channels_", cut)
    monkeypatch.setattr(compress.width, "hidden_axes", forgetful)
    with pytest.raises(ModelError, match="BertModel cannot run without what the plan removes"):
        apply_plan(checkpoint, plan)
