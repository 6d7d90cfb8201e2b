"""Which devices a run may name, and that one file alone knows their makes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from dqx.common import accelerator
from dqx.common.devices import device_problems, pick_device

PACKAGE = Path(accelerator.__file__).parents[1]
CPU = torch.device("cpu")


def test_no_other_file_asks_for_one_make() -> None:
    named = re.compile(r"torch\.(cuda|xpu|mps|accelerator)\b|\.cuda\(|== \"cuda\"")
    found = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if named.search(path.read_text())}
    assert found == {"common/accelerator.py"}


@pytest.mark.skipif(torch.accelerator.is_available(), reason="has an accelerator")
@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("auto", None),
        ("cpu", None),
        ("cuda:1", "finds no CUDA device here; write cpu or auto"),
        ("xpu", "finds no XPU device here; write cpu or auto"),
        ("mps", "is not supported: Apple's GPU has no float64, in which rotations"),
        ("tpu", "is no device; write auto, cpu, cuda, cuda:1 or xpu"),
    ],
)
def test_devices_by_name(name: str, problem: str | None) -> None:
    found = list(device_problems(name))
    assert len(found) == (problem is not None)
    assert (problem or "") in "".join(found)


def test_apples_gpu_is_not_taken_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("mps"))
    assert (accelerator.kind(), accelerator.count(), pick_device("auto")) == (None, 0, CPU)


def test_nothing_is_asked_of_the_cpu() -> None:
    for ask in (accelerator.synchronize, accelerator.empty_cache, accelerator.watch_peak):
        ask(CPU)
    accelerator.bound_memory(CPU, 1.0)
    assert (accelerator.name(CPU), accelerator.peak_memory(CPU)) == ("cpu", 0)
    assert accelerator.free_memory(CPU) == float("inf")
    assert accelerator.capability(CPU) == torch.backends.cpu.get_cpu_capability()
