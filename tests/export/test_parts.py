"""Which graphs a model becomes, with which cache."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from calib_data.errors import ModelError
from compress.checkpoint import Checkpoint
from compress.loading import open_checkpoint
from compress.signature import transformer_signature
from export.cached import CachedDecoder
from export.graph import ExportConfig, build_graph
from export.parts import parts
from export.publish import export_onnx
from tests.export.graphs import checkpoint_of, run_graph
from tests.tiny import tiny_checkpoint, tiny_model, write

# a convolution's state beside keys and values; a state-space model; one that loops over its tokens
LFM2 = {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}
MAMBA2 = {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8}


def other(family: str, **changes: Any) -> Checkpoint:
    """Return a seeded causal language model of a family that has no row of its own in the tests."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    words = {"intermediate_size": 64, "vocab_size": 60, "max_position_embeddings": 64}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **(sizes | words | changes))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    return Checkpoint(model, "text-generation", transformer_signature(model, model, None))


def test_an_encoder_is_one_graph_and_itself() -> None:
    assert parts(checkpoint_of("bert")) == {"model": checkpoint_of("bert")}


def test_a_decoder_takes_and_returns_its_cache() -> None:
    (name, part), *others = parts(checkpoint_of("llama")).items()
    assert (name, others) == ("model", [])
    assert isinstance(part.module, CachedDecoder)
    cache = [f"{layer}.{kind}" for layer in (0, 1) for kind in ("key", "value")]
    names = ["input_ids", "attention_mask", "position_ids"]
    assert part.signature.names == (*names, *(f"past_key_values.{name}" for name in cache))
    assert part.signature.outputs == ("logits", *(f"present.{name}" for name in cache))
    shapes = {item.shape[1] for item in part.signature.inputs if item.kind == "past"}
    assert shapes == {2}  # the shared heads, as a run of the model shows them


@pytest.mark.parametrize(("family", "changes"), [("lfm2", LFM2), ("mamba2", MAMBA2)])
def test_a_cache_of_anything_else_is_left_out(family: str, changes: dict[str, Any]) -> None:
    checkpoint = other(family, **changes)
    assert parts(checkpoint) == {"model": checkpoint}
    model = build_graph(checkpoint, ExportConfig())
    for batch, sequence in ((1, 1), (3, 9)):
        sample = checkpoint.signature.sample(batch, sequence)
        expected = checkpoint.predict(sample)["logits"]
        np.testing.assert_allclose(
            run_graph(model, sample)["logits"], expected, rtol=1e-3, atol=1e-5
        )


def test_a_model_that_rescales_its_weights_when_it_runs_is_refused() -> None:
    """RWKV divides weights at its first run in eval mode: a second run is another model's."""
    with pytest.raises(ModelError, match=r"writes into rwkv\.blocks") as caught:
        other("rwkv", attention_hidden_size=32, context_length=64)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "auto", "given", "expected"),
    [
        ("bert", "AutoModelForSequenceClassification", None, "text-classification"),
        ("gpt2", "AutoModelForCausalLM", None, "text-generation"),
        ("gpt2", "AutoModelForCausalLM", "feature-extraction", "feature-extraction"),
        ("marian", "AutoModelForSeq2SeqLM", None, "text2text-generation"),
        ("vit", "AutoModelForImageClassification", None, "image-classification"),
    ],
)
def test_task_of_a_directory_without_a_tokenizer(
    family: str, auto: str, given: str | None, expected: str, tmp_path: Path
) -> None:
    tiny_model(family, getattr(transformers, auto)).save_pretrained(tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model", task=given)
    assert checkpoint.task == expected
    assert len(parts(checkpoint)) == (2 if family == "marian" else 1)


def test_directory_without_a_tokenizer_exports(tmp_path: Path) -> None:
    tiny_model("gpt2", transformers.AutoModelForCausalLM).save_pretrained(tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    assert checkpoint.processor is None
    bundle, report = export_onnx(checkpoint, tmp_path / "out", ExportConfig())
    assert report.passed
    assert bundle.signature.has_past
    assert bundle.processor is None


def test_generation_settings_are_kept(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint("gpt2", "text-generation")
    settings: Any = checkpoint.backbone.generation_config
    settings.repetition_penalty = 1.5
    settings.temperature = 0.5  # without sampling: transformers refuses to save it
    opened: Any = open_checkpoint(write(checkpoint, tmp_path / "model")).backbone
    assert opened.generation_config.repetition_penalty == 1.5
