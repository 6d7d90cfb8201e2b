"""The name of an artefact: a digest of the facts that it depends on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dqx.common.digest import digest
from dqx.common.files import file_name

#: Of artefacts. Nothing of another kind is listed or removed, so none can be made.
KINDS = ("results", "quantized", "outliers", "activations", "denoising", "predictions", "fidelity", "calibration")


@dataclass(frozen=True)
class Key:
    """The name of an artefact: its kind (`results`), what people call it, and the facts it depends on.

    Raises ValueError for a kind that is not among `KINDS`.
    """

    kind: str
    name: str
    facts: Mapping[str, Any]  # as JSON has it

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"{self.kind} is no kind of artefact; there are {', '.join(KINDS)}")

    @property
    def digest(self) -> str:
        return digest(self.facts)

    @property
    def path(self) -> Path:
        """Where its files are in a cache, without their suffix."""
        return Path(self.kind, f"{file_name(self.name)}-{self.digest[:20]}")
