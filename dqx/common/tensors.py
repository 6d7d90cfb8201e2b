"""Tensors as files and as digests."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dqx.common.files import write_bytes

if TYPE_CHECKING:  # torch takes a second: where nothing is computed it is not imported
    from torch import Tensor


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file as `write_bytes` does. Of tensors that share memory each gets its own."""
    from safetensors.torch import save

    write_bytes(path, save({name: tensor.contiguous().clone() for name, tensor in tensors.items()}))


def tensor_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hash of named tensors, one at a time on the CPU."""
    import torch

    content = hashlib.sha256()
    for name, tensor in tensors:
        content.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        content.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return content.hexdigest()
