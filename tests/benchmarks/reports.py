"""A report as a benchmark would make it, without measuring."""

from dataclasses import replace

import numpy as np

from benchmarks.config import BenchmarkConfig
from benchmarks.measure import latency
from benchmarks.report import (
    Arrivals,
    BenchmarkReport,
    Environment,
    Latency,
    Load,
    Quality,
    VariantReport,
)
from benchmarks.subjects import Timing
from benchmarks.worker import WarmUp
from benchmarks.workloads import Workload


def rounds(median: float, seed: int, count: int = 8) -> list[list[float]]:
    random = np.random.default_rng(seed)
    return [(median * random.normal(1, 0.02, 30)).tolist() for _ in range(count)]


def make_latency(milliseconds: float, base: float | None, batch: int, seed: int = 1) -> Latency:
    shape = Workload(f"{batch} × 128", ({},), batch, 128, 128.0 * batch)
    timing = Timing(rounds(milliseconds / 1e3, seed), WarmUp(6, True), {}, 0.99)
    baseline = None if base is None else rounds(base / 1e3, 0)
    return latency(shape, timing, baseline, BenchmarkConfig())


def make_load(milliseconds: float, streams: int) -> Load:
    rate = 500 * streams / milliseconds
    arrivals = [Arrivals(rate * share, 0.01, 0.02 * share, 0.05, 200) for share in (1, 2)]
    return Load("1 × 128", streams, 2, 0.03, 2 * rate, rate, (0.9 * rate, 1.1 * rate), arrivals)


def operators(seconds: float) -> dict[str, float]:
    """Return nine operators, each of which takes half of what the one before does."""
    names = ["MatMulInteger", "com.microsoft.FusedMatMul", *(f"Op{i}" for i in range(7))]
    return {name: seconds / 2 ** (i + 1) for i, name in enumerate(names)}


def make_variant(
    name: str, milliseconds: float, size: float, value: float, seed: int = 1, is_base: bool = False
) -> VariantReport:
    base = None if is_base else 143.0
    lineage = [
        {"stage": "source", "model": "sentence-transformers/all-MiniLM-L6-v2"},
        {"stage": "quantize", "config": {"scheme": "dynamic", "per_channel": True}},
    ]
    return VariantReport(
        name=name,
        runtime="pytorch" if is_base else "onnx",
        model=name.replace(" ", "-"),
        lineage=lineage,
        size_bytes=int(size * 1e6),
        sha256={"model.onnx": "0123456789abcdef" * 4},
        providers=["CPUExecutionProvider"],
        load_seconds=0.42,
        peak_memory_bytes=int(size * 3e6) + 120_000_000,
        operators={} if is_base else operators(milliseconds / 1e3),
        placed={} if is_base else {"CPUExecutionProvider": 9},
        copies=None if is_base else 0,
        load=[make_load(milliseconds, streams) for streams in (1, 2)],
        latency=[
            make_latency(milliseconds / 7, base and base / 7, 1, seed),
            make_latency(milliseconds, base, 8, seed),
        ],
        quality=[
            Quality("spearman", value, True, 1500, value - 86.72, None, "× 100"),
            Quality(
                "cosine_fidelity", 1 - (86.72 - value) / 30, True, 1500, (value - 86.72) / 30, None
            ),
        ],
    )


def make_report(command: str = "onnxpress benchmark report int8 -o out") -> BenchmarkReport:
    variants = [
        make_variant("PyTorch", 143, 90.9, 86.72, seed=0, is_base=True),
        make_variant("float", 75, 90.4, 86.72, seed=2),
        make_variant("int8", 32.5, 24.3, 86.51, seed=3),
        make_variant("int8 pruned", 18.0, 19.6, 85.93, seed=4),
        replace(
            make_variant("broken", 9, 12.0, 1.0),
            status="failed",
            reason="its process was killed, perhaps for want of memory; free some",
            peak_memory_bytes=None,
            load_seconds=None,
            operators={},
            latency=[],
            load=[],
            quality=[],
        ),
    ]
    config = {
        **BenchmarkConfig(eval="dev.csv", threads=(2,)).to_json(),
        "shapes": [[1, 128], [8, 128]],
    }
    return BenchmarkReport(
        title="MiniLM: five variants",
        created="2026-01-02T03:04:05+00:00",
        command=command,
        task="sentence-embedding",
        baseline="PyTorch",
        config={**config, "metrics": []},
        environment=replace(Environment.here("cpu", 2), load_average=0.3, cores=2),
        variants=variants,
    )
