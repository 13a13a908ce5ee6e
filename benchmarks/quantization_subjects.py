"""The models whose quality int8 must keep, the data that judge them, and the bounds that are claimed."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import distillation
from benchmarks.commands import output_of, run_command

SCHEMES = {
    "dynamic": (),
    "dynamic, gptq": ("--rounding", "gptq"),
    "static": ("--scheme", "static"),
    "4-bit": ("--scheme", "weight-only", "--bits", "4"),
}
CALIBRATED = ("dynamic, gptq", "static")  # learn from data
LOWER_IS_BETTER = ("perplexity", "loss")
SAMPLES = 512  # examples that calibrate
BLOCK = 128  # characters of a text that the character model is calibrated on
VIT: dict[str, Any] = {
    "model_type": "vit",
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 192,
    "image_size": 28,
    "patch_size": 7,
    "num_channels": 1,
}
OPENINGS = (
    "Once upon a time",
    "Lily and Ben were",
    "One day, a little boy",
    "The cat was very",
    "There was a big dog",
    "In the garden, she saw",
    "Tom had a red ball",
    "Mom said to her son",
)
NEW_TOKENS = 200  # of each text that the language model writes


@dataclass(frozen=True)
class Bound:
    """What a quantized model's metric is to reach: a figure, or how far from the float model's."""

    figure: float | None = None
    times: float = 1.0
    plus: float = 0.0

    def of(self, whole: float) -> float:
        """Return the bound for a float model that reaches `whole`."""
        return whole * self.times + self.plus if self.figure is None else self.figure


@dataclass(frozen=True)
class Subject:
    """A model with what it is judged on, and by how much it may be worse."""

    name: str
    model: str
    metric: str  # of `calib_data.metrics`; "loss" is that of packed text
    evaluations: Mapping[str, tuple[str, str | None]]  # label → data and its columns
    calibration: tuple[str, ...]  # options of `compress quantize`
    bounds: Mapping[str, Bound]  # scheme → bound
    prepare: Callable[[], None] = field(
        default=lambda: None
    )  # makes what it is trained and fed with
    simulated: bool = False  # whether the PyTorch model is measured, too


def subjects(data: Path, models: Path, out: Path, trained: Path) -> Iterator[Subject]:
    """Yield every model of the table; `trained` is where `benchmarks.distillation` has run, or will."""
    yield _sentences(data)
    yield _classifier(data, trained)
    yield _stories(models, out)
    yield _characters(data, out, trained)
    yield _digits(data, out)


def _sentences(data: Path) -> Subject:
    pairs = ("--data", f"{data}/stsb/train.csv", "--columns", "sentence1,sentence2,_")
    return Subject(
        "minilm",
        distillation.MINILM,
        "spearman",
        {"STS-B dev": (f"{data}/stsb/dev.csv", "sentence1,sentence2,score")},
        (*pairs, "--limit", str(SAMPLES)),
        {
            "dynamic": Bound(86.6),
            "dynamic, gptq": Bound(86.6),
            "static": Bound(86.5),
            "4-bit": Bound(86.0),
        },
        simulated=True,
    )


def _classifier(data: Path, trained: Path) -> Subject:
    texts = ("--data", f"{data}/sst2/train.tsv", "--max-length", "64")
    return Subject(
        "sst2",
        f"{trained}/sst2/full",
        "accuracy",
        {"SST-2 dev": (f"{data}/sst2/dev.tsv", None)},
        (*texts, "--limit", str(SAMPLES)),
        {"dynamic": Bound(plus=-0.4), "static": Bound(plus=-0.5)},
        partial(_train, "sst2/full", data, trained),
    )


def _stories(models: Path, out: Path) -> Subject:
    model, folder = models / "stories260K", out / "stories"
    return Subject(
        "stories",
        str(model),
        "perplexity",
        {
            f"its own text, {kind}": (f"{folder}/{kind}.jsonl", None)
            for kind in ("greedy", "sampled")
        },
        ("--data", f"{folder}/calibration.jsonl", "--max-length", "256"),
        {"dynamic": Bound(times=1.03), "static": Bound(times=1.05)},
        partial(_write_stories, model, folder),
    )


def _characters(data: Path, out: Path, trained: Path) -> Subject:
    play, blocks = data / "tinyshakespeare" / "input.txt", out / "gpt" / "calibration.jsonl"

    def prepare() -> None:
        _train("gpt/teacher", data, trained)
        write_blocks(play, blocks)

    return Subject(
        "gpt",
        f"{trained}/gpt/teacher",
        "loss",
        {"tinyshakespeare, last tenth": (f"whole:{play}:test", None)},
        ("--data", str(blocks)),
        {"dynamic": Bound(plus=0.01), "static": Bound(plus=0.02)},
        prepare,
    )


def _digits(data: Path, out: Path) -> Subject:
    images = out / "vit" / "mnist.npz"

    def prepare() -> None:
        split_digits(data / "mnist" / "train.npz", images)
        (out / "vit.json").write_text(json.dumps(VIT))
        made = ("compress", "finetune", "--from-config", "OUT/vit.json")
        shown = ("--data", f"{images}:train", "--eval", f"{images}:test", "--eval-every", "900")
        long = ("--epochs", "6", "--lr", "1e-3", "--batch-size", "64")
        distillation.run(distillation.Job("vit/model", (*made, *shown, *long)), out)

    return Subject(
        "vit",
        f"{out}/vit/model",
        "accuracy",
        {"MNIST, a tenth held out": (f"{images}:test", None)},
        ("--data", f"{images}:train", "--limit", str(SAMPLES)),
        {"dynamic": Bound(plus=-0.1), "static": Bound(plus=-0.2)},
        prepare,
    )


def _train(name: str, data: Path, trained: Path) -> None:
    job = next(job for job in distillation.jobs(data) if job.name == name)
    distillation.run(job, trained)


def split_digits(source: Path, target: Path) -> None:
    """Write the images of `source` again, the last tenth of them as the test split."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with np.load(source, allow_pickle=False) as file:
        images, labels = file["x_train"], file["y_train"]
    cut = len(images) - len(images) // 10
    np.savez_compressed(
        target, x_train=images[:cut], y_train=labels[:cut], x_test=images[cut:], y_test=labels[cut:]
    )


