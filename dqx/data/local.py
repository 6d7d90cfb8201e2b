"""Datasets from local folders in the hub's layout.

`datasets.load_dataset` keeps an Arrow copy by the folder's name and configuration: another folder, or a changed file,
would silently give the first one's documents. Here the copy's place depends on the files.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dqx.common.content import file_digests

if TYPE_CHECKING:
    from datasets import DatasetDict


def data_files(folder: str, name: str | None) -> dict[str, list[Path]]:
    """The files of each split of a configuration. Raises ValueError or OSError for a folder that has none."""
    import datasets  # a second: not before there is something to read

    builder = datasets.load_dataset_builder(folder, name=name)
    return {str(split): [Path(f) for f in files] for split, files in (builder.config.data_files or {}).items()}


def load_local(folder: str, name: str | None, **settings: Any) -> DatasetDict:
    """All splits of a configuration of the dataset in `folder`."""
    import datasets  # as above

    files = [(split, file) for split, files in data_files(folder, name).items() for file in files]
    contents = file_digests([file for _, file in files])
    named = [f"{split} {file.resolve()} {content}" for (split, file), content in zip(files, contents, strict=True)]
    digest = hashlib.sha256("\n".join(named).encode()).hexdigest()[:16]
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "local" / digest
    return datasets.load_dataset(folder, name=name, cache_dir=str(cache), **settings)
