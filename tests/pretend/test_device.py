"""The pretend device refuses and counts what a GPU would."""

from __future__ import annotations

import gc

import pytest
import torch

from dqx.common import accelerator as ours
from dqx.common.devices import device_problems, gpus, pick_device
from pretend.device import TOTAL, Refused, State, accelerator


def test_it_is_there_only_while_a_test_wants_it() -> None:
    with accelerator(devices=2):
        assert torch.accelerator.current_accelerator(check_available=True) == torch.device("pretend")
        assert (ours.kind(), ours.count()) == ("pretend", 2)
        assert (pick_device("auto"), pick_device("cpu")) == (torch.device("pretend:0"), torch.device("cpu"))
        assert [gpus(name) for name in ("auto", "pretend", "pretend:1", "cpu")] == [2, 2, 1, 0]
        assert list(device_problems("pretend:1")) == []
        assert list(device_problems("pretend:2")) == [
            "model.device=pretend:2, but there are 2 PRETEND devices, pretend:0 to pretend:1"
        ]
    assert not torch.accelerator.is_available()
    assert (ours.kind(), ours.count(), pick_device("auto")) == (None, 0, torch.device("cpu"))


@pytest.mark.usefixtures("pretend")
def test_devices_do_not_mix() -> None:
    x = torch.ones(3, device="pretend")
    with pytest.raises(Refused, match="found at least one on cpu"):
        x + torch.ones(3)
    with pytest.raises(Refused, match="found at least one on cpu"):
        torch.cat((x, torch.ones(3)))
    with pytest.raises(Refused, match="pretend:0, pretend:1"):
        x + torch.ones(3, device="pretend:1")
    assert (x + torch.tensor(2.0)).tolist() == [3, 3, 3]  # a number may come from the CPU
    with pytest.raises(Refused, match="found at least one on cpu"):
        torch.stack((x[0], torch.tensor(2.0)))  # but not everywhere
    assert x[torch.tensor([0, 2])].tolist() == [1, 1]  # and so may an index
    assert x.to("pretend:1").device == torch.device("pretend:1")


@pytest.mark.usefixtures("pretend")
def test_device_memory_is_not_read_behind_its_back() -> None:
    x = torch.ones(3, device="pretend")
    for read in (x.numpy, x.__array__):
        with pytest.raises(TypeError, match=r"Use Tensor\.cpu\(\) first"):
            read()


@pytest.mark.usefixtures("pretend")
def test_random_numbers_are_drawn_on_the_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = {
        "rand": lambda: torch.rand(3, device="pretend"),
        "of the CPU's generator": lambda: torch.rand(3, device="pretend", generator=generator),
        "in place": lambda: torch.ones(3, device="pretend").normal_(generator=generator),
        "a permutation": lambda: torch.randperm(3, device="pretend"),
    }
    for draw in draws.values():
        with pytest.raises(Refused, match="draws other random numbers than the CPU"):
            draw()


ASKED = {
    "item": (lambda x: x[0].item(), 1),
    "float": (lambda x: float(x.sum()), 1),
    "bool": (lambda x: bool((x > 0).all()), 1),
    "tolist": (lambda x: x.tolist(), 1),
    "cpu": (lambda x: x.cpu(), 1),
    "copy_": (lambda x: torch.empty(4).copy_(x), 1),
    "nonzero": (lambda x: x.nonzero(), 1),
    "a mask as an index": (lambda x: x[x > 0], 1),
    "equal": (lambda x: torch.equal(x, x), 1),
    "a mask that is filled": (lambda x: x.masked_fill_(x > 0, 1.0), 0),
    "a mask that gets a number": (lambda x: x.__setitem__(x > 0, 1.0), 0),
    "a mask that gets a tensor": (lambda x: x.__setitem__(x > 0, torch.ones(4, device=x.device)), 1),
    "a matrix product": (lambda x: x @ x, 0),
    "a list as an index": (lambda x: x[[0, 1]], 0),
    "from the CPU": (lambda x: torch.ones(4).to(x.device), 0),
    "arange": (lambda x: len(torch.arange(4, device=x.device)), 0),
}


@pytest.mark.parametrize(("ask", "times"), ASKED.values(), ids=ASKED)
def test_round_trips_are_counted(pretend: State, ask, times: int) -> None:
    x = torch.ones(4, device="pretend")
    ask(x)
    assert sum(pretend.waits.values()) == times, pretend.waits


def test_bytes_are_counted_and_limited(pretend: State) -> None:
    before = pretend.taken
    x = torch.zeros(1000, device="pretend")
    view = x[:10]
    assert pretend.taken - before == 4000
    del x
    assert pretend.taken - before == 4000  # the view holds it
    del view
    gc.collect()
    assert pretend.taken == before
    assert ours.peak_memory(torch.device("pretend:0")) == before + 4000
    pretend.limit = before + 6000
    x = torch.zeros(1000, device="pretend")
    with pytest.raises(torch.OutOfMemoryError, match="tried to allocate 4000 bytes"):
        x + 1
    x += 1  # in place
    assert ours.free_memory(torch.device("pretend:0")) == 2000


def test_memory_can_be_bounded(pretend: State) -> None:
    device = torch.device("pretend:0")
    assert ours.total_memory(device) == TOTAL
    ours.bound_memory(device, 5000)
    assert pretend.limit == 5000
    assert ours.free_memory(device) == 5000 - pretend.taken
    ours.bound_memory(device, None)
    assert pretend.limit == TOTAL


def test_an_operation_can_be_made_to_run_out_of_memory(pretend: State) -> None:
    x = torch.ones(2, device="pretend")
    pretend.failing["exp"] = 2
    x.exp()
    with pytest.raises(torch.OutOfMemoryError):
        x.exp()
    x.exp()
