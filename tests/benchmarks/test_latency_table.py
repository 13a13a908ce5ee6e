"""The latency table: that it explains what was timed, is kept, and is measured anew when it must be."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.latency_table import (
    LatencyTable,
    block_classes,
    cache_folder,
    describe,
    latency_table,
    solve,
    trials,
)
from benchmarks.yardstick import Conditions, Timed
from calib_data.errors import DataError
from compress.apply_plan import apply_plan
from compress.blocks import find_groups
from compress.checkpoint import Checkpoint
from compress.plan import PrunePlan
from tests.benchmarks.yardsticks import FIXED, LAYER, PER_UNIT, CountingYardstick, milliseconds
from tests.tiny import tiny_checkpoint

HEADS = "encoder.layer.*.attention.self.heads × 32"


def table_of(checkpoint: Checkpoint, folder: Path, **conditions: int) -> LatencyTable:
    return latency_table(
        checkpoint, CountingYardstick(checkpoint, Conditions(**conditions)), folder
    )


def test_the_table_tells_what_every_part_costs(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint("bert")
    table = table_of(checkpoint, tmp_path)
    cost = table.cost(checkpoint.backbone)
    assert table.milliseconds == pytest.approx(milliseconds(checkpoint))
    assert table.fixed == pytest.approx(FIXED)
    assert table.layers == pytest.approx({"encoder.layer": LAYER})
    for group in find_groups(checkpoint.backbone):
        assert cost.group(group, 3) == pytest.approx(3 * PER_UNIT[group.kind])
    plan = PrunePlan(
        {g.key: tuple(range(g.units // 2)) for g in find_groups(checkpoint.backbone)},
        {"encoder.layer": (1,)},
    )
    pruned = milliseconds(apply_plan(checkpoint, plan))
    assert cost.total(find_groups(checkpoint.backbone), plan) == pytest.approx(pruned)


@pytest.mark.parametrize("family", ["gpt2", "llama", "vit", "mpnet"])
def test_it_does_for_every_kind_of_model(family: str, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(family)
    cost = table_of(checkpoint, tmp_path).cost(checkpoint.backbone)
    for group in find_groups(checkpoint.backbone):
        assert cost.group(group, 1) == pytest.approx(PER_UNIT[group.kind])


def test_blocks_of_different_sizes_share_a_curve(tmp_path: Path) -> None:
    whole = tiny_checkpoint("bert")
    first, second = (g.key for g in find_groups(whole.backbone) if g.kind == "heads")
    pruned = apply_plan(whole, PrunePlan({second: (0, 2)}))
    yardstick = CountingYardstick(whole, Conditions())
    table = latency_table(pruned, yardstick, tmp_path)
    assert "whole" in yardstick.asked  # which is not the reference here
    assert table.relative == pytest.approx(milliseconds(pruned) / milliseconds(whole))
    cost = table.cost(pruned.backbone)
    groups = {g.key: g for g in find_groups(pruned.backbone)}
    assert cost.group(groups[first], 4) == pytest.approx(4 * PER_UNIT["heads"])
    assert cost.group(groups[second], 2) == pytest.approx(2 * PER_UNIT["heads"])


def bent(times: Mapping[int, float], noise: float) -> LatencyTable:
    """Return the table of a model whose heads take `times`, shares of the whole's, each ± noise."""
    checkpoint = tiny_checkpoint("bert")
    plans, timed = trials(checkpoint), {}
    for name in plans:
        share = times.get(int(name.rpartition("-")[2]), 0.9) if "heads" in name else 0.9
        timed[name] = Timed(share, (share - noise, share + noise), 100 * share, 100.0)
    return solve(checkpoint, plans, timed)


def test_a_bend_is_believed_where_the_noise_cannot_have_made_it() -> None:
    # 4 heads in each of 2 layers; 3 and 1 are timed
    clear = dict(bent({3: 0.70, 1: 0.60}, 0.01).blocks[HEADS])
    assert clear[4] - clear[3] == pytest.approx(15)
    assert clear[3] - clear[1] == pytest.approx(5)
    noisy = dict(bent({3: 0.70, 1: 0.60}, 0.2).blocks[HEADS])
    assert noisy[4] - noisy[3] == pytest.approx((noisy[3] - noisy[1]) / 2)
    # fewer heads that take longer count as no difference
    assert dict(bent({3: 1.02, 1: 1.01}, 0.0).blocks[HEADS]) == {0: 0, 1: 0.25, 3: 0.75, 4: 0.75}


def test_a_table_is_measured_once(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint("bert")
    first = table_of(checkpoint, tmp_path)
    again = CountingYardstick(checkpoint, Conditions())
    assert latency_table(checkpoint, again, tmp_path) == first
    assert not again.asked
    # other weights of the same shapes take as long
    assert table_of(tiny_checkpoint("bert", seed=1), tmp_path) == first
    assert len(list(tmp_path.iterdir())) == 1


def test_a_table_of_another_state_of_the_machine_is_measured_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, over = tiny_checkpoint("bert"), Conditions(over="pytorch")

    def table(slower: float) -> tuple[LatencyTable, list[str]]:
        monkeypatch.setattr(
            CountingYardstick, "real", staticmethod(lambda relative: slower * relative)
        )
        yardstick = CountingYardstick(checkpoint, over)
        return latency_table(checkpoint, yardstick, tmp_path), yardstick.asked

    first, _ = table(0.1)
    assert table(0.105) == (first, ["whole"])
    second, asked = table(0.14)
    assert second.relative == pytest.approx(0.14)
    assert len(asked) > 3
    assert table(0.14) == (second, ["whole"])  # and kept instead


def test_a_table_that_is_broken_or_old_is_measured_anew(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint("bert")
    first = table_of(checkpoint, tmp_path)
    (file,) = tmp_path.iterdir()
    for text in ("{", "[]", "null", '{"schema": 0}', file.read_text().replace('"fixed"', '"fix"')):
        file.write_text(text)
        assert table_of(checkpoint, tmp_path) == first
    with pytest.raises(DataError, match="schema 0"):
        LatencyTable.from_json({"schema": 0})


def test_what_times_depend_on_is_in_the_key() -> None:
    checkpoint, plain = tiny_checkpoint("bert"), Conditions()
    key = describe(checkpoint, plain)
    assert key == describe(tiny_checkpoint("bert", seed=1), plain)
    assert key != describe(checkpoint, replace(plain, threads=7))
    assert key != describe(checkpoint, replace(plain, shapes=((1, 8),)))
    assert key != describe(tiny_checkpoint("bert", hidden_act="relu"), plain)
    group = find_groups(checkpoint.backbone)[0].key
    assert key != describe(apply_plan(checkpoint, PrunePlan({group: (0,)})), plain)


def test_the_cache_is_where_xdg_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "onnxpress" / "latency"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "onnxpress" / "latency"


def test_classes_tell_blocks_of_other_widths_apart() -> None:
    assert set(block_classes(tiny_checkpoint("bert").backbone).values()) == {
        HEADS,
        "encoder.layer.*.neurons × 32",
    }
    swin = block_classes(tiny_checkpoint("swin").backbone)
    assert len({name.rpartition(" ")[2] for name in swin.values()}) == 2
