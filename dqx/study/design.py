"""The parts of a run, built once from its configuration: what plans and estimates look at.

`dqx.study.experiment` builds it, and adds the checkpoint for runs that are not only planned.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dqx.config.schema import Config
from dqx.diffusion.samplers import Sampler
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

    @property
    def streams(self) -> frozenset[str]:
        """Whose activations the method looks at, at these bits."""
        return self.method.streams(self.config.bits)

    @property
    def changes_model(self) -> bool:
        """Whether the method, at these bits, quantizes or transforms anything."""
        method, bits = self.method, self.config.bits
        return bool(method.transforms) or any(
            (method.rounding_of(role) is not None and bits.rounds_weight(role))
            or (method.quantizes_input(role) and bits.rounds_input(role))
            for role in self.arch.roles
        )
