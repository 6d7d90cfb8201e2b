"""Tensors as files and as digests."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from dqx.common.files import write_bytes


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file as `write_bytes` does. Of tensors that share memory each gets its own."""
    write_bytes(path, save({name: tensor.contiguous().clone() for name, tensor in tensors.items()}))


def tensor_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hash of named tensors, one at a time on the CPU."""
    found = hashlib.sha256()
    for name, tensor in tensors:
        found.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
