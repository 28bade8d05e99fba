"""Line charts of SVG: numbers to pixels, for a template to draw."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator

COLOURS = 10  # that the page's style has; more lines are dashed, more classes hues
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 270, 52, 12, 12, 40


class Line(NamedTuple):
    """A line of a chart, in pixels.

    Attributes:
      title: of the run.
      style: CSS classes.
      points: of an SVG polyline.
      band: of an SVG polygon around it, from the lowest to the highest seed; or "".
    """

    title: str
    style: str
    points: str
    band: str = ""


class Chart(NamedTuple):
    """A chart, in pixels.

    Attributes:
      title: above it.
      x_ticks: ``(x, label)``.
      y_ticks: ``(y, label)``.
      lines: to draw.
      box: left, top, right and bottom of the axes, width and height of all.
      single: of a single epoch: points, not lines.
    """

    title: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[Line]
    box: tuple[int, ...] = (LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM, WIDTH, HEIGHT)
    single: bool = False


class Series(NamedTuple):
    """What a line shows.

    Attributes:
      title: of the run.
      style: CSS classes.
      epochs: ``[e]``.
      values: of each seed, ``[seeds, e]``.
    """

    title: str
    style: str
    epochs: Sequence[int]
    values: np.ndarray


def style(index: int) -> str:
    """CSS classes of the line of a distance."""
    return f"c{index % COLOURS} d{index // COLOURS % 3}"


def _text(points):
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _ticks(low, high, log):
    if log and high / low >= 10:
        subs = (1.0,) if high / low >= 1e3 else (1.0, 2.0, 5.0)
        found = LogLocator(subs=subs, numticks=6).tick_values(low, high)
    else:
        found = MaxNLocator(nbins=5, steps=(1, 2, 2.5, 5, 10)).tick_values(low, high)
    slack = 1e-9 * (high - low)
    return [float(v) for v in found if low - slack <= v <= high + slack]


def _label(value):
    """Short: 0.002, 5e-4, 1e+6."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def chart(
    title: str,
    series: Iterable[Series],
    *,
    log: bool = False,
    limits: tuple[float, float] | None = None,
) -> Chart | None:
    """Lays a chart out: a line for each mean over seeds.

    Args:
      title: above it.
      series: to draw; what is not finite, or not positive on a logarithmic axis, is
        left out.
      log: a logarithmic axis.
      limits: of the axis; None: those of the values.

    Returns:
      The chart, None if nothing is left to draw.
    """
    drawn = []
    for one in series:
        values = np.asarray(one.values, float)
        good = np.isfinite(values).all(0)
        good &= (values > 0).all(0) if log else True
        if good.any():
            epochs = np.asarray(one.epochs)[good]
            drawn.append((one, epochs, values[:, good]))
    if not drawn:
        return None
    scale = np.log if log else lambda v: v
    low, high = limits or (
        min(float(values.min()) for _, _, values in drawn),
        max(float(values.max()) for _, _, values in drawn),
    )
    if high <= low:
        low, high = (low / 2, low * 2) if log else (low - 0.5, low + 0.5)
    first = min(int(epochs.min()) for _, epochs, _ in drawn)
    last = max(int(epochs.max()) for _, epochs, _ in drawn)
    span = max(last - first, 1)
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    at_x = lambda epoch: LEFT + (right - LEFT) * (epoch - first) / span
    share = lambda v: (scale(v) - scale(low)) / (scale(high) - scale(low))
    at_y = lambda v: bottom - (bottom - TOP) * share(v)
    lines = []
    for one, epochs, values in drawn:
        x, mean = at_x(epochs), values.mean(0)
        band = ""
        if len(values) > 1:
            edge = [*zip(x, at_y(values.max(0)), strict=True)]
            edge += [*zip(x[::-1], at_y(values.min(0))[::-1], strict=True)]
            band = _text(edge)
        points = _text(zip(x, at_y(mean), strict=True))
        lines.append(Line(one.title, one.style, points, band))
    epochs = MaxNLocator(nbins=6, integer=True).tick_values(first, last)
    return Chart(
        title,
        [(float(at_x(e)), f"{e:g}") for e in epochs if first <= e <= last],
        [(float(at_y(v)), _label(v)) for v in _ticks(low, high, log)],
        lines,
        single=first == last,
    )
