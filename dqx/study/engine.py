"""`backend=llama_cpp`: what is measured on the quantized model is measured on its GGUF file, in llama.cpp.

The model is quantized as ever and written as `export=gguf` writes it; llama.cpp computes the logits of that file, and
samplers, likelihoods and tasks ask it in place of the simulation. Activations are looked at in the simulation, as
llama.cpp shows none.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from weakref import finalize

import torch

from dqx.api import DiffusionLM
from dqx.common.digest import code_version
from dqx.config.schema import Config, ExportConfig
from dqx.diffusion.samplers import Sampler
from dqx.engines import llama_cpp
from dqx.engines.model import EngineModel, engine_problems
from dqx.export.formats import FORMATS
from dqx.export.rehearsal import export_problems
from dqx.models.architecture import Architecture
from dqx.quant.method import Method

LLAMA_CPP = "llama_cpp"
FORMAT = FORMATS["gguf"]


def dtype_of_file(export: ExportConfig) -> str:
    """What matrices that are not rounded are stored in: as in the exported file, where one is asked for."""
    return (export.dtype if export.format == FORMAT.name else None) or FORMAT.dtypes[0]


def problems(
    config: Config,
    method: Method,
    sampler: Sampler,
    arch: Architecture,
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> Iterator[str]:
    """Why `backend=llama_cpp` cannot compute what the run will make; `device` is None where another machine runs it."""
    if config.backend != LLAMA_CPP:
        return
    if device is not None:
        yield from (f"backend={LLAMA_CPP}: {problem}" for problem in llama_cpp.problems())
        if device.type != "cpu":
            yield f"backend={LLAMA_CPP} computes on the CPU, and model.device is {device.type}; write model.device=cpu"
    yield from (f"backend={LLAMA_CPP}: {problem}" for problem in engine_problems(sampler))
    widths = config.bits.resolve(arch)
    if not any(method.rounding_of(role) is not None and widths.rounds_weight(role) for role in arch.roles):
        yield (
            f"backend={LLAMA_CPP} computes the file of a quantized model, and method={config.method.name} with "
            f"bits={config.bits.name} rounds no weights; write method=gptq bits=gguf_q4_k, or backend=simulated"
        )
        return
    unfit = export_problems(ExportConfig(FORMAT.name, dtype_of_file(config.export)), method, config.bits, arch, dtype)
    yield from (f"backend={LLAMA_CPP}: {problem.removeprefix('export.format=gguf: ')}" for problem in unfit)


def facts(export: ExportConfig) -> dict[str, Any]:
    """What results depend on besides the quantized model: the engine, and how the file is written."""
    return {
        "engine": f"{llama_cpp.PACKAGE} {llama_cpp.version()}",
        "dtype": dtype_of_file(export),
        "code": code_version(("engines", "export/gguf")),
    }


def notes(config: Config) -> list[str]:
    """What a reader of results should know."""
    if config.backend != LLAMA_CPP:
        return []
    notes = [
        f"backend={LLAMA_CPP}: scores and divergences of the quantized model are those of its GGUF file "
        f"({dtype_of_file(config.export)} where nothing is rounded) in {llama_cpp.PACKAGE} {llama_cpp.version()}; "
        "full precision is computed by dqx"
    ]
    if config.outliers.samples:
        notes.append(
            f"backend={LLAMA_CPP}: outliers are looked at in the simulation, as llama.cpp shows no activations"
        )
    return notes


def in_llama_cpp(lm: DiffusionLM, export: ExportConfig) -> EngineModel:
    """A quantized model's file, in llama.cpp, which is deleted with the model.

    Raises ConfigProblems where the file cannot hold the model's numbers or llama.cpp fails its test.
    """
    folder = TemporaryDirectory(prefix="dqx-", ignore_cleanup_errors=True)
    file = Path(folder.name) / FORMAT.file
    FORMAT.write_alone(lm, file, dtype_of_file(export))
    model = EngineModel(lm.model.arch, llama_cpp.LlamaCpp(file))
    finalize(model, folder.cleanup)
    return model
