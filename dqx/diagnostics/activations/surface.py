"""The activation surface: |x| over tokens and channels of one window, small enough to keep and to draw.

T tokens, C channels.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

MOST_TOKENS, MOST_CHANNELS = 256, 512


def surface(x: Tensor) -> Tensor:
    """|x| [T', C'] of x [T, C] in float32 on the CPU, the maximum of each patch where one axis is too long.

    T' = ceil(T / t) with the smallest whole t that gives at most 256, C' likewise at most 512; the last patch of an
    axis may be smaller. Values that are not finite count as 0.
    """
    size = x.detach().float().nan_to_num(0.0, 0.0, 0.0).abs()
    patch = (-(-x.shape[0] // MOST_TOKENS), -(-x.shape[1] // MOST_CHANNELS))
    return F.max_pool2d(size[None], patch, ceil_mode=True)[0].cpu()


def default_blocks(count: int) -> list[int]:
    """First, middle and last of `count` blocks."""
    return sorted({0, count // 2, count - 1})
