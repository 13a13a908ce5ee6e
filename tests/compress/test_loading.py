import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from calib_data.batches import ImageShape
from calib_data.errors import ConfigError, ModelError
from compress.checkpoint import Checkpoint, weights_sha256
from compress.loading import open_checkpoint
from compress.quantize import quantize
from compress.quantize_config import QuantizeConfig
from tests.compress.test_prune import apply_plan, random_plan
from tests.tiny import (
    FAMILIES,
    tiny_checkpoint,
    tiny_tokenizer,
    write,
    write_bert,
    write_classifier,
    write_sentence_encoder,
)

TIED = [("gpt2", "text-generation"), ("bert", "fill-mask"), ("llama", "text-generation")]
TASKS = [
    *TIED,
    ("bert", "text-classification"),
    ("bert", "token-classification"),
    ("bert", "question-answering"),
    ("vit", "image-classification"),
    ("t5", "text2text-generation"),
]


def check_same(first: Checkpoint, second: Checkpoint) -> None:
    assert weights_sha256(first.module) == weights_sha256(second.module)
    assert first.task == second.task
    assert first.signature.names == second.signature.names
    assert first.signature.outputs == second.signature.outputs
    assert dict(first.structure) == dict(second.structure)
    assert first.quantization == second.quantization
    assert not second.module.training
    sample = first.signature.sample(2, 9, ragged=True)
    mine, theirs = first.predict(sample), second.predict(sample)
    for name, value in mine.items():
        assert np.array_equal(value, theirs[name]), name


