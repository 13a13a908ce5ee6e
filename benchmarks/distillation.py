"""The quality that training reaches: what docs/results/training.md claims, by one command.

    python -m benchmarks.distillation DATA -o OUT [--only PREFIX]

DATA is a folder with the data sets that the file names. Each job is one command of `onnxpress`, whose
result lies in OUT; one that is finished is not run again, one that was killed goes on. Hours on two
cores; `--only` runs and tells the jobs whose name begins so.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
SEEDS = (0, 1, 2)
ABLATION_STEPS = 400
GPT: dict[str, Any] = {
    "model_type": "gpt2",
    "n_embd": 256,
    "n_layer": 4,
    "n_head": 8,
    "n_positions": 128,
}


@dataclass(frozen=True)
class Job:
    """One command; `arguments` may name earlier jobs' results as `OUT/name`."""

    name: str
    arguments: tuple[str, ...]


def jobs(data: Path) -> Iterator[Job]:
    """Yield every job, those first whose results others start from."""
    sst2 = ("--data", f"{data}/sst2/train.tsv", "--eval", f"{data}/sst2/dev.tsv")
    short = ("--max-length", "64", "--eval-every", "1000")
    yield Job("sst2/full", ("compress", "finetune", MINILM, *sst2, *short, "--epochs", "2"))
    yield Job(
        "sst2/lora",
        ("compress", "finetune", MINILM, *sst2, *short, "--epochs", "2", "--method", "lora"),
    )
    texts = ",".join(
        [
            f"{data}/stsb/train.csv",
            f"{data}/multi30k/train.en",
            f"{data}/sst2/train.tsv",
            f"{data}/agnews/train_subset_10k.tsv",
            f"{data}/wikitext2/train_prefix.txt",
            "pydoc:train",
        ]
    )
    mixed = ("--data", texts, "--columns", "sentence1,sentence2,_;;;text,_;;", "--max-length", "64")
    judged = ("--eval", f"{data}/stsb/dev.csv", "--eval-columns", "sentence1,sentence2,score")
    student = ("compress", "distill", "--teacher", MINILM, "--layers", "3", *mixed, *judged)
    # judged at its end only: no STS-B score chooses the weights
    yield Job(
        "sts/student", (*student, "--steps", "16000", "--eval-every", "16000", "--lr", "3e-4")
    )
    fit = (
        "embedding",
        "similarity",
        "contrastive",
        "hidden",
        "hidden-cosine",
        "attention",
        "relations",
    )
    for loss in fit:
        steps = ("--steps", str(ABLATION_STEPS), "--eval-every", str(ABLATION_STEPS))
        yield Job(f"ablation/{loss}", (*student, "--losses", loss, *steps))
    for seed in SEEDS:
        base = ("--layers", "3", *sst2, *short, "--epochs", "1", "--seed", str(seed))
        taught = ("compress", "distill", "--teacher", "OUT/sst2/full", *base)
        yield Job(f"sst2/taught-{seed}", (*taught, "--losses", "logits,hidden"))
        yield Job(f"sst2/alone-{seed}", (*taught, "--losses", "hard"))
    play = f"whole:{data}/tinyshakespeare/input.txt"
    characters = (
        "--data",
        f"{play}:train",
        "--eval",
        f"{play}:test",
        "--pack",
        "--eval-every",
        "500",
    )
    made = ("--from-config", "OUT/gpt.json", "--tokenizer", "characters", "--max-length", "128")
    yield Job("gpt/teacher", ("compress", "finetune", *made, *characters, "--epochs", "10"))
    for seed in SEEDS:
        # both start from the teacher's weights, so that what differs is the loss
        half = ("--hidden", str(GPT["n_embd"] // 2), "--seed", str(seed), "--max-length", "128")
        speaker = ("compress", "distill", "--teacher", "OUT/gpt/teacher", *half, *characters)
        yield Job(f"gpt/taught-{seed}", (*speaker, "--epochs", "3"))
        yield Job(f"gpt/alone-{seed}", (*speaker, "--epochs", "3", "--losses", "hard"))


def run(job: Job, out: Path) -> None:
    """Run a job that is not finished; its output goes to the terminal."""
    target = out / job.name
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    (out / "gpt.json").write_text(json.dumps(GPT))
    arguments = [argument.replace("OUT/", f"{out}/") for argument in job.arguments]
    command = [sys.executable, "-m", "onnxpress", *arguments, "--resume", "-o", str(target)]
    subprocess.run(command, check=True)


def figures(out: Path, names: list[str]) -> dict[str, Mapping[str, Any]]:
    """Return the metrics of the last stage of every finished job, by its name."""
    found = {}
    for name in names:
        manifest = out / name / "onnxpress.json"
        if manifest.is_file():
            found[name] = json.loads(manifest.read_text())["lineage"][-1]["metrics"]
    return found


def figure(metrics: Mapping[str, Any]) -> float:
    """Return the metric that a job is about at its best: accuracy, Spearman × 100 or perplexity."""
    for name in ("accuracy", "spearman", "perplexity"):
        if name in metrics:
            return float(metrics[name])
    # one of which less is better has a minus
    return abs(max(float(value) for _, value in metrics["evaluations"]))


def table(found: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield the lines of a Markdown table: one row a job, seeds of one thing together."""
    yield "| job | figure | steps |"
    yield "|---|---|---|"
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for name, metrics in found.items():
        group, _, seed = name.rpartition("-")
        groups.setdefault(group if seed.isdigit() else name, []).append(metrics)
    for name, each in groups.items():
        values = [figure(metrics) for metrics in each]
        spread = (
            f" ± {statistics.stdev(values):.2f} ({len(values)} seeds)" if len(values) > 1 else ""
        )
        yield f"| {name} | {statistics.mean(values):.2f}{spread} | {each[0]['steps']} |"


def main() -> None:
    """Run the jobs and print what they reached."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.distillation", description=main.__doc__
    )
    parser.add_argument("data", type=Path, help="the folder with the data sets")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--only", default="", help="the jobs whose name begins so")
    given = parser.parse_args()
    chosen = [job for job in jobs(given.data) if job.name.startswith(given.only)]
    for job in chosen:
        run(job, given.out)
    print("\n".join(table(figures(given.out, [job.name for job in chosen]))))


if __name__ == "__main__":
    main()
