"""The activation surface of the study's figure 1: |x| over tokens and channels, before and after.

A value is a bar, so that a massive outlier, one value on one token, stands by itself however many others there are.
Where a window has more values than a print can show, a bar is the largest of its patch, never a mean. Both sides have
one scale; where it would flatten the smaller side to nothing, each has its own and says so.

T tokens, C channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from mpl_toolkits.mplot3d import Axes3D
from mpl_toolkits.mplot3d.art3d import Line3DCollection, Poly3DCollection
from numpy.typing import NDArray

from dqx.models.transformer import SITES
from dqx.record.folder import Record
from dqx.report.figures import style
from dqx.report.figures.captions import SITE_NAMES, what_ran
from dqx.report.figures.sheet import Caption, between, sheet

MOST_TOKENS, MOST_CHANNELS = 128, 256  # bars of a panel; its axes are not many more points long
ONE_SCALE_UP_TO = 8.0  # times the smaller side's largest value
ASIDE = 0.012  # of the figure: panels stand to the left of their middle, for the numbers at their right
FLOOR = "#F3F3F3"
LOWEST = 0.01  # of the scale's upper end: lower bars are the floor
ELEVATION, AZIMUTH = 24.0, -58.0  # degrees
PALETTE = ListedColormap(mpl.colormaps[style.LARGE_IS_DARK](np.linspace(0.06, 1, 256)))  # palest: still not paper

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
        """Few enough values to draw, each the largest of its patch."""
        by = [math.ceil(n / most) for n, most in zip(self.values.shape, (MOST_TOKENS, MOST_CHANNELS), strict=True)]
        rows = np.maximum.reduceat(self.values, range(0, self.values.shape[0], by[0]), axis=0)
        values = np.maximum.reduceat(rows, range(0, self.values.shape[1], by[1]), axis=1)
        return Surface(values, (self.patch[0] * by[0], self.patch[1] * by[1]))

    def bars(self) -> Floats:
        """Token, channel and height of every bar [T C, 3], the farthest from the eye first."""
        token, channel = np.indices(self.values.shape)
        across, along = (np.cos(np.radians(AZIMUTH)), np.sin(np.radians(AZIMUTH)))
        near = across * channel / self.values.shape[1] + along * token / self.values.shape[0]
        order = np.argsort(near, axis=None, kind="stable")
        places = [(i * p + (p - 1) / 2).ravel() for i, p in zip((token, channel), self.patch, strict=True)]
        return np.stack([*places, self.values.ravel()], axis=1)[order]


def surfaces(record: Record) -> dict[str, Figure]:
    """One figure per block and site whose surface was kept: `surface_BLOCK_SITE`."""
    kept = {(block, site) for _, block, site, what in map(_split, record.activations) if what == "surface"}
    order = sorted(kept, key=lambda place: (place[0], list(SITES).index(place[1])))
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


def _split(name: str) -> tuple[str, int, str, str]:
    side, block, site, what = name.split("/")
    return side, int(block), site, what


def _figure(record: Record, block: int, site: str) -> Figure:
    found = {side: surface for side in style.SIDES if (surface := _surface(record, side.key, block, site)) is not None}
    tops = [surface.top or 1.0 for surface in found.values()]
    own_scales = max(tops) > ONE_SCALE_UP_TO * min(tops)
    tokens, channels = _extent(record, block, site)
    patch = next(iter(found.values())).pooled().patch
    notes = [
        "Vertical: |x| as the linears read it, after rotations and scalings; "
        f"the first calibration window, {tokens} tokens x {channels} channels",
        *(["a bar is the largest of {} tokens x {} channels".format(*patch)] if max(patch) > 1 else []),
        *(["each side has its own vertical scale"] if own_scales else []),
    ]
    caption = Caption(
        f"Activations before and after: block {block}, {SITE_NAMES[site]}", what_ran(record), "; ".join(notes) + "."
    )
    figure = sheet(caption, 2.55)
    left, bottom, width, height = between(figure)
    figure.set_layout_engine(None)
    for i, (side, surface) in enumerate(found.items()):
        share = width / len(found)
        axes = figure.add_axes(
            (left + i * share - ASIDE, bottom, share, height), projection="3d", computed_zorder=False
        )
        assert isinstance(axes, Axes3D)
        top = tops[i] if own_scales else max(tops)
        _draw(axes, surface.pooled(), top, (tokens, channels))
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


def _draw(axes: Axes3D, surface: Surface, top: float, extent: tuple[int, int]) -> None:
    """The bars on their floor; `top` is the upper end of the scale, `extent` how many tokens and channels there are."""
    tokens, channels = extent
    corners = [(0, 0, 0), (channels, 0, 0), (channels, tokens, 0), (0, tokens, 0)]
    floor = Poly3DCollection([corners], facecolor=FLOOR, linewidth=0)
    bars = surface.bars()
    token, channel, height = bars[bars[:, 2] >= LOWEST * top].T
    ends = [np.stack([channel, token, z], axis=1) for z in (np.zeros_like(height), height)]
    lines = Line3DCollection(
        np.stack(ends, axis=1), colors=PALETTE(height / top), linewidths=0.8, capstyle="butt", rasterized=True
    )
    for part in (floor, lines):
        part.set_clip_on(False)
        axes.add_collection3d(part, autolim=False)
    for limit, end in ((axes.set_xlim, channels), (axes.set_ylim, tokens), (axes.set_zlim, top)):
        limit(0, end, view_margin=0)
    axes.view_init(ELEVATION, AZIMUTH)
    axes.set_box_aspect((1.5, 1.1, 0.75), zoom=1.2)
    axes.set_xlabel("channel", labelpad=-7)
    axes.set_ylabel("token", labelpad=-7)
    axes.tick_params(pad=-3)
    for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
        axis.pane.set(facecolor="white", edgecolor="#BBBBBB", linewidth=0.4)
        axis.line.set_linewidth(0.5)
