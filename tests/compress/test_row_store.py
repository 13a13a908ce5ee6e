from pathlib import Path

import numpy as np
import pytest

import compress.row_store
from calib_data.errors import DestinationError, ModelError
from compress.row_store import Layout, RowStore, checksum

LENGTHS = np.array([3, 1, 4])
LAYOUTS = {"vector": Layout((2,), per_token=False), "states": Layout((5,), per_token=True)}


def row(index: int, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng([seed, index])
    shapes = {"vector": (1, 2), "states": (LENGTHS[index], 5)}
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def same(store: RowStore, index: int, seed: int = 0) -> bool:
    return all((store.read(index)[name] == value).all() for name, value in row(index, seed).items())


def open_store(folder: Path, key: str = "key") -> RowStore:
    return RowStore(folder, key, LAYOUTS, LENGTHS)


def filled(folder: Path) -> RowStore:
    store = open_store(folder)
    for index in (2, 0):
        store.write(index, 7, row(index))
    return store


def test_rows_come_back_in_this_and_the_next_process(tmp_path: Path) -> None:
    for store in (filled(tmp_path), open_store(tmp_path)):
        assert [store.has(index, 7) for index in range(3)] == [True, False, True]
        assert store.stored == 2
        assert same(store, 0)
        assert same(store, 2)


def test_two_open_at_once_see_each_others_rows(tmp_path: Path) -> None:
    one, other = open_store(tmp_path), open_store(tmp_path)
    one.write(1, 7, row(1))
    assert other.has(1, 7)
    assert same(other, 1)


def test_another_input_is_told_from_none(tmp_path: Path) -> None:
    store = filled(tmp_path)
    assert store.has(0, 8) is None
    assert store.has(1, 8) is False


def test_a_part_that_was_damaged_counts_as_missing(tmp_path: Path) -> None:
    filled(tmp_path)
    states = np.lib.format.open_memmap(tmp_path / "states.npy", mode="r+")
    states[0, 0] += 1
    states.flush()
    store = open_store(tmp_path)
    assert [store.has(index, 7) for index in range(3)] == [False, False, True]
    store.write(0, 7, row(0))
    assert store.has(0, 7)
    assert open_store(tmp_path).has(0, 7)


@pytest.mark.parametrize("how", ["key", "layouts", "header", "no header yet", "format"])
def test_what_was_made_otherwise_is_replaced(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path)
    layouts = LAYOUTS
    if how == "layouts":
        layouts = {"vector": LAYOUTS["vector"]}
    if how == "header":
        (tmp_path / "cache.json").write_text('{"key": "ke')
    if how == "no header yet":  # as one leaves it that is killed while it makes the arrays
        (tmp_path / "cache.json").write_text("{}")
    if how == "format":
        monkeypatch.setattr(compress.row_store, "FORMAT", 99)
    store = RowStore(tmp_path, "other" if how == "key" else "key", layouts, LENGTHS)
    assert store.stored == 0
    assert {path.stem for path in tmp_path.glob("*.npy")} == {"rows", *layouts}


def test_the_same_is_not_replaced_by_an_interrupted_opening(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np.lib.format, "open_memmap", killed)
        with pytest.raises(KeyboardInterrupt):
            open_store(tmp_path)
    assert filled(tmp_path).stored == 2


def test_a_folder_of_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.npy").write_bytes(b"precious")
    with pytest.raises(DestinationError, match=r"mine.npy and no teacher cache"):
        open_store(tmp_path)
    assert (tmp_path / "mine.npy").read_bytes() == b"precious"


def free(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    usage = type("Usage", (), {"free": size + compress.row_store._SPARE})
    monkeypatch.setattr(compress.row_store.shutil, "disk_usage", lambda _: usage)


def test_a_disk_without_room_is_told_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = np.full(1000, 500)
    layouts = {"states": Layout((1000,), per_token=True)}  # 2 GB
    free(monkeypatch, 10**9)
    with pytest.raises(
        DestinationError, match=r"take 2.0 GB more, and .* has 1.0 GB free"
    ) as caught:
        RowStore(tmp_path, "key", layouts, lengths)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 8
    assert not list(tmp_path.glob("*.npy"))
    RowStore(tmp_path, "key", layouts, lengths, reached=0.4)
    assert (tmp_path / "states.npy").stat().st_size > 2e9
    assert compress.row_store._on_disk(tmp_path / "states.npy") < 1e6


def test_what_is_stored_needs_no_more_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled(tmp_path)
    store.write(1, 7, row(1))
    free(monkeypatch, 0)
    assert open_store(tmp_path).stored == 3


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_gets_full_stops_with_one_line(tmp_path: Path) -> None:
    store = filled(tmp_path)
    store._arrays["states"]._file = Path("/dev/full").open("r+b")  # noqa: SIM115
    with pytest.raises(DestinationError, match="no space left"):
        store.write(1, 7, row(1))
    assert not store.has(1, 7)
    assert not open_store(tmp_path).has(1, 7)


def test_values_of_another_shape_are_refused(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    with pytest.raises(ModelError, match="cannot be cached"):
        store.write(0, 7, {**row(0), "states": np.zeros((3, 6), np.float32)})
    with pytest.raises(ModelError, match="cannot be cached"):
        store.write(0, 7, {**row(0), "states": np.zeros((4, 5), np.float32)})
    assert not store.has(0, 7)


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    filled(tmp_path)
    np.save(tmp_path / "states.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ModelError, match="cannot be read"):
        open_store(tmp_path)


def test_checksums_tell_bits_apart() -> None:
    values = [np.zeros(2, np.float32), np.ones(1, np.float32)]
    assert checksum(values) != checksum(reversed(values))
    assert checksum(values) == checksum(value.copy() for value in values)
