"""Accuracy against average bits: every method with its interval, and the front of those that nothing beats.

Panels are activation widths, since a weight's bits are no fair price where activations differ. A method is on the front
where no other of its panel does as well with as few bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation

from dqx.common.names import natural
from dqx.config.schema import choices
from dqx.report.figures import groups, style
from dqx.report.figures.sheet import Caption, legend, sheet
from dqx.report.gather import Row, RunGroup

APART = 2.2  # points between methods, which often have the same bits
BESIDE = 0.6  # bits of room at the sides
ACROSS = 3  # panels beside each other


def accuracy_by_bits(group: RunGroup) -> Figure:
    """The figure of a group of runs, some of which have all of its tasks."""
    rows = groups.complete(group)
    panels = _panels(rows)
    families = [name for name in choices("method") if name != "fp16" and not name.endswith("_as_published")]
    looks = style.look(sorted({row.cell.method for row in rows}, key=natural), families)
    across, down = min(ACROSS, len(panels)), -(-len(panels) // ACROSS)
    better = "less" if groups.nats(group) else "more"
    caption = Caption(
        f"{groups.score(group).split(',')[0].capitalize()} against average bits per weight",
        groups.what_ran([group]),
        "Bits of the quantized weights, scales and zero points included. Bars: 95 % interval of the difference from "
        "full precision, paired by document. Methods of the same bits are drawn side by side. Grey: the Pareto front, "
        f"nothing has {better} with as few bits.{groups.left_out(group)}",
    )
    width, columns = (style.SINGLE, 3) if across == 1 else (style.DOUBLE, 5)
    legend_rows = math.ceil((len(looks) + 2) / columns)
    figure = sheet(caption, 2.5 * down, width, legend_rows)
    grid = figure.subplots(down, across, sharey=True, squeeze=False)
    for axes in grid.ravel()[len(panels) :]:
        axes.set_axis_off()
    for axes, (name, members) in zip(grid.ravel(), panels.items(), strict=False):
        _panel(axes, group, members, looks)
        axes.set(title=f"activations of {name}", xlabel="average bits per weight")
    for row in grid:
        row[0].set_ylabel(groups.score(group))
    _limit(grid[0][0], group, rows)
    legend(figure, grid.ravel(), columns, legend_rows)
    return figure


def front(points: Sequence[tuple[float, float]], lower_is_better: bool = False) -> list[tuple[float, float]]:
    """The points (bits, score), by bits, than which no other is as good with as few bits."""
    sign = -1 if lower_is_better else 1
    best: list[tuple[float, float]] = []
    for bits, score in sorted(points, key=lambda point: (point[0], -sign * point[1])):
        if not best or sign * score > sign * best[-1][1]:
            best.append((bits, score))
    return best


def _panels(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows by the width and format of activations, the widest first."""
    panels: dict[tuple[int, str], list[Row]] = {}
    for row in rows:
        run = row.cell.runs[0].record.settings
        panels.setdefault((run.activation_bits, run.activation_format), []).append(row)
    order = sorted(panels, key=lambda key: (-key[0], key[1]))
    named = [f"{bits} bits{'' if format == 'int' or bits == 16 else f' ({format})'}" for bits, format in order]
    return {name: panels[key] for name, key in zip(named, order, strict=True)}


def _panel(axes: Axes, group: RunGroup, rows: Sequence[Row], looks: dict[str, dict[str, Any]]) -> None:
    line: dict[str, Any] = {"color": style.BLACK, "linestyle": (0, (4, 2)), "linewidth": 0.7}
    axes.axhline(groups.full_precision(group), label="full precision", **line)
    points = [(row.cell.average_bits, groups.quantized(group, row.overall)[0]) for row in rows]
    best = front(points, groups.nats(group))
    axes.step(*zip(*best, strict=True), where="post", color="#BBBBBB", linewidth=2.5, zorder=1, label="Pareto front")
    bits = [row.cell.average_bits for row in rows]
    axes.set_xlim(min(bits) - BESIDE, max(bits) + BESIDE)
    axes.xaxis.set_major_locator(MaxNLocator(9, integer=True, min_n_ticks=1))
    methods = [name for name in looks if any(row.cell.method == name for row in rows)]
    for i, method in enumerate(methods):
        cells = sorted((row for row in rows if row.cell.method == method), key=lambda row: row.cell.average_bits)
        values = [groups.quantized(group, row.overall) for row in cells]
        heights = [value for value, _, _ in values]
        limits = np.maximum(0, [[value - low, high - value] for value, low, high in values]).T
        aside = ScaledTranslation(APART * (i - (len(methods) - 1) / 2) / 72, 0, axes.figure.dpi_scale_trans)
        axes.errorbar(
            [row.cell.average_bits for row in cells], heights, yerr=limits, label=method, elinewidth=0.7, capsize=0,
            transform=axes.transData + aside, **looks[method] | {"linestyle": "none"},
        )  # fmt: skip


def _limit(axes: Axes, group: RunGroup, rows: Sequence[Row]) -> None:
    """Room for full precision and every interval."""
    shown = [groups.full_precision(group), *(x for row in rows for x in groups.quantized(group, row.overall))]
    heights = [x for x in shown if math.isfinite(x)]
    room = 0.05 * (max(heights) - min(heights)) or 1.0
    axes.set_ylim(min(heights) - room, max(heights) + room)
