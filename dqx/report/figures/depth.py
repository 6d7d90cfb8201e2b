"""The error of the hidden state, block by denoising step, and its mean against depth."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from dqx.record.folder import Record
from dqx.record.words import models
from dqx.report.figures import style
from dqx.report.figures.axes import Matrix, colour_bar, heat_map, mask_ratios_on_top, masked, name_ticks
from dqx.report.figures.sheet import Caption, answers, sheet


def sqnr(record: Record) -> dict[str, Figure]:
    """`sqnr`; empty where it was not measured, or no block is off at all."""
    layers: dict[str, Any] = record.fidelity.get("layers") or {}
    values = masked(layers.get("sqnr_db") or [[]])
    if not values.count():
        return {}
    absent = "; grey: no error at all" if np.ma.is_masked(values) else ""
    caption = Caption(
        "Error of the hidden state behind every block",
        models(record),
        "Signal to quantization noise, 10 log10(|x|^2 / |x - y|^2) in dB of the hidden state x at full precision and y "
        f"quantized, on the same states{answers(record)}; 6 dB are one bit{absent}. Right: mean over the steps, and "
        "their range.",
    )
    blocks = [str(i) for i in range(len(values))]
    figure = sheet(caption, max(1.9, min(3.4, 0.8 + 0.16 * len(blocks))))
    maps, profile = figure.subplots(1, 2, width_ratios=(2.6, 1))
    norm = Normalize(float(values.min()), float(values.max()))
    steps = [str(step) for step in layers["steps"]]
    image = heat_map(maps, values, rows=blocks, columns=steps, norm=norm, colours=style.SMALL_IS_DARK)
    maps.set(xlabel="denoising step", ylabel="block")
    mask_ratios_on_top(maps, range(len(steps)), layers["mask_ratios"])
    colour_bar(figure, image, [maps], "SQNR, dB")
    _profile(profile, values, blocks)
    return {"sqnr": figure}


def _profile(axes: Axes, values: Matrix, blocks: list[str]) -> None:
    """The mean in dB of each block, the first on top as in the map."""
    depth = np.arange(len(values))
    mean, low, high = (np.ma.filled(f(values, axis=1), np.nan) for f in (np.ma.mean, np.ma.min, np.ma.max))
    axes.fill_betweenx(depth, low, high, color=style.SIDES[1].line["color"], alpha=0.2, linewidth=0)
    axes.plot(mean, depth, **style.SIDES[1].line | {"marker": "o"})
    axes.set(xlabel="SQNR, dB", ylabel="block", ylim=(len(blocks) - 0.5, -0.5))
    name_ticks(axes.yaxis, blocks)
