import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from calib_data.errors import ModelError
from compress.loading import open_checkpoint
from compress.sentence import SentenceEncoder, pool
from tests.tiny import SENTENCES, write, write_bert, write_sentence_encoder

HIDDEN = torch.tensor([[[1.0, -4.0], [3.0, 2.0], [100.0, 100.0]]])
MASK = torch.tensor([[1, 1, 0]])


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("cls", [1.0, -4.0]),
        ("mean", [2.0, -1.0]),
        ("max", [3.0, 2.0]),
        ("mean_sqrt_len_tokens", [4 / 2**0.5, -2 / 2**0.5]),
        ("weightedmean", [7 / 3, 0.0]),
        ("lasttoken", [3.0, 2.0]),
    ],
)
def test_pooling_known_values(mode: str, expected: list[float]) -> None:
    assert pool(HIDDEN, MASK, mode)[0].tolist() == pytest.approx(expected)


def test_last_token_with_padding_on_the_left() -> None:
    assert pool(HIDDEN, torch.tensor([[0, 1, 1]]), "lasttoken")[0].tolist() == [100, 100]


def change(directory: Path, dense: bool, pooling: dict[str, Any], norm: bool) -> None:
    """Give the encoder another pooling, a projection, or no normalisation."""
    modules = json.loads((directory / "modules.json").read_text())
    modules = modules if norm else modules[:2]
    config = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": False} | pooling
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(config))
    if dense:
        kind = "sentence_transformers.models.Dense"
        modules.insert(2, {"idx": 2, "name": "d", "path": "2_Dense", "type": kind})
        (directory / "2_Dense").mkdir()
        width = 32 * sum(pooling.values())
        settings = {
            "in_features": width,
            "out_features": 12,
            "bias": True,
            "activation_function": "torch.nn.modules.activation.Tanh",
        }
        (directory / "2_Dense" / "config.json").write_text(json.dumps(settings))
        torch.manual_seed(5)
        weights = {"linear.weight": torch.randn(12, width), "linear.bias": torch.randn(12)}
        save_file(weights, directory / "2_Dense" / "model.safetensors")
    (directory / "modules.json").write_text(json.dumps(modules))


LAYOUTS: dict[str, tuple[bool, dict[str, Any], bool]] = {
    "mean": (False, {"pooling_mode_mean_tokens": True}, True),
    "cls": (False, {"pooling_mode_cls_token": True}, True),
    "max, not normalised": (False, {"pooling_mode_max_tokens": True}, False),
    "dense": (True, {"pooling_mode_mean_tokens": True}, True),
    "two poolings, dense": (
        True,
        {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
        False,
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_matches_the_sentence_transformers_library(layout: str, tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    directory = write_sentence_encoder(tmp_path / "source")
    change(directory, *LAYOUTS[layout])
    checkpoint = open_checkpoint(directory)
    assert isinstance(checkpoint.module, SentenceEncoder)
    assert checkpoint.task == "sentence-embedding"
    assert checkpoint.max_length == 48
    texts = SENTENCES[:8]
    batch = checkpoint.processor(texts, padding=True, return_tensors="pt")
    found = checkpoint.predict(batch)["sentence_embedding"]

    reference = library.SentenceTransformer(str(directory), device="cpu")
    np.testing.assert_allclose(found, reference.encode(texts), rtol=1e-4, atol=1e-6)

    saved = write(checkpoint, tmp_path / "saved")
    again = open_checkpoint(saved)
    assert np.array_equal(again.predict(batch)["sentence_embedding"], found)
    reopened = library.SentenceTransformer(str(saved), device="cpu")
    np.testing.assert_allclose(found, reopened.encode(texts), rtol=1e-4, atol=1e-6)


def test_plain_encoder_becomes_one_with_mean_pooling(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_bert(tmp_path / "bert"), task="sentence-embedding")
    batch = checkpoint.processor(SENTENCES[:3], padding=True, return_tensors="pt")
    outputs = checkpoint.predict(batch)
    mask = batch["attention_mask"].numpy()[..., None]
    mean = (outputs["token_embeddings"] * mask).sum(axis=1) / mask.sum(axis=1)
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    np.testing.assert_allclose(outputs["sentence_embedding"], mean, rtol=1e-5, atol=1e-6)
    again = open_checkpoint(write(checkpoint, tmp_path / "saved"))
    assert np.array_equal(again.predict(batch)["sentence_embedding"], outputs["sentence_embedding"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("1_Pooling/config.json", {"pooling_mode": "median"}, "median"),
        ("1_Pooling/config.json", {}, "pooling mode"),
        ("modules.json", [{"path": "", "type": "x.Transformer"}], "no pooling"),
        ("modules.json", [{"path": "", "type": "x.Transformer"}, {"path": "", "type": "x.LSTM"}],
         "'LSTM' is not supported"),
        ("modules.json", [{"path": "", "type": "x.Transformer"},
                          {"path": "../secret", "type": "x.Pooling"}], "leads outside"),
        ("modules.json", [{"path": "../other", "type": "x.Transformer"}], "leads outside"),
        ("modules.json", [], "modules.json"),
        ("modules.json", {"a": 1}, "modules.json"),
        ("modules.json", [{"type": "x.Transformer"}], "modules.json"),
    ],
)  # fmt: skip
def test_layouts_that_make_no_sense_are_refused(
    name: str, content: Any, message: str, tmp_path: Path
) -> None:
    directory = write_sentence_encoder(tmp_path / "source")
    (directory / name).write_text(json.dumps(content))
    with pytest.raises(ModelError, match=message) as caught:
        open_checkpoint(directory)
    assert "\n" not in str(caught.value)


def test_dense_that_makes_no_sense_is_refused(tmp_path: Path) -> None:
    for index, (changes, message) in enumerate(
        [({"activation_function": "os.system"}, "os.system"), ({"in_features": 5}, "2_Dense")]
    ):
        directory = write_sentence_encoder(tmp_path / str(index))
        change(directory, *LAYOUTS["dense"])
        path = directory / "2_Dense" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        with pytest.raises(ModelError, match=message) as caught:
            open_checkpoint(directory)
        assert "\n" not in str(caught.value)
