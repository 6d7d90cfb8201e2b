"""Runs on a device that is too small: nothing finished is lost, and the end says what to change."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_processes import launch

import dqx
from dqx.common import accelerator as own
from dqx.common.processes import processes
from dqx.diffusion.engine import Engine
from dqx.diffusion.scorer import Scorer
from dqx.evaluate.journal import Journal
from dqx.launch.main import main
from dqx.quant.checkpoint.on_disk import OnDisk
from dqx.quant.transforms import awq
from dqx.record.outcomes import launched, why
from dqx.study.subjects import TOO_SMALL
from pretend.device import STATES, TOTAL, State, accelerator
from pretend.test_run import FACTS, SMALL, SUMS, found, outcome, ran


def in_the_search(state: State, patch: pytest.MonkeyPatch) -> None:
    """Memory is short when AWQ rounds for its fifth candidate."""
    rounding, calls = awq.rescaled_rounding, []

    def short(*args: Any) -> torch.Tensor:
        calls.append(args)
        if len(calls) == 5:
            state.failing["div"] = 1
        return rounding(*args)

    patch.setattr(awq, "rescaled_rounding", short)


def in_a_factor(state: State, patch: pytest.MonkeyPatch) -> None:
    """Memory is short in the fifth of GPTQ's factorisations: in the second block."""
    state.failing["linalg_cholesky_ex"] = 5


SHORT = {
    "awq": (["method=awq", "bits=w4a16", "method.transforms.scale.n_grid=2", "method.clip=null"], in_the_search),
    "gptq": ([], in_a_factor),
}


