"""Text files as people have them: what is text is read, what is none is named by file, line and field."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dqx.data.texts import TextSource, load_texts


def written(folder: Path, content: str | bytes, name: str = "a.jsonl") -> TextSource:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return TextSource(str(path), documents=True)


@pytest.mark.parametrize("text", ["one\u2028two", "one\u0085two", "one\x1ctwo", "one\x0btwo", "one\r\ntwo"])
def test_line_breaks_of_unicode_are_text(text: str, tmp_path: Path) -> None:
    assert load_texts(written(tmp_path, json.dumps({"text": text}, ensure_ascii=False) + "\n")) == [text]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    assert load_texts(written(tmp_path, '\ufeff{"text": "a"}\n')) == ["a"]
    assert load_texts(written(tmp_path, "\ufeffa", "a.txt")) == ["a"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": null}\n', "a.jsonl, line 2: field 'text' is null, not a text"),
        ('{"text": 3}', "line 1: field 'text' is a int"),
        ('{"text": ["a"]}', "line 1: field 'text' is a list"),
        ('{"text": "\\ud800"}', "line 1: field 'text' holds half of a surrogate pair"),
        ('{"text": "a"}\n\n{"text": "cut', "line 3 is no JSON: Unterminated string"),
        ('[{"text": "a"}]', "line 1 is a list; JSON Lines has an object"),
        ('{"content": "a"}', "line 1 has no field 'text'; it has content: set calib.field"),
        ('{"text": "a"}\n{"text": "gr\u00fcn"}\n'.encode("latin-1"), "line 2 is not in UTF-8; `iconv"),
        ("[" * 100_000, "line 1 "),
    ],
)
def test_what_is_no_text_is_named(content: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load_texts(written(tmp_path, content))


def test_rows_of_parquet_files(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet, row 2: field 'text' is null"):
        load_texts(TextSource(str(tmp_path / "a.parquet")))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.sampled_from(["text", "x"]), inside, max_size=2),
    max_leaves=6,
)


@settings(max_examples=300, deadline=2000)
@given(st.lists(JSON.map(json.dumps) | st.text(max_size=30), max_size=4).map("\n".join) | st.binary(max_size=60))
def test_any_file_is_read_or_named(tmp_path_factory: pytest.TempPathFactory, content: str | bytes) -> None:
    source = written(tmp_path_factory.getbasetemp(), content, "fuzzed.jsonl")
    try:
        rows, told = load_texts(source), ""
    except ValueError as error:
        rows, told = [], str(error)
    assert not told or "fuzzed.jsonl, line " in told
    assert all(isinstance(row, str) and row.encode() for row in rows)
