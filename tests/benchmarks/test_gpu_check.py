import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check, gpus

SCRIPT = Path(gpu_check.__file__).with_name("gpu_check.sh")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_machine_without_cuda_is_one_line(tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [str(SCRIPT), str(tmp_path / "out")],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 5
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "Error: PyTorch finds no CUDA device; this check is for machines with one"
    ]
    assert not (tmp_path / "out").exists()


def test_table_holds_what_was_found_and_why_the_rest_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpus, "describe", lambda: "Some GPU, driver 1.2")
    monkeypatch.setattr(gpu_check, "MODELS", ("bert",))
    bert = tmp_path / "bert"
    (bert / "report").mkdir(parents=True)
    timed = {"name": "fp32", "latency": [{"workload": "1 × 32", "typical": 0.00123}]}
    (bert / "report" / "report.json").write_text(json.dumps({"variants": [timed]}))
    (bert / "half.json").write_text(json.dumps({"1 × 32": 0.002}))
    exported = {"parity": {"worst": {"rms": 1e-6, "rms_allowed": 4e-6}}}
    placed = {"graphs": {"model": {"fused": {"Attention": 6}, "copies": 1}}}
    files = {
        "fp32": (exported, placed, ""),
        "fp16": (None, None, "a warning\nError: a | b"),
        "bf16": (exported, None, "Error: 1 matrix product"),
        "int8": (None, None, ""),
    }
    for kind, (export, inspect, error) in files.items():
        (bert / f"{kind}.export").write_text(json.dumps(export) if export else "")
        (bert / f"{kind}.inspect").write_text(json.dumps(inspect) if inspect else "")
        (bert / f"{kind}.error").write_text(error)
    first, _, *rows = gpu_check.table(tmp_path)
    assert first.startswith("Some GPU, driver 1.2; Python ")
    assert rows == [
        "| model | gate: error of allowed | fused | copies | 1 × 32, ms |",
        "| --- | --- | --- | --- | --- |",
        "| bert, PyTorch | – | – | – | – |",
        "| bert, PyTorch fp16 | – | – | – | 2.00 |",
        "| bert, fp32 | 1e-06 of 4e-06 | 6 Attention | 1 | 1.23 |",
        "| bert, fp16 | Error: a / b | – | – | – |",
        "| bert, bf16 | 1e-06 of 4e-06 | Error: 1 matrix product | – | – |",
        "| bert, int8 | no result | – | – | – |",
    ]
