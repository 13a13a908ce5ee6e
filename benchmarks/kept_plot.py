"""A picture of what pruning left of each layer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calib_data.errors import ConfigError

FORMATS = (".png", ".svg", ".pdf")
# the report's colours on paper
_INK, _MUTED, _LINE, _KEPT = "#1d1c1a", "#68645d", "#e0dcd5", "#0d7268"
_ROW = 0.26  # inches


def save_kept_plot(units: Mapping[str, Mapping[str, int]], title: str, path: Path) -> None:
    """Draw, for every group of `units`, the units kept of those before; write it to `path`.

    A panel per kind of unit, a bar per layer in the model's order. Raises `ConfigError` for a file
    whose name says no format.
    """
    from matplotlib.figure import Figure

    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"--plot {path} must end in {', '.join(FORMATS)}")
    kinds = dict.fromkeys(name.rpartition(".")[2] for name in units)
    rows = max(sum(n.rpartition(".")[2] == kind for n in units) for kind in kinds) if kinds else 1
    figure = Figure(figsize=(5 * max(1, len(kinds)), 1.1 + _ROW * rows), layout="constrained")
    figure.suptitle(title, color=_INK, fontsize=11)
    panels = figure.subplots(1, max(1, len(kinds)), squeeze=False)[0]
    for panel, kind in zip(panels, kinds):
        members = {n: row for n, row in units.items() if n.rpartition(".")[2] == kind}
        _draw_(panel, kind, members)
    figure.savefig(path, dpi=144, metadata={"Date": None} if path.suffix == ".svg" else None)


def _draw_(panel: Any, kind: str, members: Mapping[str, Mapping[str, int]]) -> None:
    """Draw one bar per group: light for what there was, dark for what is left."""
    places = range(len(members))
    most = max(row["units"] for row in members.values())
    panel.barh(places, [row["units"] for row in members.values()], color=_LINE, height=0.7)
    panel.barh(places, [row["kept"] for row in members.values()], color=_KEPT, height=0.7)
    for place, row in enumerate(members.values()):
        told = f"{row['kept']} of {row['units']}" if row["kept"] else f"none of {row['units']}"
        panel.text(1.02 * row["units"], place, told, va="center", color=_MUTED, fontsize=8)
    panel.set_title(kind, loc="left", fontsize=10, color=_MUTED)
    panel.set_yticks(places, [name.rpartition(".")[0] for name in members], fontsize=8)
    panel.set_ylim(len(members) - 0.4, -0.6)  # the first layer on top
    panel.set_xlim(0, 1.3 * most)
    panel.set_xticks([])
    panel.tick_params(length=0, colors=_INK)
    for side in panel.spines.values():
        side.set_visible(False)
