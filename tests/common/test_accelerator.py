"""Which devices a run may name, and that one file alone knows their makes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from dqx.common import accelerator
from dqx.common.devices import device_problems, pick_device

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
MAKES = r"torch\.(cuda|xpu|mps)\b|\.cuda\(|== [\"']cuda"


def naming(pattern: str, *folders: str) -> set[str]:
    """The files of ours, documents too, in which a pattern is found; `.` stands for the top folder's own."""
    paths = [path for folder in folders for path in (ROOT / folder).glob("*" if folder == "." else "**/*")]
    files = [path for path in paths if path.suffix in (".py", ".md", ".yaml", ".toml")]
    assert len(files) > 2 * len(folders)
    return {str(path.relative_to(ROOT)) for path in files if re.search(pattern, path.read_text())}


def test_one_file_alone_asks_for_a_make() -> None:
    ours = "dqx/common/accelerator.py"
    assert naming(MAKES, ".", "conf", "dqx", "tests") == {ours}
    assert naming(r"torch\.accelerator\b", ".", "conf", "dqx") == {ours}


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
