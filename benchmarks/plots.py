"""The report's plots, as SVG text that takes its colours from the page's CSS."""

import contextlib
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import figures, summary, tables
from benchmarks.report import BenchmarkReport, VariantReport

# Stand-ins that matplotlib draws with, and the CSS that takes their place.
INK, MUTED, LINE, ACCENT, BAR, PAPER = (f"#{n:02x}0b0c" for n in range(1, 7))
_CSS = {INK: "ink", MUTED: "muted", LINE: "line", ACCENT: "accent", BAR: "bar", PAPER: "card"}
_SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: searchable, readable aloud, in the page's font
    "text.parse_math": False,  # a variant may be called $x$
    "font.size": 13,
}
_POINT = 1 / 72  # inches


@dataclass(frozen=True)
class Plot:
    """A drawing and the text that stands for it."""

    title: str
    description: str
    svg: str


@dataclass(frozen=True)
class _Bar:
    name: str
    text: str
    value: float | None
    interval: tuple[float, float] | None = None
    accent: bool = False


def latency_plots(report: BenchmarkReport) -> list[Plot]:
    """Return one panel of bars per workload: medians with their intervals."""
    winner = summary.best(report)
    plots = []
    for place in summary.workloads(report):
        bars = []
        for variant in report.variants:
            x = summary.latency_at(variant, place)
            if x is None:
                bars.append(_Bar(variant.name, "failed", None))
                continue
            text = f"{figures.number(1e3 * x.typical)} ms"
            if x.speedup is not None:
                faster = figures.factor(x.speedup.value)
                text += f" · {faster if x.speedup.different else figures.NO_DIFFERENCE}"
            bars.append(_Bar(variant.name, text, x.typical, x.interval, variant is winner))
        plots.append(_bars(f"{place}", "Latency at " + place, bars))
    return plots


def resource_plots(report: BenchmarkReport) -> list[Plot]:
    """Return two panels of bars: size on disk and peak memory."""
    winner = summary.best(report)

    def panel(title: str, values: list[tuple[VariantReport, int | None]]) -> Plot:
        bars = [
            _Bar(v.name, "failed" if x is None else figures.megabytes(x), x, None, v is winner)
            for v, x in values
        ]
        return _bars(title, title, bars)

    sizes: list[tuple[VariantReport, int | None]] = [(v, v.size_bytes) for v in report.variants]
    memory = [(v, v.peak_memory_bytes) for v in report.variants]
    return [panel("Size on disk", sizes), panel("Peak memory", memory)]


def load_plots(report: BenchmarkReport) -> list[Plot]:
    """Return a panel of bars for each number of streams: requests per second answered in time."""
    winner = summary.best(report)
    plots = []
    for streams in summary.load_streams(report):
        bars = []
        for variant in report.variants:
            x = next((x for x in variant.load if x.streams == streams), None)
            if x is None:
                bars.append(_Bar(variant.name, "failed", None))
                continue
            text = f"{figures.number(x.sustained)} /s"
            bars.append(_Bar(variant.name, text, x.sustained, x.interval, variant is winner))
        plots.append(
            _bars(f"{streams} at once", f"Requests answered in time, {streams} at once", bars)
        )
    return plots


