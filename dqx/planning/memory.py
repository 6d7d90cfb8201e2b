"""What the device has to hold at the most expensive moment of a run, in bytes, and what it has.

Weights are counted exactly. Besides them, whichever is more: the activations of an evaluation's batches (as the engine
and the scorer plan them), or, while the model is quantized, one block in full precision, the inputs and outputs of the
current block for every calibration window and stream, the Hessians of one site, and the activations of one window.
What a method's searches hold beyond that is not counted.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from dqx.diffusion.engine import row_bytes
from dqx.models.transformer import Architecture, MaskedDiffusionTransformer
from dqx.planning.speed import block_parameters
from dqx.planning.work import Work


@dataclass(frozen=True)
class Memory:
    """Bytes: the weights, and what comes on top while quantizing and while evaluating."""

    weights: int
    quantizing: int = 0
    evaluating: int = 0

    @property
    def total(self) -> int:
        return self.weights + max(self.quantizing, self.evaluating)


def weight_bytes(arch: Architecture, dtype: torch.dtype) -> int:
    """All parameters, a tied head once."""
    with torch.device("meta"):
        return sum(p.numel() for p in MaskedDiffusionTransformer(arch).parameters()) * dtype.itemsize


def quantizing_bytes(
    arch: Architecture, dtype: torch.dtype, streams: int, samples: int, length: int, *, hessians: bool
) -> int:
    """While one block is quantized; 0 streams: nothing is calibrated."""
    block = block_parameters(arch) * dtype.itemsize
    if not streams:
        return block
    kept = 2 * streams * samples * length * arch.hidden_size * dtype.itemsize
    wide = max(arch.hidden_size, arch.mlp_size)
    factors = 3 * wide**2 * 4 if hessians else 0  # the sum, its factor, and room to factor
    return block + kept + factors + row_bytes(arch, length, 0)


def evaluating_bytes(arch: Architecture, works: Iterable[tuple[Work, int]]) -> int:
    """The largest batch of all work, each with its number of sequences."""
    return max((rows * row_bytes(arch, work.length, round(work.read)) for work, rows in works), default=0)


def device_bytes(device: torch.device) -> int:
    """The memory of a GPU, or of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
