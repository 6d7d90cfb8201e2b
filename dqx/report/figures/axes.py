"""What axes of several figures have: mask ratios above denoising steps, limits, plain ticks, a matrix as colours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from numpy.typing import NDArray

from dqx.report.figures import style

MOST_RATIOS, MOST_TICKS = 5, 9
SHORT, LONG = 60, 3000  # logarithmic axes that end at less than so many times where they begin

Matrix = np.ma.MaskedArray[Any, np.dtype[np.float64]]


def panels(figure: Figure, rows: Sequence[str], columns: Sequence[str], below: str, **shared: Any) -> NDArray[Any]:
    """Axes [rows, columns] with the columns' names on top, the rows' at the left, and one name below all."""
    grid = figure.subplots(len(rows), len(columns), squeeze=False, **shared)
    for axes, name in zip(grid[0], columns, strict=True):
        axes.set_title(name)
    for axes, name in zip(grid[:, 0], rows, strict=True):
        axes.set_ylabel(name)
    for axes in grid[-1]:
        axes.set_xlabel(below)
    return grid


def mask_ratios_on_top(axes: Axes, places: Sequence[float], ratios: Sequence[float]) -> None:
    """A second axis at the top that says how much is masked at some of the steps' places."""
    chosen = sorted({round(i) for i in np.linspace(0, len(places) - 1, min(MOST_RATIOS, len(places)))})
    top = axes.secondary_xaxis("top")
    top.set_ticks([places[i] for i in chosen], labels=[f"{100 * ratios[i]:.0f}" for i in chosen])
    top.set_xlabel("masked, %")
    top.spines["top"].set_visible(False)


def from_zero(axes: Axes, top: float | None = None) -> None:
    """Show the vertical axis, and those that share it, from 0 to a little more than what is drawn, or to `top`."""
    highest = max(float(each.dataLim.y1) for each in axes.get_shared_y_axes().get_siblings(axes))
    axes.set_ylim(0, top or (1.06 * highest if 0 < highest < np.inf else 1.0))


def tick_plainly(axis: Axis) -> None:
    """Ticks of a logarithmic axis as people write numbers: 0.02, 5, 300; between powers of ten where there is room."""
    low, high = axis.get_view_interval()
    subs = (1.0, 2.0, 5.0) if high < SHORT * low else (1.0, 3.0) if high < LONG * low else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
    axis.set_minor_locator(NullLocator())


def masked(rows: Sequence[Sequence[float | None]]) -> Matrix:
    """A matrix whose None, NaN and infinite entries are masked."""
    return np.ma.masked_invalid(np.array([[np.nan if x is None else float(x) for x in row] for row in rows]))


def heat_map(
    axes: Axes,
    values: Matrix,
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    norm: Normalize,
    colours: str = style.LARGE_IS_DARK,
) -> AxesImage:
    """Draw values [R, C], the first row on top; what lies below the colours' range is left blank."""
    palette = mpl.colormaps[colours].with_extremes(bad=style.ABSENT, under=(1, 1, 1, 0))
    image = axes.imshow(values, cmap=palette, norm=norm, aspect="auto", interpolation="nearest")
    axes.grid(False)
    for axis, names in ((axes.xaxis, columns), (axes.yaxis, rows)):
        name_ticks(axis, names)
    for spine in axes.spines.values():
        spine.set(visible=True, linewidth=0.3)
    return image


def colour_bar(figure: Figure, image: AxesImage, of: Iterable[Axes], name: str = "") -> Axes:
    """What the colours of these axes mean, its name above it: beside it would read as that of the axis behind it."""
    bar = figure.colorbar(image, ax=list(of), pad=0.01).ax
    above: dict[str, Any] = {
        "xycoords": "axes fraction",
        "textcoords": "offset points",
        "size": style.TICKS["labelsize"],
    }
    bar.annotate(name, (0, 1), (0, 3), va="bottom", **above)  # a title's width would not be given room
    bar.tick_params(width=0.3)
    for spine in bar.spines.values():
        spine.set_linewidth(0.3)
    return bar


def name_ticks(axis: Axis, names: Sequence[str], most: int = MOST_TICKS) -> None:
    """Ticks at 0, 1, ... with names, every second, fifth, tenth ... where there are many."""
    every = next(n for n in (1, 2, 4, 5, 8, 10, 16, 20, 25, 32, 50, 64, 100, len(names) + 1) if len(names) <= n * most)
    axis.set_ticks(range(0, len(names), every), labels=list(names[::every]))
    axis.set_minor_locator(NullLocator())


def write_numbers(axes: Axes, image: AxesImage, texts: Sequence[Sequence[str]], size: float = 5.5) -> None:
    """Write a text into every cell, light on dark and dark on light."""
    colours = image.to_rgba(image.get_array())[..., :3]  # type: ignore[arg-type]
    light = colours @ (0.299, 0.587, 0.114) > 0.5
    for i, row in enumerate(texts):
        for j, text in enumerate(row):
            axes.text(
                j, i, text, ha="center", va="center", size=size, color=style.ON_LIGHT if light[i, j] else style.ON_DARK
            )
