"""Steps by bits: what quantization costs at each number of denoising steps, methods side by side."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from dqx.common.names import natural
from dqx.evaluate.spec import NLL
from dqx.record.words import difference, value
from dqx.report.figures import groups, style
from dqx.report.figures.axes import colour_bar, heat_map, masked, write_numbers
from dqx.report.figures.sheet import Caption, sheet, shortened
from dqx.report.gather import Row, RunGroup, settings

ACROSS = 3  # panels beside each other
MOST_WRITTEN = 7  # widths beside each other whose numbers can be read
FULL = "full"  # the column of full precision


def by_steps(candidates: Sequence[RunGroup]) -> list[dict[int | None, RunGroup]]:
    """The groups that differ in nothing but their steps, by these, where there are several; None: the tasks' own."""
    alike: dict[tuple[object, ...], dict[int | None, RunGroup]] = {}
    for group in candidates:
        if not groups.complete(group):
            continue
        record = group.rows[0].cell.runs[0].record
        others = {key: value for key, value in settings(record)[0].items() if key != "steps.count"}
        key = (group.kind, group.tasks, *sorted(others.items()))
        alike.setdefault(key, {})[record.settings.steps] = group
    return [members for members in alike.values() if len(members) > 1]


def steps_by_bits(members: dict[int | None, RunGroup]) -> Figure:
    """The figure of groups that differ in their steps."""
    order = sorted(members, key=lambda steps: (steps is None, steps))
    cells = {(steps, row.cell.method, row.cell.bits): row for steps in order for row in groups.complete(members[steps])}
    methods = sorted({method for _, method, _ in cells}, key=natural)
    widths = sorted({bits for _, _, bits in cells}, key=natural, reverse=True)
    group = members[order[0]]
    largest = max(abs(groups.unit(group) * row.overall.delta) for row in cells.values()) or 1.0
    norm = Normalize(-largest, largest)
    across, down = min(ACROSS, len(methods)), -(-len(methods) // ACROSS)
    what = "nats per token" if groups.nats(group) else "points"
    caption = Caption(
        f"Denoising steps by bits: {groups.score(group)}, and its difference from full precision",
        groups.what_ran([members[steps] for steps in order]),
        f"In brackets and as colours: difference in {what} from full precision at the same number of steps; the first "
        "column is full precision. Grey: not run.",
    )
    figure = sheet(caption, down * (0.55 + 0.3 * len(order)))
    grid = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    for axes in grid.ravel()[len(methods) :]:
        axes.set_axis_off()
    for axes, method in zip(grid.ravel(), methods, strict=False):
        rows = [[cells.get((steps, method, bits)) for bits in widths] for steps in order]
        image = _panel(axes, [members[steps] for steps in order], rows, norm)
        axes.set_title(shortened(method, 0.9 * style.DOUBLE / across, 7))
        axes.set_xticks(range(len(widths) + 1), labels=[FULL, *widths], rotation=0 if len(widths) < 5 else 45)
        axes.set_yticks(range(len(order)), labels=["own" if steps is None else str(steps) for steps in order])
    for row in grid:
        row[0].set_ylabel("denoising steps")
    colour_bar(figure, image, grid.ravel(), what)
    return figure


def _panel(axes: Axes, members: Sequence[RunGroup], rows: Sequence[Sequence[Row | None]], norm: Normalize) -> AxesImage:
    """One method: a row per number of steps; full precision, then the widths."""
    unit, metric = groups.unit(members[0]), NLL if groups.nats(members[0]) else None
    values = masked([[0.0, *(None if row is None else unit * row.overall.delta for row in line)] for line in rows])
    image = heat_map(axes, values, rows=[], columns=[], norm=norm, colours=style.SIGNED)
    texts = []
    for group, line in zip(members, rows, strict=True):
        written = [
            "" if row is None else f"{value(row.overall.quantized, metric)}\n({difference(row.overall.delta, metric)})"
            for row in line
        ]
        texts.append([value(groups.full_precision(group) / unit, metric), *written])
    if len(texts[0]) <= MOST_WRITTEN + 1:
        write_numbers(axes, image, texts)
    return image