def variants(checkpoint: Checkpoint) -> dict[str, Checkpoint]:
    pruned = apply_plan(checkpoint, random_plan(checkpoint))
    skip = "fc1" if hasattr(checkpoint.module, "fc1") else "*.0.*"
    return {
        "plain": checkpoint,
        "pruned": pruned,
        "int8": quantize(checkpoint, QuantizeConfig()).checkpoint,
        "pruned int8": quantize(pruned, QuantizeConfig(skip=(skip,))).checkpoint,
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_families_round_trip_bit_for_bit(family: str, tmp_path: Path) -> None:
    for name, checkpoint in variants(tiny_checkpoint(family)).items():
        check_same(checkpoint, open_checkpoint(write(checkpoint, tmp_path / name)))


@pytest.mark.parametrize(("family", "task"), TASKS)
def test_tasks_round_trip_bit_for_bit(family: str, task: str, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(family, task, tie_word_embeddings=True)
    for name, variant in variants(checkpoint).items():
        check_same(variant, open_checkpoint(write(variant, tmp_path / name)))


@pytest.mark.parametrize(("family", "task"), TIED)
def test_tied_weights_stay_tied(family: str, task: str, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(family, task, tie_word_embeddings=True)
    pruned = apply_plan(checkpoint, random_plan(checkpoint))
    for name, variant in (("plain", checkpoint), ("pruned", pruned)):
        module: Any = open_checkpoint(write(variant, tmp_path / name)).module
        assert module.get_input_embeddings().weight is module.get_output_embeddings().weight


def test_processor_structure_and_lineage_survive(tmp_path: Path) -> None:
    source = open_checkpoint(write_bert(tmp_path / "source"))
    assert [entry["stage"] for entry in source.lineage] == ["source"]
    assert source.lineage[0]["model"] == "source"
    assert source.lineage[0]["sha256"] == weights_sha256(source.module)
    made = quantize(source, QuantizeConfig()).checkpoint
    again = open_checkpoint(write(made, tmp_path / "made"))
    assert again.lineage == made.lineage
    assert again.processor.get_vocab() == tiny_tokenizer().get_vocab()
    assert again.max_length == 64


@pytest.mark.parametrize(
    ("family", "task", "auto"),
    [
        ("bert", "feature-extraction", AutoModel),
        ("bert", "fill-mask", AutoModelForMaskedLM),
        ("gpt2", "text-generation", AutoModelForCausalLM),
        ("vit", "feature-extraction", AutoModel),
    ],
)
def test_plain_checkpoint_opens_with_transformers(
    family: str, task: str, auto: Any, tmp_path: Path
) -> None:
    checkpoint = tiny_checkpoint(family, task)
    directory = write(checkpoint, tmp_path / "saved")
    module, info = auto.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert weights_sha256(module) == weights_sha256(checkpoint.module)


def test_task_is_asked_of_the_config_or_given(tmp_path: Path) -> None:
    directory = write_classifier(tmp_path / "model")
    assert open_checkpoint(directory).task == "text-classification"
    checkpoint = open_checkpoint(directory, task="feature-extraction")
    assert "last_hidden_state" in checkpoint.signature.outputs
    with pytest.raises(ConfigError, match="unknown task 'sorting'"):
        open_checkpoint(directory, task="sorting")
    with pytest.raises(ModelError, match="bert has no model for the task image-classification"):
        open_checkpoint(directory, task="image-classification")
    with pytest.raises(ModelError, match=r"missing (lm_head|cls)"):
        open_checkpoint(directory, task="fill-mask")


def test_headless_weights_open_without_a_pooler(tmp_path: Path) -> None:
    directory = write(tiny_checkpoint("bert", "fill-mask"), tmp_path / "model")
    checkpoint = open_checkpoint(directory, task="sentence-embedding")
    assert checkpoint.backbone.pooler is None
    made = quantize(checkpoint, QuantizeConfig()).checkpoint
    check_same(made, open_checkpoint(write(made, tmp_path / "made")))


def test_images_without_a_processor(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(tiny_checkpoint("vit"), tmp_path / "vit"))
    assert checkpoint.processor == ImageShape(12, 3)


# --- factories ----------------------------------------------------------------------------------

MIXER = "tests.compress.factories:mixer"


@pytest.mark.parametrize("name", [MIXER, "tests.compress.factories:mixer_tuple"])
def test_factory(name: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(name)
    assert checkpoint.task == "custom"
    assert checkpoint.signature.names == ("ids", "scale")
    assert checkpoint.signature.outputs == ("scores", "features")
    for kind, variant in variants(checkpoint).items():
        directory = write(variant, tmp_path / kind)
        with pytest.raises(ModelError, match="pass --trust-remote-code"):
            open_checkpoint(directory)
        again = open_checkpoint(directory, trust_remote_code=True)
        check_same(variant, again)
        assert again.factory == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "must return"),
        ("text_examples", "must be tensors"),
        ("absent", "cannot be imported"),
        ("failing", "failing"),
        ("infinite", "NaN or infinite"),
    ],
)
def test_broken_factories_are_refused(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        open_checkpoint(f"tests.compress.factories:{name}")
    assert "\n" not in str(caught.value)


def test_factory_in_no_module_is_refused() -> None:
    with pytest.raises(ModelError, match="cannot be imported"):
        open_checkpoint("no_such_package.module:make")


def test_damaged_weights_of_a_factory_are_refused(tmp_path: Path) -> None:
    directory = write(open_checkpoint(MIXER), tmp_path / "made")
    truncate(directory)
    with pytest.raises(ModelError) as caught:
        open_checkpoint(directory, trust_remote_code=True)
    assert "\n" not in str(caught.value)
    (directory / "model.safetensors").unlink()
    with pytest.raises(ModelError):
        open_checkpoint(directory, trust_remote_code=True)


# --- bad input ----------------------------------------------------------------------------------


def truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def truncate_header(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"\x10\x00")


def huge_header(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")


def weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        values = load_file(directory / "model.safetensors")
        change(values)
        save_file(values, directory / "model.safetensors", metadata={"format": "pt"})

    return apply


def first(values: dict[str, torch.Tensor]) -> str:
    return next(name for name in sorted(values) if name.endswith("layer.0.output.dense.weight"))


def fill(value: float) -> Callable[[Path], None]:
    def apply(values: dict[str, torch.Tensor]) -> None:
        values[first(values)][0] = value

    return weights(apply)


def drop(values: dict[str, torch.Tensor]) -> None:
    del values[first(values)]


def config(**changes: Any) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return apply


def longer_tokenizer(directory: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["onnx", "press"])
    tokenizer.save_pretrained(directory)


def manifest(**changes: Any) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        path = directory / "onnxpress.json"
        values = json.loads(path.read_text()) if path.is_file() else {"format": 1}
        path.write_text(json.dumps(values | changes))

    return apply


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "model.safetensors"),
    "truncated weights": (truncate, "cannot be read"),
    "truncated header": (truncate_header, "cannot be read"),
    "huge header": (huge_header, "cannot be read"),
    "empty weights": (lambda d: (d / "model.safetensors").write_bytes(b""), "cannot be read"),
    "missing key": (weights(drop), "missing .*layer.0.output.dense"),
    "extra key": (weights(lambda v: v.update(extra=torch.ones(2))), "unexpected .*extra"),
    "wrong shape": (
        weights(lambda v: v.update({first(v): v[first(v)][:5].clone()})),
        "wrong shape .*layer.0.output.dense",
    ),
    "NaN": (fill(float("nan")), "NaN or infinite"),
    "infinite": (fill(float("inf")), "NaN or infinite"),
    "tokenizer too large": (longer_tokenizer, "ids up to 108, the embedding table 107 rows"),
    "unknown model_type": (config(model_type="perceptron"), "unknown architecture 'perceptron'"),
    "no model_type": (config(model_type=None), "unknown architecture"),
    "unknown class": (config(architectures=["BertForJuggling"]), "BertForJuggling"),
    "no architectures": (config(architectures=None), "fits no task; pass --task"),
    "config that makes no sense": (config(num_attention_heads=5), "multiple"),
    "config of the wrong type": (config(hidden_size="wide"), "hidden_size|wide|int|str"),
    "config is a list": (lambda d: (d / "config.json").write_text("[]"), "config.json"),
    "broken config.json": (lambda d: (d / "config.json").write_text("{"), "cannot be read as JSON"),
    "no config.json": (lambda d: (d / "config.json").unlink(), "no config.json"),
    "broken tokenizer": (lambda d: (d / "tokenizer.json").write_text("{"), "tokenizer"),
    "newer manifest": (manifest(format=99), "newer than 2; upgrade"),
    "manifest without format": (manifest(format="one"), "not a checkpoint's manifest"),
    "manifest of a bundle": (manifest(graphs=[]), "ONNX bundle"),
    "manifest with a factory": (manifest(factory=MIXER), "pass --trust-remote-code"),
    "manifest with an unknown task": (manifest(task="sorting"), "sorting"),
}


def check_refused(directory: Path, message: str) -> None:
    with pytest.raises((ModelError, ConfigError), match=message) as caught:
        open_checkpoint(directory)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == (2 if "sorting" in message else 4)


@pytest.mark.parametrize("damage", DAMAGE)
def test_bad_input_is_refused_in_one_line(damage: str, tmp_path: Path) -> None:
    directory = write_bert(tmp_path / "model")
    open_checkpoint(directory)
    change, message = DAMAGE[damage]
    change(directory)
    check_refused(directory, message)


WEIGHTS = [k for k in DAMAGE if any(w in k for w in ("key", "shape", "weights", "header", "NaN"))]


@pytest.mark.parametrize("damage", WEIGHTS)
def test_damaged_checkpoints_of_ours_are_refused(damage: str, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint("bert")
    pruned = apply_plan(checkpoint, random_plan(checkpoint))
    directory = write(pruned, tmp_path / "model")
    change, message = DAMAGE[damage]
    change(directory)
    check_refused(directory, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"structure": {"encoder.layer.9.neurons": 3}}, "cannot hold"),
        ({"structure": {}}, "wrong shape|missing|scheme"),
        ({"structure": {"encoder.layer.0.neurons": "many"}}, "structure|cannot hold"),
        ({"quantization": {"scheme": "dynamic"}}, "do not fit the manifest"),
        ({"quantization": {"scheme": "fp4", "modules": []}}, "scheme 'fp4'"),
        ({"quantization": None}, "do not fit"),
    ],
)
def test_manifest_that_does_not_fit_the_weights(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    checkpoint = tiny_checkpoint("bert")
    made = quantize(apply_plan(checkpoint, random_plan(checkpoint)), QuantizeConfig()).checkpoint
    directory = write(made, tmp_path / "model")
    manifest(**changes)(directory)
    check_refused(directory, message)


class Attack:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_pickles_do_not_run_code(tmp_path: Path) -> None:
    directory = write_bert(tmp_path / "model")
    target = tmp_path / "executed"
    (directory / "model.safetensors").unlink()
    torch.save(
        {"embeddings.word_embeddings.weight": Attack(target)}, directory / "pytorch_model.bin"
    )
    check_refused(directory, "cannot be read")
    assert not target.exists()
    torch.load(directory / "pytorch_model.bin", weights_only=False)
    assert target.exists()  # so the attack would have worked
    target.unlink()
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Attack(target)))
    check_refused(directory, "cannot be read")
    assert not target.exists()


