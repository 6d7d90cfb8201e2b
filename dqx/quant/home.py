"""Where a model lies while it is quantized: in memory, or on disk (`on_disk.py`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch

from dqx.models.transformer import Block, MaskedDiffusionTransformer
from dqx.quant.activations_store import ActivationStore, Row
from dqx.quant.linear import QuantLinear
from dqx.quant.report import LinearRow


@dataclass(frozen=True)
class Progress:
    """How far a quantization has come: all that its next block depends on besides the settings."""

    blocks: int = 0  # that are done
    rows: Sequence[LinearRow] = ()  # of the report, for these
    inputs: Mapping[str, Row] = field(default_factory=dict)  # of the next block, by stream
    seconds: float = 0.0
    peak_ram: int = 0
    peak_gpu: int = 0


class Home(Protocol):
    """What the loop takes blocks from and gives them back to."""

    model: MaskedDiffusionTransformer  # weights may be missing (on torch's meta device); done blocks have their modules
    device: torch.device
    store: ActivationStore
    from_disk: bool
    progress: Progress | None  # of an earlier attempt; None: start

    def problems(self) -> list[str]:
        """What keeps the model from being quantized."""
        ...

    def outer(self) -> AbstractContextManager[None]:
        """A context in which embedding, final norm and head are loaded; they are kept as they are at its end."""
        ...

    def take(self, index: int) -> Block:
        """A block as it was stored."""
        ...

    def put(self, index: int, block: Block) -> None:
        """Keep a finished block."""
        ...

    def note(self, progress: Progress) -> None:
        """Remember how far things are, after every block and before the first."""
        ...


class InMemory:
    """A model that is loaded as a whole and changed in place."""

    def __init__(self, model: MaskedDiffusionTransformer):
        self.model, self.device, self.store = model, model.device, ActivationStore()
        self.from_disk = False
        self.progress: Progress | None = None

    def problems(self) -> list[str]:
        if any(isinstance(module, QuantLinear) for module in self.model.modules()):
            return ["the model is quantized already; load its weights again"]
        return []

    @contextmanager
    def outer(self) -> Iterator[None]:
        yield

    def take(self, index: int) -> Block:
        block = self.model.blocks[index]
        assert isinstance(block, Block)
        return block

    def put(self, index: int, block: Block) -> None:
        """Nothing to do: the block is in its place."""

    def note(self, progress: Progress) -> None:
        """Nothing to do: what is lost with the process cannot be continued."""
