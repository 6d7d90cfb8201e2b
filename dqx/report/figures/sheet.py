"""A figure with its caption: above what it shows and what was run, below units and counts; sites in words.

The caption is broken to the figure's width and the figure grows with it, so that no name is too long. What is drawn
lies between the two; `between` says where, in shares of the figure.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font

from dqx.record.folder import Record
from dqx.record.words import public
from dqx.report.figures import style

MARGIN = 0.08  # inches
TITLE, TEXT, FOOT = 8.0, 6.5, 6.0  # points
LEADING = 1.35  # of a line, in font sizes
LEGEND_ROW, GAP = 0.15, 0.04  # inches
POINTS = 72  # per inch
FINE = 720  # dots per inch: letters are as wide as in print
HINTED = 1.05  # as wide as that they may be on the grid of a PNG

#: Sites of a dense transformer as people say them.
SITE_NAMES = {
    "attn_in": "input of q, k, v",
    "attn_out": "input of o",
    "mlp_in": "input of gate, up",
    "mlp_out": "input of down",
}


@dataclass(frozen=True)
class Caption:
    """The words of a figure."""

    title: str  # what it shows
    run: str  # what was run
    foot: str  # units and counts


def sheet(caption: Caption, height: float, width: float = style.DOUBLE, legend_rows: int = 0) -> Figure:
    """An empty figure `width` wide with `height` inches for what is drawn, which keeps clear of words and legend."""
    room = width - 2 * MARGIN
    parts = ((caption.title, TITLE, True), (caption.run, TEXT, False), (caption.foot, FOOT, False))
    lines = [wrapped(public(text), room, size, bold) for text, size, bold in parts]
    tall = [len(broken) * size * LEADING / POINTS for broken, (_, size, _) in zip(lines, parts, strict=True)]
    below = MARGIN + tall[2] + GAP
    base = below + legend_rows * LEGEND_ROW
    total = base + height + tall[1] + tall[0] + MARGIN
    figure = Figure(figsize=(width, total), dpi=style.DPI)
    FigureCanvasAgg(figure)
    tops = (total - MARGIN, total - MARGIN - tall[0], MARGIN + tall[2])
    for broken, (_, size, bold), top in zip(lines, parts, tops, strict=True):
        weight, colour = ("bold", style.INK) if bold else ("normal", style.QUIET)
        words = figure.text(MARGIN / width, top / total, "\n".join(broken), size=size, va="top", weight=weight)
        words.set(color=colour, linespacing=1.1, parse_math=False, in_layout=False)
    figure.set_layout_engine("constrained", rect=(0, base / total, 1, height / total), w_pad=0.03, h_pad=0.03)
    return figure


def between(figure: Figure) -> tuple[float, float, float, float]:
    """Left, bottom, width and height of what lies between words and legend."""
    rect: tuple[float, float, float, float] = figure.get_layout_engine().get()["rect"]  # type: ignore[union-attr]
    return rect


def legend(figure: Figure, of: Iterable[Axes], columns: int, rows: int = 1) -> None:
    """Put one legend of these axes below them all, in the rows that `sheet` was asked to leave for it."""
    handles = {label: handle for axes in of for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    room = inches(figure)[0] / columns - 0.45
    height = rows * LEGEND_ROW / inches(figure)[1]
    labels = [shortened(public(label), room, 6) for label in handles]
    box = figure.legend(list(handles.values()), labels, ncols=columns, loc="center", borderaxespad=0)
    box.set_bbox_to_anchor((0, between(figure)[1] - height, 1, height), figure.transFigure)
    box.set_in_layout(False)


def settled(figure: Figure) -> Figure:
    """The figure with everything in its place, which saving does not work out again."""
    if engine := figure.get_layout_engine():
        engine.execute(figure)
        figure.set_layout_engine("none")
    return figure


def inches(figure: Figure) -> tuple[float, float]:
    """Width and height of a figure."""
    width, height = figure.get_size_inches()
    return float(width), float(height)


def wrapped(text: str, room: float, size: float, bold: bool = False) -> list[str]:
    """The text in lines no wider than `room` inches, broken at spaces, and within a word that is wider than a line."""
    lines, line = [], ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if measured(longer, size, bold) <= room:
            line = longer
            continue
        if line:
            lines.append(line)
        while measured(word, size, bold) > room:
            fits = next(n for n in range(len(word) - 1, 0, -1) if measured(word[:n], size, bold) <= room or n == 1)
            lines.append(word[:fits])
            word = word[fits:]
        line = word
    return [*lines, line]


def shortened(text: str, room: float, size: float) -> str:
    """The text, its middle left out where it is wider than `room` inches."""
    if measured(text, size) <= room:
        return text
    for kept in range(len(text) - 1, 1, -1):
        shorter = f"{text[: (kept + 1) // 2]}…{text[-(kept // 2) :]}"
        if measured(shorter, size) <= room:
            return shorter
    return "…"


@lru_cache(maxsize=4096)
def measured(text: str, size: float, bold: bool = False) -> float:
    """Width in inches of a line of text."""
    font = get_font(findfont(FontProperties(family="DejaVu Sans", weight="bold" if bold else "normal")))
    font.set_size(size, FINE)
    font.set_text(text)
    return HINTED * float(font.get_width_height()[0]) / 64 / FINE


def site_name(site: str) -> str:
    """A site in words."""
    return SITE_NAMES.get(site, f"input at {site}")


def sites_of(record: Record) -> list[str]:
    """The sites that the record's statistics and tensors are of, in their order."""
    measured = [site for stats in record.outliers.values() for site in stats.sites]
    return list(dict.fromkeys([*measured, *(name.split("/")[2] for name in record.activations)]))


def answers(record: Record) -> str:
    """The answers that denoising states were taken from: ` of 4 answers of 16 tokens`; empty where none are."""
    known = record.fidelity.get("answers")
    return f" of {known['documents']} answers of {known['tokens']} tokens" if known else ""


def windows(record: Record) -> str:
    """The text that outlier statistics were made on: `8 calibration windows of 256 tokens`."""
    stats = next(iter(record.outliers.values()))
    return f"{stats.sequences} calibration windows of {stats.tokens // stats.sequences} tokens"
