"""`compress distill` as users type it: losses, maps, tokenizers, the teacher's own words."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from calib_data.characters import character_tokenizer
from onnxpress.cli import onnxpress_group
from onnxpress.recipe import read_recipe
from onnxpress.recipe_run import run_recipe
from onnxpress.stages import Run
from tests.compress.pairs import make
from tests.tiny import SENTENCES, tiny_checkpoint, write, write_sentence_encoder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with teachers, and text."""
    place = tmp_path_factory.mktemp("distillation")
    write_sentence_encoder(place / "encoder", num_hidden_layers=3)
    write(tiny_checkpoint("bert", "text-classification"), place / "classifier")
    letters = character_tokenizer(SENTENCES, 64)
    words = {"vocab_size": len(letters), "eos_token_id": letters.eos_token_id}
    gpt = tiny_checkpoint("gpt2", "text-generation", num_hidden_layers=3, **words)
    write(replace(gpt, processor=letters), place / "gpt")
    bart = make("bart", "text2text-generation", decoder_start_token_id=0, **words)
    write(replace(bart, processor=letters), place / "bart")
    other = make("gpt2", "sentence-embedding", vocab_size=len(letters))
    write(replace(other, processor=letters), place / "letters")
    (place / "text.txt").write_text("\n".join(SENTENCES))
    pairs = "\n".join(f"{a},{b}" for a, b in itertools.pairwise(SENTENCES))
    (place / "pairs.csv").write_text(f"text,text_pair\n{pairs}")
    return place


def invoke(*words: object) -> Result:
    return CliRunner().invoke(onnxpress_group, ["compress", "distill", *map(str, words)])


def must(out: Path, *words: object) -> list[dict]:
    """Run the command; return the result's lineage."""
    common = ("--steps", 3, "--batch-size", 8, "--max-length", 24, "-o", out, "--json")
    result = invoke(*words, *common)
    assert result.exit_code == 0, result.output
    return json.loads((out / "onnxpress.json").read_text())["lineage"]


def test_losses_and_their_numbers_reach_the_training(place: Path, tmp_path: Path) -> None:
    (*_, stage) = must(
        tmp_path / "student", "--teacher", place / "encoder", "--layers", 2,
        "--data", place / "text.txt", "--losses", "relations=2, hidden-cosine=0.5,contrastive",
        "--layer-map", "0:0,1:2", "--relation-map", "1:1", "--relation-heads", 8,
        "--contrast-temperature", 0.1,
    )  # fmt: skip
    settings = stage["settings"]
    assert settings["weights"] == {"relations": 2.0, "hidden-cosine": 0.5, "contrastive": 1.0}
    assert settings["layer_map"] == "0:0,1:2"
    assert settings["relation_map"] == "1:1"
    assert settings["relation_heads"] == 8
    assert settings["contrast_temperature"] == 0.1


def test_a_generative_student_by_jsd_on_packed_text(place: Path, tmp_path: Path) -> None:
    (*_, stage) = must(
        tmp_path / "student", "--teacher", place / "gpt", "--layers", 2, "--pack",
        "--data", place / "text.txt", "--losses", "jsd", "--beta", 0.2, "--alpha", 0.5,
    )  # fmt: skip
    assert stage["settings"]["weights"] == {"jsd": 0.5, "hard": 0.5}
    assert stage["settings"]["beta"] == 0.2


@pytest.mark.parametrize("teacher", ["gpt", "bart"])
def test_the_teachers_own_words(teacher: str, place: Path, tmp_path: Path) -> None:
    data, student = place / "text.txt", ("--student", place / teacher)
    common = ("--teacher", place / teacher, *student, "--data", data)
    (*_, own) = must(tmp_path / "own", *common, "--generate", 5, "--prompt-tokens", 4)
    again = must(tmp_path / "again", *common, "--generate", 5, "--prompt-tokens", 4)[-1]
    other = must(tmp_path / "other", *common, "--generate", 6, "--prompt-tokens", 4)[-1]
    assert own["data"] == again["data"] != other["data"]
    assert not (tmp_path / "own.training").exists()


def test_text_to_text_from_pairs(place: Path, tmp_path: Path) -> None:
    teacher = ("--teacher", place / "bart", "--student", place / "bart")
    losses = ("--losses", "logits,hidden,relations")
    lineage = must(tmp_path / "student", *teacher, "--data", place / "pairs.csv", *losses)
    assert lineage[-1]["settings"]["weights"] == pytest.approx(
        {"logits": 0.7, "hidden": 1.0, "relations": 1.0, "hard": 0.3}
    )


def test_a_teacher_with_a_tokenizer_of_its_own(place: Path, tmp_path: Path) -> None:
    pair = ("--teacher", place / "letters", "--student", place / "encoder")
    data = ("--data", place / "text.txt")
    (*_, stage) = must(tmp_path / "student", *pair, *data)
    assert stage["settings"]["weights"] == {"embedding": 1.0, "similarity": 1.0}
    losses = ("--losses", "hidden", "--layer-map", "0:0")
    refused = invoke(*pair, *data, *losses, "--max-length", 24, "-o", tmp_path / "no")
    assert refused.exit_code == 4
    assert "tokenizers of their own" in refused.stderr


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("encoder", "--losses", "magic"), 2, "unknown loss 'magic'"),
        (("encoder", "--losses", "hidden", "--layer-map", "0:9"), 2, "layer 9 of the teacher"),
        (("encoder", "--layer-map", "middle"), 2, "--layer-map must be uniform, last or pairs"),
        (("encoder", "--losses", "relations", "--relation-heads", "5"), 2, "--relation-heads 5"),
        (("encoder", "--losses", "hidden", "--alpha", "0.5"), 2, "--alpha mixes"),
        (("encoder", "--losses", "hard"), 4, "--columns label=COLUMN"),
        (("classifier", "--alpha", "0.5"), 4, "or use --alpha 1"),
        (("encoder", "--generate", "5"), 4, "generates no text"),
        (("gpt", "--generate", "0"), 2, "--generate must be at least 1"),
        (("encoder", "--pack"), 2, "--pack is for text-generation"),
        (("bart",), 4, "text_pair"),
    ],
)
def test_wrong_input_is_one_line_and_a_code(
    place: Path, tmp_path: Path, words: tuple[str, ...], code: int, told: str
) -> None:
    teacher, *rest = words
    both = ("--teacher", place / teacher, "--student", place / teacher)
    data = ("--data", place / "text.txt", "--max-length", 24)
    result = invoke(*both, *data, *rest, "-o", tmp_path / "out")
    assert result.exit_code == code, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    assert told in lines[0]
    assert not (tmp_path / "out").exists()


def test_a_recipe_generates_too(place: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        f"model: {place / 'gpt'}\n"
        "steps:\n"
        f"  - {{name: small, stage: distill, from: model, layers: 1, data: {place / 'text.txt'},\n"
        "     max_length: 24, steps: 2, generate: 4, prompt_tokens: 3, losses: [reverse-kl]}\n"
    )
    made = read_recipe(tmp_path / "recipe.yaml")
    run_recipe(made, tmp_path / "out", Run())
    stage = json.loads((tmp_path / "out" / "small" / "onnxpress.json").read_text())["lineage"][-1]
    assert stage["settings"]["weights"] == pytest.approx({"reverse-kl": 0.7, "hard": 0.3})
