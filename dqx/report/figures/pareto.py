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

APART = 4.0  # points between methods of the same bits whose intervals would lie over each other
TALL = 0.05  # of all scores' range: what a marker covers
DIGITS = 2  # of bits that count as the same
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
        "full precision, paired by document. Of methods with the same bits the best stands there; others that would "
        f"lie over each other are moved to its right. Grey: the Pareto front, nothing has {better} with as few bits."
        f"{groups.left_out(group)}",
    )
    width, columns = (style.SINGLE, 3) if across == 1 else (style.DOUBLE, 5)
    legend_rows = math.ceil((len(looks) + 2) / columns)
    figure = sheet(caption, 2.5 * down, width, legend_rows)
    grid = figure.subplots(down, across, sharey=True, squeeze=False)
    for axes in grid.ravel()[len(panels) :]:
        axes.set_axis_off()
    low, high = _range(group, rows)
    tall = TALL * (high - low) or 1.0
    for axes, (name, members) in zip(grid.ravel(), panels.items(), strict=False):
        _panel(axes, group, members, looks, tall)
        axes.set(title=f"activations of {name}", xlabel="average bits per weight")
    for row in grid:
        row[0].set_ylabel(groups.score(group))
    grid[0][0].set_ylim(low - tall, high + tall)
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


def _panel(axes: Axes, group: RunGroup, rows: Sequence[Row], looks: dict[str, dict[str, Any]], tall: float) -> None:
    line: dict[str, Any] = {"color": style.INK, "linestyle": (0, (4, 2)), "linewidth": 0.7}
    axes.axhline(groups.full_precision(group), label="full precision", **line)
    bits = [_bits(row) for row in rows]
    axes.set_xlim(min(bits) - BESIDE, max(bits) + BESIDE)
    axes.xaxis.set_major_locator(MaxNLocator(9, integer=True, min_n_ticks=1))
    best = front([(_bits(row), _score(group, row)) for row in rows], groups.nats(group))
    best.append((axes.get_xlim()[1], best[-1][1]))
    axes.step(*zip(*best, strict=True), where="post", color=style.SOFT, linewidth=2.5, zorder=1, label="Pareto front")
    placed = _places(group, rows, tall)
    for method, place in sorted(placed, key=lambda key: (list(looks).index(key[0]), key[1])):
        cells = placed[method, place]
        values = [groups.quantized(group, row.overall) for row in cells]
        limits = np.maximum(0, [[value - low, high - value] for value, low, high in values]).T
        aside = ScaledTranslation(APART * place / 72, 0, axes.figure.dpi_scale_trans)
        axes.errorbar(
            [_bits(row) for row in cells], [value for value, _, _ in values], yerr=limits, label=method, elinewidth=0.7,
            capsize=0, transform=axes.transData + aside, **looks[method] | {"linestyle": "none"},
        )  # fmt: skip


def _bits(row: Row) -> float:
    return round(row.cell.average_bits, DIGITS)


def _score(group: RunGroup, row: Row) -> float:
    return groups.quantized(group, row.overall)[0]


def _places(group: RunGroup, rows: Sequence[Row], tall: float) -> dict[tuple[str, int], list[Row]]:
    """The rows by method and by how many places to the right of its bits each is drawn: where nothing is in its way.

    The best of those with the same bits comes first and stays, and no other moves to the left: none can seem better
    than it is.
    """
    taken: dict[float, list[list[tuple[float, float]]]] = {}  # bits -> place -> the heights that are covered there
    placed: dict[tuple[str, int], list[Row]] = {}
    for row in sorted(rows, key=lambda row: _score(group, row), reverse=not groups.nats(group)):
        score, *limits = groups.quantized(group, row.overall)
        heights = [score, *filter(math.isfinite, limits)]
        low, high = min(heights) - tall / 2, max(heights) + tall / 2
        places = taken.setdefault(_bits(row), [])
        fits = (i for i, there in enumerate(places) if all(high < bottom or top < low for bottom, top in there))
        place = next(fits, len(places))
        places[place:] = places[place:] or [[]]
        places[place].append((low, high))
        placed.setdefault((row.cell.method, place), []).append(row)
    return placed


def _range(group: RunGroup, rows: Sequence[Row]) -> tuple[float, float]:
    """The lowest and the highest of what is drawn: full precision, and every interval."""
    shown = [groups.full_precision(group), *(x for row in rows for x in groups.quantized(group, row.overall))]
    heights = [x for x in shown if math.isfinite(x)]
    return min(heights), max(heights)
