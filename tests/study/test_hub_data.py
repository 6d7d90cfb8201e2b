"""Datasets from the hub: the commit that is read is part of what a result depends on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
from conftest import DATA

from dqx.config.compose import compose, resolve
from dqx.config.schema import Config
from dqx.data import hub
from dqx.record.folder import Record
from dqx.study.cache.artifacts import ArtifactCache
from dqx.study.cache.store import Store
from dqx.study.experiment import Experiment
from dqx.study.run import run
from dqx.study.stages import Results

QUICK = ["method=fp16", "bits=w16a16", "outliers.samples=0", "fidelity.samples=0", "wandb.mode=disabled"]
TASKS = {
    "arc_easy": ["task=arc_easy", "task.limit=2", "task.suite.arc_easy.mc_samples=1"],
    "wikitext2": [
        "task=wikitext2",
        "task.limit=1",
        *("task.suite.wikitext2.length=32", "task.suite.wikitext2.mc_samples=1"),
    ],
}


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine without network, whose cache of datasets is empty."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    hub.look_again()
    yield
    hub.look_again()


def fetched(tmp_path: Path, dataset: str, config: str, commit: str, *, first: int = 0) -> Path:
    """A configuration in the cache of `datasets` as it is after that commit was read; rows from `first` on."""
    files = {}
    for file in sorted((DATA / dataset / config).glob("*.parquet")):
        split = file.name.partition("-")[0]
        rows = datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "made"))
        files[split] = str(tmp_path / "made" / f"{commit}-{config}-{split}.parquet")
        rows.select(range(first, len(rows))).to_parquet(files[split])
    made = datasets.load_dataset_builder("parquet", data_files=files, cache_dir=str(tmp_path / "made"))
    made.download_and_prepare()
    owner, name = dataset.split("/")
    place = tmp_path / "datasets" / f"{owner}___{name}" / config / "0.0.0" / commit
    shutil.copytree(made.cache_dir, place)
    for arrow in place.glob("*.arrow"):
        arrow.rename(place / arrow.name.replace("parquet", name, 1))
    info = json.loads((place / "dataset_info.json").read_text())
    (place / "dataset_info.json").write_text(json.dumps(info | {"config_name": config, "dataset_name": name}))
    return place


def configured(tmp_path: Path, task: str, *more: str) -> Config:
    return resolve(compose([*QUICK, *TASKS[task], f"cache_dir={tmp_path / 'cache'}", *more]))


def sources(record: Record) -> set[str]:
    return {source for side in record.sources.values() for source in side.values()}


@pytest.mark.parametrize(
    ("task", "dataset", "config", "later"),
    [("arc_easy", "allenai/ai2_arc", "ARC-Easy", 1), ("wikitext2", "Salesforce/wikitext", "wikitext-2-raw-v1", 5)],
)
def test_a_dataset_that_has_changed_is_evaluated_again(
    tmp_path: Path, task: str, dataset: str, config: str, later: int
) -> None:
    settings = configured(tmp_path, task)
    old = fetched(tmp_path, dataset, config, "1" * 40)
    first = run(settings, tmp_path / "first")
    assert "computed" in sources(first)
    assert sources(run(settings, tmp_path / "again")) == {"reused"}
    fetched(tmp_path, dataset, config, "2" * 40, first=later)
    os.utime(old, (0, 0))  # the older of the two
    changed = run(settings, tmp_path / "changed")
    assert "computed" in sources(changed)
    ours, theirs = ([row.log_likelihoods for row in r.full_precision[task].documents] for r in (first, changed))
    assert ours != theirs
    shutil.rmtree(old.with_name("2" * 40))
    back = run(settings, tmp_path / "back")
    assert sources(back) == {"reused"}
    assert [row.log_likelihoods for row in back.full_precision[task].documents] == ours


def keys(tmp_path: Path, task: str, *more: str) -> str:
    config = configured(tmp_path, task, *more)
    hub.look_again()
    results = Results.of(Experiment.of(config), ArtifactCache(Store(tmp_path / "cache")))
    return results.key(task, config.task.suite[task]).path.name


def test_where_the_hub_answers_its_newest_commit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked once for a dataset, however many of its configurations are read; what is in the cache is then old."""
    asked = []

    def dataset_info(_: object, dataset: str, **__: object) -> SimpleNamespace:
        asked.append(dataset)
        return SimpleNamespace(sha=commit)

    fetched(tmp_path, "allenai/ai2_arc", "ARC-Easy", "1" * 40)
    cached = keys(tmp_path, "arc_easy")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    found = {}
    for commit in ("1" * 40, "2" * 40):
        found[commit] = keys(tmp_path, "arc_easy")
    assert found["1" * 40] == cached
    assert found["2" * 40] != cached
    assert asked == ["allenai/ai2_arc"] * 2
    hub.look_again()
    several = [("cais/mmlu", name) for name in ("astronomy", "virology")]
    assert hub.revisions(several) == {"cais/mmlu astronomy": "2" * 40, "cais/mmlu virology": "2" * 40}
    assert asked[2:] == ["cais/mmlu"]


@pytest.mark.parametrize("error", [ConnectionError("no route"), OSError("401"), TimeoutError()])
def test_where_the_hub_does_not_answer_the_copy_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def dataset_info(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    assert hub.revisions([("allenai/ai2_arc", "ARC-Easy")]) == {"allenai/ai2_arc ARC-Easy": None}
    fetched(tmp_path, "allenai/ai2_arc", "ARC-Easy", "1" * 40)
    hub.look_again()
    assert hub.revisions([("allenai/ai2_arc", "ARC-Easy")]) == {"allenai/ai2_arc ARC-Easy": "1" * 40}


def test_the_hub_is_not_asked_for_what_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def revision(*_: object) -> str:
        raise AssertionError("asked")

    monkeypatch.setattr("dqx.data.hub._newest", revision)
    monkeypatch.setattr("dqx.data.hub.look_again", lambda: None)
    config = configured(tmp_path, "arc_easy", f"data_root={DATA}")
    Results.of(Experiment.of(config), ArtifactCache(Store(tmp_path))).key("arc_easy", config.task.suite["arc_easy"])
    config = resolve(compose([*QUICK, "task=[nano,nano_text]"]))
    results = Results.of(Experiment.of(config), ArtifactCache(Store(tmp_path)))
    assert [results.key(name, spec) for name, spec in config.task.suite.items()]


def test_a_folder_of_text_counts_by_its_content(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    shutil.copytree(DATA / "Salesforce" / "wikitext" / "wikitext-2-raw-v1", folder)
    own = f"task.suite.wikitext2.text={folder}"
    before = keys(tmp_path, "wikitext2", own)
    assert keys(tmp_path, "wikitext2", own) == before
    next(folder.glob("test*")).rename(folder / "test-00000-of-00002.parquet")
    assert keys(tmp_path, "wikitext2", own) != before
