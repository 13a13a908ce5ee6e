"""What the recipes reach: the tables of docs/results/headline.md, by one command.

    python -m benchmarks.headline DATA -o OUT [--other NAME=INT8.onnx] [--only RECIPE]

DATA is a folder with the data sets that are named below. Each recipe is run by `onnxpress run` into
OUT/RECIPE, with the texts of that folder; what is finished is not run again, what was killed goes on.
The graphs of sentence encoders are then timed beside int8 graphs by other tools (ONNX Runtime's own
quantizer, and each --other), and judged by how they rank texts that no recipe has seen.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import pruning_subjects
from benchmarks.clock import counted, seconds_spent
from benchmarks.commands import run_command
from benchmarks.distillation import MINILM
from benchmarks.quantizers import ORT, by_onnxruntime, exported_plainly
from benchmarks.report import BenchmarkReport, VariantReport, read_report
from benchmarks.statistics import percentile, round_ratios, sign_interval
from calib_data.errors import OnnxPressError

RECIPES = Path(__file__).parents[1] / "recipes"
LONG, SHORT = "8 × 128", "1 × 32"
ORT_INT8 = "ort-int8"
FIDELITY = 0.97  # that a fast sentence encoder is to rank like the original with


@dataclass(frozen=True)
class Goal:
    """What one graph of a recipe is to reach.

    `figure` is "speed-up at WORKLOAD", over PyTorch, "MB", a metric, or "% of METRIC", of PyTorch's.
    """

    graph: str
    figure: str
    bound: float

    @property
    def at_most(self) -> bool:
        """Whether less is better."""
        return self.figure == "MB"

    def reached(self, report: BenchmarkReport) -> float:
        """Return the figure as the recipe's report has it."""
        variant = report.variant(self.graph)
        if variant.status == "failed":
            raise OnnxPressError(f"{self.graph} failed: {variant.reason}; see its report")
        kind, _, label = self.figure.partition(" at ")
        if kind == "speed-up":
            latency = next(each for each in variant.latency if each.workload == label)
            assert latency.speedup is not None, "a recipe's report has a baseline"
            return latency.speedup.value
        if kind == "MB":
            return variant.size_bytes / 1e6
        _, _, metric = self.figure.rpartition("% of ")
        value = _quality(variant, metric)
        whole = _quality(report.variant(report.baseline), metric)
        return value if metric == self.figure else 100 * value / whole


def _quality(variant: VariantReport, metric: str) -> float:
    return next(each.value for each in variant.quality if each.metric == metric)


@dataclass(frozen=True)
class Recipe:
    """A recipe, the values of its variables, and what its graphs are to reach."""

    name: str
    variables: Mapping[str, str]
    goals: tuple[Goal, ...]
    minutes: float | None = None  # that it may take
    encoders: Mapping[str, str] = field(default_factory=dict)  # graph → checkpoint, to be judged


def recipes(data: Path, out: Path) -> Iterator[Recipe]:
    """Yield every recipe with the texts of `data`."""
    judged = {"eval": f"{data}/stsb/dev.csv", "eval_columns": "sentence1,sentence2,score"}

    def sentences(evened: bool) -> dict[str, str]:
        _, texts, _, columns, *_ = pruning_subjects.mixed(data, evened)
        return {"texts": texts.replace("OUT/", f"{out}/"), "columns": columns, **judged}

    points = (("x12", 12, 86.2), ("x15", 15, 86.0), ("x20", 20, 85.0))
    yield Recipe(
        "minilm-fast",
        sentences(evened=True),
        tuple(
            goal
            for graph, speed, spearman in points
            for goal in (
                Goal(graph, f"speed-up at {LONG}", speed),
                Goal(graph, f"speed-up at {SHORT}", 12),
                Goal(graph, "MB", 15.0),
                Goal(graph, "spearman", spearman),
            )
        ),
        minutes=90,
        encoders={graph: f"{graph}-int8" for graph, _, _ in points},
    )
    yield Recipe(
        "minilm-small",
        sentences(evened=False),  # whose rare tokens are told by how often they occur
        (Goal("small", "MB", 8.0), Goal("small", "spearman", 86.0)),
    )
    yield Recipe(
        "sst2",
        {"train": f"{data}/sst2/train.tsv", "dev": f"{data}/sst2/dev.tsv"},
        (Goal("x10", f"speed-up at {LONG}", 10), Goal("x10", "% of accuracy", 99.0)),
    )
    yield Recipe(
        "gpt2-decode",
        {"decoder": f"{out}/gpt2"},
        (
            Goal("int8", "speed-up at 32 + 128 tokens", 6),
            Goal("int8", "speed-up at 32, first token", 1),
            Goal("4bit", "speed-up at 32 + 128 tokens", 8),
            Goal("4bit", "speed-up at 32, first token", 1),
        ),
    )


