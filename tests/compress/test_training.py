import copy
import itertools
from collections.abc import Mapping

import datasets
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from calib_data.batches import Batches
from calib_data.errors import ConfigError, ModelError, TrainingError
from calib_data.sources import Examples
from compress.averaging import AveragedWeights
from compress.checkpoint import Checkpoint, weights_sha256
from compress.losses import hard_loss
from compress.train_config import learning_rate, parameter_groups
from compress.training import TrainConfig, TrainLog, train_
from tests.tiny import WORDS, tiny_batches, tiny_checkpoint, tiny_tokenizer

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


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "vit"])
def test_gradient_checkpointing_changes_no_gradient(family: str) -> None:
    """Each layer runs twice a step, and without dropout, which comes with training mode."""
    tasks = {
        "bert": "text-classification",
        "t5": "text2text-generation",
        "vit": "image-classification",
    }
    task = tasks.get(family, "text-generation")
    results = []
    for again in (False, True):
        checkpoint = tiny_checkpoint(family, task)
        layers = [
            m for m in checkpoint.module.modules() if isinstance(m, GradientCheckpointingLayer)
        ]
        runs: list[int] = []
        heart = next(m for m in layers[0].modules() if list(m.parameters(recurse=False)))
        hook = heart.register_forward_hook(lambda *_, runs=runs: runs.append(1))

        def loss_of(
            batch: Mapping[str, Tensor], _: object, checkpoint: Checkpoint = checkpoint
        ) -> dict[str, Tensor]:
            sample = checkpoint.signature.sample(batch=2, sequence=5)
            outputs = checkpoint.forward(sample)
            return {"size": outputs[checkpoint.output].square().mean()}

        config = TrainConfig(steps=2, gradient_checkpointing=again)
        log = train_(checkpoint.module, loss_of, tiny_batches(), config)
        hook.remove()
        results.append((log.losses, weights_sha256(checkpoint.module), len(runs)))
        assert not any(layer.gradient_checkpointing for layer in layers)
    (losses, weights, once), (losses_again, weights_again, twice) = results
    assert losses == losses_again
    assert weights == weights_again
    assert twice == 2 * once


def test_gradient_checkpointing_needs_layers_that_can() -> None:
    module = nn.Linear(3, 3)
    with pytest.raises(ModelError, match="Linear has no layers that support --gradient-ch"):
        train_(module, lambda *_: {}, tiny_batches(), TrainConfig(gradient_checkpointing=True))


def test_fp16_wants_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="fp16 needs a GPU; use bf16"):
        fit(classifier(), TrainConfig(precision="fp16"))


def test_bf16_learns_in_another_precision_after_another() -> None:
    logs = [fit(classifier(), TrainConfig(steps=10, precision=p)) for p in ("no", "bf16", "no")]
    assert logs[0].losses == logs[2].losses != logs[1].losses
    assert logs[0].losses == pytest.approx(logs[1].losses, rel=0.05)


def test_frozen_module_has_nothing_to_train() -> None:
    checkpoint = classifier()
    checkpoint.module.requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing to train"):
        fit(checkpoint, TrainConfig(steps=1))


def test_epochs_decide_the_steps() -> None:
    assert TrainConfig(epochs=2.0, accumulate=3).total_steps(10) == 7
    assert TrainConfig(steps=5).total_steps(10) == 5
    assert len(fit(classifier(), TrainConfig(epochs=1.5)).losses) == 3  # of 2 batches


