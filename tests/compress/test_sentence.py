import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from calib_data.errors import ModelError
from compress.loading import open_checkpoint
from compress.sentence import SentenceEncoder
from compress.sentence_modules import pool
from tests.tiny import SENTENCES, tiny_tokenizer, write, write_bert, write_sentence_encoder

HIDDEN = torch.tensor([[[1.0, -4.0], [3.0, 2.0], [100.0, 100.0]]])
MASK = torch.tensor([[1, 1, 0]])


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("cls", [1.0, -4.0]),
        ("mean", [2.0, -1.0]),
        ("max", [3.0, 2.0]),
    ],
)
def test_pooling_known_values(mode: str, expected: list[float]) -> None:
    assert pool(HIDDEN, MASK, mode)[0].tolist() == pytest.approx(expected)


def test_first_token_with_padding_on_the_left() -> None:
    assert pool(HIDDEN, torch.tensor([[0, 1, 1]]), "cls")[0].tolist() == [3, 2]


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


def listed(*modules: str) -> list[dict[str, str]]:
    """Return entries of modules.json: of `PATH=Kind`, the kind is one of sentence-transformers'."""
    named = [module.rpartition("=") for module in modules]
    return [{"path": p, "type": f"sentence_transformers.models.{kind}"} for p, _, kind in named]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("1_Pooling/config.json", {"pooling_mode": "median"}, "median"),
        ("1_Pooling/config.json", {}, "pooling mode"),
        ("modules.json", listed("Transformer"), "no pooling"),
        ("modules.json", listed("Transformer", "LSTM"), "'LSTM' is not supported"),
        ("modules.json", listed("Pooling", "Transformer"), "'Pooling' is not supported"),
        ("modules.json", [*listed("Transformer"), {"path": "", "type": "other.Pooling"}],
         "'other.Pooling' is not supported"),
        ("modules.json", listed("Transformer", "../secret=Pooling"), "leads outside"),
        ("modules.json", listed("../other=Transformer"), "leads outside"),
        ("sentence_bert_config.json", {"module_output_name": "sentence_embedding"}, "last hidden"),
        ("modules.json", [], "modules.json"),
        ("modules.json", {"a": 1}, "modules.json"),
        ("modules.json", [{"type": "sentence_transformers.models.Transformer"}], "modules.json"),
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


