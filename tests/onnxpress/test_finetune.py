"""`compress finetune` and `merge` as users type them, and as a step of a recipe."""

import json
from pathlib import Path

import numpy as np
import pytest

from onnxpress.recipe import read_recipe
from onnxpress.recipe_run import run_recipe
from onnxpress.stages import Run
from tests.onnxpress.test_cli import invoke, must
from tests.tiny import SENTENCES, tiny_checkpoint, write, write_classifier, write_sentence_encoder

GPT = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 48}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny models and data of every kind."""
    place = tmp_path_factory.mktemp("finetune")
    write_sentence_encoder(place / "encoder")
    write_classifier(place / "classifier", labels=2)
    write(tiny_checkpoint("t5", "text2text-generation", decoder_start_token_id=0), place / "t5")
    kinds = ["no", "yes"]
    rows = [f"{text}\t{kinds['cat' in text]}" for text in SENTENCES]
    (place / "train.tsv").write_text("sentence\tlabel\n" + "\n".join(rows))
    (place / "one.tsv").write_text("sentence\tlabel\n" + "\n".join(f"{t}\tyes" for t in SENTENCES))
    numbers = [f"{text}\t{i % 4}" for i, text in enumerate(SENTENCES)]
    (place / "four.tsv").write_text("sentence\tlabel\n" + "\n".join(numbers))
    (place / "text.txt").write_text("\n".join(SENTENCES))
    (place / "a.en").write_text("\n".join(SENTENCES))
    (place / "a.de").write_text("\n".join(reversed(SENTENCES)))
    (place / "gpt.json").write_text(json.dumps(GPT))
    (place / "nothing.json").write_text("{}")
    np.savez(place / "images.npz", x_train=np.zeros((8, 8, 8), np.uint8), y_train=[0, 1] * 4)
    return place


SHORT = ("--max-length", 32, "--batch-size", 8, "--steps", 3)


def test_an_adapter_from_training_to_the_graph(place: Path, tmp_path: Path) -> None:
    told = must(
        "compress", "finetune", place / "encoder", "--data", place / "train.tsv", "--eval",
        place / "train.tsv", *SHORT, "--method", "lora", "--rank", 2, "-o", tmp_path / "lora",
    )  # fmt: skip
    assert told["task"] == "text-classification"
    assert told["trained_percent"] < 20
    assert {"eval_loss", "accuracy", "steps"} <= set(told)
    assert must("export", "onnx", tmp_path / "lora", "-o", tmp_path / "onnx")["parity"]["passed"]
    assert "adapter     lora, not merged" in invoke("compress", "inspect", tmp_path / "lora").stdout
    must("compress", "merge", tmp_path / "lora", "-o", tmp_path / "merged")
    seen = must("compress", "inspect", tmp_path / "merged")
    assert [stage["stage"] for stage in seen["lineage"]] == ["source", "finetune", "merge"]
    # the merged model is the same to rounding, so its graph is too
    assert must("export", "validate", tmp_path / "merged", tmp_path / "onnx")["passed"]
    refused = invoke("compress", "quantize", tmp_path / "lora", "-o", tmp_path / "int8")
    assert refused.exit_code == 4
    assert "compress merge" in refused.stderr
    must("compress", "quantize", tmp_path / "merged", "-o", tmp_path / "int8")


def test_a_decoder_from_nothing_generates(place: Path, tmp_path: Path) -> None:
    told = must(
        "compress", "finetune", "--from-config", place / "gpt.json", "--tokenizer", "characters",
        "--data", f"whole:{place / 'text.txt'}:train", "--eval", f"whole:{place / 'text.txt'}:test",
        "--pack", *SHORT, "-o", tmp_path / "gpt",
    )  # fmt: skip
    assert told["task"] == "text-generation"
    assert told["perplexity"] > 1
    must("export", "onnx", tmp_path / "gpt", "-o", tmp_path / "onnx")
    made = must(
        "export", "generate", tmp_path / "onnx", "--prompt", "the cat\n", "--max-new-tokens", 4
    )
    assert len(made["tokens"][0]) <= 4


def test_two_files_train_an_encoder_decoder(place: Path, tmp_path: Path) -> None:
    told = must(
        "compress", "finetune", place / "t5", "--data", f"{place / 'a.de'}+{place / 'a.en'}",
        "--eval", f"{place / 'a.de'}+{place / 'a.en'}", *SHORT, "-o", tmp_path / "t5",
    )  # fmt: skip
    assert told["task"] == "text2text-generation"


def test_the_text_is_for_people(place: Path, tmp_path: Path) -> None:
    result = invoke(
        "compress", "finetune", place / "classifier", "--data", place / "four.tsv", "--new-head",
        "--eval", place / "four.tsv", *SHORT, "-o", tmp_path / "x",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "parameters trained (100.00 %)" in result.stdout
    assert "evaluation: loss" in result.stdout


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("{place}/classifier", "--data", "{place}/text.txt", "--task", "text-classification"), 4,
         "needs data with label"),
        (("{place}/encoder", "--data", "{place}/text.txt"), 2, "pass --task"),
        (("{place}/encoder", "--data", "{place}/one.tsv"), 4, "only one label, yes"),
        (("{place}/classifier", "--data", "{place}/four.tsv"), 4, "--new-head"),
        (("{place}/classifier", "--data", "{place}/train.tsv", "--eval", "{place}/four.tsv"), 4,
         "has label 2, and the model knows 0 to 1"),
        (("{place}/classifier", "--data", "{place}/train.tsv", "--max-length", "99"), 2,
         "longer than the model's 64"),
        (("{place}/classifier", "--data", "{place}/train.tsv", "--method", "lora", "--targets",
          "c_attn"), 2, "names end in classifier, dense, key, query, value"),
        (("{place}/classifier", "--data", "{place}/train.tsv", "--rank", "4"), 2, "no --rank"),
        (("{place}/classifier", "--data", "{place}/train.tsv", "--merge"), 2, "--merge is for"),
        (("{place}/classifier", "--data", "{place}/train.tsv", "--pack"), 2, "--pack is for"),
        (("{place}/classifier", "--data", "{place}/train.tsv", "--tokenizer", "x"), 2,
         "goes with --from-config"),
        (("--data", "{place}/train.tsv"), 2, "either a MODEL or --from-config"),
        (("--from-config", "{place}/nothing.json", "--data", "{place}/text.txt"), 4,
         "no model_type"),
        (("--from-config", "{place}/gpt.json", "--data", "{place}/text.txt"), 2,
         "--tokenizer characters"),
        (("{place}/classifier", "--data", "{place}/images.npz"), 4, "has no model for the task"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(
    place: Path, tmp_path: Path, words: tuple[str, ...], code: int, told: str
) -> None:
    filled = [word.format(place=place) for word in words]
    if "--max-length" not in filled:
        filled += ["--max-length", "32"]
    result = invoke("compress", "finetune", *filled, "--steps", 2, "-o", tmp_path / "out")
    assert result.exit_code == code, result.output
    assert told in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


RECIPE = """
model: {place}/encoder
steps:
  - {{name: tuned, stage: finetune, from: model, data: "{place}/train.tsv", max_length: 32, steps: 2,
      method: lora, rank: 2, merge: true, eval: "{place}/train.tsv", {more}}}
  - {{name: int8, stage: quantize, from: tuned}}
"""


def test_a_step_of_a_recipe(place: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(place=place, more="lora_dropout: 0.0"))
    told: list[str] = []
    run_recipe(read_recipe(path), tmp_path / "out", Run(), told.append)
    run_recipe(read_recipe(path), tmp_path / "out", Run(), told.append)
    assert told[2:] == ["tuned: unchanged", "int8: unchanged"]
    manifest = json.loads((tmp_path / "out" / "tuned" / "onnxpress.json").read_text())
    settings = manifest["lineage"][-1]["settings"]
    assert settings["adapter"]["rank"] == 2
    assert settings["adapter"]["lora_dropout"] == 0
    assert "accuracy" in manifest["lineage"][-1]["metrics"]
