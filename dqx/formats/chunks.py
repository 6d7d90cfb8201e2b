"""How many rows of a matrix to work on at a time."""

from __future__ import annotations

import torch

CPU_ELEMENTS = 2**17  # 512 KiB of float32: intermediate results of elementwise work stay in a core's cache
DEVICE_ELEMENTS = 2**24  # enough to keep an accelerator busy, and bounds memory


def row_slices(n_rows: int, width: int, device: torch.device) -> list[slice]:
    """Slices over `n_rows` rows of `width` numbers, each of a size that the device works on well."""
    elements = CPU_ELEMENTS if device.type == "cpu" else DEVICE_ELEMENTS
    rows = max(1, elements // max(1, width))
    return [slice(start, min(start + rows, n_rows)) for start in range(0, n_rows, rows)]
