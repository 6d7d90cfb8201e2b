"""A run's record as tables in the terminal: what it cost, where the outliers sit, where the record lies.

Everything is ASCII with colour as a hint only, so that a log file reads like the screen. The usual table fits
84 columns; a wider one is left to the terminal to wrap, nothing is cut.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dqx.common.names import method_label
from dqx.diagnostics.activations import Thresholds, summary
from dqx.evaluate.results import TaskResult
from dqx.record import statistics
from dqx.record.deltas import Delta, headline, judged
from dqx.record.folder import SIDES, Record
from dqx.record.outcomes import Outcome
from dqx.record.words import difference, points, short, value

#: Rules across, nothing down: head, head rule, rows, section rule, foot.
RULES = box.Box("    \n    \n -- \n    \n -- \n -- \n    \n    \n", ascii=True)
SIDE_NAMES = {"full_precision": "before", "quantized": "after"}
COLOURS = {"negligible": "green", "moderate": "yellow", "significant": "red"}
STATES = {"finished": "green", "reused": "green", "interrupted": "yellow", "not started": "yellow"}
VERDICTS = {statistics.UNDECIDED: "unclear"}


def print_table(record: Record, folder: str | Path | None = None, file: TextIO | None = None) -> None:
    """Print the tables of a record to `file` (standard output if None); `folder` is where the record lies."""
    file = file or sys.stdout
    console = Console(file=file, highlight=False, emoji=False)
    wide = Console(file=file, highlight=False, emoji=False, width=max(200, console.width))
    console.print()
    for line in header(record):
        console.print(Text(line, style="bold"), soft_wrap=True)
    console.print()
    wide.print(delta_table(record.deltas))
    for line in delta_legend(record.deltas):
        console.print(Text(line, style="dim"), soft_wrap=True)
    if record.fidelity:
        console.print()
        for line in fidelity_lines(record.fidelity):
            console.print(Text(line), soft_wrap=True)
    if record.outliers:
        console.print()
        wide.print(outlier_table(record))
        for line in outlier_legend(next(iter(record.outliers.values())).thresholds):
            console.print(Text(line, style="dim"), soft_wrap=True)
    console.print()
    for line in footer(record, folder):
        console.print(Text(line), soft_wrap=True)  # paths and commands stay in one piece, to be copied


def print_sweep(records: Sequence[Record], file: TextIO | None = None) -> None:
    """Print one row per run of a sweep: quantized accuracy per task, and the average's delta with its interval."""
    file = file or sys.stdout
    console = Console(file=file, highlight=False, emoji=False)
    console.print()
    wide = Console(file=file, highlight=False, emoji=False, width=max(200, console.width))
    wide.print(sweep_table(records))
    for line in (
        "In percent, deltas in points; texts in nats per token; - where a task was not run.",
        "Verdict: unclear where chance could explain the delta; corrected for several runs.",
    ):
        console.print(Text(line, style="dim"), soft_wrap=True)


def print_outcomes(outcomes: Mapping[Path, Outcome], file: TextIO | None = None) -> None:
    """Print what became of every run of a sweep, by its folder."""
    file = file or sys.stdout
    table = _table(("run", "left"), ("state", "left"))
    table.add_column("reason", overflow="fold")
    for folder, outcome in outcomes.items():
        table.add_row(folder.name, Text(outcome.state, style=STATES.get(outcome.state, "red")), outcome.reason)
    console = Console(file=file, highlight=False, emoji=False)
    console.print()
    console.print(table)


