"""Fine-tuning: every task and method learns, its loss is the step's mean, its figures are right."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from calib_data.batches import Batches
from calib_data.errors import ConfigError, ModelError
from calib_data.metrics import perplexity
from calib_data.objectives import Masked, NextToken, Packed, Translation
from calib_data.sources import Examples
from compress.adapter_plan import SETTINGS, AdapterConfig
from compress.checkpoint import Checkpoint, weights_sha256
from compress.finetune import (
    RATES,
    FinetuneConfig,
    evaluate,
    finetune,
    finetune_config,
    objective_of,
    task_loss,
)
from compress.heads import Classes, with_head
from compress.quantize import quantize
from compress.quantize_config import QuantizeConfig
from compress.tasks import get_task
from compress.training import TrainConfig, units
from tests.tiny import SENTENCES, tiny_batches, tiny_checkpoint, tiny_tokenizer

BRIEF = TrainConfig(steps=60, learning_rate=3e-3, warmup=0.0)
LABELS = [int("cat" in text or "bird" in text) for text in SENTENCES[:16]]


def pairs(checkpoint: Checkpoint, **columns: list[Any]) -> Batches:
    table = {"text": SENTENCES[:16], "text_pair": SENTENCES[1:17], **columns}
    examples = Examples(datasets.Dataset.from_dict(table), "pairs")
    objective = objective_of(checkpoint, pack=False)
    return Batches(examples, checkpoint.processor, batch_size=4, objective=objective)


def texts(checkpoint: Checkpoint) -> Batches:
    table = datasets.Dataset.from_dict({"text": SENTENCES[:16]})
    objective = objective_of(checkpoint, pack=False)
    examples = Examples(table, "texts")
    return Batches(examples, checkpoint.processor, batch_size=4, objective=objective)


def case(name: str) -> tuple[Checkpoint, Batches]:
    """Return a tiny model for a task and data that it can learn by heart."""
    if name == "scores":
        source = tiny_checkpoint("bert", "text-classification", num_labels=1)
        return source, pairs(source, score=[len(text) / 60 for text in SENTENCES[:16]])
    if name == "translation":
        source = tiny_checkpoint("t5", "text2text-generation", decoder_start_token_id=0)
        return source, pairs(source)
    family, task = {"next": ("gpt2", "text-generation"), "masked": ("bert", "fill-mask")}.get(
        name, ("bert", "text-classification")
    )
    source = tiny_checkpoint(family, task)
    if name == "pairs":
        return source, pairs(source, label=LABELS)
    return source, tiny_batches(label=LABELS) if name == "classes" else texts(source)


CASES = ("classes", "pairs", "scores", "next", "masked", "translation")


@pytest.mark.parametrize("name", CASES)
def test_every_task_learns(name: str) -> None:
    source, batches = case(name)
    before, hashed = evaluate(source, batches), weights_sha256(source.module)
    told: list[float] = []
    result = finetune(source, batches, FinetuneConfig(train=BRIEF), batches, told.append)
    assert result.report["eval_loss"] < 0.8 * before["eval_loss"]
    assert weights_sha256(source.module) == hashed
    assert result.report["losses"] == told
    entry = result.checkpoint.lineage[-1]
    assert [entry[k] for k in ("stage", "parent", "data")] == [
        "finetune", hashed, batches.fingerprint,
    ]  # fmt: skip
    assert entry["metrics"]["eval_loss"] == result.report["eval_loss"]
    assert FinetuneConfig.from_json(entry["settings"]).train == BRIEF


@pytest.mark.parametrize("method", SETTINGS)
def test_every_method_learns(method: str) -> None:
    source, batches = case("next")
    adapter = AdapterConfig(method, virtual_tokens=4 if method == "prefix" else None)
    config = FinetuneConfig(adapter, train=replace(BRIEF, learning_rate=1e-2, steps=30))
    result = finetune(source, batches, config, batches)
    assert result.report["loss_last"] < result.report["loss_first"]
    assert result.report["eval_loss"] < 0.995 * evaluate(source, batches)["eval_loss"]
    assert 0 < result.report["trained"] < result.report["parameters"]
    kept = result.checkpoint.module.state_dict()
    for key, value in source.module.state_dict().items():  # what is adapted stays as it was
        parent, _, last = key.rpartition(".")
        found = kept[key] if key in kept else kept[f"{parent}.base_layer.{last}"]
        assert torch.equal(found, value), key


def test_merged_at_the_end() -> None:
    source, batches = case("classes")
    config = FinetuneConfig(AdapterConfig("lora"), merge=True, train=replace(BRIEF, steps=5))
    merged = finetune(source, batches, config).checkpoint
    apart = finetune(source, batches, replace(config, merge=False)).checkpoint
    assert merged.adapters is None
    assert apart.adapters is not None
    sample = source.signature.sample(2, 8, ragged=True)
    np.testing.assert_allclose(
        merged.predict(sample)["logits"], apart.predict(sample)["logits"], atol=1e-5
    )


@pytest.mark.parametrize("name", CASES)
def test_losses_are_means_over_the_whole_step(name: str) -> None:
    source, batches = case(name)
    parts = list(batches)[:2]

    def mean(batch: Mapping[str, Tensor]) -> float:
        total, unit = task_loss(source, batch)
        return float(total) / units(batch)[unit]

    def reference(batch: Mapping[str, Tensor]) -> float:
        """What transformers itself makes of the labels, where it makes the same of them."""
        labels = batch.get("labels")
        if name == "next":
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        if name == "scores":
            labels = batch["scores"]
        given = {n: v for n, v in batch.items() if n in source.signature.names}
        model: Any = source.module
        return float(model(**given, labels=labels).loss)

    with torch.no_grad():
        for batch in parts:
            assert mean(batch) == pytest.approx(reference(batch), rel=1e-5)


def test_perplexity_is_that_of_the_metric() -> None:
    source, batches = case("next")
    measured = evaluate(source, batches)
    assert measured["perplexity"] == pytest.approx(perplexity(source.predict, batches).value)
    assert measured["eval_loss"] == pytest.approx(np.log(measured["perplexity"]))


def test_accuracy_is_counted() -> None:
    source, batches = case("classes")
    logits = torch.cat([torch.tensor(source.predict(batch)["logits"]) for batch in batches])
    labels = torch.cat([batch["labels"] for batch in batches])
    measured = evaluate(source, batches)
    assert measured["accuracy"] == pytest.approx(
        100 * float((logits.argmax(1) == labels).float().mean())
    )
    assert measured["eval_loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)


def test_left_padding_is_not_learned() -> None:
    source = tiny_checkpoint("gpt2", "text-generation")
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "left"
    table = Examples(datasets.Dataset.from_dict({"text": SENTENCES[:6]}), "texts")
    for batch in Batches(table, tokenizer, batch_size=3, objective=NextToken()):
        logits = torch.zeros(*batch["input_ids"].shape, source.config.vocab_size)
        total, unit = task_loss(_Fixed(source, logits), batch)  # type: ignore[arg-type]
        expected = units(batch)[unit] * np.log(source.config.vocab_size)
        assert float(total) == pytest.approx(expected)


class _Fixed:
    """A checkpoint whose logits are given."""

    def __init__(self, source: Checkpoint, logits: Tensor) -> None:
        self.task_row, self.config, self.task = source.task_row, source.config, source.task
        self._logits = logits

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"logits": self._logits}


def test_objectives_follow_the_target() -> None:
    kinds = {
        ("gpt2", "text-generation"): NextToken,
        ("bert", "fill-mask"): Masked,
        ("bart", "text2text-generation"): Translation,
    }
    for (family, task), kind in kinds.items():
        assert isinstance(objective_of(tiny_checkpoint(family, task), False), kind)
    decoder = tiny_checkpoint("gpt2", "text-generation")
    assert isinstance(objective_of(decoder, True), Packed)
    with pytest.raises(ConfigError, match="--pack is for text-generation"):
        objective_of(tiny_checkpoint("bert", "fill-mask"), True)
    nowhere = tiny_checkpoint("t5", "text2text-generation", decoder_start_token_id=None)
    with pytest.raises(ModelError, match="no decoder_start_token_id"):
        objective_of(nowhere, False)


def test_fresh_heads_are_trained_by_every_method() -> None:
    made, fresh = with_head(tiny_checkpoint("bert"), get_task("fill-mask"), None, 0)
    config = FinetuneConfig(AdapterConfig("lora"), train=replace(BRIEF, steps=2))
    result = finetune(made, texts(made), config, fresh=fresh)
    before, after = made.module.state_dict(), result.checkpoint.module.state_dict()
    assert fresh
    assert not any(torch.equal(before[name], after[name]) for name in fresh)


def test_classes_that_are_learned_anew() -> None:
    source = tiny_checkpoint("bert", "text-classification", num_labels=3)
    made, fresh = with_head(source, get_task("text-classification"), Classes(2), 0, anew=True)
    batches = tiny_batches(label=LABELS)
    result = finetune(made, batches, FinetuneConfig(train=BRIEF), batches, fresh=fresh)
    assert result.report["accuracy"] > 80


@pytest.mark.parametrize(
    ("make", "error", "told"),
    [
        (
            lambda: quantize(tiny_checkpoint("bert", "fill-mask"), QuantizeConfig()).checkpoint,
            ModelError,
            "a quantized model cannot be trained",
        ),
        (
            lambda: tiny_checkpoint("bert", "fill-mask", max_position_embeddings=8),
            ConfigError,
            "a text of 17 tokens, the model takes 8; pass --max-length 8",
        ),
    ],
)
def test_models_that_cannot_be_trained(make: Any, error: type[Exception], told: str) -> None:
    source = make()
    config = FinetuneConfig(AdapterConfig("lora"), train=BRIEF)
    with pytest.raises(error, match=told):
        finetune(source, texts(source), config)


def test_a_second_adapter_is_refused() -> None:
    source, batches = case("classes")
    config = FinetuneConfig(AdapterConfig("lora"), train=replace(BRIEF, steps=1))
    once = finetune(source, batches, config).checkpoint
    with pytest.raises(ModelError, match="merge it into the weights first"):
        finetune(once, batches, config)


@pytest.mark.parametrize(
    ("method", "settings", "merge", "told"),
    [
        ("knit", {}, False, "--method must be one of full, lora"),
        ("full", {"rank": 4}, False, "full has no --rank"),
        ("full", {}, True, "--merge is for --method lora and ia3"),
        ("prefix", {}, True, "--merge is for"),
        ("ia3", {"rank": 4}, False, "ia3 has no --rank"),
    ],
)
def test_settings_are_checked(
    method: str, settings: dict[str, Any], merge: bool, told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        finetune_config(method, settings, {}, merge=merge)


@pytest.mark.parametrize("method", RATES)
def test_settings_round_trip(method: str) -> None:
    config = finetune_config(method, {"rank": None, "targets": ()}, {"steps": 3, "seed": 1})
    assert FinetuneConfig.from_json(config.to_json()) == config
    assert config.train.learning_rate == RATES[method]
    assert config.train.dropout
    assert finetune_config(method, {}, {"learning_rate": 0.5}).train.learning_rate == 0.5
