"""Every stage of a run is reused where nothing that it depends on differs, and weights are loaded only to compute."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from dqx.api import DiffusionLM, load
from dqx.config.compose import compose, resolve
from dqx.data.calibration import CalibBatch
from dqx.diagnostics.activations import OutlierStats
from dqx.diffusion.rollout import State
from dqx.record.folder import Record
from dqx.study import subjects
from dqx.study.cache import space
from dqx.study.cache.key import Key
from dqx.study.cache.store import Store
from dqx.study.costs import Costs
from dqx.study.experiment import Experiment
from dqx.study.run import run
from dqx.study.stages import Stages, Watched
from dqx.study.subjects import Subject

SMALL = [
    *("task=nano_facts", "task.limit=2", "task.suite.nano_facts.mc_samples=2", "wandb.mode=disabled"),
    *("calib.samples=2", "calib.length=32", "outliers.samples=1", "fidelity.samples=1", "fidelity.gen_length=4"),
]
GPTQ = ("method=gptq", "bits=w2a16")
CASES = {
    "gptq": GPTQ,
    "activations": ("method=smoothquant", "bits=w8a8"),
    "rotations at run time, keys and values": ("method=quarot", "bits=w4a4"),
    "a bias": ("method=d2quant", "bits=w2a16", "method.clip.n_grid=10"),
    "rollouts": (*GPTQ, "calib=trajectory", "calib.rollout=true", "calib.gen_length=8", "calib.block_length=8"),
}
Launch = Callable[..., Record]


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """Run with these overrides, all runs of a test with one cache."""

    def start(*overrides: str) -> Record:
        config = resolve(compose([*SMALL, f"cache_dir={tmp_path / 'cache'}", *overrides]))
        return run(config, tmp_path / "run")

    return start


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was loaded or made, in order: full precision, quantize, quantized."""
    calls: list[str] = []

    def watch(name: str, called: str) -> None:
        original = getattr(subjects, name)

        def noting(*args: Any, **more: Any) -> Any:
            calls.append(called)
            return original(*args, **more)

        monkeypatch.setattr(subjects, name, noting)

    watch("load_weights", "full precision")
    watch("quantize", "quantize")
    watch("load_quantized", "quantized")
    return calls


def shown(record: Record) -> dict[str, Any]:
    """Everything that was measured, to the last bit."""
    results = [
        [row.to_dict() for row in side["nano_facts"].documents] for side in (record.full_precision, record.quantized)
    ]
    return {"results": results, "outliers": record.outliers, "fidelity": record.fidelity, "deltas": record.deltas}


def quantized_folder(tmp_path: Path) -> Path:
    (folder,) = (path for path in (tmp_path / "cache" / "quantized").iterdir() if path.is_dir())
    return folder


@pytest.mark.parametrize("case", CASES)
def test_another_task_is_measured_on_the_quantized_model_that_is_kept(
    case: str, launch: Launch, made: list[str]
) -> None:
    """Nothing is quantized again, and the numbers are those of a model that was just made."""
    changed = ("task.limit=4",)
    first = launch(*CASES[case])
    assert made == ["full precision", "quantize"]
    second = launch(*CASES[case], *changed)
    assert made[2:] == ["full precision", "quantized"]
    afresh = launch(*CASES[case], *changed, "reuse=false")
    assert shown(second) == shown(afresh)
    assert [record.quantization["source"] for record in (first, second, afresh)] == ["computed", "reused", "computed"]
    assert not [warning for warning in second.warnings if "damaged" in warning]