def sweep_table(records: Sequence[Record]) -> Table:
    """Runs in the order given, those with the same full-precision accuracies below a row that shows them."""
    tasks = list(dict.fromkeys(name for record in records for name in record.full_precision))
    table = _table(("run", "left"), ("bits per\nweight", "right"))
    for name in tasks:
        table.add_column(name.replace("_", "_\n", 1), justify="right", no_wrap=True)
    table.add_column("average", justify="right", no_wrap=True)
    table.add_column("delta\n[95 % interval]", justify="right", no_wrap=True)
    table.add_column("level", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    deltas = judged([headline(record.deltas) for record in records])
    groups: dict[tuple[object, ...], list[tuple[Record, Delta]]] = {}
    for record, delta in zip(records, deltas, strict=True):
        steps = (record.config.get("steps") or {}).get("count")
        values = tuple((name, result.value) for name, result in record.full_precision.items())
        setting = [str(record.model.get("name")), *record.approximations, *([f"{steps} steps"] if steps else [])]
        groups.setdefault((", ".join(setting), *values), []).append((record, delta))
    for (label, *_), members in groups.items():
        table.add_section()
        first, first_delta = members[0]
        scores = [_score(first.full_precision.get(name)) for name in tasks]
        table.add_row(str(label), "16", *scores, _cells(first_delta)[2], style="bold")
        for record, delta in members:
            config, cells = record.config, _cells(delta)
            masking = (config.get("calib") or {}).get("masking", "clean")
            table.add_row(
                f"  {_method(record)} {(config.get('bits') or {}).get('name')}"
                + (f" {masking}" if masking != "clean" else ""),
                "-" if record.average_bits is None else f"{record.average_bits:.2f}",
                *[_score(record.quantized.get(name)) for name in tasks],
                cells[3],
                cells[4],
                cells[6],
                cells[8],
            )
    return table


def _method(record: Record) -> str:
    method = record.config.get("method") or {}
    return method_label(method.get("name"), method.get("variant"))


def _score(result: TaskResult | None) -> str:
    return "-" if result is None else value(result.value, result.metric)


def header(record: Record) -> list[str]:
    """Model, method and bits; then calibration, steps and seed."""
    config, average = record.config, record.average_bits
    bits = (config.get("bits") or {}).get("name")
    what = f"{record.model.get('name')}, {_method(record)} {bits}"
    parts = []
    calib = config.get("calib") or {}
    if calib and record.quantization.get("calibration_tokens") != 0:
        size = f"{calib.get('samples')} x {calib.get('length')} tokens"
        masked = f", {record.mask_ratio:.0%} masked" if record.mask_ratio else ""
        parts.append(f"calibrated on {calib.get('text')} ({calib.get('masking')}{masked}, {size})")
    steps = (config.get("steps") or {}).get("count")
    parts.append(f"{steps} steps" if steps else "each task's own steps")
    if record.approximations:
        parts.append(f"approximate: {', '.join(record.approximations)}")
    limit = (config.get("task") or {}).get("limit")
    if limit is not None:
        parts.append(f"first {limit} documents{' of each task' if len(record.quantized) > 1 else ''}")
    parts.append(f"seed {config.get('seed')}")
    return [what + (f", {average:.2f} bits per weight on average" if average else ""), ", ".join(parts)]


def delta_table(rows: Sequence[Delta], before: str = "full\nprec.", after: str = "quan-\ntized") -> Table:
    """One side against another: per task, per category, on average."""
    table = _table(("task", "left"), ("docu-\nments", "right"), (before, "right"), (after, "right"))
    for name, side in (("delta\n[95 % interval]", "right"), ("rel.\ndrop", "right"), ("\nlevel", "left")):
        table.add_column(name, justify=side, no_wrap=True)  # type: ignore[arg-type]
    table.add_column("lost/\ngained", justify="right", no_wrap=True)
    table.add_column("\nverdict", no_wrap=True)
    kind = rows[0].kind
    for row in rows:
        if row.kind != kind:
            table.add_section()
        kind = row.kind
        table.add_row(*_cells(row), style="bold" if row.kind == "overall" else None)
    return table


def _cells(row: Delta) -> list[str | Text]:
    interval = ""
    if row.low is not None and row.high is not None:
        interval = f" [{difference(row.low, row.metric)}, {difference(row.high, row.metric)}]"
    drop = None if row.relative_drop is None else points(row.relative_drop).removeprefix("+")
    return [
        f"{row.category} average" if row.kind == "category" else row.name,
        str(row.n),
        value(row.full_precision, row.metric),
        value(row.quantized, row.metric),
        difference(row.delta, row.metric) + interval,
        "-" if drop is None else drop,
        Text(row.level or "-", style=COLOURS.get(row.level or "", "")),
        f"{row.lost}/{row.gained}",
        VERDICTS.get(row.verdict, row.verdict),
    ]


def delta_legend(rows: Sequence[Delta]) -> list[str]:
    """What the table's words mean, and what the sample could have shown."""
    lines = []
    if any(not row.lower_is_better for row in rows):
        lines.append("In percent, deltas in points. Every task counts the same in an average.")
    if any(row.lower_is_better for row in rows):
        lines.append("Texts: nats per token, lower is better; a delta is the log of a perplexity ratio.")
    lines += [
        "Level: the relative drop alone, below 1 % negligible, up to 4 % moderate, above",
        "significant. Verdict: unclear where chance could explain the difference; tested over",
        "documents and corrected for the number of tasks, which the intervals are not.",
    ]
    first = headline(rows)
    if first.resolvable is not None:
        least = difference(first.resolvable, first.metric).removeprefix("+")
        unit = "nats" if first.lower_is_better else "points"
        where = "on average" if first.kind == "overall" else f"in {first.name}"
        lines.append(f"A sample like this finds a difference of {least} {unit} {where} four times in five.")
    return lines


def fidelity_lines(found: dict[str, Any]) -> list[str]:
    """How far predictions on a few fixed windows have moved from full precision."""
    rows, answers = found["by_mask_ratio"], found["answers"]
    steps = [step for step in answers["first_diverging_step"] if step is not None]
    first = [f"The first differs after step {min(steps)} of {answers['steps']}."] if steps else []
    return [
        "Against full precision     masked: " + " ".join(f"{100 * row['mask_ratio']:6.0f} %" for row in rows),
        "divergence, nats per masked token  " + " ".join(f"{short(float(row['divergence'])):>8}" for row in rows),
        "same token most probable           " + " ".join(f"{100 * row['agreement']:6.0f} %" for row in rows),
        f"Answers of {answers['tokens']} tokens: {100 * answers['agreement']:.0f} % of the tokens are the same, "
        f"{len(steps)} of {answers['documents']} answers differ.",
        *first,
        *step_lines(found),
    ]


def step_lines(found: dict[str, Any]) -> list[str]:
    """What the states of full precision show, on average over the steps looked at; nothing where none were."""
    flips = [row["commit_flips"] for row in found.get("by_step", ()) if row["commit_flips"] is not None]
    if not flips:
        return []
    blocks = [[float(value) for value in block if value is not None] for block in found["layers"]["sqnr_db"]]
    means = [fmean(values) for values in blocks if values]
    noise = f"; SQNR by block {means[0]:.0f} to {means[-1]:.0f} dB" if means else ""
    return [f"On full precision's states: {100 * fmean(flips):.0f} % other commits{noise}."]


def outlier_table(record: Record) -> Table:
    """Per site the block with the largest activation, before and after quantization."""
    table = _table(("linear\ninputs", "left"), ("quanti-\nzation", "left"), ("\nblock", "right"), ("abs\nmax", "right"))
    for name in (
        "\nmedian",
        "max /\nmedian",
        "outlier\nchannels",
        "massive\nvalues",
        "on\ntokens",
        "relative only:\nvalues, tokens",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    by_side = {side: {row["site"]: row for row in summary(stats)} for side, stats in record.outliers.items()}
    for site in next(iter(by_side.values())):
        for side in (s for s in SIDES if s in by_side):
            table.add_row(site, SIDE_NAMES[side], *_outlier_cells(by_side[side][site]))
    return table


def _table(*columns: tuple[str, Literal["left", "right"]]) -> Table:
    table = Table(box=RULES, padding=0, show_edge=False)
    for name, side in columns:
        table.add_column(name, justify=side, no_wrap=True)
    return table


def _outlier_cells(row: dict[str, Any]) -> list[str]:
    ratio = row["max_over_median"]
    return [
        str(row["block"]),
        short(row["abs_max"]) + (f" ({row['not_finite']} not finite)" if row["not_finite"] else ""),
        short(row["median"]),
        "-" if ratio is None else short(ratio),
        f"{row['outlier_channels']}/{row['channels']}",
        str(row["massive_values"]),
        f"{100 * row['massive_token_share']:.1f} %",
        f"{row['relative_values']}, {100 * row['relative_token_share']:.1f} %",
    ]


def outlier_legend(settings: Thresholds) -> list[str]:
    """What the outlier table counts."""
    share = f"{100 * settings.channel_share:g} %"
    return [
        "Each row shows the block with the largest |x| at that place.",
        f"Outlier channel: |x| > {settings.channel_ratio:g} x the token's median, on at least {share} of tokens.",
        f"Massive: |x| >= {settings.massive_absolute:g} and >= {settings.massive_relative:g} x median; "
        "relative only: the second alone.",
    ]


def footer(record: Record, folder: str | Path | None) -> list[str]:
    """Notes, the memory taken, where the record lies, and how to run it again."""
    lines = [f"Note:    {text}" for text in record.warnings]
    if record.memory:
        ram, gpu = (record.memory["peak"][kind] / 1e9 for kind in ("ram", "gpu"))
        taken = f"at most {ram:.2f} GB of RAM" + (f", {gpu:.2f} GB of the GPU" if gpu else "")
        from_disk = "; quantized from disk, block by block" if record.quantization.get("from_disk") else ""
        lines.append(f"Memory:  {taken}{from_disk}")
    if folder is not None:
        lines.append(f"Record:  {folder}")
    if record.command:
        lines.append(f"Again:   {record.command}")
    return lines


def print_mirror(record: Record, file: TextIO | None = None) -> None:
    """Print in one line what became of the copy in W&B; nothing where none was wanted."""
    mirror, line = record.mirror, None
    if mirror.get("state") == "written" and mirror.get("mode") == "offline":
        line = f"offline  (upload: wandb sync {mirror['folder']})"
    elif mirror.get("state") == "written":
        line = f"{mirror.get('mode')}, {mirror.get('url') or mirror.get('folder')}"
    elif mirror.get("state") == "failed":
        line = f"not written, {mirror.get('message')}; the record is complete without it"
    if line:
        console = Console(file=file or sys.stdout, highlight=False, emoji=False)
        console.print(Text(f"W&B:     {line}"), soft_wrap=True)
