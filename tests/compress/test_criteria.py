from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from calib_data.errors import ConfigError, DataError, ModelError
from compress.apply_plan import mask_units_
from compress.blocks import find_groups
from compress.criteria import CRITERIA, unit_importance
from compress.losses import hard_targets
from compress.plan import PrunePlan
from tests.compress.test_importance import scaled
from tests.tiny import FAMILIES, SampledBatches, tiny_batches, tiny_checkpoint


@pytest.mark.parametrize("family", FAMILIES)
def test_fisher_and_wanda_see_which_units_are_silent(family: str) -> None:
    checkpoint = tiny_checkpoint(family)
    groups = find_groups(checkpoint.backbone)
    silent = {g.key: tuple(range(1, g.units)) for g in groups}  # the first of each
    mask_units_(checkpoint.backbone, PrunePlan(silent))
    batches = SampledBatches(checkpoint, count=2)
    for criterion in ("fisher", "wanda"):
        scores = unit_importance(checkpoint, groups, batches, criterion)
        for group in groups:
            assert scores[group.key].shape == (group.units,)
            assert scores[group.key].dtype == torch.float64
            assert scores[group.key][0] == 0
            assert bool((scores[group.key][1:] > 0).any())
    assert all(p.grad is None for p in checkpoint.module.parameters())


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_fisher_is_the_mean_squared_derivative_of_each_example(family: str) -> None:
    task = "text-classification" if family == "bert" else "text-generation"
    checkpoint = tiny_checkpoint(family, task)
    checkpoint.module.double()
    groups = find_groups(checkpoint.backbone)
    batches = list(tiny_batches(6, batch_size=4, label=[0, 1, 1, 0, 1, 0]))

    def losses(batch: dict[str, Tensor]) -> Tensor:
        """Return the loss of each example alone, (examples,)."""
        found = []
        for row in range(len(batch["input_ids"])):
            one = {name: value[row : row + 1] for name, value in batch.items()}
            with torch.no_grad():
                outputs = checkpoint.forward(one)
            targets = hard_targets(checkpoint.task_row.target, outputs, one)
            assert targets is not None
            found.append(F.cross_entropy(*targets, reduction="sum"))
        return torch.stack(found)

    scores = unit_importance(checkpoint, groups, batches)
    step = 1e-4
    for group in groups[::2]:
        values = []
        for factor in (1 + step, 1 - step):
            with scaled(checkpoint, group, 1, factor):
                values.append(torch.cat([losses(batch) for batch in batches]))
        expected = ((values[0] - values[1]) / (2 * step)).square().mean()
        torch.testing.assert_close(scores[group.key][1], expected, rtol=1e-3, atol=1e-9)


def test_without_labels_fisher_is_the_squared_change_of_the_output() -> None:
    checkpoint = tiny_checkpoint("bert")
    checkpoint.module.double()
    group = find_groups(checkpoint.backbone)[0]
    batches = list(tiny_batches(16)) * 100  # each time with other signs
    score = unit_importance(checkpoint, (group,), batches)[group.key][0]
    step, total = 1e-4, 0.0
    for batch in batches[:4]:
        values = []
        for factor in (1 + step, 1 - step):
            with scaled(checkpoint, group, 0, factor), torch.no_grad():
                values.append(checkpoint.forward(batch)["last_hidden_state"])
        change = (values[0] - values[1]) / (2 * step) * batch["attention_mask"].unsqueeze(-1)
        total += float(change.square().sum()) / 16
    assert float(score) == pytest.approx(total, rel=0.1)


def test_without_labels_logits_are_taken_for_a_distribution() -> None:
    checkpoint = tiny_checkpoint("bert", "text-classification", num_labels=3)
    checkpoint.module.double()
    group = find_groups(checkpoint.backbone)[0]
    batches = list(tiny_batches(16)) * 200  # each time with other labels
    score = unit_importance(checkpoint, (group,), batches)[group.key][0]
    step, total = 1e-3, 0.0
    for batch in batches[:4]:
        with torch.no_grad():
            before = checkpoint.forward(batch)["logits"].log_softmax(dim=-1)
        with scaled(checkpoint, group, 0, 1 - step), torch.no_grad():
            after = checkpoint.forward(batch)["logits"].log_softmax(dim=-1)
        total += 2 * float((before.exp() * (before - after)).sum()) / step**2 / 16
    assert float(score) == pytest.approx(total, rel=0.1)


