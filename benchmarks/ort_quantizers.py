"""Our int8 graphs and those of ONNX Runtime's quantizers, side by side, from the same data.

    python -m benchmarks.ort_quantizers MODEL --data D --eval E -o OUT [--graph NAME=FLOAT.onnx]
        [--foreign NAME=INT8.onnx]

MODEL is a sentence encoder. ONNX Runtime quantizes our float graph, the one that PyTorch's exporter
makes, and every --graph. Each graph is made in a process of its own under a memory limit. What is made
and judged lies in OUT and is not repeated, unless its NAME.made.json or NAME.quality.json is removed.
The steps can be run apart, as speed wants a quiet machine; the table always tells all that is known.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.config import usable_cores
from benchmarks.confined import GIB, Outcome, Work, confined
from benchmarks.exporters import time_graphs
from benchmarks.graph_quality import spearman_of
from benchmarks.ort_table import row, table
from benchmarks.quantizers import (
    ORT,
    OURS,
    by_onnxpress,
    by_onnxruntime,
    exported,
    exported_plainly,
    store,
)
from benchmarks.report import Environment
from benchmarks.statistics import MINIMUM_ROUNDS
from benchmarks.worker import WorkerError
from calib_data.errors import ConfigError, OnnxPressError
from compress.checkpoint import Checkpoint

STEPS = ("make", "quality", "speed")
BASELINE = "ours/float"
LENGTH = 128  # tokens that each calibration text is filled up to


@dataclass(frozen=True)
class Entry:
    """One graph of the comparison: where it is, and what makes it, step by step."""

    name: str
    graph: Path  # a file, or a bundle
    steps: Mapping[str, Callable[[], Work]]  # none: it is given

    @property
    def file(self) -> Path:
        """The graph's own file."""
        return self.graph / "model.onnx" if self.graph.suffix != ".onnx" else self.graph


def entries(
    model: str, data: Path, out: Path, graphs: Mapping[str, Path], foreign: Mapping[str, Path]
) -> Iterator[Entry]:
    """Yield every graph, float ones before those that are made of them."""
    floats = {"ours": out / "ours" / "float", "plain": out / "plain" / "float.onnx", **graphs}
    yield Entry(BASELINE, floats["ours"], {"export": partial(exported, model, floats["ours"])})
    making = {"export": partial(exported_plainly, model, floats["plain"])}
    yield Entry("plain/float", floats["plain"], making)
    yield from (Entry(f"{name}/float", path, {}) for name, path in graphs.items())
    for name, settings in OURS.items():
        small, bundle = out / "ours" / f"{name}-checkpoint", out / "ours" / name
        quantizing = partial(by_onnxpress, model, small, data, settings)
        making = {"quantize": quantizing, "export": partial(exported, str(small), bundle)}
        yield Entry(f"ours/{name}", bundle, making)
    yield from (Entry(name, path, {}) for name, path in foreign.items())
    for source, path in floats.items():
        file = Entry(source, path, {}).file
        for name, settings in ORT.items():
            target = out / source / f"ort-{name}.onnx"
            quantizing = partial(by_onnxruntime, file, target, data, settings)
            yield Entry(f"{source}/ort-{name}", target, {"quantize": quantizing})


def make(entry: Entry, out: Path, memory: int, seconds: float) -> None:
    """Make a graph step by step, up to the first step that fails, unless that has been tried before."""
    record = _record(entry, out, "made")
    if record.is_file() or not entry.steps:
        return
    outcomes: dict[str, Outcome] = {}
    for name, step in entry.steps.items():
        outcomes[name] = confined(step, memory=memory, seconds=seconds)
        if outcomes[name].failure:
            break
    _write(record, {name: asdict(outcome) for name, outcome in outcomes.items()})


def made(entry: Entry, out: Path) -> dict[str, Outcome]:
    """Return what became of the steps of making a graph, as far as they have been tried."""
    record = _record(entry, out, "made")
    found = json.loads(record.read_text()) if record.is_file() else {}
    return {name: Outcome(**outcome) for name, outcome in found.items()}


def judge(entry: Entry, checkpoint: Checkpoint, examples: Any, out: Path) -> None:
    """Measure what a graph's embeddings are worth, unless that is known."""
    record = _record(entry, out, "quality")
    if not record.is_file():
        try:
            _write(record, spearman_of(entry.file, checkpoint, examples))
        except WorkerError as error:  # the table is shown around: it names no place on this machine
            _write(record, str(error).replace(str(entry.file), entry.file.name).replace("|", "/"))


def judged(entry: Entry, out: Path) -> float | str | None:
    """Return 100 × Spearman's correlation of a graph, why there is none, or None if it is not known."""
    record = _record(entry, out, "quality")
    found: float | str | None = json.loads(record.read_text()) if record.is_file() else None
    return found


def _record(entry: Entry, out: Path, what: str) -> Path:
    return out / f"{entry.name}.{what}.json"


