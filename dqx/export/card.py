"""The model card beside an exported model: what it is, what was measured, how it was made and how to check it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dqx.common.environment import package_version
from dqx.common.files import write_text
from dqx.models.checkpoint import PACKAGED
from dqx.record import words
from dqx.report import tables
from dqx.report.markdown import code, escape, table

if TYPE_CHECKING:
    from dqx.api import DiffusionLM
    from dqx.record.folder import Record
    from dqx.report.tables import Table

READ_BACK = "## Read back"


def card_path(out: Path) -> Path:
    """Where the card of an export lies: `README.md` in a folder, `model.md` beside `model.gguf`."""
    return out / "README.md" if out.is_dir() else out.with_suffix(".md")


def write_card(out: Path, format: str, lm: DiffusionLM, notes: Sequence[str], record: Record | None = None) -> None:
    """Write the card of an export. `record` is that of the run that made and measured the model, where there is one."""
    write_text(card_path(out), "\n\n".join(_parts(out, format, lm, notes, record)) + "\n")


def _parts(out: Path, format: str, lm: DiffusionLM, notes: Sequence[str], record: Record | None) -> Iterator[str]:
    path = lm.config.path
    here = not path or path.startswith(PACKAGED) or Path(path).expanduser().exists()
    base = lm.config.name if here else path
    tags = ["diffusion", format, *(["quantized"] if lm.quantization else []), "dqx"]
    yield "\n".join(["---", f"base_model: {base}", f"tags: [{', '.join(tags)}]", "---"])
    precision = lm.facts()["precision"]
    yield f"# {escape(words.title(record) if record else f'{lm.config.name}, {precision}')}"
    if record:
        yield f"{escape(words.conditions(record))}."
    yield "\n".join(["| | |", "|---|---|", *(f"| {name} | {escape(value)} |" for name, value in lm.facts().items())])
    yield "## Measured"
    if record and record.quantization.get("linears"):
        yield (
            f"{_whose_scores(out, format, record)} They stand beside those of full precision, document by document, "
            "with 95 % intervals."
        )
        yield table(tables.deltas(record.deltas))
        if record.forwards:
            yield table(tables.forwards(record.forwards))
    else:
        yield "Nothing: no run of dqx stands behind this model."
    if notes:
        yield "## What readers do differently\n\n" + "\n".join(f"* {escape(note)}" for note in notes)
    yield "## Commands"
    made = [record.command] if record and record.command else []
    source = "RUN" if record else "SOURCE"
    commands = [*made, f"dqx export {format} {source} --out {out.name}", f"dqx verify {out.name} --against {source}"]
    yield "```sh\n" + "\n".join(commands) + "\n```"
    yield f"Made by dqx {package_version('dqx')}" + (f" from the run of {record.created}." if record else ".")


def add_verification(out: Path, lines: Sequence[str], logits: Table | None) -> None:
    """Put what `dqx verify` has found into the card of an export, if it has one, in place of what it found before."""
    path = card_path(out)
    if path.is_file():
        kept = path.read_text(encoding="utf-8").partition(f"\n{READ_BACK}\n")[0].rstrip("\n")
        found = ["\n".join(["```", *lines, "```"]), *([] if logits is None else [table(logits)])]
        write_text(path, "\n\n".join([kept, READ_BACK, *found]) + "\n")


def _whose_scores(out: Path, format: str, record: Record) -> str:
    if format == "gguf" and record.config.get("backend") == "llama_cpp":
        return "Scores of this file, whose logits llama.cpp computed."
    check = code(f"dqx verify {out.name}")
    return f"Scores of this model in dqx, of the simulation; {check} says whether the file is that model."
