"""What pruning keeps: the table of docs/results/pruning.md, by one command.

    python -m benchmarks.pruning DATA MODELS -o OUT [--trained DIR] [--only PREFIX]

DATA and MODELS are folders with the data sets and the models that are named below. Each row is a
command of `onnxpress`, whose result lies in OUT: what is finished is not run again, what was
killed goes on, what fails is a row with its reason. Hours on two cores; `--only` runs and tells the rows
whose name begins so. The classifier is that of `benchmarks.distillation`, trained here unless --trained
names where that has run. The rows of `sweep` are drawn as accuracy against latency in OUT/sweep.
"""

import argparse
import json
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import pruning_subjects
from benchmarks.clock import counted, seconds_spent
from benchmarks.commands import failure_of, run_command
from benchmarks.distillation import HALF
from benchmarks.pruning_subjects import MINILM, Subject
from calib_data.errors import OnnxPressError

SEEDS = (0, 1, 2)
CRITERIA = ("fisher", "taylor", "gradient", "magnitude", "wanda", "random")
SWEEP = (1.25, 1.5, 2.0, 2.5, 3.0, 4.0)
SHAPE = ("--shape", "8x128")


@dataclass(frozen=True)
class Row:
    """One line of the table: what makes it, whose it is, and what it is to reach."""

    name: str
    subject: str
    command: tuple[str, ...]  # without its `-o`; `OUT/` begins the place of another row's result
    goal: float | None = None  # of the subject's metric; where less is better, at most
    minutes: float | None = None  # that it may take


def rows(data: Path) -> Iterator[Row]:
    """Yield every row."""
    yield from _sentences(data)
    yield from _criteria(data)
    yield from _besides(data)
    yield from _others(data)


def _sentences(data: Path) -> Iterator[Row]:
    """The sentence encoder, faster by a stated factor."""
    prune = ("compress", "prune", MINILM, *pruning_subjects.mixed(data), *SHAPE)
    whole = ("export", "onnx", MINILM)
    yield Row("minilm/float.onnx", "minilm", whole)
    yield Row("minilm/1.5-untrained", "minilm", (*prune, "--speedup", "1.5"), 86.0, 3)
    for speed, steps, goal, minutes in (
        ("1.5", "1000", 86.6, 10), ("2.5", "7200", 86.4, 40), ("4.0", "12000", 85.5, 60),
    ):  # fmt: skip
        healed = (*prune, "--speedup", speed, "--heal", steps, *HALF)
        yield Row(f"minilm/{speed}-healed", "minilm", healed, goal, minutes)
    rounds = ("--schedule", "iterative", "--rounds", "3", "--heal", "2400", *HALF)
    yield Row("minilm/2.5-rounds", "minilm", (*prune, "--speedup", "2.5", *rounds))
    plain = (*prune, "--speedup", "1.5", "--no-reconstruct")
    yield Row("minilm/1.5-unreconstructed", "minilm", plain)
    for factor in SWEEP:
        short = (*prune, "--speedup", f"{factor:g}", "--heal", "400", *HALF)
        small = f"OUT/sweep/{factor:g}"
        yield Row(f"sweep/{factor:g}", "minilm", short)
        yield Row(f"sweep/{factor:g}.onnx", "minilm", ("export", "onnx", small))


def _criteria(data: Path) -> Iterator[Row]:
    """Every criterion at one size, and so one speed, with one healing, three seeds each."""
    prune = ("compress", "prune", MINILM, *pruning_subjects.mixed(data))
    shares = ("--heads", "0.45", "--ffn", "0.45")
    for criterion in CRITERIA:
        for seed in SEEDS:
            line = (*prune, *shares, "--criterion", criterion, "--seed", str(seed))
            healed = (*line, "--heal", "300", *HALF)
            yield Row(f"criteria/{criterion}-untrained-{seed}", "minilm", line)
            yield Row(f"criteria/{criterion}-{seed}", "minilm", healed)


