"""Outliers while an answer is written: block by denoising step, and by what a token is to the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dqx.diagnostics.activations import PartStats
from dqx.record.folder import Record
from dqx.record.words import models
from dqx.report.figures import style
from dqx.report.figures.axes import colour_bar, from_zero, heat_map, mask_ratios_on_top, masked, panels, tick_plainly
from dqx.report.figures.sheet import Caption, answers, legend, sheet, site_name

MOST_MARKERS = 12  # of a line
CLASSES = ("prompt", "committed", "masked")
STATES = "States{} that full precision visits while it writes, the same for both sides"
NONE = 1e-9  # a share below is none


@dataclass(frozen=True)
class Measure:
    """One number of a part, and how it is drawn."""

    name: str  # of the figures made of it
    title: str
    label: str  # with its unit
    of: Callable[[PartStats], float]
    log: bool

    def norm(self, values: Sequence[float]) -> Normalize:
        """Colours from the smallest to the largest of the values; shares begin above 0, so that none is below them."""
        if self.log:
            drawn = [x for x in values if 0 < x < float("inf")] or [1.0]
            return LogNorm(min(drawn), max(max(drawn), 1.01 * min(drawn)))
        return Normalize(NONE, max(values, default=0.0) or 1.0)


def massive_share(part: PartStats) -> float:
    """Tokens with a massive value, in percent."""
    return 100 * part.massive_tokens / part.tokens if part.tokens else 0.0


MEASURES = (
    Measure("outliers", "Largest |x|", "largest |x|", lambda part: part.abs_max, log=True),
    Measure("massive", "Tokens with a massive value", "tokens, %", massive_share, log=False),
)


def by_step(record: Record) -> dict[str, Figure]:
    """`outliers_by_step` and, where there are massive values, `massive_by_step`."""
    parts = {side: [p for p in rows if p.step is not None] for side, rows in _parts(record).items()}
    return {f"{m.name}_by_step": _by_step(record, m, parts) for m in MEASURES if _shown(m, parts)}


def by_class(record: Record) -> dict[str, Figure]:
    """`outliers_by_class` and, where there are massive values, `massive_by_class`."""
    parts = {side: [p for p in rows if p.step is None] for side, rows in _parts(record).items()}
    return {f"{m.name}_by_class": _by_class(record, m, parts) for m in MEASURES if _shown(m, parts)}


Parts = dict[style.Side, list[PartStats]]


def _parts(record: Record) -> Parts:
    return {side: record.outliers[side.key].parts for side in style.SIDES if side.key in record.outliers}


def _shown(measure: Measure, parts: Parts) -> list[str]:
    """The sites at which there is something to see."""
    every = [part for of_side in parts.values() for part in of_side]
    seen = {part.site for part in every if measure.of(part) > 0}
    return [site for site in dict.fromkeys(part.site for part in every) if site in seen]


def _by_step(record: Record, measure: Measure, parts: Parts) -> Figure:
    sites = _shown(measure, parts)
    caption = Caption(
        f"{measure.title} by block and denoising step",
        models(record),
        f"{STATES.format(answers(record))}. Colours: {measure.label}, one scale for both sides of a site"
        f"{'; logarithmic' if measure.log else ', blank: none'}. {_definition(record, measure)}",
    )
    figure = sheet(caption, 0.6 + 1.05 * len(sites))
    names = [f"{site_name(site)}\nblock" for site in sites]
    grid = panels(figure, names, [side.label for side in parts], "denoising step", sharex=True, sharey=True)
    for row, site in zip(grid, sites, strict=True):
        at = {side: [p for p in rows if p.site == site] for side, rows in parts.items()}
        norm = measure.norm([measure.of(p) for rows in at.values() for p in rows])
        for axes, rows in zip(row, at.values(), strict=True):
            steps, blocks = (sorted({getattr(p, key) for p in rows}) for key in ("step", "block"))
            cells = {(p.block, p.step): measure.of(p) for p in rows}
            values = masked([[cells.get((block, step)) for step in steps] for block in blocks])
            image = heat_map(axes, values, rows=list(map(str, blocks)), columns=list(map(str, steps)), norm=norm)
        bar = colour_bar(figure, image, row, measure.label if site == sites[0] else "")
        if measure.log:
            tick_plainly(bar.yaxis)
    for axes, rows in zip(grid[0], parts.values(), strict=True):
        ratios = dict(sorted((int(p.step or 0), float(p.mask_ratio or 0)) for p in rows))
        mask_ratios_on_top(axes, range(len(ratios)), list(ratios.values()))
    return figure


def _by_class(record: Record, measure: Measure, parts: Parts) -> Figure:
    sites = _shown(measure, parts)
    caption = Caption(
        f"{measure.title} by what a token is: given, committed by now, or masked",
        models(record),
        f"{STATES.format(answers(record))}; all steps together. {_definition(record, measure)}",
    )
    figure = sheet(caption, 0.35 + 1.3 * len(parts), legend_rows=1)
    names = [f"{side.label}\n{measure.label}" for side in parts]
    grid = panels(figure, names, [*map(site_name, sites)], "block", sharex=True, sharey="col")
    for row, rows in zip(grid, parts.values(), strict=True):
        for axes, site in zip(row, sites, strict=True):
            for name, line in zip(CLASSES, style.CYCLE, strict=False):
                of_class = sorted((p for p in rows if (p.site, p.token_class) == (site, name)), key=lambda p: p.block)
                marks = {"label": name, "clip_on": False, "markevery": 1 + len(of_class) // MOST_MARKERS}
                axes.plot([p.block for p in of_class], [measure.of(p) for p in of_class], **marks | line)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    for axes in grid[0]:
        if measure.log:
            axes.set_yscale("log", nonpositive="mask")
            tick_plainly(axes.yaxis)
        else:
            from_zero(axes)
    legend(figure, grid[0], columns=3)
    return figure


def _definition(record: Record, measure: Measure) -> str:
    limits = next(iter(record.outliers.values())).thresholds
    absolute, relative = f"{limits.massive_absolute:g}", f"{limits.massive_relative:g}"
    return "" if measure.log else f"Massive: |x| >= {absolute} and >= {relative} x the site's median."