def quality_plot(report: BenchmarkReport, width: int) -> Plot | None:
    """Return quality against latency with the Pareto front, `width` pixels wide, or None."""
    metric, place = summary.main_metric(report), summary.headline(report)
    points = []
    for variant in report.variants:
        latency, quality = summary.latency_at(variant, place), summary.quality_of(variant, metric)
        if variant.status == "ok" and latency is not None and quality is not None:
            points.append((variant, latency, quality))
    if len(points) < 2:
        return None
    sign = 1 if points[0][2].higher_is_better else -1
    front = pareto([(x.typical, sign * q.value) for _, x, q in points])
    better = "higher" if sign > 0 else "lower"
    values = "; ".join(
        f"{v.name}: {figures.number(1e3 * x.typical)} ms, {figures.score(q.value)}"
        for v, x, q in points
    )
    title = f"{(metric or '').replace('_', ' ')} against latency at {place}".capitalize()
    with _settings(f"{title} {width}"):
        figure, axes = _figure(width, 380)
        axes.set_position((62 / width, 52 / 380, 1 - 82 / width, 1 - 70 / 380))
        slowest, fastest = (f(x.typical for _, x, _ in points) * 1e3 for f in (max, min))
        _scale(axes, fastest, slowest)
        steps = sorted((points[i][1].typical * 1e3, points[i][2].value) for i in front)
        axes.step(*zip(*steps, strict=True), where="post", color=ACCENT, linewidth=1.5, alpha=0.5)
        for i, (_, x, q) in enumerate(points):
            color = ACCENT if i in front else MUTED
            center = x.typical * 1e3
            axes.hlines(
                q.value, 1e3 * x.interval[0], 1e3 * x.interval[1], color=color, linewidth=1.5
            )
            if q.interval is not None and q.difference is not None:
                base = q.value - q.difference
                axes.vlines(center, base + q.interval[0], base + q.interval[1], color=color, lw=1.5)
            axes.plot(
                center, q.value, "o", ms=9, mfc=color if i in front else PAPER, mec=color, mew=2
            )
        axes.margins(y=0.18)
        _label(figure, axes, [(v.name, x.typical * 1e3, q.value) for v, x, q in points])
        axes.set_xlabel(f"Median latency at {place}, ms", color=MUTED)
        axes.set_title(
            f"{summary.metric_label(points[0][2])} ({better} is better)",
            loc="left",
            fontsize=12,
            color=MUTED,
        )
        return Plot(title, f"{title}. {values}.", _svg(figure))


def training_plots(report: BenchmarkReport) -> list[Plot]:
    """Return the loss curve of every training stage in the variants' lineages, each once."""
    plots = []
    for stage in summary.training_stages(report):
        steps, losses = zip(*stage.curve, strict=True)
        title = f"{stage.name}: {', '.join(stage.variants)}"
        first, last = (figures.number(losses[i]) for i in (0, -1))
        with _settings(f"training {title}"):
            figure, axes = _figure(360, 200)
            axes.set_position((52 / 360, 44 / 200, 1 - 66 / 360, 1 - 60 / 200))
            axes.plot(steps, losses, color=ACCENT, linewidth=1.5)
            if min(losses) > 0 and max(losses) > 10 * min(losses):
                axes.set_yscale("log")
            axes.set_xlim(0, max(steps))
            axes.set_xlabel("Steps", color=MUTED)
            plots.append(
                Plot(
                    title,
                    f"Training loss of {title}: from {first} to {last} in {steps[-1]:g} steps.",
                    _svg(figure),
                )
            )
    return plots


def operator_plot(report: BenchmarkReport, width: int, row: int = 58) -> Plot | None:
    """Return a bar per variant of what its operators take, the costliest first, or None."""
    shown = [(v.name, tables.shown_operators(v.operators)) for v in report.variants if v.operators]
    if not shown:
        return None
    longest = max(sum(seconds for _, seconds in parts) for _, parts in shown) or 1.0
    spoken = []
    with _settings(f"operators {width}"):
        figure, axes = _figure(width, row * len(shown))
        axes.set_position((0, 0, 1, 1))
        axes.axis("off")
        axes.set(xlim=(0, width), ylim=(row * len(shown), 0))
        for i, (name, parts) in enumerate(shown):
            top, left = i * row + 25, 0.0
            whole = sum(seconds for _, seconds in parts)
            axes.text(0, top - 7, name, color=INK)
            total = f"{figures.number(1e3 * whole)} ms"
            axes.text(width, top - 7, total, color=MUTED, ha="right")
            for j, (operator, seconds) in enumerate(parts):
                part = width * seconds / longest
                shade = 1 - 0.8 * j / max(1, len(parts) - 1)
                axes.barh(top, part, left=left, height=12, align="edge", color=ACCENT, alpha=shade)
                short = operator.rsplit(".", 1)[-1]
                if part > 6.5 * len(short) + 4:
                    axes.text(left, top + 24, short, color=MUTED, fontsize=11)
                left += part
            named = ", ".join(f"{o} {100 * s / (whole or 1):.0f} %" for o, s in parts)
            spoken.append(f"{name}: {named}")
        return Plot("Time by operator", f"Time by operator. {'; '.join(spoken)}.", _svg(figure))


