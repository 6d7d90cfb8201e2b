"""What the device has to hold at the most expensive moment of a run, in bytes, and what it has.

Weights are counted exactly. Besides them, whichever is more: the activations of an evaluation's batches (as the engine
and the scorer plan them), or, while the model is quantized, one block in full precision, the working copies of what is
rounded at once, the inputs and outputs of the current block for every calibration window and stream, the Hessian of one
site with its factor, and the activations of one window. What a method's searches hold beyond that is not counted.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from dqx.diffusion.batches import token_bytes
from dqx.diffusion.engine import row_bytes
from dqx.models.transformer import SITES, Architecture, MaskedDiffusionTransformer
from dqx.planning.speed import block_parameters
from dqx.planning.work import Work

#: Copies in float32 of the linears of a site while they are rounded and judged; as many were measured, with RTN.
COPIES = 10


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
    largest = max(sum(arch.in_features(r) * arch.out_features(r) for r in roles) for roles in SITES.values())
    block = block_parameters(arch) * dtype.itemsize + COPIES * largest * 4
    if not streams:
        return block
    kept = 2 * streams * samples * length * arch.hidden_size * dtype.itemsize
    wide = max(arch.hidden_size, arch.mlp_size)
    factors = 3 * wide**2 * 4 if hessians else 0  # the sum, its factor, and room to factor
    return block + kept + factors + row_bytes(arch, length, 0)


def evaluating_bytes(arch: Architecture, dtype: torch.dtype, works: Iterable[tuple[Work, int]]) -> int:
    """The largest batch of all work, each with its number of sequences, as engine and scorer estimate it."""
    return max((rows * _sequence_bytes(arch, dtype, work) for work, rows in works), default=0)


def _sequence_bytes(arch: Architecture, dtype: torch.dtype, work: Work) -> int:
    if work.kind == "generation":
        return row_bytes(arch, work.length, round(work.read))
    return work.length * token_bytes(arch, dtype.itemsize, work.length, work.target / work.length)


def device_bytes(device: torch.device) -> int:
    """The memory of a GPU, or of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