def test_pickles_of_weights_open(tmp_path: Path) -> None:
    directory = write_bert(tmp_path / "model")
    expected = weights_sha256(open_checkpoint(directory).module)
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    assert weights_sha256(open_checkpoint(directory).module) == expected


def test_hub_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    for name, hint in (
        ("bert-base-uncased", "check the id and the network"),
        ("someone/something", "check the id and the network"),
        ("./missing", "no such directory"),
        ("/missing/model", "no such directory"),
        ("a/b/c", "no such directory"),
    ):
        with pytest.raises(ModelError, match=hint) as caught:
            open_checkpoint(name)
        assert "\n" not in str(caught.value)


def test_packaged_hub_id_checks_its_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from compress import loading

    write_sentence_encoder(tmp_path / "fake_model_package" / "model")
    (tmp_path / "fake_model_package" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    weights_file = tmp_path / "fake_model_package" / "model" / "model.safetensors"
    right = loading.sha256_file(weights_file)
    monkeypatch.setitem(loading._PACKAGED, "some/model", ("fake_model_package", right))
    checkpoint = open_checkpoint("some/model")
    assert checkpoint.task == "sentence-embedding"
    assert checkpoint.lineage[0]["model"] == "some/model"
    monkeypatch.setitem(loading._PACKAGED, "some/model", ("fake_model_package", "0" * 64))
    with pytest.raises(ModelError, match="not 000000000000…; reinstall"):
        open_checkpoint("some/model")
