"""Digests of files: every byte counts, and what is remembered is forgotten when a file changes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dqx.common import content
from dqx.common.digest import files_digest


def test_digests_are_remembered_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    reads: list[Path] = []
    piece = content._piece
    monkeypatch.setattr(content, "_piece", lambda p: reads.append(p[0]) or piece(p))
    monkeypatch.setattr(content, "SMALL", 0)
    file = tmp_path / "file"
    file.write_bytes(b"a" * 100)
    first = content.file_digests([file])
    content.file_digests([file])
    assert len(reads) == 2  # it had just changed, and might again within the clock's tick
    monkeypatch.setattr(content, "SETTLED_NS", 0)
    assert content.file_digests([file]) == first == content.file_digests([file])
    assert len(reads) == 3
    status = file.stat()
    file.write_bytes(b"b" * 100)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # the time set back: the inode's own tells
    assert content.file_digests([file]) != first
    assert len(reads) == 4


def test_files_of_the_hubs_cache_need_no_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "_piece", None)
    monkeypatch.setattr(content, "SMALL", 0)
    blob = tmp_path / "blobs" / ("ab" * 32)
    blob.parent.mkdir()
    blob.write_bytes(b"x")
    (tmp_path / "snapshots").mkdir()
    link = tmp_path / "snapshots" / "model.safetensors"
    link.symlink_to(blob)
    assert content.file_digests([link]) == [blob.name]


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