def _besides(data: Path) -> Iterator[Row]:
    """Single weights and tokens."""
    prune = ("compress", "prune", MINILM)
    mixed = pruning_subjects.mixed(data)
    yield Row("sparse/0.5", "minilm", (*prune, *mixed, "--sparsity", "0.5"), 85.5)
    yield Row("sparse/2-4", "minilm", (*prune, *mixed, "--sparsity", "2:4"), 84.5)
    tokens = f"{data}/stsb/train.csv,{data}/sst2/train.tsv,{data}/multi30k/train.en,pydoc"
    columns = ("--vocab-columns", "sentence1,sentence2,_;;;")
    for count in ("1", "5"):
        fewer = (*prune, "--vocab-from", tokens, *columns, "--vocab-min-count", count)
        yield Row(f"vocabulary/{count}", "minilm", fewer, 86.52)
        pair = ("--teacher", MINILM, "--student", f"OUT/vocabulary/{count}")
        taught = ("--losses", "embedding", "--steps", "1000", "--lr", "1e-4", *HALF)
        healed = ("compress", "distill", *pair, *mixed, *taught)
        yield Row(f"vocabulary/{count}-healed", "minilm", healed, 86.52)


def _others(data: Path) -> Iterator[Row]:
    """A classifier, images and a language model; goals are shares of what the whole model reaches."""
    texts = ("--data", f"{data}/sst2/train.tsv", "--max-length", "64")
    for speed, steps in (("1.5", "1500"), ("2.0", "2500")):
        classifier = ("compress", "prune", "TRAINED/sst2/full", *texts, "--speedup", speed, *SHAPE)
        yield Row(f"sst2/{speed}", "sst2", (*classifier, "--heal", steps, *HALF))
    images = ("--data", "OUT/subjects/vit/mnist.npz:train", "--batch-size", "64")
    vision = ("compress", "prune", "OUT/subjects/vit/model", *images)
    # so small that most of its time is that of having a layer at all
    faster = ("--speedup", "2.0", "--whole-layers", "--shape", "64x1")
    healed = ("--heal", "9000", "--lr", "1e-3")
    yield Row("vit/2.0", "vit", (*vision, *faster, *healed))
    own = ("--data", "OUT/subjects/stories/healing.jsonl", "--max-length", "256", "--pack")
    stories = ("compress", "prune", "MODELS/stories260K", *own, "--heads", "0", "--ffn", "0.2")
    taught = ("--heal", "1200", "--temperature", "1", "--lr", "1e-3")
    yield Row("stories/ffn-20", "stories", (*stories, *taught))


# --- running -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Places:
    """The folders that commands name: `OUT/`, `TRAINED/` and `MODELS/`."""

    data: Path
    models: Path
    out: Path
    trained: Path

    def filled(self, words: Sequence[str]) -> list[str]:
        """Return a command with the folders in it."""
        named = {"OUT": self.out, "TRAINED": self.trained, "MODELS": self.models}
        pattern = (
            rf"(^|,)({'|'.join(named)})/"  # at the start of a path, of several joined by commas
        )
        return [re.sub(pattern, lambda m: f"{m[1]}{named[m[2]]}/", word) for word in words]

    def subject(self, name: str) -> Subject:
        """Return a subject, once what it is judged on is made."""
        return pruning_subjects.subject(name, self.data, self.models, self.out, self.trained)


def run(row: Row, places: Places) -> str | None:
    """Make a row's result unless it is there; return why it failed. How long it took is kept beside."""
    target = places.out / row.name
    if target.exists():
        return None
    target.parent.mkdir(parents=True, exist_ok=True)
    places.subject(row.subject).prepare()
    goes_on = ("--resume",) if row.command[0] == "compress" else ()
    with counted(target):
        # 6: a speed that was missed, with the result there; the table tells which it is
        return failure_of([*places.filled(row.command), *goes_on, "-o", str(target)], fine=(0, 6))


def figures(row: Row, places: Places) -> dict[str, Any]:
    """Return what a finished row reached: speed, minutes, and every metric; looked up if it is known."""
    target = places.out / row.name
    record = target.with_name(f"{target.name}.figures.json")
    if record.is_file():
        known: dict[str, Any] = json.loads(record.read_text())
        return known
    manifest = json.loads((target / "onnxpress.json").read_text())
    stages = [stage for stage in manifest["lineage"] if stage["stage"] == "prune"]
    seconds = seconds_spent(target)
    found = {
        "speedup": (stages[-1].get("measured") or {}).get("speedup") if stages else None,
        "minutes": None if seconds is None else seconds / 60,
        "bytes": sum(file.stat().st_size for file in target.rglob("*") if file.is_file()),
        "metrics": pruning_subjects.judge(places.subject(row.subject), str(target)),
    }
    record.write_text(json.dumps(found, indent=1) + "\n")
    return found