# --- running -------------------------------------------------------------------------------------


def prepare(recipe: Recipe, data: Path, out: Path) -> None:
    """Make what the recipe reads: parts of corpora, or a GPT-2 of random weights."""
    if recipe.name == "gpt2-decode":
        write_gpt2(out / "gpt2")
    if "texts" in recipe.variables:
        pruning_subjects.subject("minilm", data, data, out, out).prepare()


def write_gpt2(target: Path) -> None:
    """Write a GPT-2 of 124 M parameters, which are random: speed asks for no more."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    if target.exists():
        return
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config()).save_pretrained(target)


def run(recipe: Recipe, out: Path) -> None:
    """Run a recipe until it is finished; the seconds that all its runs took are kept beside it."""
    settings = [f"--set={name}={value}" for name, value in recipe.variables.items()]
    path, target = RECIPES / f"{recipe.name}.yaml", out / recipe.name
    with counted(target):
        run_command(["run", str(path), *settings, "-o", str(target)])


def compare(
    recipe: Recipe, report: BenchmarkReport, out: Path, others: Mapping[str, Path]
) -> BenchmarkReport:
    """Return a report of a recipe's encoders beside int8 graphs by other tools.

    One made before holds as long as the graphs are those of `report`.
    """
    target = out / f"{recipe.name}.others"
    found = target / "report.json"
    if found.is_file() and _hashes(recipe, read_report(found)) == _hashes(recipe, report):
        return read_report(found)
    plain, ort = out / "plain" / "float.onnx", out / "plain" / f"{ORT_INT8}.onnx"
    if not ort.is_file():
        exported_plainly(MINILM, plain)()
        by_onnxruntime(plain, ort, out, ORT["dynamic"])()
    graphs = {graph: out / recipe.name / graph for graph in recipe.encoders}
    named = [f"{name}={path}" for name, path in {**graphs, ORT_INT8: ort, **others}.items()]
    judged = ["--eval", recipe.variables["eval"], "--columns", recipe.variables["eval_columns"]]
    titled = ["--title", "all-MiniLM-L6-v2 by this and by other tools"]
    line = ["benchmark", "report", *named, "--baseline", MINILM, *judged, *titled]
    run_command([*line, "--overwrite", "-o", str(target)])
    return read_report(found)


def fidelities(
    recipe: Recipe, report: BenchmarkReport, data: Path, out: Path
) -> dict[str, dict[str, float]]:
    """Return how alike each encoder and the original rank texts, by corpus; looked up once known.

    The checkpoint answers for the graph, which computes the same to the integer.
    """
    record = out / f"{recipe.name}.fidelity.json"
    known: dict[str, dict[str, float]] = {}  # by the graph's hash
    if record.is_file():
        known = json.loads(record.read_text())
    subject = pruning_subjects.subject("minilm", data, data, out, out)
    found = {}
    for graph, digest in _hashes(recipe, report).items():
        if digest not in known:
            checkpoint = out / recipe.name / recipe.encoders[graph]
            known[digest] = pruning_subjects.judge(subject, str(checkpoint))
            record.write_text(json.dumps(known, indent=1) + "\n")
        found[graph] = known[digest]
    return found


def _hashes(recipe: Recipe, report: BenchmarkReport) -> dict[str, str]:
    """Return the sha256 of each encoder's graph that a report measured."""
    variants = {graph: report.find(graph) for graph in recipe.encoders}
    return {graph: v.sha256["model.onnx"] for graph, v in variants.items() if v is not None}


# --- telling -------------------------------------------------------------------------------------


