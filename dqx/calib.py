"""Calibration: text -> token windows. What of them is masked is decided in `dqx/masking.py`.

Two ways of drawing windows, as the reference implementations do: `stream` texts (WikiText-2 in GPTQ's code) are
joined and cut at random places; `documents` texts (the Pile in AWQ's code) are visited in random order, joined and
cut one after the other.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dqx.diffusion.noise import generator
from dqx.evaluate.local_data import load_local

ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True)
class CalibBatch:
    """`ids` [B, T] int64 as the model sees them, and the share of masked tokens of each row `mask_ratio` [B]."""

    ids: Tensor
    mask_ratio: Tensor


@dataclass(frozen=True)
class TextSource:
    """Where a calibration text lies and how it is cut."""

    path: str  # hub dataset id or local file
    config: str | None = None
    split: str = "train"
    field: str = "text"
    documents: bool = False
    separator: str = ""  # between documents; "<eos>" is the tokenizer's end token


TEXTS: dict[str, TextSource] = {
    "nano": TextSource(str(ASSETS / "nano" / "corpus.txt"), documents=True, separator="<eos>"),
    "wikitext2": TextSource("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "pile": TextSource("mit-han-lab/pile-val-backup", split="validation", documents=True),
}
LOCAL_SUFFIXES = (".txt", ".jsonl", ".parquet")


class CalibSettings(Protocol):
    """The fields of the `calib` config group that this module reads."""

    text: str
    config: str | None
    split: str | None
    field: str
    samples: int
    length: int


def source(calib: CalibSettings, data_root: str | None = None) -> TextSource:
    """The text that `calib.text` names: a registered name, a local file, or a dataset id (under `data_root` if set)."""
    found = TEXTS.get(calib.text)
    if found is None:
        local = Path(calib.text).suffix in LOCAL_SUFFIXES
        found = TextSource(
            str(Path(calib.text).expanduser()) if local else calib.text,
            calib.config,
            calib.split or "train",
            calib.field,
            documents=local and not calib.text.endswith(".txt"),
        )
    if data_root and Path(found.path).suffix not in LOCAL_SUFFIXES and not Path(found.path).is_dir():
        found = TextSource(**{**vars(found), "path": str(Path(data_root).expanduser() / found.path)})
    return found


def calib_problems(calib: CalibSettings, data_root: str | None = None) -> list[str]:
    """What config alone can tell is wrong with the calibration text."""
    text = source(calib, data_root)
    path = Path(text.path)
    if path.suffix in LOCAL_SUFFIXES:
        if not path.is_file():
            return [
                f"calib.text={calib.text}: the file does not exist; give an existing {', '.join(LOCAL_SUFFIXES)} file"
            ]
        if path.stat().st_size == 0:
            return [f"calib.text={calib.text}: the file is empty"]
        return []
    if data_root and not path.is_dir():
        return [
            f"calib.text={calib.text}: {path} does not exist; put a copy of the dataset there, "
            f"choose another text ({', '.join(TEXTS)} or a local file), or unset data_root to fetch it from the hub"
        ]
    if not data_root and calib.text not in TEXTS and calib.text.count("/") != 1 and not path.is_dir():
        return [
            f"calib.text={calib.text} is neither one of {', '.join(TEXTS)}, nor a local file "
            f"({', '.join(LOCAL_SUFFIXES)}), nor a dataset id such as Salesforce/wikitext"
        ]
    return []


def load_texts(text: TextSource) -> list[str]:
    """The rows of a text source that hold more than white space. Raises ValueError naming the file or the field."""
    path = Path(text.path)
    if path.suffix == ".txt":
        content = path.read_text(encoding="utf-8")
        rows: list[Any] = content.split("\n\n") if text.documents else [content]
    elif path.suffix == ".jsonl":
        rows = [
            _field(json.loads(line), text) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()
        ]
    else:
        data = _table(text)
        if text.field not in data.column_names:
            raise ValueError(
                f"{text.path} has no field {text.field!r}; it has {', '.join(data.column_names)}: set calib.field"
            )
        column: Any = data[text.field]
        rows = column.to_pylist() if path.suffix == ".parquet" else column
    return [row for row in rows if row.strip()]


def _table(text: TextSource) -> Any:
    """The rows of a Parquet file, a local dataset folder or a hub dataset, by column."""
    if text.path.endswith(".parquet"):
        import pyarrow.parquet

        return pyarrow.parquet.read_table(text.path)
    import datasets

    if not Path(text.path).is_dir():
        return datasets.load_dataset(text.path, name=text.config, split=text.split)
    splits = load_local(text.path, text.config)
    if text.split not in splits:
        raise ValueError(f"{text.path} has no split {text.split!r}; it has {', '.join(splits)}: set calib.split")
    return splits[text.split]


def _field(row: dict[str, Any], text: TextSource) -> str:
    if text.field not in row:
        raise ValueError(f"{text.path}: a line has no field {text.field!r}; it has {', '.join(row)}: set calib.field")
    return row[text.field]


def windows(text: TextSource, tokenizer: Any, samples: int, length: int, seed: int) -> Tensor:
    """[samples, length] token ids drawn from the text with `seed`.

    Of the text's path only the last part enters the noise: another clone or data folder gives the same windows.

    Raises ValueError where the text is too short for a single window.
    """
    noise = generator(seed, "calib", Path(text.path).name)
    rows = load_texts(text)
    if not text.documents:
        ids = torch.tensor(tokenizer("\n\n".join(rows), add_special_tokens=False).input_ids)
        _long_enough(text, len(ids), length)
        starts = torch.randint(0, len(ids) - length + 1, (samples,), generator=noise)
        return torch.stack([ids[s : s + length] for s in starts.tolist()])
    gap = [tokenizer.eos_token_id] if text.separator == "<eos>" else []
    stream: list[int] = []
    while len(stream) < samples * length:
        before = len(stream)
        for i in torch.randperm(len(rows), generator=noise).tolist():
            stream += tokenizer(rows[i].strip(), add_special_tokens=False).input_ids + gap
            if len(stream) >= samples * length:
                break
        _long_enough(text, len(stream) - before, length if len(stream) < samples * length else 1)
    return torch.tensor(stream[: samples * length]).view(samples, length)


def _long_enough(text: TextSource, tokens: int, length: int) -> None:
    if tokens < length:
        raise ValueError(
            f"{text.path} has only {tokens} tokens, fewer than one window of calib.length={length}; choose less"
        )


def calibration_windows(calib: CalibSettings, tokenizer: Any, *, seed: int, data_root: str | None = None) -> Tensor:
    """The text that `calib` names as `calib.samples` windows of `calib.length` tokens [N, T], fully visible."""
    return windows(source(calib, data_root), tokenizer, calib.samples, calib.length, seed)
