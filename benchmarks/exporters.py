"""One encoder's graphs, by whatever exporter, against what PyTorch's own exporter makes of it.

    python -m benchmarks.exporters MODEL GRAPH.onnx... [--shapes 8x128,1x32]

The plain graph is `torch.onnx.export(dynamo=True, opset_version=18)` of the model without pooling. One
process per graph, interleaved rounds, all outputs fetched.
"""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.config import usable_cores
from benchmarks.runtimes import Place
from benchmarks.statistics import MINIMUM_ROUNDS, percentile, round_ratios, sign_interval
from benchmarks.worker import Variant, Worker
from calib_data.errors import OnnxPressError
from compress.checkpoint import Checkpoint

_SECONDS = 0.5  # per graph, shape and round


def export_plainly(checkpoint: Checkpoint, path: Path) -> None:
    """Write the graph that PyTorch's exporter makes of the backbone, batch and sequence dynamic."""
    import torch

    sample = checkpoint.signature.sample(2, 16)
    axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.onnx.export(
        checkpoint.backbone,
        kwargs=sample,
        dynamic_shapes=dict.fromkeys(sample, axes),
        dynamo=True,
        opset_version=18,
        verbose=False,
    )
    assert program is not None
    program.save(str(path))


def time_graphs(
    graphs: Mapping[str, str],
    samples: Mapping[str, Mapping[str, np.ndarray]],
    rounds: int,
    threads: int,
    seconds: float = _SECONDS,
) -> dict[tuple[str, str], list[list[float]]]:
    """Return the seconds of each call by (shape, graph), a list a round; `graphs` are paths by name."""
    times: dict[tuple[str, str], list[list[float]]] = {}
    variants = [Variant(name, path, "onnx") for name, path in graphs.items()]
    opened = [Worker(variant, Place("cpu", threads)) for variant in variants]
    try:
        for worker in opened:
            worker.load()
        for shape, sample in samples.items():
            for _ in range(1 + rounds):  # the first to warm up
                for worker in opened:
                    key = shape, worker.variant.name
                    times.setdefault(key, []).append(worker.time([sample], seconds))
    finally:
        for worker in opened:
            worker.__exit__()
    return {key: spent[1:] for key, spent in times.items()}


def measure(
    graphs: Sequence[str],
    samples: dict[str, dict[str, np.ndarray]],
    rounds: int,
    threads: int,
    seconds: float = _SECONDS,
) -> list[str]:
    """Return the lines of a Markdown table, one per shape and graph; the first is the baseline."""
    times = time_graphs({graph: graph for graph in graphs}, samples, rounds, threads, seconds)
    lines = [
        "| shape | graph | median, ms | of the plain graph's | 95 % interval |",
        "|---|---|---|---|---|",
    ]
    for (shape, name), spent in times.items():
        ratios = round_ratios(times[shape, graphs[0]], spent)  # of the times, not of the speeds
        low, high = sign_interval(ratios)
        median = 1000 * percentile([percentile(calls, 50) for calls in spent], 50)
        label = "plain" if name == graphs[0] else "/".join(Path(name).parts[-2:])
        lines.append(
            f"| {shape} | {label} | {median:.2f} | {percentile(ratios, 50):.3f} | {low:.3f}–{high:.3f} |"
        )
    return lines


def main() -> None:
    """Print how long graphs of an encoder take, and what share of the plain graph's time that is."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.exporters", description=main.__doc__
    )
    parser.add_argument("model", help="the source: an encoder")
    parser.add_argument("graphs", nargs="+", metavar="GRAPH.onnx")
    parser.add_argument("--shapes", default="8x128,1x32", help="batch × tokens")
    parser.add_argument("--rounds", type=int, default=MINIMUM_ROUNDS)
    parser.add_argument("--threads", type=int, help="per graph; default: all cores")
    given = parser.parse_args()
    from compress.loading import open_checkpoint

    try:
        checkpoint = open_checkpoint(given.model)
        samples = {}
        for shape in given.shapes.split(","):
            batch, sequence = map(int, shape.split("x"))
            sample = checkpoint.signature.sample(batch, sequence)
            samples[f"{batch} × {sequence}"] = {k: v.numpy() for k, v in sample.items()}
        with tempfile.TemporaryDirectory() as folder:
            plain = Path(folder) / "plain.onnx"
            export_plainly(checkpoint, plain)
            threads = given.threads or usable_cores()
            lines = measure([str(plain), *given.graphs], samples, given.rounds, threads)
    except OnnxPressError as error:
        parser.exit(error.exit_code, f"Error: {error}\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