def trend_plots(reports: Sequence[BenchmarkReport]) -> list[Plot]:
    """Return a curve per variant of the last report: its speed-up, or its time, oldest first."""
    place = summary.headline(reports[-1])
    plots = []
    for variant in reports[-1].variants:
        found = []
        for report in reports:
            then = report.find(variant.name)
            latency = summary.latency_at(then, place) if then else None
            if latency is not None:
                found.append(latency)
        if len(found) < 2:
            continue
        factors = [x.speedup for x in found if x.speedup is not None]
        if len(factors) == len(found):
            unit, ends = "×", [(x.value, *x.interval) for x in factors]
        else:
            unit = "ms"
            ends = [(1e3 * x.typical, 1e3 * x.interval[0], 1e3 * x.interval[1]) for x in found]
        values, lows, highs = zip(*ends, strict=True)
        title = f"{variant.name}, {unit} at {place}"
        with _settings(f"trend {title}"):
            figure, axes = _figure(360, 200)
            axes.set_position((52 / 360, 44 / 200, 1 - 66 / 360, 1 - 60 / 200))
            places = list(range(1, len(values) + 1))
            axes.vlines(places, lows, highs, color=ACCENT, linewidth=1.5)
            axes.plot(places, values, "o-", color=ACCENT, linewidth=1.5, markersize=6)
            axes.set_ylim(0, 1.15 * max(highs))
            axes.set_xticks(places)
            axes.set_xlabel("Report, oldest first", color=MUTED)
            spoken = ", ".join(figures.number(value) for value in values)
            plots.append(Plot(title, f"{title}, oldest first: {spoken}.", _svg(figure)))
    return plots


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of points (cost, worth) that no other beats in both, in input order."""
    return [
        i
        for i, (cost, worth) in enumerate(points)
        if not any(
            c <= cost and w >= worth and (c, w) != (cost, worth)
            for j, (c, w) in enumerate(points)
            if j != i
        )
    ]


# --- drawing -------------------------------------------------------------------------------------


def _bars(title: str, subject: str, bars: list[_Bar], width: int = 360, row: int = 46) -> Plot:
    """Return bars from zero, each under its name and its figure, so that no axis is needed."""
    height = row * len(bars)
    spoken = ", ".join(f"{bar.name} {bar.text}" for bar in bars)
    with _settings(f"{subject} {width}"):
        figure, axes = _figure(width, height)
        axes.set_position((0, 0, 1, 1))
        axes.axis("off")
        ends = [b.interval[1] if b.interval else b.value for b in bars if b.value is not None]
        longest = max(ends, default=1) or 1
        axes.set(xlim=(0, width), ylim=(height, 0))
        for i, bar in enumerate(bars):
            top = i * row + 25
            axes.barh(top, width, height=8, align="edge", color=LINE)
            room = int((width - 8.8 * len(bar.text)) / 7.8)
            name = bar.name if len(bar.name) <= room else bar.name[: room - 1] + "…"
            axes.text(0, top - 7, name, color=INK)
            axes.text(width, top - 7, bar.text, color=INK if bar.accent else MUTED, ha="right")
            if bar.value is None:
                continue
            color = ACCENT if bar.accent else BAR
            axes.barh(top, width * bar.value / longest, height=8, align="edge", color=color)
            if bar.interval is not None:
                low, high = (width * end / longest for end in bar.interval)
                axes.hlines(top + 4, low, high, color=INK, linewidth=1)
                axes.vlines([low, high], top + 1, top + 7, color=INK, linewidth=1)
        return Plot(title, f"{subject}: {spoken}.", _svg(figure))


def _figure(width: int, height: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * _POINT, height * _POINT), dpi=72)
    axes = figure.add_subplot()
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    axes.grid(axis="y", color=LINE, linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(color=LINE, labelcolor=MUTED, length=0, pad=6, labelsize=12)
    return figure, axes


def _scale(axes: Any, fastest: float, slowest: float) -> None:
    """Start at zero, or go logarithmic where the fast ones would crowd at the left."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if slowest < 4 * fastest:
        axes.set_xlim(0, 1.15 * slowest)
        return
    axes.set_xscale("log")
    axes.set_xlim(fastest / 1.5, slowest * 1.5)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(which="minor", length=0)


