from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch

from calib_data.batches import Batches
from calib_data.characters import character_tokenizer
from calib_data.errors import ConfigError, DataError, DestinationError, ModelError
from calib_data.objectives import NextToken, Translation
from calib_data.sources import Examples
from compress import generations
from compress.checkpoint import Checkpoint
from compress.distill import DistillConfig, distill
from compress.generations import GenerateConfig, generate_examples
from compress.training import TrainConfig
from tests.compress.pairs import make
from tests.tiny import SENTENCES

TEXTS = list(dict.fromkeys(SENTENCES))


def examples(texts: list[str] = TEXTS) -> Examples:
    return Examples(datasets.Dataset.from_dict({"text": texts}), "test data")


def writer(family: str = "gpt2", **changes: object) -> Checkpoint:
    """A teacher whose tokens are characters, so that text and tokens are the same thing."""
    tokenizer = character_tokenizer(TEXTS, 64)
    task = "text2text-generation" if family in ("bart", "t5") else "text-generation"
    words = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    return replace(make(family, task, **words, **changes), processor=tokenizer)


CONFIG = GenerateConfig(new_tokens=6, prompt_tokens=4, batch_size=3)


def test_greedy_continuations_are_the_likeliest_tokens(tmp_path: Path) -> None:
    teacher = writer()
    made = generate_examples(teacher, examples(), CONFIG, tmp_path)
    assert made.roles == {"text"}
    assert len(made) == len(TEXTS)
    tokenizer = teacher.processor
    for text in made.column("text"):
        prompt = next(t for t in TEXTS if t[:4] == text[:4])
        ids = tokenizer(prompt[:4])["input_ids"]
        for _ in range(6):  # one row, no padding, no cache
            with torch.no_grad():
                logits = teacher.forward(
                    {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids))}
                )["logits"]
            ids.append(int(logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_sampling_is_seeded(tmp_path: Path) -> None:
    teacher = writer()
    found = []
    for seed, temperature in ((0, 1.0), (0, 1.0), (1, 1.0), (0, 0.0)):
        config = replace(CONFIG, seed=seed, temperature=temperature)
        state = torch.random.get_rng_state()
        place = tmp_path / str(len(found))
        found.append(generate_examples(teacher, examples(), config, place).column("text"))
        assert torch.random.get_rng_state().equal(state)
    assert found[0] == found[1]
    assert found[0] != found[2]
    assert found[0] != found[3]


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_an_encoder_decoder_answers(family: str, tmp_path: Path) -> None:
    teacher = writer(family, decoder_start_token_id=0)
    made = generate_examples(teacher, examples(), CONFIG, tmp_path)
    assert made.roles == {"text", "text_pair"}
    assert set(made.column("text")) <= set(TEXTS)
    for text, answer in zip(made.column("text"), made.column("text_pair")):
        row = teacher.processor(text, return_tensors="pt")
        alone = teacher.backbone.generate(**row, max_new_tokens=6, do_sample=False)
        assert teacher.processor.decode(alone[0], skip_special_tokens=True) == answer


def count_calls(teacher: Checkpoint, monkeypatch: pytest.MonkeyPatch, stop: int = 99) -> list[int]:
    calls: list[int] = []
    generate = teacher.backbone.generate

    def counted(*inputs: object, **settings: object) -> object:
        if len(calls) == stop:
            raise KeyboardInterrupt
        calls.append(1)
        return generate(*inputs, **settings)

    monkeypatch.setattr(teacher.backbone, "generate", counted)
    return calls


def test_what_was_generated_is_kept_and_an_interrupted_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, temperature=1.0)
    whole = generate_examples(writer(), examples(), config, tmp_path / "whole").column("text")
    teacher = writer()
    with monkeypatch.context() as patch:
        assert count_calls(teacher, patch, stop=2) == []
        with pytest.raises(KeyboardInterrupt):
            generate_examples(teacher, examples(), config, tmp_path / "cut")
    (partial,) = (tmp_path / "cut").iterdir()
    assert partial.suffix == ".partial"
    with partial.open("a") as file:
        file.write('{"text": "torn li')  # as a killed process may leave it
    calls = count_calls(teacher, monkeypatch)
    assert generate_examples(teacher, examples(), config, tmp_path / "cut").column("text") == whole
    assert len(calls) == 1  # of three batches two were there
    assert generate_examples(teacher, examples(), config, tmp_path / "cut").column("text") == whole
    assert len(calls) == 1
    others = [
        (writer(seed=3), examples(), config),
        (teacher, examples(TEXTS[:5]), config),
        (teacher, examples(), replace(config, prompt_tokens=5)),
    ]
    for other in others:  # another teacher, other texts, other settings: another file
        generate_examples(*other, tmp_path / "cut")
    assert len(list((tmp_path / "cut").iterdir())) == 4


def test_positions_bound_what_is_generated(tmp_path: Path) -> None:
    teacher = writer(max_position_embeddings=8, n_positions=8)
    teacher = replace(teacher, signature=replace(teacher.signature, longest=8))
    config = replace(CONFIG, new_tokens=50, prompt_tokens=50)
    made = generate_examples(teacher, examples(), config, tmp_path)
    assert all(1 <= len(text) <= 8 for text in made.column("text"))


def test_a_student_learns_from_its_teachers_sentences(tmp_path: Path) -> None:
    for family, objective in (("gpt2", NextToken()), ("bart", Translation(0))):
        teacher = writer(family, decoder_start_token_id=0)
        made = generate_examples(teacher, examples(), CONFIG, tmp_path)
        student = writer(family, decoder_start_token_id=0, seed=1)
        batches = Batches(made, teacher.processor, batch_size=4, objective=objective)
        train = TrainConfig(steps=15, learning_rate=5e-3)
        result = distill(teacher, student, batches, DistillConfig(train=train))
        assert result.report["losses"][-1] < 0.8 * result.report["losses"][0]


def test_what_generates_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="generates no text; --generate is for text-generation"):
        generate_examples(make("bert", "fill-mask"), examples(), CONFIG, tmp_path)
    with pytest.raises(DataError, match="no token to begin with"):
        generate_examples(writer(), examples(["the", ""]), CONFIG, tmp_path)
    for wrong in ({"new_tokens": 0}, {"prompt_tokens": 0}, {"temperature": -1.0}):
        with pytest.raises(ConfigError):
            GenerateConfig(**wrong)
    (tmp_path / "file").write_text("")
    with pytest.raises(DestinationError):
        generate_examples(writer(), examples(), CONFIG, tmp_path / "file")


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(generations, "_answers", full)
    with pytest.raises(DestinationError, match="no space left"):
        generate_examples(writer(), examples(), CONFIG, tmp_path)
