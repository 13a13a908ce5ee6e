"""Two processes over gloo: the same weights and losses as one, and one error for both."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]

# trains on batches of 3, 3, 1 rows and as many tokens as chance has it, two of them a step
SCRIPT = """
import json, os, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from calib_data.errors import OnnxPressError
from compress.training import TrainConfig, TrainRun, Workspace, train_
from tests.tiny import tiny_batches, tiny_checkpoint

where, mode = Path(sys.argv[1]), sys.argv[2]
if os.environ.get("ACCELERATE_USE_FSDP"):  # Accelerate shards on GPUs only, gloo can as well
    from accelerate import PartialState
    from accelerate.utils import DistributedType
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
checkpoint = tiny_checkpoint("gpt2", "text-generation")
checkpoint.module.register_parameter("unused", torch.nn.Parameter(torch.ones(3)))
rank = int(os.environ.get("RANK", 0))

def loss_of(batch, step):
    logits = checkpoint.forward(batch)["logits"][:, :-1]
    labels = batch["input_ids"][:, 1:]
    mask = batch["attention_mask"][:, 1:]
    each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    if mode == "nan" and rank == 1:
        each = each * float("nan")
    if mode == "crash" and rank == 1:
        raise MemoryError("can't allocate memory")
    summed = (each * mask).sum()
    return {"next": summed / step["next"], "half": 0.5 * summed / step["tokens"]}

space = Workspace(where / "w", resume=True, save_every=2) if mode != "plain" else None
told = []
def progress(loss):
    told.append(loss)
    if mode == "stop" and len(told) == 3:
        raise SystemExit(0)
config = TrainConfig(steps=5, learning_rate=1e-2, accumulate=2, dropout=mode in ("stop", "go on"))
try:
    log = train_(checkpoint.module, loss_of, tiny_batches(7, 3), config, progress,
                 run=TrainRun(space))
except OnnxPressError as error:
    print(error, file=sys.stderr)
    raise SystemExit(error.exit_code)
name = f"{mode}-{os.environ.get('WORLD_SIZE', 1)}-{rank}"
weights = {k: v.detach().clone() for k, v in checkpoint.module.named_parameters()}
save_file(weights, where / f"{name}.safetensors")
(where / f"{name}.json").write_text(json.dumps(log.losses))
"""


FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "GPT2Block",
}


def launch(where: Path, mode: str, processes: int, **more: str) -> subprocess.CompletedProcess[str]:
    script = where / "train.py"
    script.write_text(SCRIPT)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), str(script), str(where), mode],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more},
        capture_output=True,
        text=True,
        timeout=180,
    )


def result(where: Path, name: str) -> tuple[list[float], dict[str, Any]]:
    losses = json.loads((where / f"{name}.json").read_text())
    return losses, load_file(where / f"{name}.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, FSDP], ids=["DDP", "FSDP"])
def test_two_processes_equal_one(more: dict[str, str], tmp_path: Path) -> None:
    for processes in (1, 2):
        done = launch(tmp_path, "plain", processes, **(more if processes == 2 else {}))
        assert done.returncode == 0, done.stderr
    losses, weights = result(tmp_path, "plain-1-0")
    # A batch of one row leaves the second process without any. Sharded weights go to the first.
    for rank in (0,) if more else (0, 1):
        found, own = result(tmp_path, f"plain-2-{rank}")
        assert found == pytest.approx(losses, rel=1e-5)
        for name, value in weights.items():
            difference = own[name].sub(value).abs()
            if name.endswith("c_attn.bias"):
                # A key's bias moves all scores of a row alike: its gradient is rounding, of which
                # Adam makes steps as large as any.
                difference[32:64] = 0
            assert difference.max() < 2e-4, name


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [{}, pytest.param(FSDP, marks=pytest.mark.exhaustive)], ids=["DDP", "FSDP"]
)
def test_two_processes_go_on_where_they_were(more: dict[str, str], tmp_path: Path) -> None:
    """With dropout, of which each process has its own: the whole run twice, once in two parts."""
    (tmp_path / "whole").mkdir()
    assert launch(tmp_path / "whole", "go on", 2, **more).returncode == 0
    assert launch(tmp_path, "stop", 2, **more).returncode == 0
    done = launch(tmp_path, "go on", 2, **more)
    assert done.returncode == 0, done.stderr
    expected, weights = result(tmp_path / "whole", "go on-2-0")
    found, own = result(tmp_path, "go on-2-0")
    assert found == expected
    assert all(own[name].equal(value) for name, value in weights.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "message"),
    [("nan", "the loss is nan at step 0"), ("crash", "does not fit in memory")],
)
def test_a_failure_of_one_ends_both(mode: str, message: str, tmp_path: Path) -> None:
    done = launch(tmp_path, mode, 2)
    assert done.returncode != 0
    assert done.stderr.count(message) == 1
