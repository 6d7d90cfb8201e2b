"""Texts by name, file or dataset id: where they lie, what can be wrong with them, and their rows."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dqx.common.files import ASSETS
from dqx.data.local import load_local
from dqx.models.vocabulary import check, text_ids


@dataclass(frozen=True)
class TextSource:
    """Where a text lies and how its rows become one."""

    path: str  # hub dataset id or local file
    config: str | None = None
    split: str = "train"
    field: str = "text"
    documents: bool = False
    separator: str = ""  # between documents; "<eos>" is the tokenizer's end token
    files: str | None = None  # of a hub dataset: the only files that are downloaded
    where: str = "calib"  # the section of the config that names it, for messages


TEXTS: dict[str, TextSource] = {
    "nano": TextSource(str(ASSETS / "nano" / "corpus.txt"), documents=True, separator="<eos>"),
    "wikitext2": TextSource("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "pile": TextSource("mit-han-lab/pile-val-backup", split="validation", documents=True),
    "c4": TextSource("allenai/c4", "en", documents=True, files="en/c4-train.00000-of-01024.json.gz"),
}
LOCAL_SUFFIXES = (".txt", ".jsonl", ".parquet")


def find_text(
    text: str,
    *,
    config: str | None = None,
    split: str | None = None,
    field: str = "text",
    data_root: str | None = None,
    where: str = "calib",
) -> TextSource:
    """The text of a registered name, a local file, or a dataset id (under `data_root` if set).

    `config`, `split` and `field` are of a dataset id or file; a registered name has its own. `where` is the section
    of the configuration that names the text.
    """
    source = TEXTS.get(text)
    if source is None:
        local = Path(text).suffix in LOCAL_SUFFIXES
        path = str(Path(text).expanduser()) if local else text
        documents = local and not text.endswith(".txt")
        source = TextSource(path, config, split or "train", field, documents=documents)
    if data_root and Path(source.path).suffix not in LOCAL_SUFFIXES and not Path(source.path).is_dir():
        source = replace(source, path=str(Path(data_root).expanduser() / source.path))
    return replace(source, where=where)


def text_problems(text: str, source: TextSource, data_root: str | None = None) -> list[str]:
    """What config alone can tell is wrong with a text; `source` is what `find_text` made of it."""
    path, key = Path(source.path), f"{source.where}.text={text}"
    if path.suffix in LOCAL_SUFFIXES:
        if not path.is_file():
            return [f"{key}: the file does not exist; give an existing {', '.join(LOCAL_SUFFIXES)} file"]
        if path.stat().st_size == 0:
            return [f"{key}: the file is empty"]
        return []
    if data_root and not path.is_dir():
        return [
            f"{key}: {path} does not exist; put a copy of the dataset there, "
            f"choose another text ({', '.join(TEXTS)} or a local file), or unset data_root to fetch it from the hub"
        ]
    if not data_root and text not in TEXTS and text.count("/") != 1 and not path.is_dir():
        return [
            f"{key} is neither one of {', '.join(TEXTS)}, nor a local file "
            f"({', '.join(LOCAL_SUFFIXES)}), nor a dataset id such as Salesforce/wikitext"
        ]
    return []


def load_texts(text: TextSource) -> list[str]:
    """The rows of a text source that hold more than white space.

    Raises ValueError naming the file, and the line or row and the field, where something there is no text.
    """
    path = Path(text.path)
    if path.suffix == ".txt":
        content = _decoded(path, path.read_bytes())
        rows = content.split("\n\n") if text.documents else [content]
    elif path.suffix == ".jsonl":
        lines = _decoded(path, path.read_bytes()).split("\n")  # other line breaks may stand inside of a text
        rows = [_parsed(line, f"{path}, line {number}", text) for number, line in enumerate(lines, 1) if line.strip()]
    else:
        data = _table(text)
        if text.field not in data.column_names:
            raise ValueError(
                f"{text.path} has no field {text.field!r}; it has {', '.join(data.column_names)}: "
                f"set {text.where}.field"
            )
        column: Any = data[text.field]
        values = column.to_pylist() if path.suffix == ".parquet" else column
        rows = [_checked(value, f"{text.path}, row {number}", text) for number, value in enumerate(values, 1)]
    return [row for row in rows if row.strip()]


def _decoded(path: Path, content: bytes) -> str:
    """The text of a file in UTF-8, without a byte order mark."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line} is not in UTF-8; `iconv -f latin1 -t utf-8` converts Latin-1") from error


def _parsed(line: str, place: str, text: TextSource) -> str:
    """The text in a line of JSON."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place} is no JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{place} has lists inside lists without end") from error
    if not isinstance(row, dict):
        raise ValueError(f"{place} is a {type(row).__name__}; JSON Lines has an object with its fields on each line")
    if text.field not in row:
        raise ValueError(f"{place} has no field {text.field!r}; it has {', '.join(row)}: set {text.where}.field")
    return _checked(row[text.field], place, text)


def _checked(value: Any, place: str, text: TextSource) -> str:
    if not isinstance(value, str):
        kind = "null" if value is None else f"a {type(value).__name__}"
        raise ValueError(
            f"{place}: field {text.field!r} is {kind}, not a text; take the row out or set {text.where}.field"
        )
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"{place}: field {text.field!r} holds half of a surrogate pair, which is no character")
    return value


def _table(text: TextSource) -> Any:
    """The rows of a Parquet file, a local dataset folder or a hub dataset, by column."""
    if text.path.endswith(".parquet"):
        import pyarrow.parquet

        return pyarrow.parquet.read_table(text.path)
    import datasets

    if not Path(text.path).is_dir() and text.files is not None:
        return datasets.load_dataset(text.path, data_files={text.split: text.files}, split=text.split)
    if not Path(text.path).is_dir():
        return datasets.load_dataset(text.path, name=text.config, split=text.split)
    splits = load_local(text.path, text.config)
    if text.split not in splits:
        raise ValueError(f"{text.path} has no split {text.split!r}; it has {', '.join(splits)}: set {text.where}.split")
    return splits[text.split]


def token_stream(text: TextSource, tokenizer: Any) -> list[int]:
    """All tokens of a text, its rows joined as its kind wants it. Raises what `load_texts` and `text_ids` raise."""
    rows = load_texts(text)
    if not text.documents:
        return text_ids(tokenizer, "\n\n".join(rows))
    gap = separator_ids(text, tokenizer)
    return [token for row in rows for token in text_ids(tokenizer, row.strip()) + gap]


def separator_ids(text: TextSource, tokenizer: Any) -> list[int]:
    """The tokens between the documents of a text."""
    if text.separator != "<eos>":
        return []
    check(tokenizer, [tokenizer.eos_token_id], text.separator)
    return [tokenizer.eos_token_id]
