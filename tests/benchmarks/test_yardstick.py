"""Graphs timed side by side: real workers on tiny models. No test asserts a time."""

from dataclasses import replace

import onnx
import pytest
import torch

from benchmarks.worker import WorkerError
from benchmarks.yardstick import Conditions, Yardstick, _compared
from calib_data.errors import ConfigError, ModelError
from compress.apply_plan import apply_plan
from compress.blocks import find_groups
from compress.plan import PrunePlan
from tests.tiny import tiny_checkpoint

QUICK = Conditions(shapes=((1, 8), (2, 4)), threads=1, rounds=6, seconds=0.01)


def test_a_smaller_graph_is_compared_with_the_whole() -> None:
    checkpoint = tiny_checkpoint("bert")
    keep = {g.key: tuple(range(1)) for g in find_groups(checkpoint.backbone)}
    told: list[str] = []
    with Yardstick(checkpoint, QUICK) as yardstick:
        found = yardstick.time({"small": apply_plan(checkpoint, PrunePlan(keep))}, told.append)
    timed = found["small"]
    assert timed.interval[0] <= timed.relative <= timed.interval[1]
    assert timed.milliseconds == pytest.approx(timed.relative * timed.reference_milliseconds)
    assert timed.speedup == 1 / timed.relative
    assert {"exporting small", "loading reference"} <= set(told)


def test_graphs_are_quantized_as_the_result_will_be() -> None:
    checkpoint = tiny_checkpoint("bert")
    operators = []
    for scheme in (None, "dynamic"):
        with Yardstick(checkpoint, replace(QUICK, scheme=scheme)) as yardstick:
            path = yardstick._export("x", checkpoint, lambda what: None)
            operators.append({node.op_type for node in onnx.load(path).graph.node})
    assert "MatMulInteger" in operators[1] - operators[0]


def test_the_reference_may_run_in_pytorch() -> None:
    checkpoint = tiny_checkpoint("bert")
    told: list[str] = []
    with Yardstick(checkpoint, replace(QUICK, over="pytorch")) as yardstick:
        found = yardstick.time({"same": checkpoint}, told.append)
    assert found["same"].reference_milliseconds > 0
    assert "exporting reference" not in told
    assert "loading reference" in told


def test_a_scheme_that_needs_data_is_refused() -> None:
    with pytest.raises(ConfigError, match="dynamic takes about the same time"):
        replace(QUICK, scheme="static")
    with pytest.raises(ConfigError, match="weight-only"):
        replace(QUICK, scheme="dynamic", provider="cuda")


def test_a_graph_that_computes_nonsense_fails() -> None:
    checkpoint = tiny_checkpoint("bert")
    broken = replace(checkpoint, module=tiny_checkpoint("bert").module)
    torch.nn.init.constant_(broken.backbone.embeddings.LayerNorm.weight, float("nan"))
    with Yardstick(checkpoint, QUICK) as yardstick, pytest.raises(WorkerError, match="NaN"):
        yardstick.time({"broken": broken})


def test_a_model_of_several_graphs_is_refused() -> None:
    checkpoint = tiny_checkpoint("t5", "text2text-generation")
    with (
        Yardstick(checkpoint, QUICK) as yardstick,
        pytest.raises(ModelError, match=r"only models of one graph are timed.*--heads"),
    ):
        yardstick.time({"same": checkpoint})


def test_a_length_that_the_model_does_not_take_is_refused() -> None:
    with pytest.raises(ConfigError, match="64 positions"):
        Yardstick(tiny_checkpoint("bert"), replace(QUICK, shapes=((1, 65),)))


def test_drift_of_the_machine_divides_out() -> None:
    theirs = [[1.0, 2.0], [10.0, 20.0], [1.0, 2.0], [2.0, 4.0], [1.0, 2.0], [3.0, 6.0]]
    ours = [[a * 0.5, b * 0.25] for a, b in theirs]
    timed = _compared(ours, theirs)
    assert timed.relative == 0.375  # the mean over the shapes
    assert timed.interval == (0.375, 0.375)
    assert timed.reference_milliseconds == 2250


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shapes": ()}, "at least one shape"),
        ({"shapes": ((0, 8),)}, "a shape is"),
        ({"threads": 0}, "--threads"),
        ({"rounds": 3}, "rounds must be at least"),
        ({"seconds": 0}, "seconds per round"),
        ({"provider": "tpu"}, "--provider"),
    ],
)
def test_conditions_reject_nonsense(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Conditions(**settings)
    assert Conditions.from_json(QUICK.to_json()) == QUICK
