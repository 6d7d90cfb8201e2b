"""Calibration windows: where they are cut, that the seed decides, and what a bad text says."""

from dataclasses import dataclass

import pytest
import torch

from dqx.data.calibration import calib_problems, calibration_windows, source, windows
from dqx.data.texts import TextSource, load_texts


@dataclass
class Calib:
    text: str
    samples: int = 4
    length: int = 8
    config: str | None = None
    split: str | None = None
    field: str = "text"


class Bytes:
    """A tokenizer whose tokens are bytes, so that windows can be read back."""

    eos_token_id = 0

    def __call__(self, text, add_special_tokens):
        assert add_special_tokens is False
        return type("Encoding", (), {"input_ids": list(text.encode())})


def test_stream_windows_are_substrings_and_follow_the_seed(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(97 + i % 26) for i in range(500)))
    calib = Calib(str(path))
    first, again, other = (calibration_windows(calib, Bytes(), seed=seed) for seed in (1, 1, 2))
    assert first.shape == (4, 8)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    for row in first.tolist():
        assert bytes(row) in path.read_bytes()


def test_windows_do_not_depend_on_where_the_text_lies(tmp_path):
    """Else the same command would calibrate differently in another clone, or with the data in another folder."""
    windows = []
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "text.txt").write_text("".join(chr(97 + i % 26) for i in range(500)))
        windows.append(calibration_windows(Calib(str(tmp_path / place / "text.txt")), Bytes(), seed=1))
    assert torch.equal(*windows)


def test_home_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "text.txt").write_text("hello")
    (tmp_path / "data" / "Salesforce" / "wikitext").mkdir(parents=True)
    assert load_texts(source(Calib("~/text.txt"))) == ["hello"]
    assert calib_problems(Calib("~/text.txt")) == []
    assert calib_problems(Calib("wikitext2"), "~/data") == []


def test_documents_are_joined_with_the_end_token_and_reused_when_short(tmp_path):
    path = tmp_path / "docs.jsonl"
    path.write_text('{"text": "abc"}\n\n{"text": "  "}\n{"text": "de"}\n')
    text = TextSource(str(path), documents=True, separator="<eos>")
    assert load_texts(text) == ["abc", "de"]
    ids = windows(text, Bytes(), samples=2, length=7, seed=0).flatten().tolist()
    assert sorted(bytes(ids).split(b"\0")[:4]) == [b"abc", b"abc", b"de", b"de"]


def test_text_too_short_says_so(tmp_path):
    (tmp_path / "t.txt").write_text("short")
    with pytest.raises(ValueError, match=r"only 5 tokens, fewer than one window of calib.length=8"):
        windows(source(Calib(str(tmp_path / "t.txt"))), Bytes(), 1, 8, 0)


def test_hub_layout_under_data_root(tmp_path):
    import datasets

    folder = tmp_path / "Salesforce" / "wikitext" / "wikitext-2-raw-v1"
    folder.mkdir(parents=True)
    datasets.Dataset.from_dict({"text": ["", " = Title = ", "some words here"]}).to_parquet(
        str(folder / "train-00000-of-00001.parquet")
    )
    (tmp_path / "Salesforce" / "wikitext" / "README.md").write_text(
        "---\nconfigs:\n- config_name: wikitext-2-raw-v1\n  data_files:\n  - split: train\n"
        "    path: wikitext-2-raw-v1/train-*\n---\n"
    )
    found = source(Calib("wikitext2"), str(tmp_path))
    assert load_texts(found) == [" = Title = ", "some words here"]
    assert calib_problems(Calib("wikitext2"), str(tmp_path)) == []


def test_parquet_file(tmp_path):
    import datasets

    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_dict({"body": ["first", "", "second"]}).to_parquet(str(path))
    assert load_texts(source(Calib(str(path), field="body"))) == ["first", "second"]


@pytest.mark.parametrize(
    ("text", "data_root", "words"),
    [
        ("missing.txt", None, "the file does not exist"),
        ("wikitext3", None, "is neither one of nano, wikitext2, pile"),
        ("wikitext2", "/nowhere", "put a copy of the dataset there"),
    ],
)
def test_problems_name_the_remedy(text, data_root, words):
    (problem,) = calib_problems(Calib(text), data_root)
    assert words in problem


def test_missing_field_names_the_fields_there_are(tmp_path):
    path = tmp_path / "docs.jsonl"
    path.write_text('{"content": "abc"}\n')
    with pytest.raises(ValueError, match=r"no field 'text'; it has content: set calib.field"):
        load_texts(source(Calib(str(path))))
