"""What was run, in words; and the numbers and texts of a record as people read them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from dqx.common.names import enumerated, natural
from dqx.evaluate.spec import LOWER_IS_BETTER
from dqx.record.deltas import headline
from dqx.record.settings import RunSettings
from dqx.record.significance import UNDECIDED

if TYPE_CHECKING:
    from dqx.record.folder import Record

NAMED = 6  # tasks; more are counted
OWN_STEPS = "each task's own steps"
#: Control characters but for tab and newline, separators of lines, marks of direction, halves of surrogate pairs.
UNSEEN = re.compile(
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u061c\\u200b-\\u200f\\u2028-\\u202e\\u2060-\\u2069\\ufeff\\ud800-\\udfff]"
)
#: Absolute paths of two parts or more, not those inside an address or a relative path.
ABSOLUTE = re.compile(r"(?<![\w/.:<>~$-])(?:file://|~)?/(?:[\w.+@~-]+/)+[\w.+@~-]*|~/[\w.+@~-]+")


def sampling(run: RunSettings) -> str:
    """A model, and what is not usual in its sampling: `nano_llada, threshold0.9, 64 steps`."""
    return ", ".join([run.model, *run.approximations, *([f"{run.steps} steps"] if run.steps else [])])


def evaluation(run: RunSettings) -> str:
    """A model, and what is not usual in its evaluation: `nano_llada, 64 steps, first 16 documents of each task`."""
    return sampling(run) + ("" if run.limit is None else f", {_first(run.limit)} of each task")


def _first(limit: int) -> str:
    return "first document" if limit == 1 else f"first {limit} documents"


def quantization(run: RunSettings) -> str:
    """A method, and its calibration where that is not clean text: `gptq, mcs`."""
    return run.method_label if run.masking == "clean" else f"{run.method_label}, {run.masking}"


def title(record: Record) -> str:
    """Model, method and bits: `nano_llada, gptq w3a16, 3.15 bits per weight on average`."""
    run, average = record.settings, record.average_bits
    bits = f", {average:.2f} bits per weight on average" if average else ""
    return f"{run.model}, {run.method_label} {run.bits}{bits}"


def conditions(record: Record) -> str:
    """Calibration, steps, what makes the sampler approximate, documents and seed."""
    run = record.settings
    parts = [*_calibration(record), f"{run.steps} steps" if run.steps else OWN_STEPS, *_approximations(run)]
    if run.limit is not None:
        parts.append(f"{_first(run.limit)}{' of each task' if len(record.quantized) > 1 else ''}")
    return ", ".join([*parts, f"seed {run.seed}"])


def _calibration(record: Record) -> Iterator[str]:
    calib = record.settings.calibration
    if calib and record.quantization.get("calibration_tokens") != 0:
        masked = f", {record.mask_ratio:.0%} masked" if record.mask_ratio else ""
        yield f"calibrated on {calib.text} ({calib.masking}{masked}, {calib.samples} x {calib.length} tokens)"


def _approximations(run: RunSettings) -> Iterator[str]:
    if run.approximations:
        yield f"approximate: {', '.join(run.approximations)}"


def models(record: Record) -> str:
    """The two models of a run, whatever they were evaluated on: title, calibration, approximations and seed."""
    run = record.settings
    return ", ".join([title(record), *_calibration(record), *_approximations(run), f"seed {run.seed}"])


def many_runs(name: str, documents: Mapping[str, int], runs: Iterable[RunSettings]) -> str:
    """Model, tasks, documents, steps, calibration and seeds of runs that differ in their steps alone, if at all.

    `name` says how they were evaluated, `documents` counts those of each task.
    """
    runs = list(runs)
    counts = {run.steps for run in runs}
    steps = [str(count) for count in sorted(c for c in counts if c is not None)] + ["own"] * (None in counts)
    texts = sorted({run.calibration.text for run in runs if run.calibration})
    tasks = ", ".join(documents) if len(documents) <= NAMED else f"{len(documents)} tasks"
    sizes = set(documents.values())
    count = (
        f"{max(sizes)} documents each" if len(documents) > len(sizes) == 1 else f"{sum(documents.values())} documents"
    )
    parts = [
        re.sub(r", \d+ steps", "", name),
        f"{tasks}: {count}{' in all' if len(sizes) > 1 else ''}",
        OWN_STEPS if counts == {None} else f"{', '.join(steps)} steps",
        *([f"calibrated on {', '.join(texts)}"] if texts else []),
        _seeds(runs),
    ]
    return "; ".join(parts)


def outcome(record: Record) -> str:
    """What came of a run, in one line: `71.2, -3.8 [-8.0, +0.4], p 0.12, unclear, 41 s`."""
    row = headline(record.deltas)
    change = f"{difference(row.delta, row.metric)} {interval(row.low, row.high, row.metric)}".strip()
    chance = f"p {probability(row.p_value, row.p_adjusted)}, {verdict(row.verdict)}"
    return f"{value(row.quantized, row.metric)}, {change}, {chance}, {sum(record.timings.values()):.0f} s"


def meanings(runs: Iterable[tuple[str, str, str]]) -> list[str]:
    """Choices of widths that do not mean the same with all methods: one line each, with what would.

    A run is its choice (w3), its method (duquant) and what the choice means there (w3a3).
    """
    choices: dict[str, dict[str, list[str]]] = {}
    for choice, method, widths in runs:
        methods = choices.setdefault(choice, {}).setdefault(widths, [])
        if method not in methods:
            methods.append(method)
    lines = []
    for choice, meant in choices.items():
        typed = choice.removeprefix("w") if choice.removeprefix("w").isdigit() else choice
        if len(meant) > 1:
            told = ", ".join(f"{widths} for {enumerated(methods)}" for widths, methods in meant.items())
            lines.append(f"bits={typed} means {told}; bits={_weights_only(meant)} means the same for all.")
    return lines


def _weights_only(widths: Iterable[str]) -> str:
    """Of several widths the one with 16-bit activations, else the first."""
    known = list(widths)
    return next((name for name in known if re.search(r"a16(?!\d)", name)), known[0])


def lede(records: Sequence[Record]) -> str:
    """What was run, in one sentence."""
    if not records:
        return "No finished run."
    runs = [record.settings for record in records]
    widths = sorted({run.bits for run in runs}, key=natural, reverse=True)
    parts = [
        f"{len(runs)} {'run' if len(runs) == 1 else 'runs'} of {_distinct(map(evaluation, runs))}",
        f"{_distinct(map(quantization, runs))} at {_distinct(widths)}",
        f"on {_distinct(name for record in records for name in record.quantized)}",
        _seeds(runs),
    ]
    return ", ".join(parts) + "."


def _seeds(runs: Sequence[RunSettings]) -> str:
    seeds = sorted({run.seed for run in runs})
    return f"seed{'' if len(seeds) == 1 else 's'} {_distinct(map(str, seeds))}"


def _distinct(names: Iterable[str]) -> str:
    return enumerated(list(dict.fromkeys(names)))


def value(score: float, metric: str | None) -> str:
    """A score in percent, or in nats or forwards per token with three digits after the point."""
    return f"{score:.3f}" if metric in LOWER_IS_BETTER else f"{100 * score:.1f}"


def difference(fraction: float, metric: str | None) -> str:
    """A difference of scores in points, nats or forwards, always signed except for zero."""
    if metric not in LOWER_IS_BETTER:
        return points(fraction)
    text = f"{fraction:+.3f}"
    return "0.000" if text in ("+0.000", "-0.000") else text


def interval(low: float | None, high: float | None, metric: str | None) -> str:
    """`[-3.8, +2.9]`; empty where one document cannot give one."""
    return "" if low is None or high is None else f"[{difference(low, metric)}, {difference(high, metric)}]"


def probability(p: float, corrected: float) -> str:
    """A p-value, and in brackets the one corrected for the table where it is another: `0.03 (0.09)`."""
    return _probability(p) if corrected == p else f"{_probability(p)} ({_probability(corrected)})"


def _probability(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}" if p < 0.01 else f"{p:.2f}" if p < 0.995 else "1"


def verdict(name: str) -> str:
    """The verdict of a row in one word: better, worse or unclear."""
    return "unclear" if name == UNDECIDED else name


def points(fraction: float) -> str:
    """A difference of fractions in percentage points, always signed except for zero."""
    text = f"{100 * fraction:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text


def short(value: float) -> str:
    """Three significant digits, without an exponent where that stays short."""
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def visible(text: str) -> str:
    """Text of models and files as it may be shown: what steers a terminal or turns the direction of writing is escaped.

    Lines and tabs stay; control characters, marks of direction and halves of surrogate pairs become `\\x1b`, `\\u202e`.
    """
    return UNSEEN.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def public(text: str) -> str:
    """`visible` text for what is passed on: of absolute paths, which tell of one machine, the last part is left.

    `model.path=/home/jane/models/llada` becomes `model.path=.../llada`.
    """
    return ABSOLUTE.sub(lambda match: f".../{match[0].rstrip('/').rpartition('/')[2]}", visible(text))
