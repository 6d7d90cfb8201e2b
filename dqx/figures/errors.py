"""How far predictions have moved: against denoising step and mask ratio, and when free generation goes its own way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dqx.figures import style
from dqx.figures.axes import from_zero, mask_ratios_on_top
from dqx.figures.captions import what_ran
from dqx.figures.sheet import Caption, legend, sheet
from dqx.store import Record

#: Key in the record -> label, factor, whether 100 % is good.
CURVES = {
    "divergence": ("KL to full precision, nats", 1.0),
    "agreement": ("same most probable token, %", 100.0),
    "commit_flips": ("commits that flip, %", 100.0),
}
MOST_MARKERS = 32  # of a line
SHARES = 105  # percent: where axes of shares end that are mostly near 100
KL = "KL: mean KL(full precision || quantized) over masked tokens."
FREE = " Last: of {documents} answers of {tokens} tokens that each model writes by itself, those still the same."
STATES = " The sampler's states: those that full precision visits, by the share of its answers that is masked."
RANDOM = {"label": "random masks", **style.CYCLE[0]}
OWN = {"label": "the sampler's states", **style.CYCLE[1]}


def by_step(record: Record) -> dict[str, Figure]:
    """`divergence_by_step`: KL, agreement, commit flips, and how many answers are still the same."""
    rows = record.fidelity.get("by_step") or []
    answers = record.fidelity.get("answers")
    if not rows:
        return {}
    caption = Caption(
        "Predictions against full precision, by denoising step",
        what_ran(record),
        f"{KL} Both models see the states that full precision visits ({rows[0]['positions']} masked tokens at "
        "first). A commit flips where quantized would put another token at a place that full precision fills."
        + (FREE.format(**answers) if answers else ""),
    )
    figure = sheet(caption, 3.6 if answers else 2.0)
    panels = figure.subplots(2, 2).ravel() if answers else figure.subplots(1, 3)
    steps = [row["step"] for row in rows]
    for axes, (key, (label, factor)) in zip(panels, CURVES.items(), strict=False):
        _curve(axes, steps, rows, key, factor, {**style.CYCLE[1]})
        axes.set(xlabel="denoising step", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        mask_ratios_on_top(axes, steps, [row["mask_ratio"] for row in rows])
    if answers:
        _same_so_far(panels[-1], answers)
    return {"divergence_by_step": figure}


def by_mask_ratio(record: Record) -> dict[str, Figure]:
    """`divergence_by_mask_ratio`: random masks, and the states of the sampler beside them."""
    random, own = (record.fidelity.get(key) or [] for key in ("by_mask_ratio", "by_step"))
    if not random:
        return {}
    keys = list(CURVES) if own else [key for key in CURVES if key != "commit_flips"]
    caption = Caption(
        "Predictions against full precision, by mask ratio",
        what_ran(record),
        f"{KL} Random masks: {random[0]['positions']} masked tokens per ratio.{STATES if own else ''}",
    )
    figure = sheet(caption, 1.9, legend_rows=bool(own))
    panels = figure.subplots(1, len(keys))
    for axes, key in zip(panels, keys, strict=True):
        label, factor = CURVES[key]
        for rows, line in ((random, RANDOM), (own, OWN)):
            if rows and key in rows[0]:
                _curve(axes, [100 * row["mask_ratio"] for row in rows], rows, key, factor, line)
        axes.set(xlabel="masked, %", ylabel=label)
        axes.set_xlim(-3, 103)
    if own:
        legend(figure, columns=2)
    return {"divergence_by_mask_ratio": figure}


def _curve(
    axes: Axes, x: Sequence[float], rows: Sequence[dict[str, Any]], key: str, factor: float, line: dict[str, Any]
) -> None:
    """One measure; shares from 0 to 100 %, a divergence from 0."""
    heights = [float("nan") if row[key] is None else factor * float(row[key]) for row in rows]
    axes.plot(x, heights, markevery=1 + len(heights) // MOST_MARKERS, **line)
    from_zero(axes, SHARES if key == "agreement" else None)


def _same_so_far(axes: Axes, answers: dict[str, Any]) -> None:
    """The share of answers that do not differ yet, after 0, 1, ... steps."""
    first = answers["first_diverging_step"]
    after = range(answers["steps"] + 1)
    same = [100 * sum(step is None or step > done for step in first) / len(first) for done in after]
    axes.step(after, same, where="post", color=style.BLUE)
    axes.set(xlabel="steps done, each model by itself", ylabel="answers still the same, %", ylim=(0, SHARES))
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
