"""A run's folder as one file that a teammate can run again: `dqx share RUN`.

    dqx share runs/2026-11-20/12-00-00-000000-nano_llada-gptq-w3a16

The bundle has the resolved configuration, so that whoever runs it needs neither the config files of a team nor those
of the same version. Documents are in it as scores and digests of their texts, enough to tell which predictions are
identical; `--documents` puts in the texts. Activations by channel and token stay behind: whoever runs it makes them
again. Nothing in it says on which machine or by whom it was made (`dqx/sharing/private.py`), except what `--documents`
takes from the predictions themselves.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from dqx.common.environment import package_version
from dqx.evaluate.results import DocumentRow, TaskResult
from dqx.record import words
from dqx.record.collection import Run
from dqx.record.folder import SIDES, Record, RunFolder
from dqx.report import markdown, tables
from dqx.report.gather import evaluations, groups
from dqx.report.terminal import errors_end, print_lines
from dqx.sharing import bundle
from dqx.sharing.fingerprints import data_fingerprints
from dqx.sharing.private import Cleaner, local_paths, placeholder, without_places

DIGEST = "sha256:"


def share(run: str | Path, to: str | Path | None = None, *, documents: bool = False) -> tuple[Path, list[str]]:
    """Write the bundle of a finished run to `to` (None: `RUN.dqx.zip` here). Returns its path and what to know of it.

    Raises OSError or ValueError for a folder without a finished run.
    """
    folder = Path(run)
    if not (folder / "results.json").is_file():
        raise ValueError(f"{folder} holds no finished run: there is no results.json")
    record = RunFolder(folder).read()
    path = Path(to) if to else Path(folder.resolve().name + bundle.SUFFIX)
    members, facts, told = contents(record, documents=documents)
    path.parent.mkdir(parents=True, exist_ok=True)
    bundle.write(path, facts, members)
    texts = sum(len(content) for name, content in members.items() if name.startswith("documents/"))
    told.append(
        f"documents: {'with their texts' if documents else 'scores and digests'}, {_size(texts)} before packing"
    )
    return path, [*told, f"size: {_size(path.stat().st_size)}"]


def contents(record: Record, *, documents: bool = False) -> tuple[dict[str, bytes], dict[str, Any], list[str]]:
    """The members of a run's bundle, the facts of its manifest, and what to know: what was taken out."""
    paths = local_paths(record.config)
    data = data_fingerprints(record.config)
    shared, cleaner = cleaned(record, paths)
    if not documents:
        shared = concealed(shared)
    members = _files(shared) | {bundle.REPORT: report(shared, sorted(paths), data).encode()}
    facts = {
        "dqx": package_version("dqx"),
        "texts_of_documents": documents,
        "give_anew": sorted(paths),
        "data": data,
    }
    told = [f"{key} was local and is {placeholder(key)} in the bundle: it must be given anew" for key in paths]
    others = cleaner.taken - {placeholder(key) for key in paths}
    if others:
        told.append(f"other paths and names were replaced by {', '.join(sorted(others))}")
    return members, facts, told


def cleaned(record: Record, paths: Mapping[str, str]) -> tuple[Record, Cleaner]:
    """The record without what belongs to one machine or person; `paths` are the settings to give anew."""
    cleaner = Cleaner(paths)
    config = without_places(record.config)
    for key in paths:
        _set(config, key, placeholder(key))
    changed = replace(
        record,
        config=config,
        environment=cleaner.value(record.environment),
        model=cleaner.value(record.model),
        quantization=cleaner.value(record.quantization),
        command=record.command and cleaner.command(record.command),
        warnings=cleaner.value(record.warnings),
        mirror={"state": "not shared"},
        activations={},
    )

    def without(result: TaskResult) -> TaskResult:
        return replace(result, notes=cleaner.value(result.notes))

    return _each(changed, without), cleaner


