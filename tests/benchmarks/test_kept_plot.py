from pathlib import Path

import pytest

from benchmarks.kept_plot import save_kept_plot
from calib_data.errors import ConfigError

UNITS = {
    "layer.0.attention.heads": {"kept": 3, "units": 4},
    "layer.0.neurons": {"kept": 48, "units": 64},
    "layer.1.attention.heads": {"kept": 0, "units": 4},
    "layer.1.neurons": {"kept": 0, "units": 64},
}


def test_every_layer_is_drawn_with_its_numbers(tmp_path: Path) -> None:
    save_kept_plot(UNITS, "Model, hidden size 27 of 32", tmp_path / "kept.svg")
    drawn = (tmp_path / "kept.svg").read_text()
    for text in ("3 of 4", "48 of 64", "none of 4", "layer.1.attention", "hidden size 27 of 32"):
        assert f"<!-- {text}" in drawn or f"{text}" in drawn


@pytest.mark.parametrize("units", [UNITS, {}])
def test_a_picture_is_written(units: dict[str, dict[str, int]], tmp_path: Path) -> None:
    save_kept_plot(units, "Model", tmp_path / "kept.png")
    assert (tmp_path / "kept.png").read_bytes().startswith(b"\x89PNG")


def test_a_name_without_a_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"kept.txt must end in \.png, \.svg, \.pdf"):
        save_kept_plot(UNITS, "Model", tmp_path / "kept.txt")
