"""The parts of a run, built once from its configuration: what plans and estimates look at.

`dqx.study.experiment` builds it, and adds the checkpoint for runs that are not only planned.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from dqx.config.schema import Config
from dqx.data.masking import window_tokens
from dqx.diffusion.samplers import Sampler
from dqx.formats.bits import UNQUANTIZED, Widths
from dqx.models.architecture import Architecture
from dqx.quant.method import Method


@dataclass(frozen=True)
class Design:
    """A configuration, the parts it names, and the model's shapes, number type and device."""

    config: Config
    method: Method
    sampler: Sampler
    arch: Architecture
    dtype: torch.dtype
    device: torch.device

    @property
    def reads_text(self) -> bool:
        """Whether the run needs calibration text: for its method, or to measure outliers."""
        return self.method.needs_data or self.config.outliers.samples > 0

    @cached_property
    def widths(self) -> Widths:
        """The grids of every block."""
        return self.config.bits.resolve(self.arch)

    @cached_property
    def window_tokens(self) -> int:
        """Tokens of a calibration window as they are computed: of a sampler that writes by passes, those of all."""
        return window_tokens(self.config.calib, self.sampler, self.arch)

    @property
    def streams(self) -> frozenset[str]:
        """Whose activations the method looks at, at these bits."""
        return self.method.streams(self.widths)

    @property
    def asks_confidence(self) -> bool:
        """Whether the unquantized model runs over the calibration text, for the weights of its tokens."""
        return bool(self.streams) and self.method.weighs_by("confidence")

    @property
    def asks_commitments(self) -> bool:
        """Whether the method wants to know when each calibration token is written."""
        return bool(self.streams) and self.method.weighs_by("committed")

    @property
    def changes_model(self) -> bool:
        """Whether the method, at these bits, quantizes or transforms anything."""
        method, widths = self.method, self.widths
        of_heads = method.kv is not None and min(self.config.bits.kv_widths()) != UNQUANTIZED
        return (
            bool(method.transforms)
            or of_heads
            or any(
                (method.rounding_of(role) is not None and widths.rounds_weight(role))
                or (method.quantizes_input(role) and widths.rounds_input(role))
                for role in self.arch.roles
            )
        )
