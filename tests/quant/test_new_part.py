"""Parts, a statistic and a method of somebody else's: one module and one YAML, and nothing of dqx is touched."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from goldens import tiny

from dqx.config.compose import build, compose, resolve
from dqx.config.schema import Config
from dqx.quant import Method, load_quantized, quantize, save_quantized, storable
from dqx.quant.checkpoint.folder import read_recipe
from dqx.quant.registry import STORABLE
from dqx.quant.transforms.channel_scale import Divide
from dqx.study.plan.runs import plan_run

PARTS = '''
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import nn

from dqx.formats.make import make_grid
from dqx.quant import storable
from dqx.quant.rounding.rtn import rtn_round
from dqx.quant.stats import Collector


class Signs(Collector, statistic="signs"):
    """Of every channel's sum [I]: 1 or -1."""

    factors: ClassVar[int] = 1

    def add(self, x, intact=None):
        total = x.reshape(-1, x.shape[-1]).sum(0)
        self.total = total if self.total is None else self.total + total

    def value(self):
        return torch.where(self.total < 0, -1.0, 1.0)


@storable
class Flip(nn.Module):
    """Turns the signs of channels: orthogonal."""

    def __init__(self, signs_I):
        super().__init__()
        self.register_buffer("signs_I", signs_I)

    def forward(self, x):
        return x * self.signs_I.to(x.dtype)


@dataclass(frozen=True)
class FlipInputs:
    """Makes every channel of a site's input positive on average."""

    scope: ClassVar[str] = "site"
    stream: ClassVar[str] = "quantized"
    needs: ClassVar[frozenset[str]] = frozenset({"signs"})

    def fit(self, w_OI, stats, context, site):
        return Flip(stats["signs"])

    def problems(self, where, context):
        return []


@dataclass(frozen=True)
class Narrow:
    """Rounds to nearest with fewer bits than asked for."""

    fewer: int = 0
    needs: ClassVar[frozenset[str]] = frozenset({"signs"})
    stream: ClassVar[str] = "quantized"

    def grid(self, bits):
        return make_grid(replace(bits, bits=bits.bits - self.fewer))

    def __call__(self, w_OI, bits, stats, clip=None):
        assert stats["signs"].min() > 0  # of the flipped input
        return rtn_round(w_OI, self.grid(bits), bits.group_size, clip)

    def problems(self, where, context):
        return [] if 0 <= self.fewer <= 2 else [f"{where}.fewer={self.fewer} must be 0, 1 or 2"]
'''
METHOD = """
name: toy
transforms:
  flip: {_target_: toy_parts.FlipInputs}
rounding: {_target_: toy_parts.Narrow, fewer: 1}
"""
IDS = torch.randint(0, 300, (3, 24), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of somebody else's: configuration and a module."""
    folder = tmp_path_factory.mktemp("ours")
    (folder / "toy_parts.py").write_text(PARTS)
    (folder / "method").mkdir()
    (folder / "method" / "toy.yaml").write_text(METHOD)
    return folder


@pytest.fixture
def overrides(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What chooses the method on the bundled model."""
    monkeypatch.syspath_prepend(folder)
    searched = f"hydra.searchpath=[file://{folder}]"
    return [
        searched,
        "parts=[toy_parts]",
        "method=toy",
        "model=nano_llada",
        "bits=w4a16",
        "bits.weight.group_size=32",
        "task=nano_facts",
    ]


def configured(overrides: list[str]) -> Config:
    return resolve(compose(overrides))


@torch.no_grad()
def test_a_new_method_is_quantized_stored_and_loaded(overrides: list[str], folder: Path, tmp_path: Path) -> None:
    config = configured(overrides)
    method, model, logits = build(config.method), tiny("llada"), tiny("llada")(IDS)
    assert method.needs_data
    report = quantize(model, method, config.bits, IDS, progress=False)
    assert {row.rounding for row in report.linears} == {"Narrow"}
    assert type(model.blocks[0].inputs["mlp_in"]).__name__ == "Flip"
    assert (model(IDS) - logits).abs().max() > 0.01
    save_quantized(model, report, tmp_path / "saved", method=method, bits=config.bits)
    again, report_again = load_quantized(tmp_path / "saved")
    assert torch.equal(again(IDS), model(IDS))
    assert report_again == report

    (tmp_path / "load.py").write_text(
        "import sys\nsys.path.append(sys.argv[1])\nif sys.argv[2:]: import toy_parts\n"
        "from dqx.quant import load_quantized\nmodel, _ = load_quantized('saved')\n"
        "print(type(model.blocks[1].inputs['mlp_out']).__name__)"
    )

    def in_another_process(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "load.py", str(folder), *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert in_another_process("and import the module").stdout.split() == ["Flip"]
    assert "no class Flip is known; import the module whose @storable class it is" in in_another_process().stderr


@torch.no_grad()
def test_a_transform_leaves_the_function_alone(overrides: list[str]) -> None:
    config = configured([*overrides, "bits=w16a16"])
    model = tiny("llada", torch.float64)
    before = model(IDS)
    quantize(model, build(config.method), config.bits, IDS, progress=False)
    torch.testing.assert_close(model(IDS), before, atol=1e-10, rtol=0)


def test_memory_and_plan_know_it(overrides: list[str]) -> None:
    ours, rtn = (plan_run(compose([*overrides, "plan_tflops=1", method])) for method in ("method=toy", "method=rtn"))
    assert (ours.problems, ours.changes) == ([], True)
    assert ours.memory.quantizing > rtn.memory.quantizing
    assert ours.quantization.seconds > rtn.quantization.seconds == 0


def test_its_problems_are_told(overrides: list[str]) -> None:
    run = plan_run(compose([*overrides, "method.rounding.fewer=7"]))
    assert run.problems == ["method.rounding.fewer=7 must be 0, 1 or 2"]
    run = plan_run(compose([*overrides, "+method.rounding.fewest=1"]))
    assert run.problems == ["method.rounding.fewest is no option of Narrow; did you mean fewer?"]


def test_a_name_belongs_to_one_class(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"Divide is dqx\.quant\.transforms\.channel_scale\.Divide already"):
        storable(type(Divide.__name__, (), {}))
    monkeypatch.setitem(STORABLE, "Ours", storable(type("Ours", (), {})))
    again = storable(type("Ours", (), {}))  # the cell of a notebook run twice
    assert STORABLE["Ours"] is again


def test_recipes_with_what_only_other_groups_read_are_built() -> None:
    """Older quantized folders list the calibration and symmetry that a method asks for as its options."""
    recipe = read_recipe(Path(__file__).parents[1] / "data" / "old" / "quarot_llada")["method"]
    assert {"calib_samples", "symmetric_weights"} <= recipe.keys()
    assert isinstance(build(recipe), Method)