def encoder_of(folder: Path, modules: list[Any], side: str = "right", **settings: Any) -> Path:
    """Save `modules` after a tiny BERT as sentence-transformers does; return the directory."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer

    body = write_bert(folder / "body")
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    tokenizer.save_pretrained(body)
    with torch.no_grad():
        for module in modules:
            for value in module.parameters():
                value.mul_(3)
    made = SentenceTransformer(modules=[Transformer(str(body)), *modules], **settings)
    made.save_pretrained(str(folder / "encoder"), create_model_card=False)
    return folder / "encoder"


def _lists() -> dict[str, Any]:
    """Return lists of modules, made when they are asked for: the library is an extra."""
    from sentence_transformers.sentence_transformer import modules as library

    pooling, dense, normalize = library.Pooling, library.Dense, library.Normalize
    return {
        "normalize, dense": lambda: [pooling(32, "mean"), normalize(), dense(32, 12)],
        "dense, normalize": lambda: [pooling(32, "mean"), dense(32, 12), normalize()],
        "mean and max": lambda: [pooling(32, ("mean", "max"))],
        "residual dense": lambda: [pooling(32, "mean"), dense(32, 32, use_residual=True)],
        "residual, narrower": lambda: [pooling(32, "max"), dense(32, 12, use_residual=True)],
        "SiLU": lambda: [pooling(32, "cls"), dense(32, 9, activation_function=nn.SiLU())],
        "tokens": lambda: [
            dense(32, 8, bias=False, module_input_name="token_embeddings"),
            normalize(module_input_name="token_embeddings"),
        ],
        "tokens, pooled": lambda: [
            dense(32, 8, module_input_name="token_embeddings"), pooling(8, "mean"),
        ],
        "layer norm": lambda: [pooling(32, "mean"), library.LayerNorm(32), library.Dropout(0.5)],
        **{mode: lambda mode=mode: [pooling(32, mode)] for mode in pooling.POOLING_MODES},
    }  # fmt: skip


@pytest.mark.parametrize("side", ["right", "left"])
def test_every_list_of_modules_encodes_as_the_library(side: str, tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    for number, (name, make) in enumerate(_lists().items()):
        directory = encoder_of(tmp_path / str(number), make(), side)
        checkpoint = open_checkpoint(directory)
        batch = checkpoint.processor(SENTENCES[:5], padding=True, return_tensors="pt")
        found = checkpoint.predict(batch)
        saved = open_checkpoint(write(checkpoint, tmp_path / f"{number}-saved"))
        for path in (directory, tmp_path / f"{number}-saved"):
            reference = library.SentenceTransformer(str(path), device="cpu")
            if "sentence_embedding" in found:
                expected = reference.encode(SENTENCES[:5])
                np.testing.assert_allclose(
                    found["sentence_embedding"], expected, rtol=1e-4, atol=2e-6, err_msg=name
                )
            tokens = reference.encode(SENTENCES[:5], output_value="token_embeddings")
            for row, real, expected in zip(
                found["token_embeddings"], batch["attention_mask"], tokens
            ):
                np.testing.assert_allclose(
                    row[real.bool()], expected, rtol=1e-4, atol=2e-6, err_msg=name
                )
        again = saved.predict(batch)
        assert all(np.array_equal(again[key], value) for key, value in found.items()), name


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("mode", ["mean", "cls", "lasttoken"])
def test_a_prompt_is_left_out_of_the_pooling(mode: str, side: str, tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    modules = library.sentence_transformer.modules
    prompts = {"query": "the red text: ", "long": "the red text: in python ", "none": ""}
    pooling = modules.Pooling(32, mode, include_prompt=False)
    directory = encoder_of(tmp_path, [pooling], side, prompts=prompts)
    checkpoint = open_checkpoint(directory)
    reference = library.SentenceTransformer(str(directory), device="cpu")
    for name, prompt in prompts.items():
        texts = [prompt + text for text in SENTENCES[:5]]
        batch = checkpoint.processor(texts, padding=True, return_tensors="pt")
        found = checkpoint.predict(batch)["sentence_embedding"]
        expected = reference.encode(SENTENCES[:5], prompt_name=name)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-6, err_msg=name)


def test_a_prompt_that_nothing_names_is_refused(tmp_path: Path) -> None:
    directory = write_sentence_encoder(tmp_path / "source")
    pooling = {"pooling_mode": "mean", "include_prompt": False}
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    with pytest.raises(ModelError, match="names no prompts"):
        open_checkpoint(directory)


def test_a_module_of_the_library_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = write_sentence_encoder(tmp_path / "source")
    open_checkpoint(directory)
    (directory / "1_Pooling" / "config.json").write_text('{"pooling_mode": "lasttoken"}')
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *more: None if name == "sentence_transformers" else find(name, *more),
    )
    with pytest.raises(ModelError, match=r"pip install 'onnxpress\[sentence\]'"):
        open_checkpoint(directory)


def test_the_transformer_in_a_folder_of_its_own_is_saved_at_the_top(tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    directory = write_sentence_encoder(tmp_path / "source")
    entries = json.loads((directory / "modules.json").read_text())
    entries[0]["path"] = "0_Transformer"
    inner = directory / "0_Transformer"
    inner.mkdir()
    for file in [path for path in directory.iterdir() if path.is_file()]:
        file.rename(inner / file.name)
    (inner / "modules.json").unlink()
    (directory / "modules.json").write_text(json.dumps(entries))
    checkpoint = open_checkpoint(directory)
    assert checkpoint.max_length == 48
    saved = write(checkpoint, tmp_path / "saved")
    expected = library.SentenceTransformer(str(directory), device="cpu").encode(SENTENCES[:3])
    found = library.SentenceTransformer(str(saved), device="cpu").encode(SENTENCES[:3])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
