"""Loops that a graph can replay: the numbers of the eager loop, which is what runs where there are no graphs."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from dqx.common import accelerator
from dqx.common.accelerator import captured
from dqx.formats.binary import BinaryGrid
from dqx.formats.floats import FLOAT_GRIDS
from dqx.formats.integers import Grid
from dqx.formats.weight import BoundClip, QuantizedWeight
from dqx.quant.clip import ClipAtSite, OutputMSE
from dqx.quant.rounding.dual_scale import DualScale
from dqx.quant.rounding.gptaq import GPTAQ, gptaq_round
from dqx.quant.rounding.gptq import ColumnSettings, gptq_round
from dqx.quant.transforms.greedy_rotation import SearchOnDevice, base_rotation, greedy_rotation
from pretend.device import Refused
from pretend.graph import recorder

CPU, DEVICE = "cpu", "pretend:0"
COLUMNS, CHUNK = 44, 8
CASES = {
    "rows": (Grid(4), -1, ColumnSettings(chunk=CHUNK)),
    "groups": (Grid(3), 8, ColumnSettings(chunk=CHUNK)),
    "groups in the order of activations": (Grid(3), 4, ColumnSettings(chunk=CHUNK, act_order=True)),
    "groups larger than a chunk": (Grid(3, symmetric=True), 16, ColumnSettings(chunk=CHUNK)),
    "fresh ranges": (Grid(2), 4, ColumnSettings(chunk=CHUNK, fresh_ranges=True)),
    "static groups": (Grid(2), 4, ColumnSettings(chunk=CHUNK, act_order=True, static_groups=True)),
    "clamped": (Grid(2), 4, ColumnSettings(chunk=CHUNK)),
    "levels": (BinaryGrid(2), 4, ColumnSettings(chunk=CHUNK, group_order=True, levels=DualScale(iterations=3))),
    "mxfp4": (FLOAT_GRIDS["mxfp4"], 4, ColumnSettings(chunk=CHUNK)),
    "GPTAQ": (Grid(2), 8, GPTAQ(chunk=CHUNK, alpha=1.0)),
    "GPTAQ, rounded": (Grid(2), 8, GPTAQ(chunk=CHUNK, alpha=1.0, carry_rounded=True, fresh_ranges=True)),
}


@pytest.fixture
def replays(pretend, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The device has graphs; how often each was replayed."""
    record, counts = recorder()
    monkeypatch.setitem(accelerator.RECORDERS, "pretend", record)
    return counts


def inputs(device: str) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, what its inputs are, and how far they are from those of full precision."""
    draw = torch.Generator().manual_seed(0)
    w = torch.randn(6, COLUMNS, generator=draw)
    x = torch.randn(200, COLUMNS, generator=draw) * torch.rand(COLUMNS, generator=draw)
    return w.to(device), x.to(device), (0.1 * torch.randn(200, COLUMNS, generator=draw)).to(device)


def rounded(device: str, name: str) -> QuantizedWeight:
    grid, group_size, settings = CASES[name]
    w, x, change = inputs(device)
    clip: BoundClip | None = ClipAtSite(OutputMSE(n_grid=4), {"weighted_tokens": x}) if name == "clamped" else None
    if isinstance(settings, GPTAQ):
        return gptaq_round(w, x.T @ x, change.T @ x, grid, group_size, clip, settings)
    return gptq_round(w, x.T @ x, grid, group_size, clip, settings)


@pytest.mark.parametrize("name", CASES)
def test_columns_of_a_chunk_replayed(name: str, replays: list[int]) -> None:
    expected, ours = rounded(CPU, name), rounded(DEVICE, name)
    for part in ("codes", "scale", "zero_point", "group_index"):
        assert torch.equal(getattr(ours, part).cpu(), getattr(expected, part))
    assert sum(replays) >= 2  # the first chunk of every shape is eager


@pytest.mark.parametrize("index", ["channel", "row"])
def test_steps_of_the_greedy_search_replayed(index: str, replays: list[int]) -> None:
    draw = torch.Generator().manual_seed(1)
    x, base = torch.randn(40, 32, generator=draw), base_rotation(8, draw)
    x[:, 3] *= 20
    x[9] = x[8]
    expected = greedy_rotation(x, base, 12, index)
    ours = greedy_rotation(x.to(DEVICE), base.to(DEVICE), 12, index)
    assert replays == [12]
    in_chunks = SearchOnDevice(x.view(-1, 8).to(DEVICE), base.to(DEVICE), 12, index, chunk=30).result()
    for found in (ours, in_chunks):
        assert found.indices == expected.indices
        assert torch.equal(found.rotation_BB.cpu(), expected.rotation_BB)


@pytest.mark.usefixtures("pretend")
def test_without_graphs_the_work_itself_is_done() -> None:
    def work() -> None: ...

    assert captured(work, torch.device(CPU)) is work
    assert captured(work, torch.device(DEVICE)) is work
    assert list(accelerator.RECORDERS) == ["cuda"]


class Work:
    """What a graph can repeat, and two things that it cannot."""

    def __init__(self) -> None:
        self.x, self.turn = torch.zeros(3, device=DEVICE), 0

    def repeatable(self) -> None:
        self.x += 2 * self.x + 1

    def counting(self) -> None:
        self.turn += 1
        self.x += self.turn

    def reading(self) -> None:
        self.x += self.x.max().item() + 1

    def from_the_cpu(self) -> None:
        self.x += torch.ones(3).to(DEVICE)


def test_the_first_time_is_not_recorded_and_every_time_is_done(replays: list[int]) -> None:
    work = Work()
    repeat = captured(work.repeatable, torch.device(DEVICE))
    for expected in ([1.0] * 3, [4.0] * 3, [13.0] * 3):
        repeat()
        assert work.x.tolist() == expected
    assert replays == [2]


def test_a_loop_that_counts_in_python_would_come_out_wrong(replays: list[int]) -> None:
    """As with CUDA: which is why loops are compared with themselves, eager, above."""
    work = Work()
    repeat = captured(work.counting, torch.device(DEVICE))
    for _ in range(3):
        repeat()
    assert work.x.tolist() == [1 + 2 + 2] * 3


@pytest.mark.parametrize("fault", ["reading", "from_the_cpu"])
def test_what_cannot_be_recorded_goes_on_without_and_says_so(
    fault: str, replays: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    work = Work()
    repeat = captured(getattr(work, fault), torch.device(DEVICE))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            repeat()
    assert work.x.tolist() == [7.0 if fault == "reading" else 3.0] * 3
    assert [record.message[:62] for record in caplog.records] == [
        "a loop runs without a graph, which is slower and changes nothi"
    ]
    assert "cannot be part of a graph" in caplog.text
    assert not replays
    assert issubclass(Refused, RuntimeError)
