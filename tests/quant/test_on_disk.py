"""Quantizing a checkpoint on disk block by block: the numbers of the path in memory, spilling, going on when killed."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import pytest
import torch
from goldens import GOLDEN
from test_saved import CASES, IDS, SMALL, assert_same, configured, dtype_of, quantized
from tiny import Batch

from dqx.config.compose import build, select
from dqx.models.checkpoint import inspect, load_weights
from dqx.models.plant import plant_outliers
from dqx.quant import load_quantized, quantize, quantize_checkpoint
from dqx.quant.activations_store import ActivationStore
from dqx.quant.checkpoint.on_disk import Loading, OnDisk


def on_disk(family, case, output, dtype=torch.float32, activations_gb=0.0, **options):
    """The report of a case quantized from disk, no activation in memory."""
    config = configured(family, CASES[case])
    part, source = build(config.method), inspect(str(GOLDEN / f"{family}_tiny"))
    batches = [Batch(IDS)] if part.needs_data else []
    options |= {"loading": Loading(dtype, activations_gb=activations_gb), "progress": False}
    return quantize_checkpoint(source, output, part, config.bits, batches, **options)


def without_costs(report):
    return replace(report, from_disk=False, seconds=0.0, peak_ram=0, peak_gpu=0)


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_from_disk_is_as_in_memory(case, family, tmp_path):
    model, _, _, report = quantized(family, CASES[case], dtype_of(case))
    found = on_disk(family, case, tmp_path / "out", dtype_of(case))
    again, stored = load_quantized(tmp_path / "out")
    assert_same(model, again)
    assert stored == found
    assert without_costs(found) == without_costs(report)
    assert (found.from_disk, report.from_disk) == (True, False)
    assert found.peak_ram > 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert {p.suffix for p in (tmp_path / "out").iterdir()} == {".safetensors", ".json"}


class Killed(Exception):
    """Ends a quantization in the middle."""


def in_a_process_that_kills_itself(stage, at, *args, **options):
    """Run `on_disk` in a fork that sends itself SIGKILL when block `at` comes to a stage; its exit signal."""
    pid = os.fork()
    if pid:
        return os.WTERMSIG(os.waitpid(pid, 0)[1])
    try:
        whole = getattr(OnDisk, stage)

        def call(self, *given):
            if getattr(given[0], "blocks", given[0]) == at or at is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(self, *given)

        setattr(OnDisk, stage, call)
        on_disk(*args, **options)
    finally:
        os._exit(0)


STAGES = [("note", 0), ("take", 0), ("put", 0), ("note", 1), ("put", 1), ("take", 2), ("note", 3), ("finish", None)]


@pytest.mark.parametrize("case", ["gptaq w2a16", "quarot w4a4", "duquant w4a4"])
@torch.no_grad()
def test_a_killed_quantization_goes_on_where_it_was(case, tmp_path):
    """Killed at every stage of a block, in turn: loading, writing, noting that it is done; and before the very end."""
    model, _, _, report = quantized("dream", CASES[case])
    for stage, at in STAGES:
        ended_by = in_a_process_that_kills_itself(stage, at, "dream", case, tmp_path / "out", activations_gb=None)
        assert ended_by == signal.SIGKILL
        assert [p.name for p in tmp_path.iterdir()] == ["out.partial"]
    found = on_disk("dream", case, tmp_path / "out")
    assert without_costs(found) == without_costs(report)
    assert_same(model, load_quantized(tmp_path / "out")[0])
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_finished_blocks_are_not_done_again(tmp_path, monkeypatch):
    put, take, order = OnDisk.put, OnDisk.take, []

    def counted(self, index):
        order.append(index)
        return take(self, index)

    def stops(self, index, block):
        put(self, index, block)
        if index == 1 and order.count(1) == 1:
            raise Killed

    monkeypatch.setattr(OnDisk, "take", counted)
    monkeypatch.setattr(OnDisk, "put", stops)
    with pytest.raises(Killed):
        on_disk("llada", "gptq w3a16", tmp_path / "out")
    on_disk("llada", "gptq w3a16", tmp_path / "out")
    assert order == [0, 1, 1, 2]


def test_another_call_does_not_go_on_with_foreign_blocks(tmp_path, monkeypatch):
    def killed(self, index):
        raise Killed

    monkeypatch.setattr(OnDisk, "take", killed)
    with pytest.raises(Killed):
        on_disk("llada", "rtn w4a16", tmp_path / "out")
    monkeypatch.undo()
    with pytest.raises(
        ValueError, match=r"out\.partial is an unfinished quantization with another bits, seed; remove it"
    ):
        on_disk("llada", "rtn w8a8", tmp_path / "out", torch.float32, seed=1)
    on_disk("llada", "rtn w4a16", tmp_path / "out")
    with pytest.raises(ValueError, match="exists already"):
        on_disk("llada", "rtn w4a16", tmp_path / "out")


@torch.no_grad()
def test_planted_outliers_and_tied_heads(tmp_path, tiny_checkpoint):
    source = inspect(str(tiny_checkpoint("llada", weight_tying=True, max_shard_bytes=100_000)))
    config = select(method="quarot", bits="w4a4")
    model, method = load_weights(source), build(config.method)
    plant_outliers(model, 8.0, 2)
    quantize(model, method, config.bits, [Batch(IDS % 256)], progress=False)
    settings = {"loading": Loading(planted=(8.0, 2)), "progress": False}
    quantize_checkpoint(source, tmp_path / "out", method, config.bits, [Batch(IDS % 256)], **settings)
    assert_same(model, load_quantized(tmp_path / "out")[0])
    config = select(method="rtn", bits="w4a16", overrides=[SMALL])
    quantize_checkpoint(source, tmp_path / "tied", build(config.method), config.bits, progress=False)
    again = load_quantized(tmp_path / "tied")[0]
    assert again.head.weight is again.embed.weight


def test_one_block_is_in_memory_at_a_time(tmp_path, monkeypatch):
    """When a block is taken no other has weights, and the embedding has none; the final norm is one vector."""
    take, seen = OnDisk.take, []

    def counted(self, index):
        seen.append([name for name, p in self.model.named_parameters() if not p.is_meta])
        return take(self, index)

    monkeypatch.setattr(OnDisk, "take", counted)
    on_disk("dream", "gptq w3a16", tmp_path / "out")
    assert seen == 3 * [["norm.weight"]]


def test_rows_spill_and_come_back_the_same(tmp_path):
    store = ActivationStore(tmp_path, limit=400)
    sent = [torch.randn(2, 16, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64)]
    row = store.row()
    for x in sent:
        row.append(x)
    assert store.held == 128 + 64  # the last one had no room
    assert [len(list(p.iterdir())) for p in tmp_path.iterdir()] == [1]
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(row, sent, strict=True))
    assert torch.equal(row[-1], sent[-1])
    kept = store.row(keep=True)
    kept.append(sent[0])
    del row
    assert store.held == 128
    assert len(list(tmp_path.iterdir())) == 1
    del kept
    assert store.held == 0
    assert len(list(tmp_path.iterdir())) == 1
    assert isinstance(ActivationStore().row(), list)
