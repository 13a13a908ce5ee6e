"""Targets: that the plan is corrected by what was measured, and that what cannot be is told."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from calib_data.errors import ConfigError
from compress.allocate import Limits
from compress.apply_plan import apply_plan
from compress.blocks import find_groups
from compress.byte_cost import weight_bytes
from compress.checkpoint import Checkpoint
from compress.plan import PrunePlan
from compress.prune import Study
from onnxpress.aim import Aim
from onnxpress.target import Target, parse_shapes, target_of
from tests.benchmarks.yardsticks import CountingYardstick, milliseconds
from tests.tiny import tiny_checkpoint


class Fake(CountingYardstick):
    """A yardstick whose formula and noise a test sets."""


@pytest.fixture
def yardstick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[Fake]]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("benchmarks.yardstick.Yardstick", Fake)
    yield Fake
    Fake.real, Fake.noise = staticmethod(lambda relative: relative), 0.0


def random_study(checkpoint: Checkpoint, layers: bool = False) -> Study:
    random = torch.Generator().manual_seed(0)
    groups = find_groups(checkpoint.backbone)
    units = {g.key: torch.rand(g.units, generator=random) for g in groups}
    return Study(groups, units, {"encoder.layer": torch.tensor([9.0, 8.0])} if layers else {}, None)


def plan(target: Target, checkpoint: Checkpoint, **how: Any) -> tuple[PrunePlan, dict[str, Any]]:
    found = random_study(checkpoint, target.whole_layers)
    limits = how.pop("limits", Limits())
    with Aim(how.pop("source", checkpoint), target) as aim:
        return aim.plan(checkpoint, found, limits, **how)


def test_what_is_asked_for_is_reached(yardstick: type[Fake]) -> None:
    checkpoint = tiny_checkpoint("bert")
    made, told = plan(Target(speedup=1.5), checkpoint)
    whole = milliseconds(checkpoint)
    assert milliseconds(apply_plan(checkpoint, made)) == pytest.approx(whole / 1.5, rel=0.03)
    assert told["held"]
    assert told["speedup"] == pytest.approx(1.5, rel=0.03)
    assert told["attempts"] == [told["speedup"]]
    assert len(told["table"]) == 64
    by_latency, _ = plan(Target(latency=whole / 1.5), checkpoint)
    assert by_latency == made


@pytest.mark.parametrize("bend", [lambda r: r**0.6, lambda r: r**1.6, lambda r: 0.1 + 0.9 * r])
def test_what_the_table_has_wrong_is_corrected(
    yardstick: type[Fake], bend: Callable[[float], float]
) -> None:
    checkpoint = tiny_checkpoint("bert")
    plan(Target(speedup=1.5), checkpoint)  # keeps a table that knows of no bend
    yardstick.real = staticmethod(bend)
    _, told = plan(Target(speedup=1.5), checkpoint)
    assert len(told["attempts"]) > 1
    assert told["held"]
    assert abs(told["attempts"][0] - 1.5) > 0.045
    assert told["speedup"] == pytest.approx(1.5, rel=0.03)


def test_a_target_out_of_reach_says_what_is_in_reach(yardstick: type[Fake]) -> None:
    checkpoint = tiny_checkpoint("bert")
    least = apply_plan(
        checkpoint, PrunePlan({g.key: (0,) for g in find_groups(checkpoint.backbone)})
    )
    most = milliseconds(checkpoint) / milliseconds(least)
    with pytest.raises(
        ConfigError, match=rf"--speedup 9 cannot.*{most:.2f} × as fast.*with 1 heads"
    ):
        plan(Target(speedup=9), checkpoint)
    limits = Limits({"heads": 2, "neurons": 9}, {"neurons": 16})
    with pytest.raises(ConfigError, match="2 heads and 16 neurons in every layer"):
        plan(Target(speedup=9), checkpoint, limits=limits)
    assert plan(Target(speedup=most * 0.999), checkpoint)[1]["held"]


def test_layers_go_where_they_may(yardstick: type[Fake]) -> None:
    checkpoint = tiny_checkpoint("bert")
    speed = milliseconds(checkpoint) / 9  # fixed, a layer and the least that it holds: 8 + 2 + 0.25
    with pytest.raises(ConfigError, match="of one layer; ask for less"):
        plan(Target(speedup=speed, whole_layers=True), checkpoint)
    made, _ = plan(Target(speedup=milliseconds(checkpoint) / 11, whole_layers=True), checkpoint)
    assert made.layers == {"encoder.layer": (0,)}


def test_a_miss_is_told_with_its_reason(yardstick: type[Fake]) -> None:
    checkpoint = tiny_checkpoint("bert")
    coarse = Limits({}, {"neurons": 64})  # so that heads alone can go, one of them 2 of 59 ms
    plan(Target(speedup=1.2), checkpoint, limits=coarse)
    yardstick.real = staticmethod(lambda relative: min(1.0, relative + 0.3))
    _, told = plan(Target(speedup=1.2), checkpoint, limits=coarse)
    assert not told["held"]
    assert told["note"].startswith(
        "1.00 × where 1.20 × was aimed at: nothing more can go with 1 heads"
    )
    assert 2 <= len(told["attempts"]) <= 4
    yardstick.real = staticmethod(lambda relative: 0.9 if relative < 0.8 else 1.1)
    _, told = plan(Target(speedup=1.02), checkpoint, limits=coarse)
    assert "too coarse" in told["note"]
    yardstick.noise = 0.5
    _, told = plan(Target(speedup=1.02), checkpoint, limits=coarse)
    assert "something else is at work" in told["note"]


def test_rounds_cover_the_way_in_equal_ratios(yardstick: type[Fake]) -> None:
    source = tiny_checkpoint("bert")
    first, told = plan(Target(speedup=3.375), source, share=1 / 3)
    assert told["speedup"] == pytest.approx(1.5, rel=0.03)
    assert told["held"]
    half = apply_plan(source, first)
    second, told = plan(Target(speedup=3.375), half, source=source, share=1 / 2)
    assert told["speedup"] == pytest.approx(2.25, rel=0.03)
    assert milliseconds(apply_plan(half, second)) < milliseconds(half)


def test_a_round_that_went_too_far_is_not_the_end(yardstick: type[Fake]) -> None:
    source = tiny_checkpoint("bert")
    first, told = plan(Target(speedup=1.5), source)
    made = apply_plan(source, first)
    asked = Target(speedup=told["speedup"] / 1.04)
    last, told = plan(asked, made, source=source)
    assert milliseconds(apply_plan(made, last)) == milliseconds(made)
    assert told["held"]


def test_sizes_are_counted() -> None:
    checkpoint = tiny_checkpoint("bert")
    whole = weight_bytes(checkpoint.backbone)
    made, told = plan(Target(size=0.8 * whole / 1e6), checkpoint)
    size = weight_bytes(apply_plan(checkpoint, made).backbone)
    assert 0.78 * whole < size <= 0.8 * whole
    assert told["megabytes"] == size / 1e6
    assert told["held"]
    with pytest.raises(ConfigError, match=r"cannot be reached: 0\.\d+ MB are left"):
        plan(Target(size=1e-3), checkpoint)
    with pytest.raises(ConfigError, match="no less than the model's"):
        plan(Target(size=100.0), checkpoint)


def test_a_speed_over_pytorch(yardstick: type[Fake]) -> None:
    """A graph that is five times faster with all of the model in it has that much less to lose."""
    yardstick.real = staticmethod(lambda relative: relative / 5)
    checkpoint = tiny_checkpoint("bert")
    over = {"over": "pytorch"}
    made, told = plan(Target(speedup=10.0, settings=over), checkpoint)
    assert told["speedup"] == pytest.approx(10, rel=0.03)
    after = milliseconds(apply_plan(checkpoint, made))
    assert after == pytest.approx(milliseconds(checkpoint) / 2, rel=0.03)
    with pytest.raises(
        ConfigError, match=r"--speedup 3: the graph is 5.00 × as fast.* ask for more"
    ):
        plan(Target(speedup=3.0, settings=over), checkpoint)
    with pytest.raises(ConfigError, match="--over says what --speedup is over"):
        Target(latency=1.0, settings=over)


def test_a_latency_above_the_models_is_refused(yardstick: type[Fake]) -> None:
    checkpoint = tiny_checkpoint("bert")
    with pytest.raises(ConfigError, match=r"--latency \d+: the graph is 1.00 × as fast"):
        plan(Target(latency=2 * milliseconds(checkpoint)), checkpoint)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "name one of"),
        ({"speedup": 2.0, "size": 1.0}, "name one of"),
        ({"speedup": 1.0}, "--speedup must be above 1, got 1"),
        ({"speedup": float("nan")}, "--speedup must be above 1"),
        ({"latency": 0.0}, "--latency must be above 0"),
        ({"latency": 1.0, "settings": {"shapes": ((1, 8), (2, 8))}}, "of one shape"),
        ({"size": 1.0, "settings": {"scheme": "dynamic"}}, "--size counts float weights"),
    ],
)
def test_targets_reject_nonsense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Target(**settings)


def test_options_make_a_target() -> None:
    given = {"provider": "cpu", "threads": 1, "scheme": "dynamic", "over": "pytorch"}
    found = target_of({"speedup": 1.5, "shape": "1x32,8x128", **given})
    assert found == Target(1.5, settings={**given, "shapes": ((1, 32), (8, 128))})
    assert replace(found, speedup=2.0).to_json()["conditions"]["shapes"] == [[1, 32], [8, 128]]
    assert target_of({"provider": "cuda"}) is None
    with pytest.raises(ConfigError, match="--whole-layers goes with --speedup"):
        target_of({"whole_layers": True})
    with pytest.raises(ConfigError, match="--shape wants batch x length"):
        parse_shapes("8", "--shape")