def clock(
    graphs: Mapping[str, Path], checkpoint: Checkpoint, given: argparse.Namespace
) -> dict[str, dict[str, list[list[float]]]]:
    """Return the seconds of each call by shape and graph, a list a round."""
    samples = {}
    for shape in given.shapes.split(","):
        batch, sequence = map(int, shape.split("x"))
        sample = checkpoint.signature.sample(batch, sequence)
        samples[f"{batch} × {sequence}"] = {k: v.numpy() for k, v in sample.items()}
    paths = {name: str(path) for name, path in graphs.items()}
    found = time_graphs(paths, samples, given.rounds, usable_cores(), given.seconds)
    times: dict[str, dict[str, list[list[float]]]] = {}
    for (shape, name), spent in found.items():
        times.setdefault(shape, {})[name] = spent
    return times


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n")


def compare(given: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    """Do the steps asked for; return a row for every graph, and the names of those to compare with."""
    from calib_data.sources import open_data
    from compress.loading import open_checkpoint

    checkpoint = open_checkpoint(given.model)
    if checkpoint.task != "sentence-embedding":
        raise ConfigError(f"{given.model} is for {checkpoint.task}; name a sentence encoder")
    foreign = dict(map(_named, given.foreign))
    data = _calibration(given, checkpoint)
    every = list(entries(given.model, data, given.out, dict(map(_named, given.graph)), foreign))
    for entry in every:
        if "make" in given.steps:
            make(entry, given.out, given.memory * GIB, given.minutes * 60)
    if "quality" in given.steps:
        examples = open_data(given.eval, given.eval_columns)
        for entry in every:
            if entry.file.is_file():
                judge(entry, checkpoint, examples, given.out)
    record = given.out / "speed.json"
    if "speed" in given.steps:
        sound = {e.name: e.file for e in every if isinstance(judged(e, given.out), float)}
        _write(record, clock(sound, checkpoint, given))
    times = json.loads(record.read_text()) if record.is_file() else {}
    against = [BASELINE, *foreign]
    return [
        row(e.name, e.file, made(e, given.out), judged(e, given.out), times, against) for e in every
    ], against


def _calibration(given: argparse.Namespace, checkpoint: Checkpoint) -> Path:
    """Return the file of calibration batches, made unless it is there."""
    from calib_data.batches import Batches
    from calib_data.sources import open_data

    path: Path = given.out / "calibration.npz"
    if not path.is_file():
        examples = open_data(given.data, given.columns, given.limit)
        size = next(n for n in range(32, 0, -1) if len(examples) % n == 0)  # no batch is smaller
        processor = checkpoint.processor
        batches = Batches(examples, processor, batch_size=size, max_length=LENGTH, field="text")
        pads = dict.fromkeys(checkpoint.signature.names, 0)
        store(batches, pads | {"input_ids": processor.pad_token_id}, path, LENGTH)
    return path


def _named(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not equals:
        raise ConfigError(f"a graph is given as NAME=FILE.onnx, got {text}")
    return name, Path(path)


def main() -> None:
    """Make, judge and time int8 graphs; print what came out and write it to OUT/comparison.json."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ort_quantizers", description=main.__doc__
    )
    parser.add_argument("model", help="the source: a sentence encoder")
    parser.add_argument("--data", required=True, help="calibration data")
    parser.add_argument("--columns", help="of the calibration data")
    parser.add_argument("--limit", type=int, default=256, help="examples that calibrate")
    parser.add_argument("--eval", required=True, help="data with scores")
    parser.add_argument("--eval-columns", help="of the data with scores")
    parser.add_argument("--graph", action="append", default=[], metavar="NAME=FLOAT.onnx")
    parser.add_argument("--foreign", action="append", default=[], metavar="NAME=INT8.onnx")
    parser.add_argument(
        "--steps",
        type=lambda text: text.split(","),
        default=list(STEPS),
        help=f"which of {','.join(STEPS)} to do; default: all",
    )
    parser.add_argument("--memory", type=int, default=8, help="GB for each quantizer")
    parser.add_argument("--minutes", type=int, default=30, help="for each quantizer")
    parser.add_argument("--shapes", default="8x128,1x32", help="batch × tokens")
    parser.add_argument("--rounds", type=int, default=MINIMUM_ROUNDS)
    parser.add_argument("--seconds", type=float, default=0.2, help="per graph, shape and round")
    parser.add_argument("-o", "--out", type=Path, required=True)
    given = parser.parse_args()
    try:
        rows, against = compare(given)
    except OnnxPressError as error:
        parser.exit(error.exit_code, f"Error: {error}\n")
    conditions = asdict(Environment.here("cpu", usable_cores()))
    _write(given.out / "comparison.json", {"environment": conditions, "rows": rows})
    print("\n".join(table(rows, against)))


if __name__ == "__main__":
    main()
