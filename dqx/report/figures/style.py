"""How figures look: sizes, fonts, colours, markers. Whatever two figures share is said here.

Sizes are those of a two-column paper. Colours are Okabe and Ito's, told apart with every kind of colour vision; each
comes with a marker and a line style of its own, so that a print in black and white reads too. Colour maps grow evenly
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

BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILION, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
ABSENT = "#D9D9D9"  # where a heat map has no number

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
    {"color": BLACK, "marker": "X", "linestyle": (0, (8, 2))},
    {"color": YELLOW, "marker": "p", "linestyle": (0, (3, 1)), "markeredgecolor": BLACK, "markeredgewidth": 0.4},
)
FILLS = ("full", "none", "left", "top")  # of markers


@dataclass(frozen=True, eq=False)
class Side:
    """One of the two models of a run."""

    key: str  # in the record
    label: str
    line: dict[str, Any]


SIDES = (
    Side("full_precision", "full precision", {"color": BLACK, "linestyle": "-"}),
    Side("quantized", "quantized", {"color": VERMILION, "linestyle": (0, (4, 1.5))}),
)

TICKS = {"labelsize": 6, "major.width": 0.5, "major.size": 2.5, "minor.width": 0.3, "minor.size": 1.5}
RC: Any = {  # matplotlib types its keys one by one
    "font.family": "DejaVu Sans", "font.size": 7, "axes.titlesize": 7, "axes.labelsize": 7,
    "legend.fontsize": 6, "legend.frameon": False, "figure.dpi": DPI, "savefig.dpi": DPI,
    "axes.linewidth": 0.5, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": "#E4E4E4", "grid.linewidth": 0.4,
    "lines.linewidth": 1.0, "lines.markersize": 3.0, "hatch.linewidth": 0.4,
    **{f"{axis}tick.{key}": value for axis in "xy" for key, value in TICKS.items()},
    "pdf.fonttype": 42,  # text stays text
}  # fmt: skip


@contextmanager
def applied() -> Iterator[None]:
    """Draw in this style, whatever the settings of the machine are; they are back afterwards."""
    with mpl.rc_context():
        mpl.rcdefaults()
        with mpl.rc_context(RC):
            yield


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
