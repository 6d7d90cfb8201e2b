"""What axes of several figures have: the mask ratio above denoising steps, limits, ticks of logarithmic scales."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

MOST_RATIOS = 5
SHORT, LONG = 60, 3000  # logarithmic axes that end at less than so many times where they begin


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