def _label(figure: Any, axes: Any, points: list[tuple[str, float, float]]) -> None:
    """Name every point beside it, where the name covers no other name and no point."""
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()
    frame = figure.bbox
    taken = []
    for _, x, y in points:
        left, top = axes.transData.transform((x, y))
        taken.append(Bbox.from_extents(left - 7, top - 7, left + 7, top + 7))
    # The front comes from below and leaves to the right, intervals go all four ways: between them.
    places = [
        (9, 13, "left", "center"),
        (-9, 13, "right", "center"),
        (-12, 0, "right", "center"),
        (12, 0, "left", "center"),
    ]
    places += [
        (shift, up, side, "center")
        for up in (-16, 16, 30, -30)
        for shift, side in ((0, "center"), (6, "left"), (-6, "right"))
    ]
    for i, (name, x, y) in enumerate(points):
        short = name if len(name) <= 24 else name[:23] + "…"
        others = taken[:i] + taken[i + 1 :]
        chosen = None
        for right, up, horizontal, vertical in places:
            text = axes.annotate(
                *(short, (x, y), (right, up)),
                textcoords="offset points",
                ha=horizontal,
                va=vertical,
                color=INK,
            )
            box = text.get_window_extent()
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1
            if inside and not any(box.overlaps(other) for other in others):
                chosen = box
                break
            text.remove()
        if chosen is None:  # crowded: better one name over another than none
            text = axes.annotate(short, (x, y), (0, 16), textcoords="offset points", ha="center")
            text.set_color(INK)
            chosen = text.get_window_extent()
        taken.append(chosen)


def _svg(figure: Any) -> str:
    """Return a figure as an SVG element for an HTML page, its colours taken from the page's CSS."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    svg = file.getvalue()
    root, _, body = svg[svg.index("<svg") :].partition(">")
    root = re.sub(r' (?:xmlns(?::xlink)?|version|width|height)="[^"]*"', "", root)
    # The page has many plots: what would be named twice, or would style the rest of it, goes.
    for unwanted in ("metadata", "style", "clipPath"):
        body = re.sub(rf"<{unwanted}\b.*?</{unwanted}>", "", body, flags=re.DOTALL)
    body = re.sub(r' clip-path="[^"]*"', "", body)
    body = re.sub(r'<g id="[^"]*"(/?)>', r"<g\1>", body)
    body = re.sub(r'(<text style="[^"]*?)font-family: [^;"]*; ', r"\1", body)
    for stand_in, name in _CSS.items():
        body = body.replace(stand_in, f"var(--{name})")
    return f"{root}>{body}"


@contextlib.contextmanager
def _settings(salt: str) -> Iterator[None]:
    """Draw in our way; `salt` keeps the ids of markers apart between plots, and the same each time."""
    import matplotlib

    settings: Any = {**_SETTINGS, "svg.hashsalt": salt}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser has its own
        yield
