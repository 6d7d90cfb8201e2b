"""`dqx cache`: what it lists, finds damaged, removes, and leaves alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from dqx.study.cache import space
from dqx.study.cache.command import main
from dqx.study.cache.key import Key
from dqx.study.cache.store import Store


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Two results and the predictions of a model; the first result was used last."""
    store = Store(tmp_path / "cache")
    for age, name in enumerate(("old", "new")):
        key = Key("results", name, {"name": name})
        store.write(key, {"value": 1})
        path = tmp_path / "cache" / key.path
        os.utime(path.with_name(f"{path.name}.json"), (1e9 * (age + 0.5), 1e9 * (age + 0.5)))
    store.write_tensors(Key("predictions", "model", {}), {"ids": torch.arange(1000)})
    return tmp_path / "cache"


def verified(cache: Path) -> object:
    """The exit code of `verify`."""
    with pytest.raises(SystemExit) as ended:
        main(["verify", "--dir", str(cache)])
    return ended.value.code


def names(cache: Path) -> list[str]:
    return [entry.path.name.rpartition("-")[0] for entry in space.entries(cache)]


def test_the_list_names_everything(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--dir", str(cache)])
    shown = capsys.readouterr().out
    assert all(words in shown for words in ("results", "old-", "new-", "predictions", "2 in all"))


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_damage_is_named(cache: Path, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert verified(cache) == 0
    assert "4 of 4 are whole" in capsys.readouterr().out
    path = next(cache.glob(f"predictions/*{suffix}"))
    path.write_bytes(path.read_bytes()[:-3] + b"xyz")
    assert verified(cache) == 1
    assert f"{path} is damaged" in capsys.readouterr().out


def test_pruning_removes_what_was_asked_for(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as mistake:
        main(["prune", "--dir", str(cache)])
    assert mistake.value.code == 2
    assert len(names(cache)) == 4
    main(["prune", "--dir", str(cache), "--older-than", "10000", "--kind", "results"])
    assert names(cache) == ["model", "model", "new"]
    main(["prune", "--dir", str(cache), "--max-gb", "0.000001"])  # the tensors first
    assert names(cache) == ["model", "new"]
    capsys.readouterr()
    main(["prune", "--dir", str(cache), "--kind", "predictions"])
    assert capsys.readouterr().out.startswith("1 removed, ")
    assert names(cache) == ["new"]
    assert Store(cache).read_tensors(Key("predictions", "model", {})) is None