# --- telling -------------------------------------------------------------------------------------


def table(
    chosen: Sequence[Row], found: Mapping[str, Mapping[str, Any]], failed: Mapping[str, str]
) -> Iterator[str]:
    """Yield the lines of a Markdown table; seeds of one thing are one line."""
    yield "| row | speed | MB | minutes | metric | goal | rank fidelity, held out |"
    yield "|---|---|---|---|---|---|---|"
    groups: dict[str, list[Row]] = {}
    for row in chosen:
        name, _, seed = row.name.rpartition("-")
        seeded = row.name.startswith("criteria/") and seed.isdigit()
        groups.setdefault(name if seeded else row.name, []).append(row)
    for name, members in groups.items():
        done = [found[row.name] for row in members if row.name in found]
        why = next((failed[row.name] for row in members if row.name in failed), None)
        if not done:
            if why is not None:
                yield f"| {name} | | | | {why} | | |"
            continue
        yield _line(name, members[0], done)


def _line(name: str, row: Row, done: Sequence[Mapping[str, Any]]) -> str:
    metric, *others = done[0]["metrics"]
    values = [each["metrics"][metric] for each in done]
    figure = f"{metric} {_mean(values)}"
    if len(values) > 1:
        figure += f" ± {statistics.stdev(values):.2f} ({len(values)} seeds)"
    goal = ""
    if row.goal is not None:
        met = statistics.mean(values) >= row.goal
        goal = f"≥ {row.goal:g}: {'met' if met else '**missed**'}"
    minutes = [each["minutes"] for each in done if each["minutes"] is not None]
    taken = f"{statistics.mean(minutes):.1f}" if minutes else ""
    if minutes and row.minutes is not None:
        taken += f" of {row.minutes:g}"
    speeds = [each["speedup"] for each in done if each["speedup"] is not None]
    told = ", ".join(
        f"{other} {_mean([each['metrics'][other] for each in done])}" for other in others
    )
    speed = f"{_mean(speeds)} ×" if speeds else ""
    size = f"{statistics.mean(each['bytes'] for each in done) / 1e6:.1f}"
    return f"| {name} | {speed} | {size} | {taken} | {figure} | {goal} | {told} |"


def _mean(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.2f}"


def report(places: Places, names: Sequence[str]) -> None:
    """Draw accuracy against latency of the graphs in `names`, beside the unpruned one."""
    target = places.out / "sweep" / "report"
    graphs = [f"{name}={places.out / 'sweep' / f'{name}.onnx'}" for name in names]
    whole = f"unpruned={places.out / 'minilm' / 'float.onnx'}"
    line = ["benchmark", "report", whole, *graphs, "--eval", f"{places.data}/stsb/dev.csv"]
    line += ["--columns", "sentence1,sentence2,score", "--shapes", "8x128", "--overwrite"]
    line += ["--title", "all-MiniLM-L6-v2, pruned for speed"]
    run_command([*line, "-o", str(target)])
    print(f"{target / 'report.html'}")


def main() -> None:
    """Make and judge the rows, and print what they reached; write it to OUT/pruning.json, too."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pruning", description=main.__doc__)
    parser.add_argument("data", type=Path, help="the folder with the data sets")
    parser.add_argument("models", type=Path, help="the folder with the models")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--trained", type=Path, help="where benchmarks.distillation has run")
    parser.add_argument("--only", default="", help="the rows whose name begins so")
    given = parser.parse_args()
    places = Places(given.data, given.models, given.out, given.trained or given.out / "trained")
    chosen = [row for row in rows(given.data) if row.name.startswith(given.only)]
    found: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    try:
        for row in chosen:
            why = run(row, places)
            if why is not None:
                failed[row.name] = why
            elif not row.name.endswith(".onnx"):
                found[row.name] = figures(row, places)
    except OnnxPressError as error:
        parser.exit(error.exit_code, f"Error: {error}\n")
    (given.out / "pruning.json").write_text(json.dumps({**found, **failed}, indent=1) + "\n")
    print("\n".join(table(chosen, found, failed)))
    swept = [f"{speed:g}" for speed in SWEEP if f"sweep/{speed:g}" in found]
    if swept and (places.out / "minilm" / "float.onnx").exists():
        report(places, swept)


if __name__ == "__main__":
    main()