@pytest.mark.parametrize("case", ["gptq", "rollouts"])
def test_the_same_run_again_loads_no_weights(
    case: str, launch: Launch, made: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    first = launch(*CASES[case])
    made.clear()
    caplog.clear()
    with caplog.at_level(logging.DEBUG, "dqx"):
        second = launch(*CASES[case])
    assert made == []
    assert shown(second) == shown(first)
    assert "reused" in caplog.text
    assert "comput" not in caplog.text
    assert "loading" not in caplog.text


def test_predictions_are_read_only_to_compare_with_them(launch: Launch, made: list[str], tmp_path: Path) -> None:
    """They are large. Damaged ones are told of, and made again, when they are needed."""
    first = launch(*GPTQ)
    (file,) = (tmp_path / "cache" / "predictions").glob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert launch(*GPTQ).warnings == first.warnings
    other = launch(*GPTQ, "bits=w3a16")
    assert any(f"{file} is damaged and was computed again" in warning for warning in other.warnings)
    assert file.read_bytes() == whole
    assert made == ["full precision", "quantize", "full precision", "quantize", "full precision", "quantized"]
    assert other.fidelity == launch(*GPTQ, "bits=w3a16", "reuse=false").fidelity


def test_runs_read_kept_weights_at_the_same_time(
    launch: Launch, made: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who reads waits for no other reader, and nothing is removed under it."""
    first = launch(*GPTQ)
    (entry,) = (e for e in space.entries(tmp_path / "cache") if e.path == quantized_folder(tmp_path))
    locked: list[str] = []
    lock = Store.lock

    def noting(self: Store, key: Key) -> Any:
        locked.append(key.kind)
        return lock(self, key)

    monkeypatch.setattr(Store, "lock", noting)
    store, key = Store(tmp_path / "cache"), Key("quantized", "", {})
    monkeypatch.setattr(store, "_place", lambda key, suffix="": entry.path.with_name(entry.path.name + suffix))
    with store.reading(key):
        assert not space.remove(entry)
        second = launch(*GPTQ, "task.limit=3")
    assert made[-1] == "quantized"
    assert "quantized" not in locked
    assert [record.deltas[0].n for record in (first, second)] == [2, 3]
    assert space.remove(entry)


def test_outliers_are_numbers_and_tensors(tmp_path: Path) -> None:
    """Both artefacts, or both are made again; other states, blocks or thresholds are other artefacts."""
    lm = load("nano_llada")
    ids = torch.arange(1, 25)[None]
    watched = Watched([CalibBatch(ids, torch.zeros(1))], [State(ids, 0, 12, 0.0, lm.model.arch.mask_token_id)])
    loads = []

    def loaded() -> DiffusionLM:
        loads.append("once more")
        return lm

    def outliers(*overrides: str, seen: Watched = watched) -> OutlierStats:
        config = resolve(compose(["outliers.surfaces=[1]", *overrides, f"cache_dir={tmp_path}"]))
        experiment = Experiment.of(config)
        return Stages(experiment, Costs(experiment.device)).outliers(Subject("any", {}, loaded), seen)

    first, again = outliers(), outliers()
    assert len(loads) == 1
    assert again == first
    assert again.token_texts
    assert set(again.maps) == set(first.maps) >= {"1/mlp_out/surface", "2/mlp_out/channel_max"}
    assert all(torch.equal(again.maps[name], tensor) for name, tensor in first.maps.items())
    outliers(seen=replace(watched, states=[]))
    outliers(seen=replace(watched, states=[replace(watched.states[0], prompt=6)]))
    outliers("outliers.surfaces=[0]")
    outliers("outliers.massive_absolute=50.0")
    assert len(loads) == 5
    for path in (tmp_path / "activations").glob("*.safetensors"):
        path.unlink()
    assert outliers() == first
    assert len(loads) == 6


def test_rtn_is_made_again_rather_than_kept(launch: Launch, made: list[str], tmp_path: Path) -> None:
    launch("method=rtn", "bits=w4a16")
    assert not [path for path in (tmp_path / "cache" / "quantized").iterdir() if path.is_dir()]
    record = launch("method=rtn", "bits=w4a16", "task.limit=4")
    assert made == ["full precision", "quantize"] * 2
    assert record.quantization["source"] == "reused"  # its report


def test_a_damaged_model_is_reported_and_made_again(launch: Launch, made: list[str], tmp_path: Path) -> None:
    launch(*GPTQ)
    file = quantized_folder(tmp_path) / "block-00001.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    record = launch(*GPTQ, "task.limit=4")
    assert made[-1] == "quantize"
    assert any(f"{file.parent} is damaged and was computed again" in warning for warning in record.warnings)
    assert shown(launch(*GPTQ, "task.limit=3"))
    assert made[-1] == "quantized"
    assert shown(record) == shown(launch(*GPTQ, "task.limit=4", "reuse=false"))


def test_a_model_that_comes_out_differently_is_measured_anew(launch: Launch, tmp_path: Path) -> None:
    """Its weights are gone, and what was measured on the old one does not mix with what is measured on the new."""
    first = launch(*GPTQ)
    shutil.rmtree(quantized_folder(tmp_path))
    store = Store(tmp_path / "cache")
    path = next((tmp_path / "cache" / "quantized").glob("*.json"))
    key = Key("quantized", path.stem.rpartition("-")[0], json.loads(path.read_text())["facts"])
    known = store.read(key, subjects.Quantized.from_dict)
    assert known is not None
    store.write(key, subjects.Quantized(known.report, "another", ["of another model"]))
    record = launch(*GPTQ, "task.limit=4")
    assert record.quantization["source"] == "computed"
    assert "of another model" not in record.warnings
    assert record.outliers == first.outliers
    again = store.read(key, subjects.Quantized.from_dict)
    assert again is not None
    assert again.model == known.model


@pytest.mark.parametrize(("setting", "kept"), [("keep_quantized=false", 0), ("cache_max_gb=0.001", 0), ("seed=1", 1)])
def test_weights_are_kept_on_request_and_where_they_fit(
    setting: str, kept: int, launch: Launch, tmp_path: Path
) -> None:
    record = launch(*GPTQ, setting)
    assert sum(path.is_dir() for path in (tmp_path / "cache" / "quantized").iterdir()) == kept
    assert any("larger than cache_max_gb" in warning for warning in record.warnings) == ("max_gb" in setting)


def test_what_was_not_used_for_longest_makes_room(tmp_path: Path) -> None:
    store, keys = Store(tmp_path), [Key("quantized", name, {}) for name in "abcd"]
    for age, key in enumerate(reversed(keys)):  # a was used last
        folder = store.folder_of(key)
        folder.mkdir(parents=True)
        (folder / "block").write_bytes(b"x" * 1000)
        store.write(key, {"report": "small"})
        os.utime(folder, (age, age))
    small = sum(entry.bytes for entry in space.entries(tmp_path) if not entry.heavy)
    with FileLock(space.entries(tmp_path)[-1].lock, is_singleton=True):  # d is in use
        assert space.make_room(store, 1000, small + 4 * 1000)
    left = {path.name[0] for path in (tmp_path / "quantized").iterdir() if path.is_dir()}
    assert "d" in left
    assert "c" not in left
    assert len(list((tmp_path / "quantized").glob("*.json"))) == 4
    assert not space.make_room(store, 10**9, 10**6)
    assert {path.name[0] for path in (tmp_path / "quantized").iterdir() if path.is_dir()} == left
