"""The weights of a quantized model at 16 bit under the names of its checkpoint: its accuracy in any engine.

A folder like the source's: `config.json`, safetensors, tokenizer files. Values are those of the simulation to the bit,
and take what the source's take.
"""

from __future__ import annotations

from pathlib import Path

from dqx.api import DiffusionLM
from dqx.export.weights import (
    config_problems,
    copy_tokenizer,
    hub_config,
    linears,
    rounds_input,
    run_time_problems,
)
from dqx.models.checkpoint import save
from dqx.quant.checkpoint.folder import new_folder


def problems(lm: DiffusionLM) -> list[str]:
    """Why weights alone cannot be this model, each with what to use instead."""
    problems = run_time_problems(lm)
    if any(rounds_input(module) for _, _, module in linears(lm.model)):
        problems.append(
            "the inputs of linears are rounded at run time, and an engine for the checkpoint does not round them; "
            "write bits.activation.bits=16, or export compressed-tensors, which holds 8-bit inputs"
        )
    return problems + ([] if problems else config_problems(lm))


def write(lm: DiffusionLM, out: Path) -> None:
    """Write the folder, whole or not at all. Raises ValueError where it exists."""
    with new_folder(Path(out)) as folder:
        save(lm.model, hub_config(lm), folder)
        copy_tokenizer(lm, folder)
