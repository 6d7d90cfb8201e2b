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
    from dqx.record.folder import Record


@dataclass(frozen=True)
class Format:
    """The module that writes a format, what it is for, and the dtypes to choose from, the default first."""

    name: str
    module: str
    what: str
    file: str  # its usual name
    dtypes: tuple[str, ...] = ()

    def problems(self, lm: DiffusionLM) -> list[str]:
        """All reasons why the format cannot hold the model, each with what to use instead."""
        found: list[str] = self._functions.problems(lm)
        return found

    def write(self, lm: DiffusionLM, out: Path, dtype: str | None = None, record: Record | None = None) -> list[str]:
        """Write the model to `out`, which must not exist yet, and its card beside it; what to know of the file.

        `record` is that of the run that made and measured it. Raises ConfigProblems where the format cannot hold it.
        """
        from dqx.export.card import write_card

        self.write_alone(lm, out, dtype)
        notes = list(self._functions.notes(lm)) if hasattr(self._functions, "notes") else []
        write_card(out, self.name, lm, notes, record)
        return notes

    def write_alone(self, lm: DiffusionLM, out: Path, dtype: str | None = None) -> None:
        """`write` without a card."""
        raise_if(self.problems(lm))
        out.parent.mkdir(parents=True, exist_ok=True)
        self._functions.write(lm, out, **({} if dtype is None else {"dtype": dtype}))

    def dtype_problems(self, key: str, dtype: str | None) -> list[str]:
        """Why what stays in 16 bit cannot be stored in a dtype; `key` is what sets it."""
        if dtype in (None, *self.dtypes):
            return []
        choices = f"it is one of {', '.join(self.dtypes)}" if self.dtypes else "leave it out"
        return [f"{key} {dtype} is no choice of {self.name}; {choices}"]

    @property
    def _functions(self) -> Any:
        return import_module(self.module)


KNOWN = (
    Format("gguf", "dqx.export.gguf", "one file for llama.cpp: LLaDA and Dream", "model.gguf", ("f16", "bf16", "f32")),
    Format(
        "dequantized",
        "dqx.export.dequantized",
        "the rounded weights as a checkpoint like the source's, 16 bit",
        "dequantized",
    ),
    Format(
        "compressed-tensors",
        "dqx.export.compressed_tensors",
        "weights at their true widths, for transformers",
        "compressed-tensors",
    ),
)
FORMATS = {format.name: format for format in KNOWN}
