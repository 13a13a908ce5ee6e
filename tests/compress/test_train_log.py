import itertools
import json
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from calib_data.errors import ConfigError, DestinationError
from compress.train_log import LogWriter, TrainLog, check_tensorboard, read_records


def record(step: int, **more: float) -> dict:
    return {"step": step, "loss": 1 / step, "terms": {"hard": 1 / step}, **more}


def test_records_come_back_cut_after_the_steps_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "training.jsonl"
    with LogWriter(file, None) as log:
        for step in (1, 2, 3):
            log.write(record(step))
    with file.open("a") as torn:
        torn.write('{"step": 4, "lo')
    assert read_records(file, 2) == [record(1), record(2)]
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2]
    with pytest.raises(DestinationError, match="does not hold the 3 steps"):
        read_records(file, 3)
    with pytest.raises(DestinationError, match="start anew with --overwrite"):
        read_records(tmp_path / "none", 1)


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    with LogWriter(tmp_path / "log", None) as log:
        log.write(record(1, gradient_norm=float("inf"), evaluation=float("nan")))
    line = json.loads((tmp_path / "log").read_text(), parse_constant=pytest.fail)
    assert line["gradient_norm"] is None
    assert line["evaluation"] is None


def test_tensorboard_holds_the_curve(tmp_path: Path) -> None:
    with LogWriter(None, tmp_path / "board") as log:
        for step in (1, 2, 3):
            log.write(record(step))
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    assert [x.step for x in events.Scalars("train/loss")] == [1, 2, 3]
    assert events.Scalars("terms/hard")[1].value == 0.5


def test_tensorboard_that_is_missing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match="pip install 'onnxpress\\[tensorboard\\]'") as caught:
        check_tensorboard()
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("steps", [1, 199, 200, 201, 1234])
def test_curve_has_at_most_200_points_and_the_same_mean(steps: int) -> None:
    log = TrainLog(tuple(float(i) for i in range(steps)), 1.0)
    curve = log.curve()
    assert len(curve) <= 200
    assert curve[-1][0] == steps
    ends = [0, *[int(end) for end, _ in curve]]
    sizes = [b - a for a, b in itertools.pairwise(ends)]
    mean = sum(size * loss for size, (_, loss) in zip(sizes, curve)) / steps
    assert mean == pytest.approx((steps - 1) / 2, rel=1e-4)


def test_summary_holds_no_times() -> None:
    log = TrainLog((2.0, 1.0), 0.5, padding=0.1, tokens_per_second=100.0)
    assert log.summary() == {
        "loss_first": 1.5, "loss_last": 1.5, "steps": 2, "epochs": 0.5, "padding": 0.1,
        "curve": [[1, 2.0], [2, 1.0]],
    }  # fmt: skip
    assert log.report()["tokens_per_second"] == 100.0