def write_blocks(play: Path, target: Path) -> None:
    """Write stretches of the play's first nine tenths as texts, evenly spaced."""
    from calib_data.sources import open_data

    text = open_data(f"whole:{play}:train").column("text")[0]
    starts = np.linspace(0, max(0, len(text) - BLOCK), SAMPLES).astype(int)
    _write_texts(target, [text[start : start + BLOCK] for start in starts])


def _write_stories(model: Path, folder: Path) -> None:
    """Write texts of a language model by itself: two kinds that judge it, one that calibrates it."""
    bundle = folder / "float.onnx"
    if not bundle.exists():
        folder.mkdir(parents=True, exist_ok=True)
        run_command(["export", "onnx", str(model), "-o", str(bundle)])
    sampling = ("--temperature", "1")
    write_stories(bundle, folder / "greedy.jsonl", OPENINGS, ())
    write_stories(bundle, folder / "sampled.jsonl", OPENINGS * 4, (*sampling, "--seed", "0"))
    write_stories(bundle, folder / "calibration.jsonl", OPENINGS * 8, (*sampling, "--seed", "1"))


def write_stories(
    bundle: Path, target: Path, openings: tuple[str, ...], options: tuple[str, ...]
) -> None:
    """Write what a language model makes of each opening, the opening included."""
    if target.exists():
        return
    prompts = [word for opening in openings for word in ("--prompt", opening)]
    length = ("--max-new-tokens", str(NEW_TOKENS), "--json")
    found = output_of(["export", "generate", str(bundle), *prompts, *length, *options])
    texts = json.loads(found)["texts"]
    _write_texts(target, ["".join(pair) for pair in zip(openings, texts, strict=True)])


def _write_texts(target: Path, texts: list[str]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
