"""The mistakes that a machine without a GPU never shows, planted one by one: each makes tests of this folder fail.

A plant changes one function as a careless hand would: a tensor is made on the CPU in a loop whose others are on the
device; device memory is read as numpy's; the host asks for a number at every column or step. On the CPU all of them
give the right numbers. What is called here are the tests themselves: each passes by itself, and with the plant it fails
for the reason that is named.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from dqx.diagnostics.activations import meter
from dqx.diffusion import scorer
from dqx.diffusion.samplers import LLaDASampler
from dqx.formats.integers import Grid
from dqx.models.rope import Rope
from dqx.models.transformer import MaskedDiffusionTransformer
from dqx.quant.rounding import gptq
from pretend import test_diffusion, test_measures, test_quantization, test_waits
from pretend.device import Refused, State

MIXED = (Refused, "found at least one on cpu")
READ = (TypeError, r"Use Tensor\.cpu\(\) first")
WAITED = (AssertionError, "assert ")


def on_the_cpu(result: Any) -> Any:
    """The same on the CPU."""
    if isinstance(result, torch.Tensor):
        return result.cpu()
    if isinstance(result, Rope):
        return Rope(*map(on_the_cpu, result))
    return tuple(map(on_the_cpu, result)) if isinstance(result, tuple) else result


def asked(result: Any) -> Any:
    """The same, after a look at its first number."""
    (result[0] if isinstance(result, tuple) else result).flatten()[0].item()
    return result


def by_numpy(result: Any) -> Any:
    """The same, by way of numpy."""
    return torch.from_numpy(result.numpy())


@dataclass(frozen=True)
class Fault:
    """A function whose result is treated carelessly, a test that has to fail, with what, and how."""

    owner: Any
    name: str
    careless: Callable[[Any], Any]
    test: Callable[..., None]
    case: dict[str, Any]
    fails: tuple[type[BaseException], str]


SAMPLED = (test_diffusion.test_every_sampler, {"sampler": test_diffusion.SAMPLERS["warm"]}, MIXED)
SCORED = (test_waits.test_a_batch_of_likelihoods_waits_once, {}, WAITED)
QUANTIZED = (test_quantization.test_every_method, {"case": test_quantization.METHODS["gptq"]})
STEPPED = (test_waits.test_a_step_of_the_engine_waits_once, {"sampler": LLaDASampler()}, WAITED)
ROUNDED = (
    test_waits.test_rounding_does_not_wait_for_columns_or_steps,
    {"of": "gptq", "waits": 2, "columns": 16},
    WAITED,
)
FAULTS = {
    "positions of a forward on the CPU": (MaskedDiffusionTransformer, "context", on_the_cpu, *SAMPLED),
    "confidences of a step on the CPU": (LLaDASampler, "candidates", on_the_cpu, *SAMPLED),
    "a factor in the column loop on the CPU": (gptq, "triangular_inverse", on_the_cpu, *QUANTIZED, MIXED),
    "codes in the column loop on the CPU": (Grid, "codes", on_the_cpu, *QUANTIZED, MIXED),
    "codes in the column loop by numpy": (Grid, "codes", by_numpy, *QUANTIZED, READ),
    "sizes of activations by numpy": (meter, "_median", by_numpy, test_measures.test_outliers, {}, READ),
    "a second wait per batch of likelihoods": (scorer, "logits_at", asked, *SCORED),
    "a second wait per step": (LLaDASampler, "candidates", asked, *STEPPED),
    "a wait per column": (Grid, "codes", asked, *ROUNDED),
}


@pytest.mark.parametrize("family", ["llada"])
@pytest.mark.parametrize("planted", FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_found(
    planted: tuple[Any, ...],
    family: str,
    small_checkpoint: Path,
    tmp_path: Path,
    pretend: State,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fault = Fault(*planted)
    right, results = getattr(fault.owner, fault.name), []

    def careless(*args: Any, **kwargs: Any) -> Any:
        results.append(right(*args, **kwargs))
        return fault.careless(results[-1])

    monkeypatch.setattr(fault.owner, fault.name, careless)
    fixtures = {
        "family": family,
        "small_checkpoint": small_checkpoint,
        "tmp_path": tmp_path,
        "pretend": pretend,
        "monkeypatch": monkeypatch,
    }
    wanted = inspect.signature(fault.test).parameters
    error, words = fault.fails
    with pytest.raises(error, match=words):
        fault.test(**fault.case, **{name: value for name, value in fixtures.items() if name in wanted})
    assert results