def table(recipe: Recipe, report: BenchmarkReport, seconds: float) -> Iterator[str]:
    """Yield the lines of a Markdown table: a goal a line, and how long the recipe took."""
    yield "| graph | figure | goal | reached | |"
    yield "|---|---|---|---|---|"
    for goal in recipe.goals:
        value = goal.reached(report)
        met = value <= goal.bound if goal.at_most else value >= goal.bound
        bound = f"{'≤' if goal.at_most else '≥'} {goal.bound:g}"
        yield f"| {goal.graph} | {goal.figure} | {bound} | {value:.2f} | {_met(met)} |"
    if recipe.minutes is not None:
        met = seconds <= 60 * recipe.minutes
        yield f"| all | minutes | ≤ {recipe.minutes:g} | {seconds / 60:.0f} | {_met(met)} |"


def _met(met: bool) -> str:
    return "met" if met else "**missed**"


def fidelity_table(found: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """Yield the lines of a Markdown table: how alike graphs rank texts, by corpus."""
    labels = list(next(iter(found.values())))
    yield f"| graph | {' | '.join(labels)} |"
    yield "|" + "---|" * (len(labels) + 1)
    for graph, values in found.items():
        yield f"| {graph} | {' | '.join(f'{values[label]:.3g}' for label in labels)} |"
    _, *corpora = labels
    missed = [f"{graph} on {c}" for graph, v in found.items() for c in corpora if v[c] < FIDELITY]
    yield ""
    yield f"Below {FIDELITY}: {', '.join(missed) or 'none'}."


def comparison_table(
    report: BenchmarkReport, graphs: Sequence[str], others: Sequence[str]
) -> Iterator[str]:
    """Yield the lines of a Markdown table: the time of each graph as a share of others'."""
    yield f"| graph | shape | {' | '.join(f'of {other}' for other in others)} |"
    yield "|" + "---|" * (len(others) + 2)
    for graph in graphs:
        for ours in report.variant(graph).latency:
            cells = []
            for other in others:
                latency = report.variant(other).latency
                theirs = next(each for each in latency if each.workload == ours.workload)
                share = round_ratios(theirs.rounds, ours.rounds)  # of the times, not of the speeds
                low, high = sign_interval(share)
                cells.append(
                    f"1/{1 / percentile(share, 50):.2f} (1/{1 / low:.2f}–1/{1 / high:.2f})"
                )
            yield f"| {graph} | {ours.workload} | {' | '.join(cells)} |"


def main() -> None:
    """Run the recipes and print what they reached."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.headline", description=main.__doc__)
    parser.add_argument("data", type=Path, help="the folder with the data sets")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument(
        "--other", action="append", default=[], metavar="NAME=INT8.onnx",
        help="an int8 graph of the same model by another tool",
    )  # fmt: skip
    parser.add_argument("--only", help="the recipe to run")
    given = parser.parse_args()
    others = {name: Path(path) for name, _, path in (word.partition("=") for word in given.other)}
    if missing := [name for name, path in others.items() if not path.is_file()]:
        parser.error(f"--other {missing[0]}: there is no such graph; it wants NAME=INT8.onnx")
    known = {recipe.name: recipe for recipe in recipes(given.data, given.out)}
    if given.only is not None and given.only not in known:
        parser.error(f"there is no recipe {given.only!r}; there are {', '.join(known)}")
    given.out.mkdir(parents=True, exist_ok=True)
    try:
        for recipe in [known[given.only]] if given.only else known.values():
            _tell(recipe, given.data, given.out, others)
    except OnnxPressError as error:
        parser.exit(error.exit_code, f"Error: {error}\n")


def _tell(recipe: Recipe, data: Path, out: Path, others: Mapping[str, Path]) -> None:
    prepare(recipe, data, out)
    run(recipe, out)
    report = read_report(out / recipe.name / "report" / "report.json")
    seconds = seconds_spent(out / recipe.name)
    assert seconds is not None, "run() counts them"
    print(f"\n## {recipe.name}\n")
    print("\n".join(table(recipe, report, seconds)), end="\n\n")
    if recipe.encoders:
        print("\n".join(fidelity_table(fidelities(recipe, report, data, out))), end="\n\n")
        beside = compare(recipe, report, out, others)
        names = [ORT_INT8, *others]
        print("\n".join(comparison_table(beside, list(recipe.encoders), names)))


if __name__ == "__main__":
    main()
