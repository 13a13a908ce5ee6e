"""The quality that training reaches: what docs/results/training.md claims, by one command.

    python -m benchmarks.distillation DATA -o OUT [--only PREFIX]

DATA is a folder with the data sets that the file names. Each job is one command of `onnxpress`, whose
result lies in OUT; one that is finished is not run again, one that was killed goes on. Hours on two
cores; `--only` runs and tells the jobs whose name begins so.
"""

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.commands import run_command
from calib_data.errors import OnnxPressError

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
SEEDS = (0, 1, 2)
HALF = ("--precision", "bf16")
SHORT = ("--steps", "400", "--eval-every", "400")  # an ablation's training
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
    yield from _sentences(data)
    yield from _classification(data)
    yield from _characters(data)


def _classification(data: Path) -> Iterator[Job]:
    """SST-2: fine-tuning whole and in part, then students of the result."""
    sst2 = ("--data", f"{data}/sst2/train.tsv", "--eval", f"{data}/sst2/dev.tsv")
    common = (*sst2, "--max-length", "64", *HALF)
    long = ("--epochs", "2", "--eval-every", "1000")
    yield Job("sst2/full", ("compress", "finetune", MINILM, *common, *long))
    # what else was tried is in docs/results/training.md
    lora = ("--method", "lora", "--rank", "8", "--lr", "1e-3")
    yield Job("sst2/lora", ("compress", "finetune", MINILM, *common, *long, *lora))
    # begun by a student of the general model: three layers cut from the teacher reach 87.0 in that time
    general = ("--student", "OUT/sts/student")
    student = ("compress", "distill", "--teacher", "OUT/sst2/full", *general, *common)
    # judged at its end only: the best of several evaluations flatters the one that varies more
    once = ("--epochs", "2", "--eval-every", "10000", "--ema", "0.999")
    for seed in SEEDS:
        whole = (*student, *once, "--seed", str(seed))
        yield Job(f"sst2/taught-{seed}", (*whole, "--losses", "logits,hidden"))
        yield Job(f"sst2/alone-{seed}", (*whole, "--losses", "hard"))
    for loss in ("hard", "logits", "reverse-kl", "jsd", "logits-mse"):
        yield Job(f"ablation/sst2-{loss}", (*student, "--losses", loss, *SHORT))


def _sentences(data: Path) -> Iterator[Job]:
    """A student of the sentence encoder itself, and what each loss does to it."""
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
    taught = (*student, "--lr", "3e-4", *HALF)
    # judged at its end only: no STS-B score chooses the weights
    long = ("--steps", "6000", "--eval-every", "6000")
    yield Job("sts/student", (*taught, *long))
    # a step of no length: what the layers are worth before they are trained
    yield Job("ablation/sts-untrained", (*student, "--lr", "1e-12", "--steps", "1"))
    others = ("similarity", "contrastive", "hidden", "hidden-cosine", "attention", "relations")
    for losses in ("embedding", *others, *(f"embedding,{other}" for other in others)):
        name = f"ablation/sts-{losses.replace(',', '+')}"
        yield Job(name, (*taught, "--losses", losses, *SHORT))


def _characters(data: Path) -> Iterator[Job]:
    """A character model, and students half as wide that start from its weights."""
    play = f"whole:{data}/tinyshakespeare/input.txt"
    text = ("--data", f"{play}:train")
    common = (
        "--eval",
        f"{play}:test",
        "--pack",
        "--max-length",
        "128",
        "--eval-every",
        "500",
        *HALF,
    )
    made = ("--from-config", "OUT/gpt.json", "--tokenizer", "characters")
    yield Job("gpt/teacher", ("compress", "finetune", *made, *text, *common, "--epochs", "10"))
    half = ("--hidden", str(GPT["n_embd"] // 2))
    student = ("compress", "distill", "--teacher", "OUT/gpt/teacher", *half, *common)
    for seed in SEEDS:
        same = (*student, *text, "--epochs", "3", "--seed", str(seed))
        # at 3, which suits classifiers, a student is worse than without its teacher
        yield Job(f"gpt/taught-{seed}", (*same, "--temperature", "1"))
        yield Job(f"gpt/alone-{seed}", (*same, "--losses", "hard"))
    # half a million of the teacher's own characters, as often as makes the same number of steps
    lines = ("--data", f"{data}/tinyshakespeare/input.txt", "--limit", "4000", "--epochs", "6")
    spoken = ("--generate", "112", "--prompt-tokens", "16", "--generate-temperature", "1")
    yield Job("ablation/gpt-generated", (*student, *lines, *spoken))


def run(job: Job, out: Path) -> None:
    """Run a job that is not finished; what it prints goes to stderr."""
    target = out / job.name
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    (out / "gpt.json").write_text(json.dumps(GPT))
    arguments = [argument.replace("OUT/", f"{out}/") for argument in job.arguments]
    run_command([*arguments, "--resume", "-o", str(target)])


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
    try:
        for job in chosen:
            run(job, given.out)
    except OnnxPressError as error:
        parser.exit(error.exit_code, f"Error: {error}\n")
    print("\n".join(table(figures(given.out, [job.name for job in chosen]))))


if __name__ == "__main__":
    main()