@pytest.mark.parametrize("family", ["llada"])
@pytest.mark.parametrize(("method", "short"), SHORT.values(), ids=SHORT)
def test_a_model_that_cannot_be_quantized_in_memory_is_quantized_from_disk(
    method: list[str],
    short: Callable[[State, pytest.MonkeyPatch], None],
    family: str,
    small_checkpoint: Path,
    tmp_path: Path,
    pretend: State,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = [*FACTS, *method]
    expected = ran(tmp_path / "undisturbed", small_checkpoint, family, "pretend", asked)
    short(pretend, monkeypatch)
    record = ran(tmp_path / "short", small_checkpoint, family, "pretend", asked)
    assert not pretend.failing
    assert found(record) == found(expected)
    assert [expected.quantization["from_disk"], record.quantization["from_disk"]] == [False, True]
    assert TOO_SMALL in record.warnings
    assert TOO_SMALL not in expected.warnings


@pytest.mark.parametrize("family", ["llada"])
def test_blocks_that_are_quantized_are_kept(
    family: str, small_checkpoint: Path, tmp_path: Path, pretend: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even the second block alone fits: the run ends with what to change, and the next one begins there."""
    asked = FACTS
    expected = ran(tmp_path / "undisturbed", small_checkpoint, family, "pretend", asked)
    take, taken = OnDisk.take, []

    def short(home: OnDisk, index: int) -> Any:
        taken.append(index)
        if taken == [0, 1]:
            pretend.failing["linalg_cholesky_ex"] = 1
        return take(home, index)

    monkeypatch.setattr(OnDisk, "take", short)
    in_a_factor(pretend, monkeypatch)
    with pytest.raises(torch.OutOfMemoryError) as failure:
        ran(tmp_path / "short", small_checkpoint, family, "pretend", asked)
    assert "calib.length" in why(failure.value)
    record = ran(tmp_path / "short", small_checkpoint, family, "pretend", asked)
    assert taken == [0, 1, 1]
    assert found(record) == found(expected)
    assert not list((tmp_path / "short" / "cache").rglob("*.partial"))


@pytest.mark.parametrize("family", ["dream"])
def test_two_processes_go_from_memory_to_disk_together(family: str, small_checkpoint: Path, tmp_path: Path) -> None:
    """Only one of them is out of memory."""
    asked = FACTS
    expected = ran(tmp_path / "alone", small_checkpoint, family, "cpu", asked)

    def one() -> list[Any]:
        rank = torch.distributed.get_rank()
        os.environ["LOCAL_RANK"] = str(rank)
        processes()
        del os.environ["ACCELERATE_USE_CPU"]
        if rank:
            STATES[1].failing["linalg_cholesky_ex"] = 3
        record = ran(tmp_path / "two", small_checkpoint, family, "auto", asked)
        return [TOO_SMALL in record.warnings, {name: outcome(result) for name, result in record.quantized.items()}]

    with accelerator(devices=2):
        first, second = launch(2, tmp_path / "ranks", one)
    assert first == second == [True, {name: outcome(result) for name, result in expected.quantized.items()}]


@pytest.mark.parametrize("family", ["llada"])
@pytest.mark.parametrize("worker", [Engine, Scorer], ids=["answers", "likelihoods"])
def test_documents_that_are_finished_are_kept(
    worker: type, family: str, small_checkpoint: Path, tmp_path: Path, pretend: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first document not one sequence fits: the run ends with what to change, and the next one goes on."""
    asked = [*(SUMS if worker is Engine else FACTS), "likelihood.batch_tokens=100", "task.limit=3"]
    expected = ran(tmp_path / "undisturbed", small_checkpoint, family, "pretend", asked)
    append = Journal.append

    def short(journal: Journal, lines: Any) -> None:
        append(journal, lines)
        pretend.limit = pretend.taken

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", short)
        with pytest.raises(torch.OutOfMemoryError) as failure:
            ran(tmp_path / "short", small_checkpoint, family, "pretend", asked)
    told = why(failure.value)
    assert "tokens does not fit" in told
    assert "a smaller model.dtype, or a device with more memory" in told
    record = ran(tmp_path / "short", small_checkpoint, family, "pretend", asked)
    assert found(record) == found(expected)
    (result,) = record.full_precision.values()
    assert "continued: 1 of 3 documents were finished in earlier sessions" in result.notes


@pytest.mark.parametrize("family", ["dream"])
def test_a_model_that_does_not_fit(family: str, small_checkpoint: Path, tmp_path: Path, pretend: State) -> None:
    """Loading it says what it takes and what to change, and leaves nothing on the device; quantized or not."""
    lm = dqx.load(small_checkpoint, device="pretend", dtype="float32")
    lm.quantize("rtn", "w4a16", overrides=["bits.weight.group_size=16"])
    lm.save(tmp_path / "quantized")
    del lm
    gc.collect()
    before = pretend.taken
    for folder, dtype in ((small_checkpoint, "a smaller model.dtype, "), (tmp_path / "quantized", "")):
        pretend.limit = before + 60_000
        with pytest.raises(torch.OutOfMemoryError) as failure:
            dqx.load(folder, device="pretend", dtype="float32")
        assert "the model's weights take " in why(failure.value)
        assert f"; choose {dtype}a device with more memory, or model.device=cpu" in why(failure.value)
        del failure
        gc.collect()
        assert pretend.taken == before


@pytest.mark.parametrize("family", ["llada"])
def test_a_model_that_is_half_quantized_is_not_quantized_again(
    family: str, small_checkpoint: Path, pretend: State
) -> None:
    """In a notebook the cell is run again: rotations would be applied twice."""
    lm = dqx.load(small_checkpoint, device="pretend", dtype="float32")
    windows = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
    pretend.failing["linalg_cholesky_ex"] = 1
    with pytest.raises(torch.OutOfMemoryError) as failure:
        lm.quantize("quarot", "w4a4", calib=windows, overrides=["method.clip.n_grid=4"])
    assert "quantize_checkpoint" in why(failure.value)
    with pytest.raises(ValueError, match="load its weights again"):
        lm.quantize("quarot", "w4a4", calib=windows)


@pytest.mark.parametrize("family", ["llada"])
def test_a_run_that_failed_leaves_the_device_to_the_next_one(
    family: str, small_checkpoint: Path, tmp_path: Path, pretend: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep in one process; Hydra keeps a run's exception, and an exception what its functions held."""
    append, bound = Journal.append, own.bound_memory
    held = []

    def short(journal: Journal, lines: Any) -> None:
        append(journal, lines)
        pretend.limit = pretend.taken if len(held) == 1 else TOTAL

    def begun(*asked: Any) -> None:
        gc.collect()
        held.append(pretend.taken)
        bound(*asked)

    monkeypatch.setattr(Journal, "append", short)
    monkeypatch.setattr(own, "bound_memory", begun)
    launched.clear()
    base = [f"model=nano_{family}", f"model.path={small_checkpoint}", "model.device=pretend", *SMALL[2:], *FACTS]
    folders = [f"cache_dir={tmp_path / 'cache'}", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    monkeypatch.setattr(sys, "argv", ["launch.py", "-m", *base, *folders, "method=rtn", "bits=3,4"])
    assert main() == 1
    assert len(held) == 2
    assert held[1] == held[0]
