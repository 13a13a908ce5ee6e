from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from calib_data.errors import DataError, ModelError
from compress.blocks import Group, find_groups
from compress.checkpoint import Checkpoint
from compress.importance import gradient_importance
from compress.losses import hard_targets
from tests.tiny import tiny_batches, tiny_checkpoint


@contextmanager
def scaled(checkpoint: Checkpoint, group: Group, unit: int, factor: float) -> Iterator[None]:
    """Scale what one unit hands on, by a mask on the inputs of the projection down."""
    down: Any = checkpoint.backbone.get_submodule(group.down)

    def mask(_module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0].unflatten(-1, (group.units, -1))
        scale = torch.ones(group.units, 1, dtype=x.dtype)
        scale[unit] = factor
        return ((x * scale).flatten(-2),)

    handle = down.register_forward_pre_hook(mask)
    yield
    handle.remove()


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_matches_finite_differences_of_the_loss(family: str) -> None:
    task = "text-classification" if family == "bert" else "text-generation"
    checkpoint = tiny_checkpoint(family, task)
    checkpoint.module.double()
    groups = find_groups(checkpoint.backbone)
    batch = next(iter(tiny_batches(4, label=[0, 1, 1, 0])))

    def loss() -> float:
        with torch.no_grad():
            outputs = checkpoint.forward(batch)
        found = hard_targets(checkpoint.task_row.target, outputs, batch)
        assert found is not None
        return float(torch.nn.functional.cross_entropy(*found, reduction="sum"))

    scores = gradient_importance(checkpoint, groups, [batch])
    step = 1e-4
    for group in groups:
        for unit in (0, group.units - 1):
            values = []
            for factor in (1 + step, 1 - step):
                with scaled(checkpoint, group, unit, factor):
                    values.append(loss())
            expected = abs(values[0] - values[1]) / (2 * step)
            assert float(scores[group.key][unit]) == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_root_mean_square_over_batches() -> None:
    checkpoint = tiny_checkpoint("bert", "text-classification")
    groups = find_groups(checkpoint.backbone)
    batches = list(tiny_batches(8, label=[0, 1] * 4))
    together = gradient_importance(checkpoint, groups, batches)
    alone = [gradient_importance(checkpoint, groups, [batch]) for batch in batches]
    for key, value in together.items():
        expected = torch.stack([scores[key].square() for scores in alone]).mean(dim=0).sqrt()
        torch.testing.assert_close(value, expected)


def test_without_labels_the_seed_chooses_the_projection() -> None:
    checkpoint = tiny_checkpoint("bert")
    groups = find_groups(checkpoint.backbone)
    runs = [gradient_importance(checkpoint, groups, tiny_batches(), seed) for seed in (0, 0, 1)]
    for key in runs[0]:
        assert runs[0][key].shape == (next(g.units for g in groups if g.key == key),)
        assert bool((runs[0][key] >= 0).all())
        assert runs[0][key].equal(runs[1][key])
        assert not runs[0][key].equal(runs[2][key])


def test_padding_does_not_count() -> None:
    checkpoint = tiny_checkpoint("distilbert")
    groups = find_groups(checkpoint.backbone)
    short = checkpoint.signature.sample(1, 5)
    padded = {name: torch.nn.functional.pad(value, (0, 4)) for name, value in short.items()}
    # with a row of signs for each position the first five are the same
    (first,) = (gradient_importance(checkpoint, groups, [x]) for x in (short,))
    second = gradient_importance(checkpoint, groups, [padded])
    for key in first:
        torch.testing.assert_close(first[key], second[key], rtol=1e-3, atol=1e-6)


def test_no_data_is_refused() -> None:
    checkpoint = tiny_checkpoint("bert")
    with pytest.raises(DataError, match="no calibration batch"):
        gradient_importance(checkpoint, find_groups(checkpoint.backbone), [])


def test_frozen_weights_are_refused() -> None:
    checkpoint = tiny_checkpoint("bert")
    checkpoint.module.requires_grad_(False)
    with pytest.raises(ModelError, match="frozen"):
        gradient_importance(checkpoint, find_groups(checkpoint.backbone), tiny_batches())


def test_broken_and_useless_losses_are_refused() -> None:
    checkpoint = tiny_checkpoint("bert", "text-classification")
    groups = find_groups(checkpoint.backbone)
    batches = list(tiny_batches(4, label=[0, 1, 0, 1]))
    with torch.no_grad():
        checkpoint.module.classifier.weight.zero_()
    with pytest.raises(ModelError, match="all gradients are zero"):
        gradient_importance(checkpoint, groups, batches)
    with torch.no_grad():
        checkpoint.module.classifier.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="not finite"):
        gradient_importance(checkpoint, groups, batches)
