"""Exported files read back by the libraries and engines of their formats: a module for each format.

A reader has four things: `LIBRARY` and `ENGINE`, their names; `tensors(lm, path)`, what the library reads, beside what
`lm` has; `model(lm, path)`, an engine's function from token ids [B, T] to logits [B, T, V], row i predicting token i.
The latter raises ConfigProblems where the engine is not here or cannot read the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dqx.models.hub_config import LARGEST_CONFIG, read_json


@dataclass(frozen=True)
class Pair:
    """A tensor of a file beside the model's: in the model's dtype and its order of rows. None: only one has it."""

    name: str
    kind: str  # as the file stores it
    found: Tensor | None
    expected: Tensor | None

    @property
    def difference(self) -> str:
        """How the two differ, in words; empty where they are equal to the bit."""
        if self.found is None or self.expected is None:
            return "missing in the file" if self.found is None else "not in the model"
        if self.found.shape != self.expected.shape:
            return f"{list(self.found.shape)} in the file, {list(self.expected.shape)} in the model"
        differing = int((self.found != self.expected).sum())
        if not differing:
            return ""
        largest = (self.found.float() - self.expected.float()).abs().max().item()
        return f"{differing:,} of {self.found.numel():,} numbers differ, by {largest:.3g} at most"


def format_of(path: Path) -> str:
    """The format of a file or folder, by what it is. Raises ValueError for what is none."""
    if path.is_file():
        return "gguf"
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} is no file, and no folder with a config.json; give what `dqx export` has written")
    method = read_json(path / "config.json", LARGEST_CONFIG).get("quantization_config", {}).get("quant_method")
    if method not in (None, "compressed-tensors"):
        raise ValueError(f"{path} is quantized by {method}, which dqx does not write")
    return "compressed-tensors" if method else "dequantized"
