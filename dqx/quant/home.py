"""Where a model lies while it is quantized: in memory, or on disk (`checkpoint/on_disk.py`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from dqx.models.transformer import Block, MaskedDiffusionTransformer
from dqx.quant.activations_store import ActivationStore, Row
from dqx.quant.report import LinearRow


@dataclass(frozen=True)
class Progress:
    """How far a quantization has come: all that its next block depends on besides the settings."""

    blocks: int = 0  # that are done
    rows: Sequence[LinearRow] = ()  # of the report, for these
    inputs: Mapping[str, Row] = field(default_factory=dict)  # of the next block, by stream
    weights: Row | None = None  # of the calibration tokens [1, T], by sequence
    seconds: float = 0.0
    peak_ram: int = 0
    peak_gpu: int = 0


class Home:
    """What the loop takes blocks from and gives them back to: here a model in memory, which is changed in place.

    On disk the weights of `model` may be missing (on torch's meta device); done blocks have their modules all the same.
    """

    from_disk: ClassVar[bool] = False
    progress: Progress | None = None  # of an earlier attempt; None: start

    def __init__(self, model: MaskedDiffusionTransformer, device: torch.device, store: ActivationStore | None = None):
        self.model, self.device, self.store = model, device, store or ActivationStore()

    @contextmanager
    def outer(self) -> Iterator[None]:
        """A context in which embedding, final norm and head are loaded; they are kept as they are at its end."""
        yield

    def take(self, index: int) -> Block:
        block = self.model.blocks[index]
        assert isinstance(block, Block)
        return block

    def put(self, index: int, block: Block) -> None:
        """Keep a finished block; in memory it is in its place."""

    def note(self, progress: Progress) -> None:
        """Remember how far things are, after every block and before the first; in memory nothing can be continued."""
