"""What was run: the settings of a configuration that reports, tables and searches speak of, read once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dqx.common.names import approximating, approximations, method_label


@dataclass(frozen=True)
class CalibrationSettings:
    """The text on which a model was calibrated."""

    text: str
    masking: str = "clean"
    samples: int | None = None
    length: int | None = None  # tokens per window


@dataclass(frozen=True)
class RunSettings:
    """What was run. What a configuration of an earlier version lacks has the value that it had then."""

    model: str
    method: str  # without its variant
    variant: str
    bits: str  # name of the widths: w4a16
    activation_bits: int
    activation_format: str
    threshold: float | None  # of the sampler, as `cache`: None where it is exact
    cache: str | None
    steps: int | None  # denoising steps per answer; None: each task's own
    calibration: CalibrationSettings | None
    limit: int | None  # documents per task; None: all
    seed: int
    tasks: Mapping[str, Any]  # by name, with their settings
    wandb: Mapping[str, Any]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> RunSettings:
        """The settings of a resolved configuration."""
        groups = ("model", "method", "bits", "calib", "steps", "task", "wandb")
        model, method, bits, calib, steps, task, wandb = (config.get(group) or {} for group in groups)
        sampler, activation = model.get("sampler") or {}, bits.get("activation") or {}
        threshold, cache = approximating(sampler)
        calibration = {key: calib[key] for key in ("masking", "samples", "length") if key in calib}
        return cls(
            model=str(model.get("name")),
            method=str(method.get("name")),
            variant=method.get("variant") or "",
            bits=str(bits.get("name")),
            activation_bits=int(activation.get("bits", 16)),
            activation_format=activation.get("format", "int"),
            threshold=threshold,
            cache=cache,
            steps=steps.get("count"),
            calibration=CalibrationSettings(str(calib.get("text")), **calibration) if calib else None,
            limit=task.get("limit"),
            seed=int(config.get("seed", 0)),
            tasks=task.get("suite") or {},
            wandb=wandb,
        )

    @property
    def method_label(self) -> str:
        """The method with its variant: `gptq_as_published`."""
        return method_label(self.method, self.variant)

    @property
    def masking(self) -> str:
        """How the calibration text was masked; `clean` where it was not, or where none was read."""
        return self.calibration.masking if self.calibration else "clean"

    @property
    def approximations(self) -> tuple[str, ...]:
        """What makes the sampler approximate, in short names."""
        return approximations(self.threshold, self.cache)
