"""A report as one HTML file: opened from disk it needs no server and asks the network for nothing.

Styles, script and figures are inside. What models, files and people wrote is escaped by the template engine, and a
content security policy lets nothing run but the page's own script, whose digest it names.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from dqx.common.files import jsonable
from dqx.diagnostics import activations
from dqx.record import words
from dqx.record.collection import Run
from dqx.record.compare import Flip, flips
from dqx.record.folder import Record
from dqx.record.words import public, visible
from dqx.report import content, tables
from dqx.report.content import Picture, Report

FLIPS_PER_TASK = 3  # documents shown of each task of a run
LONGEST = 2000  # characters shown of an output


def page(report: Report) -> str:
    """The HTML of a report."""
    environment = Environment(
        loader=PackageLoader("dqx.report"), autoescape=True, undefined=StrictUndefined, finalize=_public,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    filters = (
        slug,
        embedded,
        shortened,
        flipped,
        listing,
        tables.anchor,
        tables.deltas,
        tables.forwards,
        content.lacks,
    )
    environment.filters |= {each.__name__: each for each in (*filters, words.title, words.conditions)}
    style, script = (
        "\n" + (resources.files("dqx.report") / "templates" / name).read_text(encoding="utf-8")
        for name in ("style.css", "script.js")
    )
    return environment.get_template("page.html").render(
        report=report,
        title=_title(report),
        lede=words.lede(report.records),
        facts=list(facts(report)),
        findings=findings(report.runs),
        runs=tables.runs(report.runs),
        style=Markup(style),
        script=Markup(script),
        policy=Markup(
            f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
            "base-uri 'none'; form-action 'none'"
        ),
    )


def facts(report: Report) -> Iterator[tuple[str, str]]:
    """What a reader wants to know first."""
    records = report.records
    if not records:
        return
    commits = sorted({str(record.environment.get("commit") or "not recorded")[:7] for record in records})
    yield "Runs", str(len(records))
    yield "Documents per task", _range({result.n for record in records for result in record.quantized.values()})
    yield "Computed in", duration(sum(sum(record.timings.values()) for record in records))
    yield "Finished", _range({record.created[:10] for record in records})
    yield "Code", ", ".join(commits[:3]) + (f" and {len(commits) - 3} more" if len(commits) > 3 else "")


def _range(values: set[Any]) -> str:
    return " to ".join(map(str, dict.fromkeys((min(values), max(values)))))


def duration(seconds: float) -> str:
    """Seconds in a unit that keeps the number short."""
    for unit, length in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.0f} s"


def _title(report: Report) -> str:
    models = dict.fromkeys(record.settings.model for record in report.records)
    return ", ".join(models) or ", ".join(comparison.preset for comparison in report.comparisons)


def flipped(record: Record) -> Iterator[tuple[str, int, list[Flip]]]:
    """The tasks with documents that flipped: how many did, and some of them."""
    for task, before in record.full_precision.items():
        changed = flips(before, record.quantized[task])
        if changed:
            yield task, len(changed), changed[:FLIPS_PER_TASK]


def listing(settings: Mapping[str, Any]) -> str:
    """Settings as YAML."""
    return str(yaml.safe_dump(jsonable(settings), sort_keys=False, allow_unicode=True))


def findings(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Where the outliers sit, in sentences: of every full-precision model once, and of each run where it differs."""
    sentences: list[tuple[str, list[str]]] = []
    known: dict[str, list[str]] = {}
    for number, run in enumerate(runs, 1):
        said = {side: activations.findings(stats) for side, stats in run.record.outliers.items()}
        model = f"{run.record.settings.model} at full precision"
        before = said.get("full_precision")
        if before is not None and known.get(model) != before:
            known[model] = before
            sentences.append((model, before))
        if "quantized" in said:
            told = ["As at full precision."] if said["quantized"] == before else said["quantized"]
            sentences.append((f"Run {number}, {words.title(run.record)}", told))
    return sentences


def slug(text: str) -> str:
    """A heading as the name of a place in the page."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "part"


def shortened(text: str | None) -> Markup:
    """An output as far as it is shown, its paths too: they are what a model wrote."""
    if text is None:
        return Markup("(nothing)")
    more = f" ... ({len(text) - LONGEST} characters more)" if len(text) > LONGEST else ""
    return escape(visible(text[:LONGEST] + more))


def embedded(picture: Picture) -> Markup:
    """A figure as a data URI; its colours are light or dark as the page's are."""
    return Markup(
        "data:image/svg+xml;base64," + base64.b64encode(picture.path.with_suffix(".svg").read_bytes()).decode()
    )


def _public(value: Any) -> Any:
    return public(str(value)) if isinstance(value, (str, Path)) and not isinstance(value, Markup) else value


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
