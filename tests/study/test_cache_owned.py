"""A cache is marked, and nothing but what dqx has made there is ever removed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dqx.config.compose import compose, resolve
from dqx.study.cache import command, owned, space
from dqx.study.cache.key import Key
from dqx.study.cache.store import Store
from dqx.study.experiment import problems

KEY = Key("results", "nano_facts", {"seed": 0})


def kept(folder: Path) -> Store:
    store = Store(folder)
    with store.lock(KEY):
        store.write(KEY, {"n": 1})
    return store


def precious(folder: Path, *names: str) -> list[Path]:
    paths = [folder / name for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("precious")
    return paths


@pytest.mark.parametrize("names", [("photos/beach.jpg",), ("results/thesis.tex",), ("notes.txt",), ("quantized",)])
def test_folders_of_others_are_refused(names: tuple[str, ...], tmp_path: Path) -> None:
    paths = precious(tmp_path, *names)
    config = resolve(compose([f"cache_dir={tmp_path}", "cache_max_gb=0"]))
    told = [line for line in problems(config) if line.startswith("cache_dir=")]
    assert re.search(rf"it holds {Path(names[0]).parts[0]}.*, which is not dqx's", told[0])
    with pytest.raises(SystemExit) as end:
        command.main(["prune", "--dir", str(tmp_path), "--max-gb", "0"])
    assert end.value.code == 2
    assert all(path.read_text() == "precious" for path in paths)


def test_in_a_cache_only_artefacts_are_removed(tmp_path: Path) -> None:
    store = kept(tmp_path / "cache")
    assert (store.folder / owned.MARKER).is_file()
    elsewhere = precious(tmp_path, "elsewhere/data.bin")[0]
    paths = precious(
        store.folder, "photos/beach-01234567890123456789.json", "results/mine.json", "results/report-2024.json"
    )
    (store.folder / "results" / f"link-{'0' * 20}").symlink_to(elsewhere.parent)
    assert [entry.path for entry in space.entries(store.folder)] == [store.folder / f"{KEY.path}.json"]
    assert space.make_room(store, 1, 1)
    command.main(["prune", "--dir", str(store.folder), "--max-gb", "0"])
    assert not (store.folder / f"{KEY.path}.json").exists()
    assert all(path.read_text() == "precious" for path in (*paths, elsewhere))


def test_an_older_cache_is_taken_over(tmp_path: Path) -> None:
    store = kept(tmp_path)
    (tmp_path / owned.MARKER).unlink()
    assert owned.cache_problem(tmp_path) is None
    kept(tmp_path)
    assert (tmp_path / owned.MARKER).is_file()
    assert store.read(KEY, dict) == {"n": 1}


def test_every_name_that_the_store_gives_is_known(tmp_path: Path) -> None:
    for kind in owned.KINDS:
        key = Key(kind, "nano llada-gptq w3/x", {"a": 1})
        store = Store(tmp_path)
        with store.lock(key):
            store.write(key, {})
            store.journal(key, 3)
        place = store.folder_of(key)
        for suffix in ("", ".json", ".lock", ".safetensors", ".partial", ".journal.3"):
            assert owned.NAME.fullmatch(place.name + suffix)
    assert owned.cache_problem(tmp_path) is None


def test_nothing_of_another_kind_can_be_kept() -> None:
    with pytest.raises(ValueError, match="thoughts is no kind of artefact; there are results"):
        Key("thoughts", "a", {})
