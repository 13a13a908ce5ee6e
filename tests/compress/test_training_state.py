"""Saving and going on: after a kill, on a full disk, into a workspace of something else."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from calib_data.errors import ConfigError, DestinationError, ModelError, TrainingError
from compress import workspace as workspaces
from compress.checkpoint import Checkpoint, weights_sha256
from compress.losses import hard_loss
from compress.training import TrainConfig, TrainLog, TrainRun, train_
from compress.workspace import Workspace, open_workspace
from tests.tiny import tiny_batches, tiny_checkpoint

LABELS = [0, 1, 1, 0, 1, 0, 0, 1, 1, 1]
# all that a state must hold: dropout's random numbers, moments, the average, the best weights
CONFIG = TrainConfig(
    steps=12, learning_rate=3e-3, dropout=True, ema=0.9, eval_every=2, patience=5, accumulate=2
)


class KilledError(Exception):
    """Stands for a kill within one process."""


def classifier() -> Checkpoint:
    return tiny_checkpoint("bert", "text-classification", hidden_dropout_prob=0.2)


def fit(
    checkpoint: Checkpoint,
    config: TrainConfig = CONFIG,
    space: Workspace | None = None,
    kill_at: int | None = None,
    **identity: Any,
) -> TrainLog:
    """Train on three ragged batches of an epoch; with `kill_at`, fail after so many steps."""

    def loss_of(batch: Mapping[str, Tensor], step: Mapping[str, float]) -> dict[str, Tensor]:
        loss = hard_loss("class", checkpoint.forward(batch), batch)
        assert loss is not None
        return {"hard": loss * len(batch["labels"]) / step["labels"]}

    def evaluate() -> float:
        batch = next(iter(tiny_batches(10, 10, label=LABELS)))
        loss = hard_loss("class", checkpoint.forward(batch), batch)
        assert loss is not None
        return -float(loss.detach())

    done: list[float] = []

    def progress(loss: float) -> None:
        done.append(loss)
        if len(done) == kill_at:
            raise KilledError

    batches = tiny_batches(10, 4, label=LABELS)
    run = TrainRun(space, identity=identity)
    return train_(checkpoint.module, loss_of, batches, config, progress, evaluate=evaluate, run=run)


def killed(path: Path, at: int = 7, save_every: int = 3, **identity: Any) -> Workspace:
    """Return the workspace of a run that ended after so many steps."""
    space = Workspace(path, resume=True, save_every=save_every)
    with pytest.raises(KilledError):
        fit(classifier(), space=space, kill_at=at, **identity)
    return space


def test_a_killed_run_goes_on_to_the_same_end(tmp_path: Path) -> None:
    whole, resumed = classifier(), classifier()
    expected = fit(whole)
    space = killed(tmp_path / "w")
    assert [p.name for p in space.states()] == ["step-00000003", "step-00000006"]
    found = fit(resumed, space=space)
    assert found.losses == expected.losses  # every bit of them
    assert found.evaluations == expected.evaluations
    assert found.best_step == expected.best_step
    assert found.padding == expected.padding
    assert weights_sha256(resumed.module) == weights_sha256(whole.module)
    lines = [json.loads(line) for line in space.log.read_text().splitlines()]
    assert [line["loss"] for line in lines] == list(expected.losses)
    assert len(space.states()) == 2


@pytest.mark.parametrize("lost", ["random.cpu", "optimizer.3.exp_avg_sq", "average", "best"])
def test_each_part_of_the_state_matters(lost: str, tmp_path: Path) -> None:
    expected = classifier()
    log = fit(expected)
    space = killed(tmp_path / "w")
    path = space.states()[-1] / "tensors.safetensors"
    tensors = load_file(path)
    for name in [name for name in tensors if name.startswith(lost)]:
        damaged = torch.zeros_like(tensors[name])
        if lost == "random.cpu":
            damaged = torch.Generator().manual_seed(99).get_state()[None]
        tensors[name] = damaged
    workspaces.save_file(tensors, path)
    state = json.loads((space.states()[-1] / "state.json").read_text())
    state["best"]["value"] = 10.0 if lost == "best" else state["best"]["value"]
    (space.states()[-1] / "state.json").write_text(json.dumps(state))
    resumed = classifier()
    found = fit(resumed, space=space)
    same = found.losses == log.losses and found.evaluations == log.evaluations
    assert not (same and weights_sha256(resumed.module) == weights_sha256(expected.module))


def test_early_stopping_counts_across_a_kill(tmp_path: Path) -> None:
    config = TrainConfig(steps=30, learning_rate=0.3, warmup=0.0, eval_every=1, patience=4)
    expected = fit(classifier(), config)
    assert len(expected.losses) < 30
    space = Workspace(tmp_path / "w", resume=True, save_every=1)
    with pytest.raises(KilledError):
        fit(classifier(), config, space, kill_at=len(expected.losses) - 2)
    assert fit(classifier(), config, space).losses == expected.losses


@pytest.mark.parametrize(
    ("config", "identity", "message"),
    [
        ({"learning_rate": 1e-3}, {}, r"train\.learning_rate was 0\.003, is 0\.001"),
        ({}, {"teacher": "f00"}, "teacher was abc, is f00"),
    ],
)
def test_a_run_with_other_settings_is_refused_and_the_difference_named(
    config: dict[str, Any], identity: dict[str, str], message: str, tmp_path: Path
) -> None:
    killed(tmp_path / "w", teacher="abc")
    other = TrainConfig(**{**vars(CONFIG), **config})
    identity = {"teacher": "abc", **identity}
    with pytest.raises(ConfigError, match=message) as caught:
        fit(classifier(), other, Workspace(tmp_path / "w", resume=True), **identity)
    assert "--overwrite" in str(caught.value)
    anew = Workspace(tmp_path / "w", resume=True, overwrite=True)
    assert len(fit(classifier(), other, anew, **identity).losses) == 12
    assert not anew.states()  # the old ones are gone


def test_other_data_and_other_weights_are_named(tmp_path: Path) -> None:
    space = killed(tmp_path / "w")
    noted = json.loads((space.path / "settings.json").read_text())
    for name in ("data", "weights"):
        changed = {**noted, name: "0" * 64}
        (space.path / "settings.json").write_text(json.dumps(changed))
        with pytest.raises(ConfigError, match=f"{name} was 000000000000, is {noted[name][:12]}"):
            fit(classifier(), space=space)


def test_a_state_needs_resume_or_overwrite(tmp_path: Path) -> None:
    killed(tmp_path / "w")
    with pytest.raises(
        DestinationError, match="run of 6 steps; continue it with --resume"
    ) as caught:
        with open_workspace(tmp_path / "w"):
            pass
    assert caught.value.exit_code == 8
    assert "--overwrite" in str(caught.value)
    with open_workspace(tmp_path / "w", overwrite=True) as space:
        assert len(fit(classifier(), space=space).losses) == 12
    assert not (tmp_path / "w").exists()  # it went with the success


def test_a_damaged_state_is_passed_over_for_the_one_before(tmp_path: Path) -> None:
    expected = fit(classifier())
    space = killed(tmp_path / "w")
    path = space.states()[-1] / "tensors.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert space.load().step == 3
    assert fit(classifier(), space=space).losses == expected.losses


def test_states_that_are_all_damaged_are_an_error(tmp_path: Path) -> None:
    space = killed(tmp_path / "w")
    for state in space.states():
        (state / "state.json").write_text("{")
    with pytest.raises(ModelError, match="can be read; start anew with --overwrite"):
        fit(classifier(), space=space)


def test_a_full_disk_leaves_the_last_good_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = workspaces.save_file
    calls = []

    def full(tensors: dict[str, Tensor], path: Path) -> None:
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(workspaces, "save_file", full)
    expected = fit(classifier())
    with pytest.raises(DestinationError, match="no space left") as caught:
        with open_workspace(tmp_path / "w", save_every=3) as space:
            fit(classifier(), space=space)
    assert caught.value.exit_code == 8
    assert [p.name for p in space.states()] == ["step-00000003"]
    assert not (space.path / "state.partial").exists()
    with open_workspace(tmp_path / "w", resume=True) as space:
        assert fit(classifier(), space=space).losses == expected.losses


def test_two_runs_at_once_are_refused(tmp_path: Path) -> None:
    with open_workspace(tmp_path / "w"):
        with pytest.raises(DestinationError, match="another run is at work"):
            with open_workspace(tmp_path / "w"):
                pass
    with pytest.raises(KilledError), open_workspace(tmp_path / "w"):
        raise KilledError
    assert not (tmp_path / "w").exists()  # nothing in it to go on from


def test_a_batch_that_gives_nan_is_kept(tmp_path: Path) -> None:
    checkpoint = classifier()
    before = weights_sha256(checkpoint.module)

    def loss_of(batch: Mapping[str, Tensor], step: Mapping[str, float]) -> dict[str, Tensor]:
        value = checkpoint.forward(batch)["logits"].sum()
        return {"sum": value * (float("nan") if 5 in batch["labels"] else 0.0)}

    batches = tiny_batches(8, 4, label=[0, 1, 0, 1, 5, 1, 0, 1])
    bad = [i for i, batch in enumerate(batches) if 5 in batch["labels"]]
    config = TrainConfig(steps=4, accumulate=2)
    with (
        pytest.raises(TrainingError, match="the loss is nan at step 0") as caught,
        open_workspace(tmp_path / "w") as space,
    ):
        train_(checkpoint.module, loss_of, batches, config, run=TrainRun(space))
    kept = tmp_path / "w" / "batch-00000000.safetensors"
    assert str(kept) in str(caught.value)
    assert "fingerprint" in str(caught.value)
    tensors = load_file(kept)
    assert {name.split(".")[0] for name in tensors} == {str(bad[0])}
    assert tensors[f"{bad[0]}.labels"].equal(list(batches)[bad[0]]["labels"])
    assert weights_sha256(checkpoint.module) == before


SCRIPT = """
import sys
from pathlib import Path
from compress.checkpoint import weights_sha256
from compress.training import Workspace
from tests.compress.test_training_state import classifier, fit

checkpoint = classifier()
log = fit(checkpoint, space=Workspace(Path(sys.argv[1]), resume=True, save_every=2))
print([x.hex() for x in log.losses], weights_sha256(checkpoint.module))
"""


@pytest.mark.slow
def test_sigkill_in_the_midst_changes_nothing(tmp_path: Path) -> None:
    """A real process, killed while it trains, twice; then left to finish."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(tmp_path / "w")]
    for wanted in ("step-00000002", "step-00000006"):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not (tmp_path / "w" / wanted).exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    checkpoint = classifier()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        log = fit(checkpoint)
    finally:
        torch.set_num_threads(threads)
    assert done.stdout == f"{[x.hex() for x in log.losses]} {weights_sha256(checkpoint.module)}\n"
