"""Tokens per second of decoding with a cache: PyTorch's `generate` against bundles, in rounds.

    python -m benchmarks.decoding --baseline MODEL BUNDLE... [--prompt 32] [--new 128] [--batch 1]

One process per model, one generation per model and round, greedy, the end token ignored.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.config import usable_cores
from benchmarks.runtimes import Arrays, Loaded, Runtime, Source
from benchmarks.statistics import MINIMUM_ROUNDS, percentile, round_ratios, sign_interval
from benchmarks.worker import Variant, Worker
from calib_data.errors import OnnxPressError


@dataclass(frozen=True)
class Row:
    """One model's result."""

    name: str
    tokens_per_second: float
    prompt_milliseconds: float
    speedup: float  # against the baseline, the median over rounds
    interval: tuple[float, float]  # 95 %, by the sign test
    same_tokens: float  # share of the new tokens that are the baseline's


def _no_description(model: str) -> Source:
    raise NotImplementedError("a decoding benchmark describes no source")


def _open_pytorch(model: str, provider: str, threads: int) -> Loaded:
    import torch

    torch.set_num_threads(threads)
    from compress.loading import open_checkpoint

    module: Any = open_checkpoint(model).backbone

    def run(batch: Arrays) -> Arrays:
        ids = torch.from_numpy(np.array(batch["input_ids"]))
        new = int(batch["new"])
        with torch.inference_mode():
            made = module.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=None,
            )
        return {"tokens": made[:, ids.shape[1] :].numpy()}

    return Loaded(lambda batch: batch, run, lambda outputs: outputs, (f"torch:{provider}",))


def _open_bundle(model: str, provider: str, threads: int) -> Loaded:
    from export.bundle import open_bundle
    from export.generate import GenerateConfig, generate, open_decoding

    decoding = open_decoding(open_bundle(model), provider, threads)

    def run(batch: Arrays) -> Arrays:
        config = GenerateConfig(max_new_tokens=int(batch["new"]), ignore_end=True)
        return {"tokens": np.array(generate(decoding, batch["input_ids"].tolist(), config).tokens)}

    return Loaded(lambda batch: batch, run, lambda outputs: outputs, (provider,))


PYTORCH = Runtime(_no_description, _open_pytorch)
BUNDLE = Runtime(_no_description, _open_bundle)


def measure(
    baseline: str,
    bundles: Sequence[str],
    *,
    vocabulary: int,
    batch: int = 1,
    prompt: int = 32,
    new: int = 128,
    rounds: int = MINIMUM_ROUNDS,
    threads: int | None = None,
    provider: str = "cpu",
) -> list[Row]:
    """Return one row per model, the PyTorch baseline first.

    Every round times each model once, on the same random prompts of shape (batch, prompt).
    """
    variants = [
        Variant("PyTorch", baseline, "benchmarks.decoding:PYTORCH"),
        *(Variant(Path(path).name, path, "benchmarks.decoding:BUNDLE") for path in bundles),
    ]
    ids = np.random.default_rng(0).integers(5, vocabulary, (batch, prompt))
    whole = {"input_ids": ids, "new": np.array(new)}
    first = {"input_ids": ids, "new": np.array(1)}
    times: dict[str, list[list[float]]] = {variant.name: [] for variant in variants}
    prompts: dict[str, list[float]] = {variant.name: [] for variant in variants}
    tokens: dict[str, np.ndarray] = {}
    opened = [Worker(variant, provider, threads or usable_cores()) for variant in variants]
    try:
        for worker in opened:
            worker.load()
            tokens[worker.variant.name] = worker.predict(whole)["tokens"]
        for _ in range(rounds):
            for worker in opened:
                name = worker.variant.name
                prompts[name] += worker.time(first, calls=1)
                times[name].append(worker.time(whole, calls=1))
    finally:
        for worker in opened:
            worker.__exit__()
    reference = times["PyTorch"]
    rows = []
    for name, spent in times.items():
        ratios = round_ratios(spent, reference)
        rows.append(
            Row(
                name,
                batch * new / percentile([calls[0] for calls in spent], 50),
                1000 * percentile(prompts[name], 50),
                percentile(ratios, 50),
                sign_interval(ratios),
                float((tokens[name] == tokens["PyTorch"]).mean()),
            )
        )
    return rows


def main() -> None:
    """Print tokens per second of bundles and of their PyTorch source, as a Markdown table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoding", description=main.__doc__)
    parser.add_argument("bundles", nargs="+", metavar="BUNDLE")
    parser.add_argument("--baseline", required=True, help="the model, run by PyTorch")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens to generate")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=MINIMUM_ROUNDS)
    parser.add_argument("--threads", type=int, help="per model; default: all cores")
    parser.add_argument("--provider", choices=["cpu", "cuda"], default="cpu")
    settings = vars(parser.parse_args())
    from compress.loading import open_checkpoint

    try:
        vocabulary = open_checkpoint(settings["baseline"]).signature.vocabulary
        rows = measure(vocabulary=vocabulary, **settings)
    except OnnxPressError as error:
        parser.exit(error.exit_code, f"Error: {error}\n")
    print("| model | tokens/s | speed-up | 95 % interval | prompt, ms | same tokens |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        low, high = row.interval
        print(
            f"| {row.name} | {row.tokens_per_second:.1f} | {row.speedup:.2f} × | "
            f"{low:.2f}–{high:.2f} | {row.prompt_milliseconds:.1f} | {row.same_tokens:.0%} |"
        )


if __name__ == "__main__":
    main()
