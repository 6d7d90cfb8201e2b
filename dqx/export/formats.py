"""The formats that models are written in for other programs, by name.

A format is a module with two functions, `problems(lm)`: all reasons why the format cannot hold the model, each with
what to use instead, and `write(lm, out)`. One with choices of a dtype for what stays in 16 bit takes `dtype` as well,
and one that has to say what readers of the file do differently has `notes(lm)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dqx.common.problems import raise_if

if TYPE_CHECKING:
    from dqx.api import DiffusionLM  # takes seconds to import, which the names do not need


@dataclass(frozen=True)
class Format:
    """The module that writes a format, what it is for, and the dtypes to choose from, the default first."""

    module: str
    what: str
    file: str  # its usual name
    dtypes: tuple[str, ...] = ()

    def problems(self, lm: DiffusionLM) -> list[str]:
        """All reasons why the format cannot hold the model, each with what to use instead."""
        found: list[str] = self._functions.problems(lm)
        return found

    def write(self, lm: DiffusionLM, out: Path, dtype: str | None = None) -> list[str]:
        """Write the model to `out`, which must not exist yet; what to know of the file.

        Raises ConfigProblems where the format cannot hold the model.
        """
        raise_if(self.problems(lm))
        out.parent.mkdir(parents=True, exist_ok=True)
        self._functions.write(lm, out, **({} if dtype is None else {"dtype": dtype}))
        return list(self._functions.notes(lm)) if hasattr(self._functions, "notes") else []

    @property
    def _functions(self) -> Any:
        return import_module(self.module)


FORMATS: dict[str, Format] = {
    "gguf": Format("dqx.export.gguf", "one file for llama.cpp: LLaDA and Dream", "model.gguf", ("f16", "bf16", "f32")),
    "dequantized": Format(
        "dqx.export.dequantized", "the rounded weights as a checkpoint like the source's, 16 bit", "dequantized"
    ),
    "compressed-tensors": Format(
        "dqx.export.compressed_tensors", "weights at their true widths, for transformers", "compressed-tensors"
    ),
}
