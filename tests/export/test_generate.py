import copy
import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from calib_data.errors import ConfigError, ModelError
from compress.checkpoint import Checkpoint
from compress.loading import open_checkpoint
from export.decoding import CachedDecoding
from export.generate import GenerateConfig, generate, generate_text, open_decoding, settings_of
from export.graph import ExportConfig, build_graph
from export.parts import parts
from export.publish import export_onnx
from export.serialize import write_model
from tests.tiny import tiny_checkpoint

SHARED = os.environ.get("ONNXPRESS_SHARED")
GREEDY = GenerationConfig(max_new_tokens=24, pad_token_id=0)
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
    settings = GenerationConfig(max_new_tokens=24, eos_token_id=[end, 10**6])
    made = generate(decoding, [PROMPTS[0]], settings)
    assert made.tokens[0] == whole[: whole.index(end)]
    assert made.steps == whole.index(end)


# what a generation_config.json may ask for: (settings, they sample)
ASKED: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "beams that stop early": {
        "num_beams": 4, "length_penalty": 0.5, "early_stopping": True, "no_repeat_ngram_size": 2,
    },
    "penalty": {"repetition_penalty": 1.7},
    "several ends": {"eos_token_id": [3, 5, 7], "min_new_tokens": 4},
    "suppressed": {"suppress_tokens": [*range(40)], "begin_suppress_tokens": [50]},
    "forced": {"forced_bos_token_id": 40, "forced_eos_token_id": 9},
    "sampled": {"do_sample": True, "top_k": 5, "temperature": 1.3},
    "sampled beams": {"do_sample": True, "num_beams": 2, "top_p": 0.8},
    "words": {"bad_words_ids": [[5], [6, 7]]},
}  # fmt: skip


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return (checkpoint, bundle) for a decoder in place, one that is not, and a translator."""
    made: dict[str, Any] = {}
    for family, target in (("llama", "cpu"), ("gpt2", "portable"), ("bart", "cpu")):
        task = "text2text-generation" if family == "bart" else "text-generation"
        checkpoint = tiny_checkpoint(family, task)
        folder = tmp_path_factory.mktemp(family) / "onnx"
        made[family] = checkpoint, export_onnx(checkpoint, folder, ExportConfig(target))[0]
    return made


@pytest.mark.parametrize("family", ["llama", "gpt2", "bart"])
@pytest.mark.parametrize("asked", ASKED)
def test_settings_mean_what_transformers_means_by_them(
    family: str, asked: str, bundles: dict[str, Any]
) -> None:
    checkpoint, bundle = bundles[family]
    module: Any = checkpoint.backbone
    both = family == "bart"
    settings = GenerationConfig(
        max_new_tokens=10,
        pad_token_id=0,
        decoder_start_token_id=2 if both else None,
        **ASKED[asked],
    )
    longest = max(map(len, PROMPTS))
    ids, mask = torch.zeros(3, longest, dtype=torch.long), torch.zeros(3, longest, dtype=torch.long)
    for row, prompt in enumerate(PROMPTS):
        place = slice(len(prompt)) if both else slice(longest - len(prompt), None)
        ids[row, place], mask[row, place] = torch.tensor(prompt), 1
    module.generation_config = GenerationConfig()  # not what the tiny config brings
    torch.manual_seed(3)
    wanted = module.generate(
        input_ids=ids, attention_mask=mask, generation_config=copy.deepcopy(settings)
    )[:, 1 if both else longest :].tolist()
    ends = ASKED[asked].get("eos_token_id", [])
    wanted = [row[: next((i for i, t in enumerate(row) if t in ends), len(row))] for row in wanted]
    found = generate(open_decoding(bundle), PROMPTS, settings, seed=3)
    assert [list(row) for row in found.tokens] == wanted


def test_a_bundle_brings_its_own_settings_and_the_user_overrules_them(
    tmp_path: Path, bundles: dict[str, Any]
) -> None:
    checkpoint, _ = bundles["llama"]
    checkpoint.backbone.generation_config = GenerationConfig(
        do_sample=True, temperature=0.6, top_p=0.9, num_beams=2, eos_token_id=[3, 5], max_length=40
    )
    bundle, _ = export_onnx(checkpoint, tmp_path / "onnx", ExportConfig())
    own = settings_of(bundle, GenerateConfig())
    assert (own.do_sample, own.temperature, own.num_beams, own.max_length) == (True, 0.6, 2, 40)
    assert own.eos_token_id == [3, 5]
    mine = settings_of(bundle, GenerateConfig(temperature=0, beams=1, max_new_tokens=7))
    assert (mine.do_sample, mine.num_beams, mine.max_new_tokens) == (False, 1, 7)
    assert mine.max_length is None
    (bundle.path / "generation_config.json").write_text('{"guidance_scale": 2.0}')
    with pytest.raises(ConfigError, match="guidance_scale"):
        settings_of(bundle, GenerateConfig())


@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_k": 5, "temperature": 0.0},
        {"beams": 0},
    ],
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
    (text,), made, told = generate_text(bundle, ["the cat sat on"], config)
    assert told["max_new_tokens"] == 5
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
    config = GenerationConfig(max_new_tokens=256, pad_token_id=0)
    wanted = [expected(checkpoint, prompt, 256) for prompt in prompts]
    assert [list(generate(decoding, [p], config).tokens[0]) for p in prompts] == wanted
    assert [list(row) for row in generate(decoding, prompts, config).tokens] == wanted
