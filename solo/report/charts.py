"""Charts of the report and of the UI pages: small PNG files in one quiet style.

In: plain numbers and arrays. Out: PNG bytes, 700 px wide, on white so that they read in a light and in a dark page.
Invariant: the same numbers give the same bytes (no date, no host, fonts shipped with matplotlib). Cost: ~0.15 s each;
matplotlib is imported by the first chart, not by this module.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_IN, DPI = 7.0, 100
N_POINTS = 400  # more points than this on a line are averaged: the chart is 700 px wide
N_COLORS = 96  # palette of the PNG; a third of the bytes, no visible difference
INK, MUTED, GRID = "#1f2933", "#66717d", "#e3e7eb"
LEGEND_COLUMNS = 4
COLORS = ("#3b6ea5", "#e08e45", "#5a9e6f", "#b75d69", "#8c7aa9", "#c9a227", "#4aa3a2", "#a8785a")
GREY = "#8a939c"
NAMED = {"chance": GREY, "other": GREY, "dropped": COLORS[1]}  # the same thing has the same colour on every chart
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.edgecolor": "#b8c0c8",
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "text.color": INK,
    "text.parse_math": False,  # a `$` in the name of a source is a dollar sign
}


P = ParamSpec("P")


@dataclass(frozen=True)
class Panel:
    """One histogram: values per group ("kept", "dropped"), on a log axis where sizes span decades; a line at limit."""

    title: str
    groups: Mapping[str, np.ndarray]
    log: bool = False
    limit: float | None = None


@dataclass(frozen=True)
class Curve:
    """One small chart: named lines of (xs, ys); the legend may stand on another chart of the same names."""

    title: str
    series: Mapping[str, tuple[Any, Any]]
    y: str
    legend: bool = True
    from_zero: bool = False


def _styled(draw: Callable[P, bytes]) -> Callable[P, bytes]:
    """Draw under our style: matplotlib reads its settings at each call, so the whole drawing lies inside."""

    @functools.wraps(draw)
    def inside(*args: P.args, **kwargs: P.kwargs) -> bytes:
        import matplotlib as mpl

        with mpl.rc_context(STYLE):  # type: ignore[arg-type]
            return draw(*args, **kwargs)

    return inside


def bars(title: str, values: Mapping[str, float], *, unit: str) -> bytes:
    """One horizontal bar per label, its number at its end."""
    return stacked(title, {label: {"": value} for label, value in values.items()}, unit=unit)


@_styled
def stacked(title: str, rows: Mapping[str, Mapping[str, float]], *, unit: str) -> bytes:
    """Horizontal bars cut into series; the number at the end of a bar is its sum."""
    series = sorted(dict.fromkeys(name for parts in rows.values() for name in parts), key=lambda name: name == "other")
    n_legend = -(-len(series) // LEGEND_COLUMNS) if len(series) > 1 else 0
    figure, (axes,) = _figure(title, height_in=0.65 + 0.28 * max(len(rows), 1) + 0.22 * n_legend)
    labels = list(rows)
    totals = np.array([sum(rows[label].values()) for label in labels], dtype=float)
    left = np.zeros(len(labels))
    for i, name in enumerate(series):
        widths = np.array([rows[label].get(name, 0) for label in labels], dtype=float)
        axes.barh(labels, widths, left=left, height=0.66, color=_color(i, name), label=name or None)
        left += widths
    for y, total in enumerate(totals):
        axes.annotate(short(total), (total, y), (4, 0), textcoords="offset points", va="center", color=MUTED)
    _finish_bars(axes, unit=unit, top=float(totals.max(initial=0)), legend=len(series) > 1)
    return _png(figure)


@_styled
def grouped(title: str, rows: Mapping[str, Mapping[str, float]], *, unit: str, top: float | None = None) -> bytes:
    """Horizontal bars side by side, one group per label and one colour per series."""
    series = list(dict.fromkeys(name for parts in rows.values() for name in parts))
    labels, n = list(rows), max(len(series), 1)
    figure, (axes,) = _figure(title, height_in=0.9 + (0.14 + 0.17 * n) * max(len(labels), 1))
    for i, name in enumerate(series):
        widths = [rows[label].get(name, 0.0) for label in labels]
        at = np.arange(len(labels)) + (i - (n - 1) / 2) * 0.8 / n
        axes.barh(at, widths, height=0.72 / n, color=_color(i, name), label=name)
        for y, width in zip(at, widths, strict=True):
            axes.annotate(short(width), (width, y), (4, 0), textcoords="offset points", va="center", color=MUTED)
    axes.set_yticks(range(len(labels)), labels)
    highest = max((v for parts in rows.values() for v in parts.values()), default=0.0)
    _finish_bars(axes, unit=unit, top=top or highest, legend=True)
    return _png(figure)


@_styled
def histograms(title: str, panels: Sequence[Panel], *, unit: str, n_columns: int = 2) -> bytes:
    """Small histograms side by side; groups are stacked, so that the outline is the whole."""
    from matplotlib.ticker import LogLocator

    n_rows = -(-len(panels) // n_columns) or 1
    figure, grid = _figure(title, height_in=0.65 + 1.45 * n_rows, n_rows=n_rows, n_columns=n_columns)
    names = list(dict.fromkeys(name for panel in panels for name in panel.groups))
    for axes, panel in zip(grid, panels, strict=False):
        edges, log = _edges(panel)
        values = [np.asarray(panel.groups.get(name, ()), dtype=float) for name in names]
        axes.hist(
            values,
            bins=edges.tolist(),
            stacked=True,
            color=[_color(i, name) for i, name in enumerate(names)],
            label=names,
        )
        if panel.limit is not None and (panel.limit > 0 or not log):
            axes.axvline(panel.limit, color=INK, linewidth=1.1, linestyle=(0, (4, 2)))
        axes.set_title(panel.title)
        axes.grid(visible=False, axis="x")
        if log:
            axes.set_xscale("log")
            few = (1.0, 2.0, 5.0) if edges[-1] < 100 * edges[0] else (1.0,)  # one tick alone says no scale
            axes.xaxis.set_major_locator(LogLocator(subs=few))
            axes.xaxis.set_minor_formatter("")
        axes.xaxis.set_major_formatter(lambda x, _: short(x))
        axes.yaxis.set_major_formatter(lambda y, _: short(y))
        axes.tick_params(axis="y", labelcolor=MUTED)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    grid[0].set_ylabel(unit)
    if len(names) > 1:
        handles, labels = grid[0].get_legend_handles_labels()
        if len(names) <= 3:
            figure.legend(handles, labels, loc="outside upper right", ncols=3)
        else:
            figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return _png(figure)


@_styled
def curves(title: str, panels: Sequence[Curve], *, x: str, n_columns: int = 2) -> bytes:
    """Small line charts side by side over one kind of x, legends inside."""
    n_rows = -(-len(panels) // n_columns) or 1
    figure, grid = _figure(title, height_in=0.5 + 1.75 * n_rows, n_rows=n_rows, n_columns=n_columns)
    for i, (axes, panel) in enumerate(zip(grid, panels, strict=False)):
        for k, (name, points) in enumerate(panel.series.items()):
            xs, ys = (_thin(np.asarray(values, dtype=float)) for values in points)
            marker = "o" if np.isfinite(ys).sum() < 8 else None
            axes.plot(xs, ys, color=_color(k, name), linewidth=1.3, marker=marker, markersize=2.5, label=name)
        axes.set_title(panel.title)
        axes.set_ylabel(panel.y)
        axes.xaxis.set_major_formatter(lambda v, _: short(v))
        axes.yaxis.set_major_formatter(lambda v, _: short(v))
        axes.tick_params(axis="y", labelcolor=MUTED)
        if panel.from_zero:
            axes.set_ylim(0, 1.15 * axes.get_ylim()[1])
        if panel.legend and len(panel.series) > 1:
            axes.legend(fontsize=7, handlelength=1.0, labelspacing=0.25, loc="upper right")  # losses fall
        if i >= len(panels) - n_columns:
            axes.set_xlabel(x)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    return _png(figure)


def short(value: float) -> str:
    """A number in at most five characters or so: 950, 1.2k, 34M, 0.62."""
    size = abs(value)
    if size == 0:
        return "0"
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit * 0.9995:
            return f"{value / limit:.3g}{suffix}"
    if size >= 1:
        return f"{value:.4g}" if float(value).is_integer() else f"{value:.3g}"
    return f"{value:.2g}"


def _figure(title: str, *, height_in: float, n_rows: int = 1, n_columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure with its title at the left; no pyplot, so no global state and no display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_IN, height_in), dpi=DPI, layout="constrained")
    figure.suptitle(title, x=0.012, ha="left", fontsize=10.5, fontweight="bold", color=INK)
    return figure, list(figure.subplots(n_rows, n_columns, squeeze=False).flat)


def _color(i: int, name: str) -> str:
    return NAMED.get(name, COLORS[i % len(COLORS)])


def _finish_bars(axes: Axes, *, unit: str, top: float, legend: bool) -> None:
    """Axis, labels and legend that all horizontal bar charts share; the first label is on top."""
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.set_xlim(0, top * 1.09 or 1)
    axes.locator_params(axis="x", integer=top > 1)
    axes.set_xlabel(unit)
    axes.xaxis.set_major_formatter(lambda x, _: short(x))
    if legend:
        axes.legend(
            ncols=LEGEND_COLUMNS, loc="lower left", bbox_to_anchor=(-0.01, 1.0), handlelength=1.0, columnspacing=1.2
        )


def _edges(panel: Panel) -> tuple[np.ndarray, bool]:
    """Bin edges over all groups and whether their axis is a log one, which less than a decade does not need.

    24 bins, equal in ratio on a log axis; few integers have one each.
    """
    arrays = [np.asarray(v, dtype=float) for v in panel.groups.values()]
    values = np.concatenate(arrays) if arrays else np.zeros(0)
    values = values[np.isfinite(values) & ((values > 0) | (not panel.log))]
    if not len(values):
        return np.array([1.0, 2.0]), False
    low, high = float(values.min()), float(values.max())
    if panel.log and high > 10 * low:
        return np.geomspace(low * 0.98, high * 1.02, 25), True
    if high - low <= 20 and np.all(values == np.round(values)):
        return np.arange(low - 2.5 if low < 0 else max(low - 2.5, -0.5), high + 3), False  # what counts is not negative
    return np.linspace(low, high if high > low else low + 1, 25), False


def _thin(values: np.ndarray) -> np.ndarray:
    """Means of equal runs, at most N_POINTS of them."""
    run = -(-len(values) // N_POINTS)
    if run <= 1:
        return values
    return np.array([values[i : i + run].mean() for i in range(0, len(values), run)])


def _png(figure: Figure) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")  # type: ignore[no-untyped-call]
    out = io.BytesIO()
    picture.quantize(N_COLORS, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return out.getvalue()
