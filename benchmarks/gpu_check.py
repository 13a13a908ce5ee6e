"""The parts of `gpu_check.sh` that no command does: models, PyTorch in fp16, and the table.

ONNX Runtime multiplies float32 in TF32 on CUDA and PyTorch does not, both by default; the gate holds
the graphs to products in full float32.
"""

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import gpus
from calib_data.errors import OnnxPressError, ProviderError

MODELS = ("bert", "gpt2")
KINDS = ("fp32", "fp16", "bf16", "int8")
EAGER = "PyTorch fp16"
_SECONDS = 3.0  # per shape, after as long a warm-up


def require_cuda() -> None:
    """Raise `ProviderError` where PyTorch or ONNX Runtime has no CUDA."""
    import onnxruntime as ort
    import torch

    from export.sessions import PROVIDERS

    if not torch.cuda.is_available():
        raise ProviderError("PyTorch finds no CUDA device; this check is for machines with one")
    if PROVIDERS["cuda"] not in ort.get_available_providers():
        raise ProviderError(f"this onnxruntime has no {PROVIDERS['cuda']}; install onnxruntime-gpu")


def make_models(directory: Path) -> None:
    """Write both models, with random weights: an encoder of MiniLM's size and a small GPT-2."""
    import torch
    from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    bert = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    # a small vocabulary: logits of 64 × 512 tokens would otherwise take longer to copy than to make
    gpt2 = GPT2Config(
        vocab_size=2048, n_embd=384, n_layer=6, n_head=6, bos_token_id=0, eos_token_id=0
    )
    BertModel(bert).save_pretrained(directory / "bert" / "source")
    GPT2LMHeadModel(gpt2).save_pretrained(directory / "gpt2" / "source")


def time_half(directory: Path, shapes: str, device: str = "cuda") -> None:
    """Time the source in PyTorch in fp16, on the device alone as the report does."""
    import torch

    from compress.loading import open_checkpoint

    checkpoint = open_checkpoint(directory / "source")
    checkpoint.module.half().to(device)
    medians = {}
    for shape in shapes.split(","):
        batch, sequence = map(int, shape.split("x"))
        sample = checkpoint.signature.sample(batch, sequence)
        inputs = {name: value.to(device) for name, value in sample.items()}
        for seconds in (_SECONDS, _SECONDS):  # the first to warm up
            spent: list[float] = []
            while sum(spent) < seconds:
                start = time.perf_counter()
                with torch.inference_mode():
                    checkpoint.forward(inputs)
                if device == "cuda":
                    torch.cuda.synchronize()
                spent.append(time.perf_counter() - start)
        medians[f"{batch} × {sequence}"] = statistics.median(spent)
    (directory / "half.json").write_text(json.dumps(medians))


def table(directory: Path) -> Iterator[str]:
    """Yield the lines of the result, the machine first."""
    yield f"{gpus.describe()}; {_versions()}"
    yield ""
    rows = [row for model in MODELS for row in _rows(directory / model)]
    labels = list(dict.fromkeys(label for _, _, latency in rows for label in latency))
    head = ["model", "gate: error of allowed", "fused", "copies", *(f"{x}, ms" for x in labels)]
    yield _line(head)
    yield _line(["---"] * len(head))
    for name, found, latency in rows:
        times = [f"{1e3 * latency[x]:.2f}" if x in latency else "–" for x in labels]
        yield _line([name, *found, *times])


def _rows(directory: Path) -> Iterator[tuple[str, list[str], dict[str, float]]]:
    """Yield (name, what gate and placement say, seconds by shape) of PyTorch and of every graph."""
    report = directory / "report" / "report.json"
    variants = json.loads(report.read_text())["variants"] if report.is_file() else []
    timed = {v["name"]: {x["workload"]: x["typical"] for x in v["latency"]} for v in variants}
    half = directory / "half.json"
    timed[EAGER] = json.loads(half.read_text()) if half.is_file() else {}
    for name in ("PyTorch", EAGER):
        yield f"{directory.name}, {name}", ["–"] * 3, timed.get(name, {})
    for kind in KINDS:
        yield f"{directory.name}, {kind}", _checked(directory, kind), timed.get(kind, {})


def _checked(directory: Path, kind: str) -> list[str]:
    """Return the gate's word, the fused operators and the copies between devices."""
    exported = _read(directory / f"{kind}.export")
    told = (directory / f"{kind}.error").read_text().strip().splitlines()
    reason = told[-1].replace("|", "/") if told else "no result"
    if exported is None:
        return [reason, "–", "–"]
    worst = exported["parity"]["worst"]
    gate = f"{worst['rms']:.2g} of {worst['rms_allowed']:.2g}"
    inspected = _read(directory / f"{kind}.inspect")
    if inspected is None:
        return [gate, reason, "–"]
    (graph,) = inspected["graphs"].values()
    fused = ", ".join(f"{count} {operator}" for operator, count in graph["fused"].items())
    return [gate, fused or "none", str(graph["copies"])]


def _read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() and path.stat().st_size else None


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _versions() -> str:
    import onnxruntime as ort
    import torch

    libraries = f"torch {torch.__version__}, onnxruntime {ort.__version__}"
    return f"Python {platform.python_version()}, {libraries}"


def main(step: str, directory: Path, *rest: str) -> None:
    """Run one step of `gpu_check.sh`."""
    steps: dict[str, Callable[[], None]] = {
        "models": lambda: make_models(directory),
        "half": lambda: time_half(directory, *rest),
        "table": lambda: print("\n".join(table(directory))),
    }
    try:
        require_cuda()
        steps[step]()
    except OnnxPressError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
