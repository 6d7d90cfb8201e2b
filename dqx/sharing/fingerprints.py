"""Which data a run has read, told by their content: only of local copies, the hub's are not looked at."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dqx.data.local import data_files
from dqx.data.texts import ASSETS, LOCAL_SUFFIXES, find_text
from dqx.evaluate.catalogue import leaves
from dqx.record.settings import RunSettings


def data_fingerprints(config: Mapping[str, Any]) -> dict[str, str]:
    """16 hex digits over the files of each local data set and text, by the name the run has for it.

    Files that are not there are left out, as is what comes from the hub or with dqx.
    """
    return {name: _digest(files) for name, files in _files(config) if files and all(file.is_file() for file in files)}


def _files(config: Mapping[str, Any]) -> Iterator[tuple[str, list[Path]]]:
    root = config.get("data_root")
    calib = config["calib"]
    yield "calib.text", _text(calib, root)
    for name, spec in RunSettings.of(config).tasks.items():
        if spec["kind"] == "text":
            yield name, _text(spec, root)
        elif root:
            yield name, sorted({f for leaf in leaves(spec["harness"]) for f in _data_set(root, leaf)})


def _text(section: Mapping[str, Any], root: str | None) -> list[Path]:
    """The files of a text that is a local file, or a copy below `root`."""
    if not section.get("text"):
        return []
    source = find_text(section["text"], config=section.get("config"), data_root=root)
    path = Path(source.path)
    if ASSETS in path.parents:
        return []
    if path.suffix in LOCAL_SUFFIXES:
        return [path]
    return _folder(path, source.config)


def _data_set(root: str, leaf: Any) -> list[Path]:
    return _folder(Path(root).expanduser() / leaf.dataset, leaf.raw.get("dataset_name")) if leaf.dataset else []


def _folder(folder: Path, name: str | None) -> list[Path]:
    """The files of a data set in the hub's layout, none where it cannot be read."""
    if not folder.is_dir():
        return []
    try:
        return [file for files in data_files(str(folder), name).values() for file in files]
    except (OSError, ValueError):
        return []


def _digest(files: Iterable[Path]) -> str:
    """Hash over the contents, in an order that does not depend on where the files lie."""
    contents = []
    for file in files:
        with file.open("rb") as f:
            contents.append(hashlib.file_digest(f, "sha256").hexdigest())
    return hashlib.sha256("".join(sorted(contents)).encode()).hexdigest()[:16]
