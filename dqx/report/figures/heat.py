"""A matrix as colours: numbers that are missing in grey, ticks that thin out as it grows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import Normalize
from matplotlib.image import AxesImage
from matplotlib.ticker import NullLocator
from numpy.typing import NDArray

from dqx.report.figures import style

MOST_TICKS = 9

Matrix = np.ma.MaskedArray[Any, np.dtype[np.float64]]


def masked(rows: Sequence[Sequence[float | None]]) -> Matrix:
    """A matrix whose None, NaN and infinite entries are masked."""
    values: NDArray[np.float64] = np.array(
        [[np.nan if x is None else float(x) for x in row] for row in rows], dtype=np.float64
    )
    return np.ma.masked_invalid(values)


def heat_map(
    axes: Axes,
    values: Matrix,
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    norm: Normalize,
    colours: str = style.LARGE_IS_DARK,
) -> AxesImage:
    """Draw values [R, C], the first row on top; what lies below the colours' range is white."""
    palette = mpl.colormaps[colours].with_extremes(bad=style.ABSENT, under="white")
    image = axes.imshow(values, cmap=palette, norm=norm, aspect="auto", interpolation="nearest")
    axes.grid(False)
    for axis, names in ((axes.xaxis, columns), (axes.yaxis, rows)):
        name_ticks(axis, names)
    for spine in axes.spines.values():
        spine.set(visible=True, linewidth=0.3)
    return image


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
            axes.text(j, i, text, ha="center", va="center", size=size, color="black" if light[i, j] else "white")