def concealed(record: Record) -> Record:
    """The record with digests in place of the documents' texts, and without likelihoods."""
    return _each(record, lambda result: replace(result, documents=[conceal(row) for row in result.documents]))


def _each(record: Record, change: Callable[[TaskResult], TaskResult]) -> Record:
    """The record with every task's result changed."""
    full_precision, quantized = ({n: change(r) for n, r in getattr(record, side).items()} for side in SIDES)
    return replace(record, full_precision=full_precision, quantized=quantized)


def conceal(row: DocumentRow) -> DocumentRow:
    """The row with digests of its prediction and target; a row that has them already is as it was."""
    return replace(
        row, prediction=_digest(row.prediction), target=_digest(row.target), answer=None, log_likelihoods=None
    )


def _digest(text: str | None) -> str | None:
    if text is None or text.startswith(DIGEST):
        return text
    return DIGEST + hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def report(record: Record, give_anew: Iterable[str], data: Mapping[str, str]) -> str:
    """What the run found, for people, in Markdown."""
    environment, packages = record.environment, record.environment.get("packages", {})
    versions = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
    again = " ".join(["dqx run --from BUNDLE", *(f"{key}=..." for key in give_anew)])
    rows = {
        "command": f"`{record.command}`" if record.command else "not recorded",
        "choices": ", ".join(f"{group}={name}" for group, name in record.choices.items()) or "not recorded",
        "commit": environment.get("commit") or "not recorded",
        "checkpoint": f"{record.model.get('path')}, fingerprint {record.model['fingerprint']}",
        "device": f"{environment.get('device')}, {environment.get('platform')}",
        "versions": f"python {environment.get('python')}, {versions}",
        "data": ", ".join(f"{name} {digest}" for name, digest in data.items()) or "bundled, or from the hub",
        "when": record.created,
    }
    lines = [f"# {words.title(record)}", ""]
    lines += [f"Run it again with `{again}`.", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {text.replace('|', ' ')} |" for name, text in rows.items()]
    for group in groups(evaluations([Run(Path(), record)])):
        lines += ["", f"## {markdown.escape(group.title)}", "", markdown.table(tables.study(group)), ""]
    lines += [f"- {text}" for text in record.warnings]
    return "\n".join(lines).rstrip() + "\n"


def _files(record: Record) -> dict[str, bytes]:
    """The files of a record, as `RunFolder.write` writes them."""
    with TemporaryDirectory() as folder:
        RunFolder(folder).write(record)
        files = (path for path in sorted(Path(folder).rglob("*")) if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def _set(config: dict[str, Any], key: str, value: str) -> None:
    """Replace a setting, on a copy of the sections that lead to it. Names of tasks may have dots."""
    if key in config:
        config[key] = value
        return
    inner = next(name for name in config if key.startswith(f"{name}."))
    config[inner] = dict(config[inner])
    _set(config[inner], key.removeprefix(f"{inner}."), value)


def _size(count: int) -> str:
    return f"{count / 1000:.0f} kB" if count < 10**6 else f"{count / 10**6:.1f} MB"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="One small file of a finished run, from which others run it again.",
        epilog="Example: dqx share runs/2026-11-20/12-00-00-000000-nano_llada-gptq-w3a16",
    )
    parser.add_argument("run", help="folder of a run")
    parser.add_argument("--to", metavar="FILE", help=f"where to write it; by default RUN{bundle.SUFFIX} here")
    parser.add_argument("--documents", action="store_true", help="with the texts of predictions and targets")
    arguments = parser.parse_args()
    with errors_end():
        path, told = share(arguments.run, arguments.to, documents=arguments.documents)
    console = Console(highlight=False, emoji=False)
    give_anew = bundle.read(path).manifest["give_anew"]
    again = " ".join(["dqx run --from", str(path), *(f"{key}=..." for key in give_anew)])
    print_lines(console, (f"{path}", *(f"  {text}" for text in told), f"Run it again: {again}"))
