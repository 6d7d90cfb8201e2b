"""How far predictions have moved: against denoising step and mask ratio, and when free generation goes its own way.

A single step has a few tokens, so steps are points; what is joined by a line are means over neighbouring steps.
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

from dqx.record.folder import Record
from dqx.record.significance import t_interval
from dqx.record.words import models
from dqx.report.figures import style
from dqx.report.figures.axes import from_zero, mask_ratios_on_top
from dqx.report.figures.sheet import POINTS, Caption, legend, sheet

#: Key in the record -> label, factor.
CURVES = {"divergence": ("KL to full precision, nats", 1.0), "agreement": ("top-1 agreement, %", 100.0)}
COMMITS = {
    "commit_flips": {"label": "commits: another token", **style.CYCLE[2]},
    "commit_delays": {"label": "commits: stay masked", **style.CYCLE[3]},
}
RANDOM = {"label": "random masks", **style.CYCLE[0]}
OWN = {"label": "the sampler's states", **style.CYCLE[1]}
MOST_MEANS, FEWEST = 4, 3  # means over neighbouring steps, and the steps of each; fewer steps are joined as they are
PALE = {"linestyle": "none", "markersize": 2.0, "alpha": 0.45}  # single steps
SHARES = 105  # percent: where axes of shares end that are mostly near 100

KL = "KL: mean KL(full precision || quantized) over masked tokens; top-1: the most probable token is the same."
CHANGED = " Commits: of the tokens that full precision commits in a step, those that quantized would change."
FREE = " Last: of {documents} answers of {tokens} tokens that each model writes by itself, those still the same."
MEANS = " Pale: single steps; lines: means of neighbouring ones, with 95 % t intervals over them."
STATES = " Both models see the states that full precision visits ({positions} masked tokens compared at first)."


def by_step(record: Record) -> dict[str, Figure]:
    """`divergence_by_step`: KL, agreement, changed commits, and how many answers are still the same."""
    rows, answers = record.fidelity.get("by_step"), record.fidelity.get("answers")
    if not rows:
        return {}
    caption = Caption(
        "Predictions against full precision, by denoising step",
        models(record),
        KL + STATES.format(**rows[0]) + CHANGED + MEANS * _joined(rows) + (FREE.format(**answers) if answers else ""),
    )
    figure = sheet(caption, 3.6 if answers else 2.0, legend_rows=1)
    panels = figure.subplots(2, 2).ravel() if answers else figure.subplots(1, 3)
    steps = [row["step"] for row in rows]
    for axes, key in zip(panels, CURVES, strict=False):
        _curve(axes, steps, rows, key, style.CYCLE[1])
    _commits(panels[2], steps, rows)
    for axes in panels[:3]:
        axes.set_xlabel("denoising step")
        mask_ratios_on_top(axes, steps, [row["mask_ratio"] for row in rows])
    if answers:
        _same_so_far(panels[3], answers)
    for axes in panels:
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    legend(figure, panels[2:3], columns=2)
    return {"divergence_by_step": figure}


def by_mask_ratio(record: Record) -> dict[str, Figure]:
    """`divergence_by_mask_ratio`: random masks, and beside them the states of the sampler where they were looked at."""
    random, own = (record.fidelity.get(key) or [] for key in ("by_mask_ratio", "by_step"))
    if not random:
        return {}
    caption = Caption(
        "Predictions against full precision, by mask ratio",
        models(record),
        f"{KL} Random masks: {random[0]['positions']} masked tokens per ratio."
        + (f" The sampler's states: those that full precision visits.{CHANGED}{MEANS * _joined(own)}" if own else ""),
    )
    figure = sheet(caption, 1.9, legend_rows=1)
    panels = figure.subplots(1, len(CURVES) + bool(own))
    for axes, key in zip(panels, CURVES, strict=False):
        for rows, line in ((random, RANDOM), (own, OWN)):
            _curve(axes, [100 * row["mask_ratio"] for row in rows], rows, key, line, rows is own)
    if own:
        _commits(panels[-1], [100 * row["mask_ratio"] for row in own], own)
    for axes in panels:
        axes.set(xlabel="masked, %", xlim=(-3, 103))
    legend(figure, panels[:: len(CURVES)], columns=4 if own else 2)
    return {"divergence_by_mask_ratio": figure}


def _curve(
    axes: Axes, x: Sequence[float], rows: Sequence[dict[str, Any]], key: str, line: dict[str, Any], steps: bool = True
) -> None:
    """One measure of both models' predictions, at `steps` or other places; nothing without rows."""
    label, factor = CURVES[key]
    most = 100.0 if key == "agreement" else math.inf
    if rows:
        _line(axes, x, [factor * float(row[key]) for row in rows], line, most, steps)
    axes.set_ylabel(label)
    from_zero(axes, SHARES if key == "agreement" else None)


def _commits(axes: Axes, x: Sequence[float], rows: Sequence[dict[str, Any]]) -> None:
    """Which commits change, and how; None where a step commits nothing."""
    for key, line in COMMITS.items():
        _line(axes, x, [math.nan if row[key] is None else 100 * row[key] for row in rows], line, 100.0)
    axes.set_ylabel("commits, %")
    from_zero(axes, SHARES)


def _joined(rows: Sequence[Any]) -> bool:
    """Whether there are steps enough for means."""
    return len(rows) >= 2 * FEWEST


def _line(
    axes: Axes, x: Sequence[float], y: Sequence[float], line: dict[str, Any], most: float, steps: bool = True
) -> None:
    """Values between 0 and `most`; of many steps each is a point, and means are joined."""
    if steps and _joined(x):
        axes.plot(x, y, clip_on=False, **line | PALE | {"label": "_steps"})
        whole = [pair for pair in zip(x, y, strict=True) if math.isfinite(pair[1])]
        parts = np.array_split(np.array(whole), max(1, min(MOST_MEANS, len(whole) // FEWEST))) if whole else []
        limits = [t_interval(part[:, 1].tolist()) or (part[0, 1],) * 2 for part in parts]
        x, y = ([float(part[:, i].mean()) for part in parts] for i in (0, 1))
        low, high = ([min(most, max(0.0, pair[i])) for pair in limits] for i in (0, 1))
        place = 3 * len(axes.collections) / POINTS  # beside the intervals that are there, not over them
        aside = axes.transData + ScaledTranslation(place, 0, axes.figure.dpi_scale_trans)
        axes.vlines(x, low, high, color=line["color"], linewidth=0.7, transform=aside)
        line = line | {"transform": aside}
    axes.plot(x, y, clip_on=False, **line)


def _same_so_far(axes: Axes, answers: dict[str, Any]) -> None:
    """The share of answers that do not differ yet, after 0, 1, ... steps."""
    first = answers["first_diverging_step"]
    after = range(answers["steps"] + 1)
    same = [100 * sum(step is None or step > done for step in first) / len(first) for done in after]
    axes.step(after, same, where="post", color=style.BLUE)
    axes.set(xlabel="steps done, each model by itself", ylabel="answers still the same, %", ylim=(0, SHARES))
