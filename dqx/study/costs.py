"""What the stages of a run take: seconds, and the most memory."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dqx.common import accelerator, heartbeat
from dqx.common.memory import peak_ram, watch_peaks
from dqx.common.processes import processes

log = logging.getLogger(heartbeat.STAGES)


class Costs:
    """By stage, of this process. `peaks` are bytes, resident in RAM and of tensors on the GPU."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, dict[str, int]] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Say what is going on, and note what it took; seconds of parts that are noted by themselves count there."""
        heartbeat.stage(name)
        if processes().main:
            log.info(name)
        watch_peaks(self.device)
        before, started = sum(self.seconds.values()), time.perf_counter()
        yield
        elapsed, inside = time.perf_counter() - started, sum(self.seconds.values()) - before
        self.seconds[name] = self.seconds.get(name, 0.0) + elapsed - inside
        taken = {"ram": peak_ram(), "gpu": accelerator.peak_memory(self.device)}
        self.peaks[name] = {kind: max(peak, self.peaks.get(name, taken)[kind]) for kind, peak in taken.items()}

    @property
    def peak(self) -> dict[str, int]:
        """The most of all stages."""
        return {kind: max(stage[kind] for stage in self.peaks.values()) for kind in ("ram", "gpu")}
