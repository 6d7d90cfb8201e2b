"""How figures look: sizes, fonts, colours, markers. Whatever two figures share is said here.

Sizes are those of a two-column paper. Colours are Okabe and Ito's, told apart with every kind of colour vision; each
comes with a marker and a line style of its own, so that a print in black and white reads too; they are seen on white
and on a dark page, where ink, greys and paper change places (`both_palettes`). Colour maps grow evenly
in lightness (viridis, cividis); a diverging one is used only where numbers have a sign.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl

SINGLE, DOUBLE = 3.3, 6.9  # inches: one column, both columns
DPI = 150  # of PNG
PRINT_DPI = 300  # of what is no line in a PDF

INK, ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILION, PURPLE = (
    "#111111", "#E69F00", "#56B4E9", "#009E73", "#A89600", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
PAPER, FLOOR, GRID, SOFT, QUIET = "#FFFFFF", "#F3F3F3", "#E4E4E4", "#BBBBBB", "#404040"
ON_LIGHT, ON_DARK = "#101010", "#FEFEFE"  # numbers written on colours
ABSENT = "#D9D9D9"  # where a heat map has no number
#: What becomes of them on a dark page; colours of lines stay. Pictures are turned round, so what is written on them is.
DARK = {
    INK: "#E6E9ED", PAPER: "#14171B", FLOOR: "#1D2126", GRID: "#363D46", SOFT: "#5C6570", QUIET: "#A3ACB7",
    ON_LIGHT: "#EFEFEF", ON_DARK: "#010101",
}  # fmt: skip

LARGE_IS_DARK = "viridis_r"  # outliers: the eye goes to what is large
SMALL_IS_DARK = "cividis"  # signal to noise: to what is small
SIGNED = "PuOr"  # differences, around 0

#: Lines that are laid over one another, in their order.
CYCLE: tuple[dict[str, Any], ...] = (
    {"color": BLUE, "marker": "o", "linestyle": "-"},
    {"color": VERMILION, "marker": "s", "linestyle": "--"},
    {"color": GREEN, "marker": "^", "linestyle": "-."},
    {"color": ORANGE, "marker": "D", "linestyle": ":"},
    {"color": PURPLE, "marker": "v", "linestyle": (0, (5, 1, 1, 1, 1, 1))},
    {"color": SKY, "marker": "P", "linestyle": (0, (1, 1))},
    {"color": INK, "marker": "X", "linestyle": (0, (8, 2))},
    {"color": YELLOW, "marker": "p", "linestyle": (0, (3, 1))},
)
FILLS = ("full", "none", "left", "top")  # of markers


@dataclass(frozen=True, eq=False)
class Side:
    """One of the two models of a run."""

    key: str  # in the record
    label: str
    line: dict[str, Any]


SIDES = (
    Side("full_precision", "full precision", {"color": INK, "linestyle": "-"}),
    Side("quantized", "quantized", {"color": VERMILION, "linestyle": (0, (4, 1.5))}),
)

FONTS = ["DejaVu Sans", "Verdana", "sans-serif"]  # those behind the first: as wide or narrower, in an SVG
TICKS = {"labelsize": 6, "major.width": 0.5, "major.size": 2.5, "minor.width": 0.3, "minor.size": 1.5}
RC: Any = {  # matplotlib types its keys one by one
    "font.family": "sans-serif", "font.sans-serif": FONTS, "font.size": 7, "axes.titlesize": 7, "axes.labelsize": 7,
    "legend.fontsize": 6, "legend.frameon": False, "figure.dpi": DPI, "savefig.dpi": DPI,
    "axes.linewidth": 0.5, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": GRID, "grid.linewidth": 0.4,
    "lines.linewidth": 1.0, "lines.markersize": 3.0, "hatch.linewidth": 0.4,
    **{f"{axis}tick.{key}": value for axis in "xy" for key, value in TICKS.items()},
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "dqx",  # text stays text, names stay the same
}  # fmt: skip


@contextmanager
def applied() -> Iterator[None]:
    """Draw in this style, whatever the settings of the machine are; they are back afterwards."""
    with mpl.rc_context():
        mpl.rcdefaults()
        with mpl.rc_context(RC):
            yield


def both_palettes(svg: str) -> str:
    """An SVG that whoever asks for dark colours sees in those of `DARK`; other viewers see it as it was."""
    rules = [
        f'[style*="{what}: {light.lower()}"] {{ {what}: {dark} !important }}'
        for light, dark in DARK.items()
        for what in ("fill", "stroke")
    ]
    rules.append("image { filter: invert(1) hue-rotate(180deg) }")
    style = "\n".join(["<style>", "@media (prefers-color-scheme: dark) {", *rules, "}", "</style>"])
    return svg.replace("<defs>", f"{style}\n<defs>", 1)


def look(names: Sequence[str], known: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Colour, marker and line style of each name.

    Known names look the same in every figure, and variants of one (`gptq_as_published`, `gptq, mcs`) differ from it in
    the fill; names beyond those come next in order. More of them than colours change the fill as well.
    """
    places, variants, looks = list(known), Counter[str](), {}
    for name in names:
        base = next((one for one in known if re.match(rf"{re.escape(one)}(_|\W|$)", name)), name)
        if base not in places:
            places.append(base)
        again, place = divmod(places.index(base), len(CYCLE))
        looks[name] = CYCLE[place] | {"fillstyle": FILLS[(again + variants[base]) % len(FILLS)]}
        variants[base] += 1
    return looks
