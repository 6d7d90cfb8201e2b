"""The name of an artefact: a digest of the facts that it depends on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dqx.common.digest import digest
from dqx.common.files import file_name


@dataclass(frozen=True)
class Key:
    """The name of an artefact: its kind (`results`), what people call it, and the facts it depends on."""

    kind: str
    name: str
    facts: Mapping[str, Any]  # as JSON has it

    @property
    def digest(self) -> str:
        return digest(self.facts)

    @property
    def path(self) -> Path:
        """Where its files are in a cache, without their suffix."""
        return Path(self.kind, f"{file_name(self.name)}-{self.digest[:20]}")
