"""What rounding by GPTQ, bias correction and smoothing are worth, alone and together.

    python -m benchmarks.rounding DATA MODELS -o OUT [--limit N]

DATA is the folder with the data sets `stsb` and `multi30k`, MODELS that with `stories260K`. The models
compute in PyTorch what their graphs compute. all-MiniLM-L6-v2 is judged by Spearman on STS-B dev and
by how far its embeddings are off, stories260K by the perplexity of what it tells itself. Every row is
kept in OUT and not measured again.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from calib_data.batches import Batches
from calib_data.metrics import spearman
from calib_data.sources import open_data
from compress.calibration import CalibrationData
from compress.checkpoint import Checkpoint
from compress.loading import open_checkpoint
from compress.quantize import Prepared, prepare, quantize_only
from compress.quantize_config import QuantizeConfig

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
SCHEMES = ("dynamic", "static", "weight-only")
SWITCHES: Mapping[str, Mapping[str, Any]] = {
    "none": {},
    "gptq": {"rounding": "gptq"},
    "bias correction": {"bias_correction": True},
    "smoothing": {"smooth": 0.5},
    "gptq, bias correction": {"rounding": "gptq", "bias_correction": True},
    "all three": {"rounding": "gptq", "bias_correction": True, "smooth": 0.5},
}
CALIBRATION = 512  # sentences, or texts of the model's own
Figures = dict[str, float]


@dataclass(frozen=True)
class Subject:
    """A model, what calibrates it, and how it is judged."""

    checkpoint: Checkpoint
    batches: CalibrationData
    judge: Callable[[Checkpoint], Figures]


def minilm(data: Path, limit: int | None) -> Subject:
    """Return the sentence encoder; `limit` pairs of STS-B dev judge it."""
    checkpoint = open_checkpoint(MINILM)
    sources = f"{data}/stsb/train.csv,{data}/multi30k/train.en,pydoc:train"
    mixed = open_data(sources, "sentence1,sentence2,_;;", CALIBRATION)
    pairs = open_data(f"{data}/stsb/dev.csv", "sentence1,sentence2,score", limit)
    sides = [Batches(pairs, checkpoint.processor, field=f) for f in ("text", "text_pair")]
    scores = np.array(pairs.column("score"))

    def embed(model: Checkpoint) -> tuple[float, np.ndarray]:
        seen: list[np.ndarray] = []

        def predict(batch: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
            found = model.predict(batch)
            seen.append(found["sentence_embedding"])
            return found

        value = spearman(predict, sides[0], sides[1], scores).value
        return value, np.concatenate(seen)

    expected: list[np.ndarray] = []

    def judge(model: Checkpoint) -> Figures:
        if not expected:
            expected.append(embed(checkpoint)[1])
        value, found = embed(model)
        off = np.square(found - expected[0]).sum() / np.square(expected[0]).sum()
        return {"Spearman": value, "error": float(off) ** 0.5}

    return Subject(checkpoint, Batches(mixed, checkpoint.processor), judge)


class Told:
    """Batches of what a language model tells from its first token on, greedily once and sampled."""

    def __init__(self, checkpoint: Checkpoint, count: int, length: int, seed: int) -> None:
        self.fingerprint = f"told-{count}-{length}-{seed}"
        first = torch.full((count, 1), checkpoint.config.bos_token_id)
        model: Any = checkpoint.module
        torch.manual_seed(seed)
        # the texts go on past an end token, which a story would follow in training too
        settings = {"max_new_tokens": length, "min_new_tokens": length}
        sampled = model.generate(first, do_sample=True, top_k=0, **settings)
        greedy = model.generate(first[:1], do_sample=False, **settings)
        self.ids = torch.cat((greedy, sampled))

    def __len__(self) -> int:
        return -(-len(self.ids) // 16)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for ids in self.ids.split(16):
            yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def stories(models: Path) -> Subject:
    """Return the story teller; what it told with another seed judges it."""
    checkpoint = open_checkpoint(str(models / "stories260K"), task="text-generation")
    told = Told(checkpoint, 64, 256, seed=1)

    def judge(model: Checkpoint) -> Figures:
        losses = []
        for batch in told:
            logits = torch.from_numpy(model.predict(batch)["logits"])[:, :-1]
            losses.append(
                F.cross_entropy(
                    logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten(), reduction="none"
                )
            )
        return {"perplexity": float(torch.cat(losses).mean().exp())}

    return Subject(checkpoint, Told(checkpoint, 64, 256, seed=0), judge)


def rows(name: str, subject: Subject, out: Path) -> Iterator[tuple[str, str, Figures]]:
    """Yield (scheme, switches, figures) of a model; the float model first."""

    def figures(label: str, make: Callable[[], Checkpoint]) -> Figures:
        path = out / f"{name}, {label}.json"
        if not path.exists():
            path.write_text(json.dumps(subject.judge(make())))
        return dict(json.loads(path.read_text()))

    yield "float", "", figures("float", lambda: subject.checkpoint)
    prepared: dict[float, Prepared] = {}

    def quantized(config: QuantizeConfig) -> Checkpoint:
        if config.smooth not in prepared:  # once for all schemes: what one needs the others ignore
            every = QuantizeConfig("static", smooth=config.smooth, rounding="gptq")
            prepared[config.smooth] = prepare(subject.checkpoint, every, subject.batches)
        return quantize_only(prepared[config.smooth], prepared[config.smooth].names, config)

    for scheme in SCHEMES:
        for label, settings in SWITCHES.items():
            config = replace(QuantizeConfig(scheme), **settings)
            yield scheme, label, figures(f"{scheme}, {label}", partial(quantized, config))


def table(found: list[tuple[str, str, Figures]]) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    names = list(found[0][2])
    yield f"| scheme | switches | {' | '.join(names)} |"
    yield "|---|---|" + "---|" * len(names)
    for scheme, label, figures in found:
        values = " | ".join(
            f"{figures[name]:.4g}" if name == "error" else f"{figures[name]:.3f}" for name in names
        )
        yield f"| {scheme} | {label} | {values} |"


def main() -> None:
    """Measure what is not measured yet and print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rounding", description=main.__doc__)
    parser.add_argument("data", type=Path, help="the folder with the data sets")
    parser.add_argument("models", type=Path, help="the folder with stories260K")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--limit", type=int, help="pairs of STS-B dev, all by default")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for name, subject in (
        ("stories260K", stories(given.models)),
        ("all-MiniLM-L6-v2", minilm(given.data, given.limit)),
    ):
        print(f"\n{name}\n")
        print("\n".join(table(list(rows(name, subject, given.out)))), flush=True)


if __name__ == "__main__":
    main()
