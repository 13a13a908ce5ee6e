import copy
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from calib_data.errors import TrainingError
from compress.checkpoint import Checkpoint, weights_sha256
from compress.losses import hard_loss
from compress.train_config import learning_rate, parameter_groups
from compress.training import TrainConfig, TrainLog, train_
from tests.tiny import tiny_batches, tiny_checkpoint

LABELS = [0, 1, 1, 0, 1, 0, 0, 1]


def classifier() -> Checkpoint:
    return tiny_checkpoint(
        "bert", "text-classification", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )


def fit(checkpoint: Checkpoint, config: TrainConfig, batch_size: int = 4) -> TrainLog:
    def loss_of(batch: Mapping[str, Tensor], step: Mapping[str, float]) -> dict[str, Tensor]:
        loss = hard_loss("class", checkpoint.forward(batch), batch)
        assert loss is not None
        return {"hard": loss * len(batch["labels"]) / step["labels"]}

    batches = tiny_batches(8, batch_size, label=LABELS)
    return train_(checkpoint.module, loss_of, batches, config)


def test_loss_goes_down_and_the_module_is_left_in_eval_mode() -> None:
    checkpoint = classifier()
    log = fit(checkpoint, TrainConfig(steps=60, learning_rate=3e-3))
    assert log.summary(5)["loss_last"] < 0.5 * log.summary(5)["loss_first"]
    assert log.epochs == 30
    assert not checkpoint.module.training


def test_same_seed_same_run() -> None:
    runs = []
    for seed, dropout in ((0, True), (0, True), (1, True), (0, False)):
        checkpoint = tiny_checkpoint("bert", "text-classification")
        log = fit(checkpoint, TrainConfig(steps=4, seed=seed, dropout=dropout))
        runs.append((log.losses, weights_sha256(checkpoint.module)))
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    assert runs[0] != runs[3]


def test_accumulated_gradients_equal_one_large_batch() -> None:
    single, accumulated = classifier(), classifier()
    rate = {"learning_rate": 1e-2, "warmup": 0.0, "clip": 1e9, "weight_decay": 0.0}
    first = fit(single, TrainConfig(steps=3, **rate), batch_size=8)
    second = fit(accumulated, TrainConfig(steps=3, accumulate=2, **rate), batch_size=4)
    assert first.losses == pytest.approx(second.losses, rel=1e-4)
    third = fit(classifier(), TrainConfig(steps=3, **rate), batch_size=4)
    assert first.losses != pytest.approx(third.losses, rel=1e-4)


def test_loss_that_is_not_finite_stops() -> None:
    checkpoint = classifier()
    before = copy.deepcopy(checkpoint.module.state_dict())
    with pytest.raises(TrainingError, match="loss is nan at step 0; lower --lr") as caught:
        train_(
            checkpoint.module,
            lambda batch, _: {"hard": checkpoint.forward(batch)["logits"].sum() * float("nan")},
            tiny_batches(),
            TrainConfig(steps=3),
        )
    assert caught.value.exit_code == 10
    assert not checkpoint.module.training
    for name, value in checkpoint.module.state_dict().items():
        assert value.equal(before[name]), name


def test_rate_rises_then_falls() -> None:
    for schedule in ("cosine", "linear"):
        config = TrainConfig(steps=100, warmup=0.1, schedule=schedule, learning_rate=1.0)
        rates = [learning_rate(step, 100, config) for step in range(100)]
        assert rates[0] == 0.1
        assert max(rates) == rates[9] == rates[10] == 1
        assert rates[10:] == sorted(rates[10:], reverse=True)
        assert 0 <= rates[-1] < 0.02


def test_only_matrices_decay() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    decayed, spared = parameter_groups(module, TrainConfig())
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.01, 0.0)
    assert [tuple(p.shape) for p in decayed["params"]] == [(4, 3)]
    assert len(spared["params"]) == 3


def test_no_gradient_stays_no_gradient() -> None:
    checkpoint = classifier()
    table = checkpoint.module.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    before = table.clone()
    fit(checkpoint, TrainConfig(steps=2))
    assert table.equal(before)
    assert torch.isfinite(checkpoint.module.classifier.weight).all()
