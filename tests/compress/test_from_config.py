"""Models of random weights, from a config file: a decoder of characters, a vision transformer."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from calib_data.batches import Batches, ImageShape
from calib_data.embedded import digits
from calib_data.errors import ConfigError, ModelError
from calib_data.sources import Examples
from compress.finetune import FinetuneConfig, finetune, objective_of
from compress.from_config import checkpoint_from_config, read_config
from compress.heads import Classes
from compress.loading import open_checkpoint
from compress.tasks import get_task
from compress.training import TrainConfig
from tests.tiny import SENTENCES, tiny_tokenizer, write

TEXTS = Examples(datasets.Dataset.from_dict({"text": SENTENCES[:16]}), "texts")
GPT = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 48}
VIT = {
    "model_type": "vit",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
}


def config_file(folder: Path, values: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(values))
    return path


def made(path: Path, task: str, tokenizer: str | None = None, seed: int = 0, **more: Any) -> Any:
    found = read_config(path)
    classes = more.get("classes")
    return checkpoint_from_config(
        path, found, get_task(task), tokenizer, more.get("examples", TEXTS), classes, seed
    )


def test_a_decoder_of_characters(tmp_path: Path) -> None:
    source = made(config_file(tmp_path, GPT), "text-generation", "characters")
    assert source.config.vocab_size == len(source.processor)
    assert source.config.eos_token_id == source.processor.eos_token_id
    assert source.processor.model_max_length == 48
    batches = Batches(
        TEXTS, source.processor, batch_size=4, max_length=32, objective=objective_of(source, True)
    )
    config = FinetuneConfig(train=TrainConfig(steps=40, learning_rate=1e-2))
    result = finetune(source, batches, config, batches)
    assert result.report["loss_last"] < 0.8 * result.report["loss_first"]
    again = open_checkpoint(write(result.checkpoint, tmp_path / "saved"))
    text = SENTENCES[0]
    assert again.processor.decode(again.processor(text)["input_ids"]) == text
    sample = again.signature.sample()
    np.testing.assert_array_equal(
        again.predict(sample)["logits"], result.checkpoint.predict(sample)["logits"]
    )
    assert [entry["stage"] for entry in again.lineage] == ["source", "finetune"]


def test_the_seed_draws_the_weights(tmp_path: Path) -> None:
    path = config_file(tmp_path, GPT)
    prints = [
        made(path, "text-generation", "characters", seed).lineage[0]["sha256"] for seed in (0, 0, 1)
    ]
    assert prints[0] == prints[1] != prints[2]


def test_a_vision_transformer(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    images, labels = digits("train")
    table = {"image": list(images[:64]), "label": labels[:64].tolist()}
    examples = Examples(datasets.Dataset.from_dict(table), "digits")
    source = made(
        config_file(tmp_path, VIT), "image-classification", examples=examples, classes=Classes(10)
    )
    assert source.processor == ImageShape(8, 1)
    batches = Batches(examples, source.processor, batch_size=16)
    config = FinetuneConfig(train=TrainConfig(steps=60, learning_rate=5e-3))
    result = finetune(source, batches, config, batches)
    assert result.report["accuracy"] > 60
    again = open_checkpoint(write(result.checkpoint, tmp_path / "saved"))
    sample = again.signature.sample()
    np.testing.assert_array_equal(
        again.predict(sample)["logits"], result.checkpoint.predict(sample)["logits"]
    )


def test_the_tokenizer_beside_the_file_is_used(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    bert = {
        "model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
        "intermediate_size": 64, "vocab_size": 200, "max_position_embeddings": 40,
    }  # fmt: skip
    path = config_file(tmp_path, bert)
    source = made(path, "fill-mask")
    assert source.processor.mask_token == "[MASK]"
    assert source.config.vocab_size == 200
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    moved = config_file(elsewhere, bert | {"vocab_size": 20})
    with pytest.raises(ModelError, match="embedding table 20 rows"):
        made(moved, "fill-mask", str(tmp_path))
    with pytest.raises(ConfigError, match="--tokenizer characters"):
        made(moved, "fill-mask")


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"hidden_size": 32}, "has no model_type"),
        ([1, 2], "has no model_type"),
        ({"model_type": "knitting"}, "knows no model_type 'knitting'"),
        ({"model_type": "gpt2", "n_layer": "two"}, "is no config of gpt2"),
    ],
)
def test_files_that_are_no_config(values: Any, told: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=told) as caught:
        read_config(config_file(tmp_path, values))
    assert "\n" not in str(caught.value)


def test_settings_that_make_no_model(tmp_path: Path) -> None:
    path = config_file(tmp_path, GPT | {"n_head": 5})
    with pytest.raises(ModelError, match="no model can be made of it"):
        made(path, "text-generation", "characters")
    with pytest.raises(ModelError, match="is missing"):
        read_config(tmp_path / "nothing.json")
