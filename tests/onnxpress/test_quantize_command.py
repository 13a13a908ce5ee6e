"""`compress quantize` as users type it, and as a step of a recipe."""

import itertools
import json
from pathlib import Path

import onnx_ir as ir
import pytest

from calib_data.errors import BudgetError, ConfigError
from onnxpress.recipe import read_recipe
from onnxpress.recipe_run import run_recipe
from onnxpress.stages import Run
from tests.onnxpress.test_cli import invoke, must
from tests.tiny import SENTENCES, tiny_checkpoint, write, write_classifier, write_sentence_encoder

SHORT = ("--max-length", 32, "--batch-size", 8)
SCHEMES = {
    "dynamic": (),
    "static": ("--scheme", "static", "--data", "{place}/text.txt"),
    "weight-only": ("--scheme", "weight-only", "--bits", 8),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny models and data."""
    place = tmp_path_factory.mktemp("quantize")
    write_sentence_encoder(place / "encoder")
    write_classifier(place / "classifier")
    write(tiny_checkpoint("llama", "text-generation"), place / "decoder")
    write(tiny_checkpoint("t5", "text2text-generation", decoder_start_token_id=0), place / "t5")
    (place / "text.txt").write_text("\n".join(SENTENCES))
    rows = [f"{text}\t{other}" for text, other in zip(SENTENCES, reversed(SENTENCES))]
    (place / "pairs.tsv").write_text("text\ttext_pair\n" + "\n".join(rows))
    scores = [f"{row}\t{len(row) % 7}" for row in rows]
    (place / "scores.tsv").write_text("sentence1\tsentence2\tscore\n" + "\n".join(scores))
    (place / "labels.csv").write_text(
        "sentence,label\n" + "\n".join(f"{s},{i % 3}" for i, s in enumerate(SENTENCES))
    )
    return place


def quantize(place: Path, model: str, out: Path, *words: object) -> dict:
    filled = [str(word).format(place=place) for word in words]
    return must("compress", "quantize", place / model, *SHORT, *filled, "-o", out)


def lineage(path: Path) -> dict:
    return json.loads((path / "onnxpress.json").read_text())["lineage"][-1]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("model", ["encoder", "decoder"])
def test_drift_is_told_and_kept_for_each_scheme(
    model: str, scheme: str, place: Path, tmp_path: Path
) -> None:
    told = quantize(place, model, tmp_path / "out", *SCHEMES[scheme])
    metrics = lineage(tmp_path / "out")["metrics"]
    for name in ("batch_drift", "padding_drift"):
        assert told[name] == metrics[name]
        assert (told[name] > 1e-4) == (scheme == "dynamic")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_drift_is_printed(place: Path, tmp_path: Path) -> None:
    for scheme, text in (("dynamic", " % with padding"), ("weight-only", "nothing with padding")):
        done = invoke(
            *("compress", "quantize", place / "encoder", "--scheme", scheme),
            *("-o", tmp_path / scheme),
        )
        assert done.exit_code == 0
        assert text in done.stdout


def test_settings_reach_the_lineage(place: Path, tmp_path: Path) -> None:
    quantize(
        place, "encoder", tmp_path / "out", *SCHEMES["static"], "--activations", "int8",
        "--ranges", "percentile", "--percentile", 99.5, "--weight-range", "full", "--target", "portable",
        "--skip", "embeddings.*", "--limit", 20,
    )  # fmt: skip
    stage = lineage(tmp_path / "out")
    expected = {
        "scheme": "static", "activations": "int8", "ranges": "percentile", "percentile": 99.5,
        "weight_range": "full", "target": "portable", "skip": ["embeddings.*"],
    }  # fmt: skip
    assert stage["settings"].items() >= expected.items()
    assert stage["metrics"]["calibration_samples"] == 20
    seen = must("compress", "inspect", tmp_path / "out")["quantization"]
    assert seen["scheme"] == "static"
    assert seen["settings"]["ranges"] == "percentile"
    assert "embeddings.word_embeddings" in seen["float"]
    assert seen["calibration"] == stage["data"]
    told = invoke("compress", "inspect", tmp_path / "out").stdout
    assert "static" in told
    assert f"calibrated  on {stage['data'][:12]}, 20 samples" in told
    assert "float       embeddings.word_embeddings" in told
    assert "quantized   no" in invoke("compress", "inspect", place / "encoder").stdout


def test_an_encoder_decoder_is_calibrated_on_pairs(place: Path, tmp_path: Path) -> None:
    told = quantize(
        place, "t5", tmp_path / "out", "--scheme", "static", "--data", "{place}/pairs.tsv"
    )
    assert told["modules"] > 0


# --- what each layer costs ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "data"), [((), "random inputs"), (("--data", "{place}/text.txt"), "text.txt")]
)
def test_sensitivity_is_written_and_told(
    words: tuple[str, ...], data: str, place: Path, tmp_path: Path
) -> None:
    report = tmp_path / "reports" / "cost.json"
    told = quantize(
        place, "encoder", tmp_path / "out", "--report-sensitivity", report, *words
    )  # fmt: skip
    written = json.loads(report.read_text())
    noise = [row["noise"] for row in written["modules"]]
    assert noise == sorted(noise, reverse=True)
    assert len(noise) == told["modules"]
    assert data in written["data"]
    assert written["settings"]["scheme"] == "dynamic"
    assert told["sensitivity"]["modules"] == written["modules"][:10]


def test_the_ten_costliest_are_printed(place: Path, tmp_path: Path) -> None:
    done = invoke(
        "compress", "quantize", place / "encoder", "--report-sensitivity", tmp_path / "cost.json",
        "-o", tmp_path / "out",
    )  # fmt: skip
    assert "drawn at random, for want of --data" in done.stdout
    rows = json.loads((tmp_path / "cost.json").read_text())["modules"]
    printed = [row["module"] in done.stdout.split() for row in rows]
    assert printed == [i < 10 for i in range(len(rows))]
    again = invoke(
        "compress", "quantize", place / "encoder", "--report-sensitivity", tmp_path / "cost.json",
        "-o", tmp_path / "other",
    )  # fmt: skip
    assert again.exit_code == 8
    assert "pass --overwrite" in again.stderr


# --- how far quality may drop -------------------------------------------------------------------

FOUR = ("--scheme", "weight-only", "--bits", 4, "--block-size", 256)


@pytest.mark.parametrize(
    ("model", "data", "metric"),
    [
        ("encoder", "scores.tsv", "spearman"),
        ("encoder", "text.txt", "cosine_fidelity"),
        ("classifier", "labels.csv", "accuracy"),
        ("decoder", "text.txt", "perplexity"),
    ],
)
def test_a_budget_is_held_by_keeping_layers_in_float(
    model: str, data: str, metric: str, place: Path, tmp_path: Path
) -> None:
    words = ("--eval", f"{{place}}/{data}", "--metric", metric)
    loose = quantize(place, model, tmp_path / "loose", *FOUR, *words, "--max-drop", 0.99)
    assert loose["kept_float"] == []
    assert loose["budget"]["metric"] == metric
    allowed = loose["budget"]["drop"] / 3
    if allowed <= 0:
        pytest.skip("the tiny model is no worse quantized")
    tight = quantize(place, model, tmp_path / "tight", *FOUR, *words, "--max-drop", allowed)
    kept, budget = tight["kept_float"], tight["budget"]
    assert 0 < len(kept) < loose["modules"]
    assert tight["modules"] + len(kept) == loose["modules"]
    assert budget["held"]
    assert budget["drop"] <= allowed
    assert budget["float"] == loose["budget"]["float"]
    stage = lineage(tmp_path / "tight")
    assert stage["metrics"]["kept_float"] == kept
    assert stage["metrics"]["budget"]["metric"] == metric
    seen = must("compress", "inspect", tmp_path / "tight")["quantization"]
    assert set(kept) <= set(seen["float"])
    assert seen["kept_float"] == kept


@pytest.fixture
def never_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let quality drop by half of all there is, a little less with each evaluation."""
    drops = itertools.count(0.5, -0.01)
    monkeypatch.setattr("calib_data.metrics.drop", lambda before, after: next(drops))


@pytest.mark.usefixtures("never_enough")
def test_a_missed_budget_keeps_the_best_model_and_says_so(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = invoke(
        "compress", "quantize", place / "encoder", *SHORT, "--max-drop", 0.01, "--eval",
        place / "scores.tsv", "-o", out,
    )  # fmt: skip
    assert done.exit_code == 6, done.output
    line = done.stderr.strip()
    assert "\n" not in line
    assert "spearman drops by" in line
    assert str(out) in line
    told = must("compress", "inspect", out)["quantization"]
    assert told["modules"]
    assert told["kept_float"]
    for name in told["kept_float"]:
        assert f"in float: {name}" in done.stdout
    assert not lineage(out)["metrics"]["budget"]["held"]
    assert must("export", "onnx", out, "-o", tmp_path / "onnx")["parity"]["passed"]


# --- wrong input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("--scheme", "static"), 2, "learns from data; give --data"),
        (("--smooth", "0.5"), 2, "learns from data; give --data"),
        (("--data", "{place}/text.txt"), 2, "uses no --data; leave it out"),
        (("--target", "cuda"), 2, "--scheme weight-only and export with --target cuda --dtype fp16"),
        (("--scheme", "static", "--data", "{place}/text.txt", "--target", "cuda"), 2, "MatMulInteger"),
        (("--max-drop", "0.1"), 2, "add --eval"),
        (("--eval", "{place}/text.txt"), 2, "--eval judges what --max-drop allows"),
        (("--metric", "spearman"), 2, "--metric judges what --max-drop allows"),
        (("--max-drop", "1.5", "--eval", "{place}/text.txt"), 2, "below 1, got 1.5"),
        (("--max-drop", "0.1", "--eval", "{place}/text.txt", "--metric", "spearman"), 4,
         "spearman needs data with score"),
        (("--max-drop", "0.1", "--eval", "{place}/text.txt", "--metric", "bleu"), 4, "no metric bleu"),
        (("--max-drop", "0.1", "--eval", "{place}/no.txt"), 4, "no.txt"),
        (("--skip", "encoder.layer.0"), 2, "did you mean encoder.layer.0.*?"),
        (("--skip", "*.querry"), 2, "*.query"),
        (("--percentile", "99"), 2, "goes with --ranges percentile"),
        (("--ranges", "mse"), 2, "dynamic has no --ranges"),
        (("--scheme", "weight-only", "--per-tensor"), 2, "weight-only has no --per-channel"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line_and_leaves_nothing(
    words: tuple[str, ...], code: int, told: str, place: Path, tmp_path: Path
) -> None:
    filled = [word.format(place=place) for word in words]
    done = invoke("compress", "quantize", place / "encoder", *SHORT, *filled, "-o", tmp_path / "x")
    assert done.exit_code == code, done.output
    assert told in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_what_is_quantized_already_is_refused(place: Path, tmp_path: Path) -> None:
    quantize(place, "encoder", tmp_path / "one")
    done = invoke("compress", "quantize", tmp_path / "one", "-o", tmp_path / "two")
    assert done.exit_code == 4
    assert "quantized already; start from the float one" in done.stderr


@pytest.mark.parametrize("option", ["--resume", "--overwrite"])
def test_a_calibration_that_was_left_is_gone_on_with_or_replaced(
    option: str, place: Path, tmp_path: Path
) -> None:
    words = ("compress", "quantize", place / "encoder", *SHORT, "-o", tmp_path / "out")
    left = tmp_path / "out.calibration"
    left.mkdir()
    refused = invoke(*words)
    assert refused.exit_code == 8
    assert "go on with --resume, or start anew with --overwrite" in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out.calibration"]
    assert invoke(*words, option).exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# --- where it runs ------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["classifier", pytest.param("decoder", marks=pytest.mark.slow)])
def test_weight_only_for_cuda_is_exported_in_half_precision(
    model: str, place: Path, tmp_path: Path
) -> None:
    quantize(place, model, tmp_path / "four", *SCHEMES["weight-only"], "--target", "cuda")
    assert lineage(tmp_path / "four")["settings"]["target"] == "cuda"
    done = must(
        "export", "onnx", tmp_path / "four", "--target", "cuda", "--dtype", "fp16",
        "-o", tmp_path / "onnx",
    )  # fmt: skip
    assert done["parity"]["passed"]
    graph = ir.load(tmp_path / "onnx" / "model.onnx").graph
    products = [node for node in graph if node.op_type == "MatMulNBits"]
    assert products
    for node in products:
        assert node.inputs[2].const_value.dtype == ir.DataType.FLOAT16  # the scales


def test_int8_is_not_exported_for_cuda(place: Path, tmp_path: Path) -> None:
    quantize(place, "encoder", tmp_path / "int8")
    done = invoke("export", "onnx", tmp_path / "int8", "--target", "cuda", "-o", tmp_path / "onnx")
    assert done.exit_code == 2
    assert "--scheme weight-only" in done.stderr
    assert not (tmp_path / "onnx").exists()


# --- as a step of a recipe ----------------------------------------------------------------------

RECIPE = """
model: {place}/encoder
steps:
  - {{name: int8, stage: quantize, from: model, {settings}}}
"""


def run_step(settings: str, place: Path, out: Path) -> dict:
    path = out / "recipe.yaml"
    path.write_text(RECIPE.format(place=place, settings=settings.format(place=place)))
    run_recipe(read_recipe(path), out / "made", Run())
    return lineage(out / "made" / "int8")


def test_a_recipe_calibrates_and_holds_a_budget(place: Path, tmp_path: Path) -> None:
    stage = run_step(
        "scheme: static, data: {place}/text.txt, max_length: 32, limit: 12, max_drop: 0.5, "
        "eval: {place}/scores.tsv, metric: spearman",
        place,
        tmp_path,
    )
    assert stage["metrics"]["calibration_samples"] == 12
    assert stage["metrics"]["budget"]["metric"] == "spearman"
    assert stage["metrics"]["budget"]["held"]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ("max_drop: 0.1", "`max_drop` and `eval` go together"),
        ("scheme: static", "give --data"),
        ("ranges: mse", "has no --ranges"),
        ("spec: x", "unknown setting 'spec'"),
    ],
)
def test_recipes_that_make_no_sense(settings: str, told: str, place: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=told):
        run_step(settings, place, tmp_path)


@pytest.mark.usefixtures("never_enough")
def test_a_recipe_stops_at_a_missed_budget(place: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="cosine_fidelity drops"):
        run_step(
            "max_length: 32, max_drop: 0.0, eval: {place}/text.txt, metric: cosine_fidelity",
            place,
            tmp_path,
        )
    assert (tmp_path / "made" / "int8" / "onnxpress.json").is_file()
