from pathlib import Path

from benchmarks.journal import NAME, Journal


def test_what_was_put_is_found_again_and_a_line_cut_short_is_not(tmp_path: Path) -> None:
    journal = Journal(tmp_path, {"rounds": 8})
    journal.put("round", "8 × 128", 0, value={"a": [0.1, 0.2]})
    journal.put("round", "8 × 128", 1, value={"a": [0.3]})
    path = tmp_path / NAME
    path.write_text(path.read_text()[:-9])  # killed while it wrote
    again = Journal(tmp_path, {"rounds": 8})
    assert again.get("round", "8 × 128", 0) == {"a": [0.1, 0.2]}
    assert again.get("round", "8 × 128", 1) is None
    again.put("round", "8 × 128", 1, value={"a": [0.4]})
    assert Journal(tmp_path, {"rounds": 8}).get("round", "8 × 128", 1) == {"a": [0.4]}


def test_another_benchmark_begins_anew(tmp_path: Path) -> None:
    Journal(tmp_path, 1).put("x", value=1)
    assert Journal(tmp_path, 2).get("x") is None
    assert Journal(tmp_path, 1).get("x") is None


def test_without_a_folder_nothing_is_written(tmp_path: Path) -> None:
    journal = Journal(None, 1)
    journal.put("x", value=1)
    assert journal.get("x") == 1
    assert not list(tmp_path.iterdir())
