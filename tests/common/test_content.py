"""Digests of files: every byte counts, and what is remembered is forgotten when a file changes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dqx.common import content
from dqx.common.digest import files_digest


def test_digests_are_remembered_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(content, "SMALL", 0)
    file = tmp_path / "file"
    file.write_bytes(b"a" * 100)
    first = content.file_digests([file])
    assert not list((tmp_path / "cache").rglob("*.json"))  # it may change again within the clock's tick
    monkeypatch.setattr(content, "SETTLED_NS", 0)
    assert content.file_digests([file]) == first
    (entry,) = (tmp_path / "cache").rglob("*.json")
    entry.write_text(entry.read_text().replace(first[0], "remembered"))
    assert content.file_digests([file]) == ["remembered"]  # it was not read
    status = file.stat()
    file.write_bytes(b"b" * 100)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # the time set back: the inode's own tells
    assert content.file_digests([file])[0] not in (first[0], "remembered")


def test_files_of_the_hubs_cache_need_no_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "SMALL", 0)
    blob = tmp_path / "blobs" / ("ab" * 32)  # no digest of what it holds
    blob.parent.mkdir()
    blob.write_bytes(b"x")
    (tmp_path / "snapshots").mkdir()
    link = tmp_path / "snapshots" / "model.safetensors"
    link.symlink_to(blob)
    assert content.file_digests([link]) == [blob.name]


def test_pieces_are_hashed_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "PIECE", 8)
    texts = {"a": b"12345678abcdefgh", "b": b"abcdefgh12345678", "c": b"12345678abcdefgh"}
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text)
    a, b, c = content.file_digests([tmp_path / name for name in texts])  # side by side
    assert a == c != b
    assert content.file_digests([tmp_path / "a"]) == [a]


def test_order_and_places_do_not_count_but_names_do(tmp_path: Path) -> None:
    def folder(name: str, **texts: str) -> str:
        (tmp_path / name).mkdir()
        for file, text in texts.items():
            (tmp_path / name / file).write_text(text)
        return files_digest((tmp_path / name).rglob("*"), tmp_path / name)

    assert folder("one", a="x", b="y") == folder("two", b="y", a="x")
    assert len({folder("three", a="y", b="x"), folder("four", a="x", c="y"), folder("five", a="x")}) == 3


def test_a_change_that_keeps_size_and_time_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text("old")
    before, status = files_digest([file]), file.stat()
    file.write_text("new")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert files_digest([file]) != before
