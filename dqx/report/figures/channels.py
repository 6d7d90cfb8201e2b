"""Channel maxima: how far the largest channels stand above the others, before and after.

Channels are sorted by their largest |x|, each side by its own, and both axes are logarithmic: a model without outliers
gives a flat line, and the few channels that a quantizer stumbles over stand at the left. Their numbers are written in.
"""

from __future__ import annotations

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dqx.record.folder import Record
from dqx.record.words import models
from dqx.report.figures import style
from dqx.report.figures.axes import panels, tick_plainly
from dqx.report.figures.sheet import Caption, legend, sheet, site_name, sites_of, windows

MOST_BLOCKS = 3
ROOM = 4.0  # times the highest line, for the names above it
NAMED = 3  # largest channels of each side


def channel_maxima(record: Record) -> dict[str, Figure]:
    """`channel_maxima`: blocks down, sites across; empty where nothing was kept."""
    kept = {name for name in record.activations if name.endswith("/channel_max")}
    if not kept:
        return {}
    blocks = first_middle_last({int(name.split("/")[1]) for name in kept})
    caption = Caption(
        "Largest |x| of every channel, before and after",
        models(record),
        f"Over {windows(record)}, as the linears read it, after rotations and scalings. Channels sorted by their "
        f"largest |x|; in the corners the numbers of the {NAMED} largest channels.",
    )
    sites = sites_of(record)
    figure = sheet(caption, 0.35 + 1.3 * len(blocks), legend_rows=1)
    rows = [f"block {block}\nlargest |x|" for block in blocks]
    grid = panels(figure, rows, [*map(site_name, sites)], "channel, by rank", sharex="col", sharey="col")
    for row, block in zip(grid, blocks, strict=True):
        for axes, site in zip(row, sites, strict=True):
            _panel(axes, record, block, site)
    for axes in grid[0]:
        axes.set_ylim(top=ROOM * axes.get_ylim()[1])
        tick_plainly(axes.xaxis)
        tick_plainly(axes.yaxis)
    legend(figure, grid[0], columns=2)
    return {"channel_maxima": figure}


def first_middle_last(blocks: set[int]) -> list[int]:
    """At most three of the blocks."""
    order = sorted(blocks)
    return order if len(order) <= MOST_BLOCKS else [order[0], order[len(order) // 2], order[-1]]


def _panel(axes: Axes, record: Record, block: int, site: str) -> None:
    axes.set(xscale="log", yscale="log")
    for i, side in enumerate(style.SIDES):
        maxima = record.activations.get(f"{side.key}/{block}/{site}/channel_max")
        if maxima is None:
            continue
        heights, order = maxima.double().sort(descending=True, stable=True)
        drawn = [x if 0 < x < math.inf else math.nan for x in heights.tolist()]  # what a logarithmic axis has
        axes.plot(range(1, len(drawn) + 1), drawn, label=side.label, **side.line)
        names = ", ".join(str(c) for c in order[:NAMED].tolist())
        axes.text(
            0.98, 0.97 - 0.13 * i, names, size=5.5, color=side.line["color"], ha="right", va="top",
            transform=axes.transAxes,
        )  # fmt: skip
