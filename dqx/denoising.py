"""Denoising states: what the model at full precision sees while it writes, recorded before its steps.

Shapes: N windows of T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: What a token is to the model at a state: given, generated and unmasked by now, or still masked.
TOKEN_CLASSES = ("prompt", "committed", "masked")


@dataclass(frozen=True)
class State:
    """The windows at one denoising step."""

    ids: Tensor  # [N, T] as the model sees them, masks included; on the CPU
    step: int  # from 0
    prompt: int  # tokens of each row that were given
    mask_ratio: float  # share of the answers' tokens that are still masked
    mask_token_id: int

    def token_class(self, name: str) -> Tensor:
        """The tokens [N, T] that are of a class. Raises ValueError for a name that is none of TOKEN_CLASSES."""
        if name not in TOKEN_CLASSES:
            raise ValueError(f"{name} is no class of tokens; they are {', '.join(TOKEN_CLASSES)}")
        given = torch.arange(self.ids.shape[1], device=self.ids.device) < self.prompt
        if name == "prompt":
            return given.expand_as(self.ids)
        masked = self.ids == self.mask_token_id
        return ~given & (masked if name == "masked" else ~masked)
