"""The activation surface of the study's figure 1: |x| over tokens and channels, before and after.

A value is a bar, so that a massive outlier, one value on one token, stands by itself however many others there are.
Where a window has more values than a print can show, a bar is the largest of its patch, never a mean. Both sides have
one scale; where it would flatten the smaller side to nothing, each has its own and says so. The projection is parallel,
so that equal values are equally tall wherever they stand; bars are painted into one image, in a hundredth of the time
that a path for each would take.

T tokens, C channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Polygon
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from dqx.diagnostics.activations.stats import MOST_CELLS
from dqx.record.folder import Record
from dqx.record.words import models
from dqx.report.figures import style
from dqx.report.figures.sheet import Caption, between, inches, sheet, site_name, sites_of

ONE_SCALE_UP_TO = 8.0  # times the smaller side's largest value
LOWEST = 0.01  # of the scale's upper end: lower bars are the floor
LENGTHS = np.array([165.0, 121.0, 85.0])  # of the axes of channels, tokens and |x|, points
ELEVATION, AZIMUTH = np.radians(24.0), np.radians(-58.0)  # of the eye
PAGE = LENGTHS * [  # how far a whole axis goes to the right and up, points
    [-np.sin(AZIMUTH), np.cos(AZIMUTH), 0.0],
    [-np.sin(ELEVATION) * np.cos(AZIMUTH), -np.sin(ELEVATION) * np.sin(AZIMUTH), np.cos(ELEVATION)],
]
LEFT, BELOW = 17.0, 13.0  # of the box, for the numbers at its axes, points
WIDE = 0.8  # a bar, points
FINE = style.PRINT_DPI / 72  # dots per point in which bars are painted
PALETTE = ListedColormap(mpl.colormaps[style.LARGE_IS_DARK](np.linspace(0.06, 1, 255)))  # palest: still not paper
COLOURS = np.vstack([np.zeros((1, 4), np.uint8), PALETTE(np.arange(PALETTE.N), bytes=True)])  # 0: none

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Surface:
    """|x| of one window at one place, and how many tokens and channels each value stands for."""

    values: Floats  # [T, C]
    patch: tuple[int, int]

    @property
    def top(self) -> float:
        return float(self.values.max())

    def pooled(self) -> Surface:
        """Few enough values to draw, each the largest of its patch. Older records have four times as many."""
        by = [math.ceil(n / most) for n, most in zip(self.values.shape, MOST_CELLS, strict=True)]
        rows = np.maximum.reduceat(self.values, range(0, self.values.shape[0], by[0]), axis=0)
        values = np.maximum.reduceat(rows, range(0, self.values.shape[1], by[1]), axis=1)
        return Surface(values, (self.patch[0] * by[0], self.patch[1] * by[1]))


@dataclass(frozen=True)
class View:
    """The box that bars stand in, as it lies on the page; the nearest corner is the one of the last channel."""

    channels: int
    tokens: int
    top: float  # upper end of the scale

    def at(self, points: ArrayLike) -> Floats:
        """Where points [..., 3] of channel, token and |x| are on the page: points to the right and up [..., 2]."""
        shares = np.asarray(points, dtype=float) / (self.channels, self.tokens, self.top)
        return shares @ PAGE.T + (LEFT, BELOW - PAGE[1, 0])

    def painted(self, surface: Surface) -> NDArray[np.uint8]:
        """The bars as a picture of numbers of COLOURS, from its lower left corner.

        Seen from the nearest token on, of every bar that part shows which is above all those before it. Where bars are
        wider than their distance on the page, several of a token share a dot, and the last channel is the nearest.
        """
        (n_tokens, n_channels), ends, wide = surface.values.shape, FINE * PAGE, WIDE * FINE
        along = ends[:, 1] * surface.patch[0] / self.tokens  # from a bar to that of the next token, dots
        across = ends[:, 0] * surface.patch[1] / self.channels
        dots, sharing = np.arange(math.ceil(ends[0].sum() + wide)), math.ceil(wide / across[0])
        token, nth = (n.reshape(-1, 1) for n in np.divmod(np.arange(n_tokens * sharing), sharing))
        place = (dots - along[0] * (token + 0.5)) / across[0] - 0.5
        channel = np.floor(place).astype(int) - nth
        there = (channel >= 0) & (channel < n_channels) & ((place - channel) * across[0] < wide)
        heights = np.where(there, surface.values[token, channel.clip(0, n_channels - 1)], 0.0)
        foot = np.rint(across[1] * (channel + 0.5) + along[1] * (token + 0.5) - ends[1, 0]).astype(int).clip(0)
        head = np.where(heights >= LOWEST * self.top, foot + np.rint(ends[1, 2] * heights / self.top).astype(int), 0)
        foot[1:] = np.maximum(foot[1:], np.maximum.accumulate(head)[:-1])
        seen = head > foot
        colour = 1 + (heights[seen] / self.top * (PALETTE.N - 1)).astype(np.uint8)
        column = np.broadcast_to(dots, seen.shape)[seen]
        changes = np.zeros((head.max() + 1, len(dots)), np.uint8)  # from a dot to the one above, modulo 256
        np.add.at(changes, (foot[seen], column), colour)
        np.subtract.at(changes, (head[seen], column), colour)
        return changes.cumsum(axis=0, dtype=np.uint8)


def surfaces(record: Record) -> dict[str, Figure]:
    """One figure per block and site whose surface was kept: `surface_BLOCK_SITE`."""
    names = [name.split("/") for name in record.activations]
    kept = {(int(block), site) for _, block, site, what in names if what == "surface"}
    sites = sites_of(record)
    order = sorted(kept, key=lambda place: (place[0], sites.index(place[1])))
    return {f"surface_{block}_{site}": _figure(record, block, site) for block, site in order}


def with_one_surface(record: Record) -> Record:
    """The record with the activation surfaces of one block and site alone, that of the largest value."""
    stats = record.outliers.get("full_precision")
    sizes = {f"{row.block}/{row.site}": row.abs_max for row in stats.rows} if stats else {}
    surfaces = [name for name in record.activations if name.endswith("/surface")]
    places = {name: name.partition("/")[2].removesuffix("/surface") for name in surfaces}
    largest = max(places.values(), key=lambda place: sizes.get(place, 0.0), default=None)
    kept = {name: record.activations[name] for name in record.activations if places.get(name, largest) == largest}
    return replace(record, activations=kept)


def _figure(record: Record, block: int, site: str) -> Figure:
    sides = {side: surface for side in style.SIDES if (surface := _surface(record, side.key, block, site)) is not None}
    tops = [surface.top or 1.0 for surface in sides.values()]
    own_scales = max(tops) > ONE_SCALE_UP_TO * min(tops)
    tokens, channels = _extent(record, block, site)
    patch = next(iter(sides.values())).pooled().patch
    notes = [
        "Vertical: |x| as the linears read it, after rotations and scalings; "
        f"the first calibration window, {tokens} tokens x {channels} channels",
        *(["a bar is the largest of {} tokens x {} channels".format(*patch)] if max(patch) > 1 else []),
        *(["each side has its own vertical scale"] if own_scales else []),
    ]
    caption = Caption(
        f"Activations before and after: block {block}, {site_name(site)}", models(record), "; ".join(notes) + "."
    )
    figure = sheet(caption, 2.55)
    left, bottom, width, height = between(figure)
    figure.set_layout_engine(None)
    share, (inches_wide, inches_high) = width / len(sides), inches(figure)
    for i, (side, surface) in enumerate(sides.items()):
        axes = figure.add_axes((left + i * share, bottom, share, height))
        view = View(channels, tokens, tops[i] if own_scales else max(tops))
        _draw(axes, surface.pooled(), view, (72 * share * inches_wide, 72 * height * inches_high))
        own = ", its own scale" if own_scales else ""
        title = f"{side.label}: up to {surface.top:.3g}{own}"
        figure.text(left + (i + 0.5) * share, bottom + height, title, ha="center", va="top")
    return figure


def _surface(record: Record, side: str, block: int, site: str) -> Surface | None:
    """What was kept of one side, None where nothing was."""
    tensor = record.activations.get(f"{side}/{block}/{site}/surface")
    if tensor is None:
        return None
    whole = _extent(record, block, site)
    patch = [math.ceil(n / kept) for n, kept in zip(whole, tensor.shape, strict=True)]
    return Surface(tensor.float().nan_to_num(0.0, 0.0, 0.0).numpy(), (patch[0], patch[1]))


def _extent(record: Record, block: int, site: str) -> tuple[int, int]:
    """Tokens of a window and channels of a place."""
    stats = next(iter(record.outliers.values()))
    return stats.tokens // stats.sequences, stats.at(block, site).channels


def _draw(axes: Axes, surface: Surface, view: View, size: tuple[float, float]) -> None:
    """The bars in their box, with the numbers and names of its axes, on a page of this size in points."""
    axes.set(xlim=(0, size[0]), ylim=(0, size[1]))
    axes.set_axis_off()
    c, t, z = view.channels, view.tokens, view.top
    locator = MaxNLocator(6, steps=[1, 2, 2.5, 5, 10])
    ticks = [[n for n in locator.tick_values(0, end) if 0 <= n <= end] for end in (c, t, z)]
    grid: list[ArrayLike] = [[(n, t, 0), (n, t, z)] for n in ticks[0]]
    grid += [[(0, n, 0), (0, n, z)] for n in ticks[1]]
    grid += [[(0, 0, n), (0, t, n), (c, t, n)] for n in ticks[2]]
    walls: list[ArrayLike] = [[(0, 0, 0), (0, 0, z), (0, t, z), (c, t, z)], [(0, t, 0), (0, t, z)]]
    edges: list[ArrayLike] = [[(0, 0, 0), (c, 0, 0), (c, t, 0), (c, t, z)]]
    for lines, colour in ((grid, style.GRID), (walls, style.SOFT), (edges, style.INK)):
        axes.add_collection(LineCollection([view.at(line) for line in lines], colors=colour, linewidths=0.5))
    axes.add_patch(Polygon(view.at([(0, 0, 0), (c, 0, 0), (c, t, 0), (0, t, 0)]), facecolor=style.FLOOR))
    painted = view.painted(surface)
    height, width = np.array(painted.shape) / FINE
    extent = (LEFT - WIDE / 2, LEFT - WIDE / 2 + width, BELOW, BELOW + height)
    axes.imshow(COLOURS[painted], origin="lower", extent=extent, aspect="auto", zorder=2)
    marks = []
    for axis, (name, start) in enumerate((("channel", (0, 0, 0)), ("token", (c, 0, 0)), ("", (c, t, 0)))):
        along, up = PAGE[:, axis] / np.hypot(*PAGE[:, axis])
        outward, unit = np.array([up, -along]), np.eye(3)[axis]
        for n in ticks[axis]:
            place = view.at(start + n * unit)
            marks.append([place, place + 2.5 * outward])
            x, y = place + 9 * outward
            axes.text(x, y, f"{n:g}", size=6, ha="center", va="center")
        x, y = view.at(start + (c, t, z) * unit / 2) + 21 * outward
        axes.text(x, y, name, ha="center", va="center", rotation=np.degrees(np.arctan2(up, along)))
    axes.add_collection(LineCollection(marks, colors=style.INK, linewidths=0.5))