@pytest.mark.parametrize(
    ("family", "task"),
    [
        ("bert", "question-answering"),
        ("bert", "fill-mask"),
        ("bert", "token-classification"),
        ("t5", "text2text-generation"),
        ("vit", "image-classification"),
    ],
)
def test_every_task_has_a_loss_without_labels(family: str, task: str) -> None:
    checkpoint = tiny_checkpoint(family, task)
    groups = find_groups(checkpoint.backbone)
    first, second, other = (
        unit_importance(checkpoint, groups, SampledBatches(checkpoint, 2), "fisher", seed)
        for seed in (0, 0, 1)
    )
    for group in groups:
        assert first[group.key].equal(second[group.key])
        assert bool((first[group.key] > 0).all())
        assert not first[group.key].equal(other[group.key])


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "gpt_neox"])
def test_weights_are_summed_over_all_that_goes_with_the_unit(family: str) -> None:
    checkpoint = tiny_checkpoint(family, "text-generation" if family != "bert" else "fill-mask")
    groups = find_groups(checkpoint.backbone)
    batch = SampledBatches(checkpoint, 1)
    before = {c: unit_importance(checkpoint, groups, batch, c) for c in CRITERIA}
    weights = {
        criterion: sum(float(scores.sum()) for scores in before[criterion].values())
        for criterion in ("magnitude", "gradient", "taylor")
    }
    from compress.example_loss import example_loss

    loss = example_loss(checkpoint, next(iter(batch)), torch.Generator().manual_seed(0)) / 4
    loss.backward()
    expected = dict.fromkeys(weights, 0.0)
    for name in {part.module for group in groups for part in group.parts}:
        module: Any = checkpoint.backbone.get_submodule(name)
        outputs = any(p.module == name and p.outputs for g in groups for p in g.parts)
        for value in (module.weight, module.bias if outputs else None):
            if value is not None:
                expected["magnitude"] += float(value.detach().double().square().sum())
                expected["gradient"] += float(value.grad.double().square().sum())
                expected["taylor"] += float((value.detach() * value.grad).double().square().sum())
    assert weights == pytest.approx(expected, rel=1e-4)
    for key, scores in before["random"].items():
        assert scores.equal(unit_importance(checkpoint, groups, batch, "random")[key])


def test_one_units_weights_count_for_it_alone() -> None:
    checkpoint = tiny_checkpoint("llama")
    groups = find_groups(checkpoint.backbone)
    before = unit_importance(checkpoint, groups, (), "magnitude")
    heads = groups[0]
    assert heads.kind == "heads"
    query: Any = checkpoint.backbone.get_submodule(heads.parts[0].module)
    width = heads.parts[0].width
    with torch.no_grad():
        query.weight[width : 2 * width] = 0
    after = unit_importance(checkpoint, groups, (), "magnitude")
    changed = before[heads.key] != after[heads.key]
    assert changed.tolist() == [False, True]
    assert all(before[g.key].equal(after[g.key]) for g in groups[1:])


def test_padding_does_not_count_for_wanda() -> None:
    checkpoint = tiny_checkpoint("bert")
    groups = find_groups(checkpoint.backbone)
    short = checkpoint.signature.sample(2, 5)
    padded = {name: F.pad(value, (0, 4)) for name, value in short.items()}
    first, second = (unit_importance(checkpoint, groups, [b], "wanda") for b in (short, padded))
    for key in first:
        torch.testing.assert_close(first[key], second[key], rtol=1e-4, atol=1e-6)


def test_bad_calls_are_refused() -> None:
    checkpoint = tiny_checkpoint("bert", "text-classification")
    groups = find_groups(checkpoint.backbone)
    batches = list(tiny_batches(4, label=[0, 1, 0, 1]))
    with pytest.raises(ConfigError, match=r"--criterion must be one of fisher, .*, got best"):
        unit_importance(checkpoint, groups, batches, "best")
    for criterion in ("fisher", "taylor", "gradient", "wanda"):
        with pytest.raises(DataError, match="no calibration batch"):
            unit_importance(checkpoint, groups, [], criterion)
    checkpoint.module.requires_grad_(False)
    unit_importance(checkpoint, groups, batches, "fisher")  # which wants no weight's gradient
    with pytest.raises(ModelError, match=r"output.dense.weight, .*frozen.*--criterion fisher"):
        unit_importance(checkpoint, groups, batches, "taylor")
    checkpoint.module.requires_grad_(True)
    with torch.no_grad():
        checkpoint.module.classifier.weight.zero_()
    for criterion in ("fisher", "gradient"):
        with pytest.raises(ModelError, match="all gradients are zero"):
            unit_importance(checkpoint, groups, batches, criterion)
    with torch.no_grad():
        checkpoint.module.classifier.weight.fill_(float("nan"))
    for data in (batches, list(tiny_batches(4))):  # with labels, and without
        with pytest.raises(ModelError, match="not finite"):
            unit_importance(checkpoint, groups, data)
