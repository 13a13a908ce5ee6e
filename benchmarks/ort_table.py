"""What a comparison with ONNX Runtime's quantizers found, as rows of plain data and as a table."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.confined import GIB, Outcome
from benchmarks.statistics import percentile, round_ratios, sign_interval

Times = Mapping[str, Mapping[str, list[list[float]]]]  # by shape and graph: calls of each round


def row(
    name: str,
    file: Path,
    outcomes: Mapping[str, Outcome],
    quality: float | str | None,
    times: Times,
    against: Sequence[str],
) -> dict[str, Any]:
    """Return what is known of one graph; its times as shares of those of the graphs `against`, too.

    `quality` is a metric, or why there is none.
    """
    failure = next((outcome.failure for outcome in outcomes.values() if outcome.failure), None)
    if isinstance(quality, str):
        failure = failure or quality
    latency = {}
    for shape, of_shape in times.items():
        if spent := of_shape.get(name):
            latency[shape] = {
                "median_seconds": percentile([percentile(calls, 50) for calls in spent], 50),
                "of": {b: _share(spent, of_shape[b]) for b in against if b in of_shape},
            }
    return {
        "graph": name,
        "failure": failure,
        "quality": quality if isinstance(quality, float) else None,
        "bytes": file.stat().st_size if file.is_file() else None,
        "steps": {step: asdict(outcome) for step, outcome in outcomes.items()},
        "latency": latency,
    }


def _share(spent: list[list[float]], baseline: list[list[float]]) -> list[float]:
    """Return the share of the baseline's time, and its 95 % interval."""
    ratios = round_ratios(baseline, spent)  # of the times, not of the speeds
    return [percentile(ratios, 50), *sign_interval(ratios)]


def table(rows: Sequence[Mapping[str, Any]], against: Sequence[str]) -> Iterator[str]:
    """Yield the lines of a Markdown table: a row a graph, with why it failed if it did."""
    shapes = list(dict.fromkeys(shape for found in rows for shape in found["latency"]))
    head = ["graph", "Spearman × 100", "MB", "quantized in, s", "peak, GB"]
    for shape in shapes:
        head += [f"{shape}, ms", *(f"of {base}" for base in against)]
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for found in rows:
        quantized = found["steps"].get("quantize", {})
        cells = [
            found["graph"],
            found["failure"] or _number(found["quality"], "{:.2f}"),
            _number(found["bytes"], "{:.1f}", 1e-6),
            _number(quantized.get("seconds"), "{:.1f}"),
            _number(quantized.get("peak_bytes"), "{:.2f}", 1 / GIB),
        ]
        for shape in shapes:
            latency = found["latency"].get(shape, {"median_seconds": None, "of": {}})
            cells.append(_number(latency["median_seconds"], "{:.2f}", 1000))
            for base in against:
                share = latency["of"].get(base)
                cells.append("{:.2f} ({:.2f}–{:.2f})".format(*share) if share else "")
        yield f"| {' | '.join(cells)} |"


def _number(value: float | None, form: str, factor: float = 1) -> str:
    return "" if value is None else form.format(value * factor)