def test_step_equals_one_written_by_hand() -> None:
    """Clipping, decay and the rate as PyTorch itself does them."""
    ours, theirs = classifier(), classifier()
    config = TrainConfig(steps=3, learning_rate=1e-2, clip=0.05, weight_decay=0.1)
    log = fit(ours, config)
    optimizer = torch.optim.AdamW(parameter_groups(theirs.module, config), lr=config.learning_rate)
    stream = itertools.cycle(tiny_batches(8, 4, label=LABELS))
    for step in range(3):
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = learning_rate(
            step, 3, config
        )
        optimizer.zero_grad()
        loss = hard_loss("class", theirs.forward(batch := next(stream)), batch)
        assert loss is not None
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.module.parameters(), 0.05)
        optimizer.step()
        assert log.losses[step] == pytest.approx(float(loss.detach()), rel=1e-5)
    for name, value in theirs.module.state_dict().items():
        torch.testing.assert_close(ours.module.state_dict()[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
)
def test_memory_that_runs_out_says_what_to_change(error: Exception) -> None:
    checkpoint = classifier()

    def loss_of(*_: object) -> dict[str, Tensor]:
        raise error

    with pytest.raises(TrainingError, match=r"--batch-size \(now 4\) and raise --accumulate"):
        train_(checkpoint.module, loss_of, tiny_batches(), TrainConfig(steps=1))
    assert not checkpoint.module.training


def test_other_errors_stay_what_they_are() -> None:
    def loss_of(*_: object) -> dict[str, Tensor]:
        raise RuntimeError("a mistake in a loss")

    with pytest.raises(RuntimeError, match="a mistake in a loss"):
        train_(classifier().module, loss_of, tiny_batches(), TrainConfig(steps=1))


def test_a_gradient_that_is_not_finite_stops() -> None:
    checkpoint = classifier()
    before = weights_sha256(checkpoint.module)

    def loss_of(batch: Mapping[str, Tensor], _: object) -> dict[str, Tensor]:
        zero = checkpoint.forward(batch)["logits"].sum() * 0
        return {"root": torch.sqrt(zero)}  # 0, with an infinite slope

    with pytest.raises(TrainingError, match="the gradient's norm is nan at step 0"):
        train_(checkpoint.module, loss_of, tiny_batches(), TrainConfig(steps=1))
    assert weights_sha256(checkpoint.module) == before


def evaluated(values: list[float], config: TrainConfig) -> tuple[TrainLog, list[str], str]:
    """Train while evaluations give `values`; return the log, the weights at each and at the end."""
    checkpoint = classifier()
    seen: list[str] = []

    def evaluate() -> float:
        assert not checkpoint.module.training
        seen.append(weights_sha256(checkpoint.module))
        return values[len(seen) - 1]

    def loss_of(batch: Mapping[str, Tensor], step: Mapping[str, float]) -> dict[str, Tensor]:
        assert checkpoint.module.training == config.dropout
        return {"size": checkpoint.forward(batch)["logits"].square().sum()}

    log = train_(checkpoint.module, loss_of, tiny_batches(), config, evaluate=evaluate)
    return log, seen, weights_sha256(checkpoint.module)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_the_best_weights_are_what_remains(ema: float) -> None:
    config = TrainConfig(steps=7, eval_every=2, ema=ema, dropout=True)
    log, seen, end = evaluated([1.0, float("nan"), 3.0, 2.0], config)
    assert end == seen[2]
    assert log.best_step == 6
    assert [step for step, _ in log.evaluations] == [2, 4, 6, 7]  # the last step as well


def test_patience_ends_training() -> None:
    log, seen, end = evaluated([1, 2, 2, 2, 9], TrainConfig(steps=50, eval_every=3, patience=2))
    assert len(log.losses) == 12
    assert end == seen[1]
    assert log.summary()["best_step"] == 6


def test_average_is_what_its_formula_says() -> None:
    module = nn.Linear(2, 2)
    average = AveragedWeights(module, 0.5)
    expected = module.weight.detach().clone()
    for step in range(20):
        with torch.no_grad():
            module.weight.add_(1.0)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * module.weight.detach()
        average.update_(module, step)
    torch.testing.assert_close(average.weights["weight"], expected)
    with average.in_place(module):
        torch.testing.assert_close(module.weight, expected)
    assert not torch.allclose(module.weight, expected)


def test_average_differs_from_the_last_weights() -> None:
    ends = []
    for ema in (0.0, 0.9):
        checkpoint = classifier()
        fit(checkpoint, TrainConfig(steps=5, ema=ema, learning_rate=1e-2))
        ends.append(weights_sha256(checkpoint.module))
    assert ends[0] != ends[1]


def test_padding_is_little_on_ragged_data() -> None:
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(WORDS, size=n)) for n in random.integers(1, 60, size=600)]
    table = datasets.Dataset.from_dict({"text": texts})
    shares = []
    for batch_size in (16, 600):  # one batch of all has no one of its own length to sit with
        batches = Batches(
            Examples(table, "ragged"), tiny_tokenizer(), batch_size=batch_size, shuffle=True
        )
        module = nn.Linear(1, 1)
        log = train_(
            module,
            lambda *_, module=module: {"zero": module.weight.sum() * 0},
            batches,
            TrainConfig(epochs=1.0),
        )
        assert log.padding is not None
        shares.append(log.padding)
    assert shares[0] < 0.1 < shares[1]
