"""Whole runs on the pretend device, the Python API, and two processes with a device each: what the CPU gives."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from test_processes import launch

import dqx
from dqx.common.devices import pick_device
from dqx.common.processes import processes
from dqx.config.compose import compose, resolve
from dqx.evaluate.journal import Journal
from dqx.evaluate.results import TaskResult
from dqx.record.folder import Record, RunFolder
from dqx.study.run import run
from pretend.device import STATES, State, accelerator

SMALL = [
    *("method=gptq", "bits=3", "bits.weight.group_size=16", "wandb.mode=disabled", "likelihood.batch_tokens=400"),
    *("task.limit=2", "model.dtype=float32", "calib.samples=2", "calib.length=16"),
]
TASKS = {
    "nano_facts": ["mc_samples=4"],
    "nano_sums": ["batch_size=1", "gen_length=8", "steps=4"],
    "nano_text": ["mc_samples=4", "length=32"],
}


def evaluated(*names: str) -> list[str]:
    """The settings of small tasks."""
    return [f"task=[{','.join(names)}]", *(f"task.suite.{name}.{own}" for name in names for own in TASKS[name])]


MEASURED = [
    *("outliers.samples=1", "outliers.steps=2"),
    *("fidelity.samples=1", "fidelity.length=16", "fidelity.gen_length=8"),
]
UNMEASURED = ["outliers.samples=0", "fidelity.samples=0"]
MORE = [*evaluated(*TASKS), *MEASURED]
LESS = [*evaluated("nano_facts", "nano_sums"), *UNMEASURED]
FACTS, SUMS = ([*evaluated(name), *UNMEASURED] for name in ("nano_facts", "nano_sums"))


def ran(folder: Path, checkpoint: Path, family: str, device: str, asked: list[str]) -> Record:
    base = [f"model=nano_{family}", f"model.path={checkpoint}", f"model.device={device}"]
    return run(resolve(compose([*base, *SMALL, f"cache_dir={folder / 'cache'}", *asked])), folder / "run")


def outcome(result: TaskResult) -> dict[str, Any]:
    """A result without what it cost."""
    cost = ("seconds", "n_forwards", "n_tokens", "n_saved", "tokens", "notes")
    return {key: value for key, value in result.to_dict().items() if key not in cost}


def found(record: Record) -> dict[str, Any]:
    """What a run has found, without what it cost."""
    sides = {"full_precision": record.full_precision, "quantized": record.quantized}
    return {
        **{side: {name: outcome(result) for name, result in tasks.items()} for side, tasks in sides.items()},
        "linears": record.quantization["linears"],
        "outliers": {side: stats.to_dict() for side, stats in record.outliers.items()},
        "fidelity": record.fidelity,
        "deltas": record.deltas,
    }


@pytest.mark.parametrize("family", ["dream"])
def test_a_run(family: str, small_checkpoint: Path, tmp_path: Path, pretend: State) -> None:
    """On the device that `auto` finds: results, record and cache. The same run again computes nothing."""
    expected = ran(tmp_path / "cpu", small_checkpoint, family, "cpu", MORE)
    record = ran(tmp_path / "device", small_checkpoint, family, "auto", MORE)
    assert found(record) == found(expected)
    assert (record.environment["device"], expected.environment["device"]) == ("Pretend", "cpu")
    assert record.memory["peak"]["gpu"] > 0
    assert RunFolder(tmp_path / "device" / "run").read().results() == record.results()
    pretend.waits.clear()
    again = ran(tmp_path / "device", small_checkpoint, family, "auto", MORE)
    assert set(again.sources["quantized"].values()) == {"reused"}
    assert found(again) == found(record)
    assert not pretend.waits


@pytest.mark.parametrize("family", ["llada"])
@pytest.mark.usefixtures("pretend")
def test_a_run_that_was_stopped_goes_on(
    family: str, small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of each evaluation of the quantized model, which is read from the cache again."""
    expected = ran(tmp_path / "undisturbed", small_checkpoint, family, "pretend", LESS)
    append, evaluated = Journal.append, []

    def stopping(journal: Journal, lines: Any) -> None:
        append(journal, lines)
        if journal.path.name not in evaluated:
            evaluated.append(journal.path.name)
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "append", stopping)
    for n in range(1, 5):
        with pytest.raises(KeyboardInterrupt):
            ran(tmp_path, small_checkpoint, family, "pretend", LESS)
        assert len(evaluated) == n
    record = ran(tmp_path, small_checkpoint, family, "pretend", LESS)
    assert found(record) == found(expected)
    assert all(result.n_forwards == expected.quantized[name].n_forwards for name, result in record.quantized.items())


@pytest.mark.parametrize("family", ["dream"])
@pytest.mark.usefixtures("pretend")
def test_the_python_api(family: str, small_checkpoint: Path, tmp_path: Path) -> None:
    """Logits, answers, likelihoods, quantization; saved on the device and loaded on either one."""
    cases: list[Any] = []
    for device in ("cpu", "auto"):
        lm = dqx.load(small_checkpoint, device=device, dtype="float32")
        assert lm.model.device.type == ("cpu" if device == "cpu" else "pretend")

        def shown(lm=lm) -> list[Any]:
            masks = torch.tensor([[True, False], [True, True]])
            prompt = lm.tokens("ab")  # on the model's device
            return [
                lm.logits("some text").tolist(),
                lm.generate(["one", prompt], gen_length=6, steps=3),
                lm.log_likelihood("one", "two", samples=3),
                lm.log_likelihood(prompt, "cd", masks=masks),
                lm.log_likelihood(prompt, "cd", masks=masks.tolist()),
            ]

        before = shown()
        lm.save(tmp_path / f"full-{device}")
        report = lm.quantize("rtn", "w4a16", overrides=["bits.weight.group_size=16"])
        lm.save(tmp_path / f"quantized-{device}")
        cases.append((before, shown(), report.linears))
        for name, expected in (("full", before), ("quantized", cases[-1][1])):
            for where in ("cpu", "pretend:0"):
                assert shown(dqx.load(tmp_path / f"{name}-{device}", device=where, dtype="float32")) == expected
    assert cases[0] == cases[1]


@pytest.mark.parametrize("family", ["llada"])
def test_two_processes_with_a_device_each(family: str, small_checkpoint: Path, tmp_path: Path) -> None:
    """Connected by gloo; they share the documents, and each has its model on a device of its own."""

    def one() -> list[Any]:
        os.environ["LOCAL_RANK"] = str(torch.distributed.get_rank())
        processes()  # connected, as processes without an accelerator are
        del os.environ["ACCELERATE_USE_CPU"]
        device, before = pick_device("auto"), [state.peak for state in STATES.values()]
        record = ran(tmp_path / "two", small_checkpoint, family, "auto", LESS)
        taken = [state.peak > peak for state, peak in zip(STATES.values(), before, strict=True)]
        return [str(device), taken, {name: outcome(result) for name, result in record.quantized.items()}]

    with accelerator(devices=2):
        (first, second) = launch(2, tmp_path / "ranks", one)
    assert first[:2] == ["pretend:0", [True, False]]
    assert second[:2] == ["pretend:1", [False, True]]
    assert first[2] == second[2]
    expected = ran(tmp_path / "alone", small_checkpoint, family, "cpu", LESS)
    assert first[2] == {name: outcome(result) for name, result in expected.quantized.items()}
