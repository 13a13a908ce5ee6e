import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calib_data.errors import ConfigError, ModelError
from compress.checkpoint import Checkpoint
from compress.loading import open_checkpoint
from export.decoding import CachedDecoding
from export.generate import GenerateConfig, choose, generate, generate_text, open_decoding
from export.graph import ExportConfig, build_graph
from export.parts import parts
from export.publish import export_onnx
from export.serialize import write_model
from tests.tiny import tiny_checkpoint

SHARED = os.environ.get("ONNXPRESS_SHARED")
GREEDY = GenerateConfig(max_new_tokens=24, ignore_end=True)
PROMPTS = [[7, 9, 11, 30, 31], [40], [12, 13, 50, 51, 52, 53, 54, 55, 56]]


@functools.cache
def tiny(family: str) -> Checkpoint:
    return tiny_checkpoint(family, "text-generation")


def decoding_of(checkpoint: Checkpoint, target: str, folder: Path) -> CachedDecoding:
    path = folder / f"{target}.onnx"
    write_model(build_graph(parts(checkpoint)["model"], ExportConfig(target=target)), path)
    return CachedDecoding(path, threads=2)


def expected(checkpoint: Checkpoint, prompt: list[int], new: int) -> list[int]:
    ids = torch.tensor([prompt])
    module: Any = checkpoint.backbone
    made = module.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new,
        do_sample=False, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return list(made[0, len(prompt) :].tolist())


@pytest.mark.parametrize(
    ("family", "target", "in_place"),
    [("llama", "cpu", True), ("llama", "portable", False), ("gpt2", "cpu", True)],
)
def test_greedy_text_is_pytorchs_alone_and_in_a_ragged_batch(
    family: str, target: str, in_place: bool, tmp_path: Path
) -> None:
    checkpoint = tiny(family)
    decoding = decoding_of(checkpoint, target, tmp_path)
    assert decoding.in_place == in_place
    wanted = [expected(checkpoint, prompt, 24) for prompt in PROMPTS]
    alone = [generate(decoding, [prompt], GREEDY).tokens[0] for prompt in PROMPTS]
    assert [list(row) for row in alone] == wanted
    assert [list(row) for row in generate(decoding, PROMPTS, GREEDY).tokens] == wanted


def test_a_step_writes_into_the_buffer_that_the_prompt_was_written_to(tmp_path: Path) -> None:
    decoding = decoding_of(tiny("llama"), "cpu", tmp_path)
    decoding.start(np.array([[7, 9, 11]]), np.ones((1, 3), np.int64), room=4)
    (first, *_) = decoding.binding.get_outputs()
    address, shape = first.data_ptr(), first.shape()
    assert shape[2] == 7
    decoding.step(np.array([12]))
    (again, *_) = decoding.binding.get_outputs()
    assert (again.data_ptr(), again.shape()) == (address, shape)


def test_text_ends_at_the_end_token(tmp_path: Path) -> None:
    decoding = decoding_of(tiny("llama"), "cpu", tmp_path)
    (whole,) = generate(decoding, [PROMPTS[0]], GREEDY).tokens
    end = whole[3]
    made = generate(decoding, [PROMPTS[0]], GenerateConfig(24), end=frozenset([end]))
    assert made.tokens[0] == whole[: whole.index(end)]
    assert made.steps == whole.index(end)


def test_sampling_follows_the_distribution() -> None:
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]])).repeat(4000, axis=0)
    random = np.random.default_rng(0)

    def shares(**settings: Any) -> np.ndarray:
        tokens = choose(logits, GenerateConfig(temperature=1.0, **settings), random)
        return np.bincount(tokens, minlength=4) / len(tokens)

    np.testing.assert_allclose(shares(), [0.5, 0.3, 0.15, 0.05], atol=0.03)
    np.testing.assert_allclose(shares(top_k=2), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(shares(top_p=0.6), [0.625, 0.375, 0, 0], atol=0.03)
    assert choose(logits[:1], GenerateConfig(), random).tolist() == [0]


@pytest.mark.parametrize(
    "settings",
    [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_k": 5}],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        GenerateConfig(**settings)


def test_an_empty_prompt_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="empty"):
        generate(decoding_of(tiny("gpt2"), "cpu", tmp_path), [[]], GREEDY)


def test_bundle_generates_text_and_knows_its_limits(tmp_path: Path) -> None:
    bundle, _ = export_onnx(tiny("llama"), tmp_path / "out", ExportConfig())
    config = GenerateConfig(max_new_tokens=5)
    (text,), made = generate_text(bundle, ["the cat sat on"], config)
    prompt = bundle.processor("the cat sat on")["input_ids"]
    wanted = expected(tiny("llama"), prompt, 5)
    assert list(made.tokens[0]) == wanted[: len(made.tokens[0])]
    assert text == bundle.processor.decode(made.tokens[0], skip_special_tokens=True)
    with pytest.raises(ConfigError, match="positions"):
        generate_text(bundle, ["the cat"], GenerateConfig(max_new_tokens=64))


def test_an_encoder_does_not_generate(tmp_path: Path) -> None:
    bundle, _ = export_onnx(tiny_checkpoint("bert"), tmp_path / "out", ExportConfig())
    with pytest.raises(ModelError, match="no decoder"):
        open_decoding(bundle)


@pytest.mark.slow
@pytest.mark.skipif(SHARED is None, reason="ONNXPRESS_SHARED does not name the evaluation folder")
def test_a_trained_model_tells_pytorchs_stories(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(Path(str(SHARED)) / "models" / "stories260K")
    decoding = decoding_of(checkpoint, "cpu", tmp_path)
    texts = ["Once upon a time", "The little dog", "A", "One day, a girl named Lily found a red"]
    prompts = [checkpoint.processor(text)["input_ids"] for text in texts]
    config = GenerateConfig(max_new_tokens=256, ignore_end=True)
    wanted = [expected(checkpoint, prompt, 256) for prompt in prompts]
    assert [list(generate(decoding, [p], config).tokens[0]) for p in prompts] == wanted
    assert [list(row) for row in generate(decoding, prompts, config).tokens] == wanted
