"""What the launchers say about their runs."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from hydra.core.utils import JobReturn, JobStatus, filter_overrides

from dqx.outcomes import Failure, RunFailed, launched

log = logging.getLogger(__name__)


def announce(number: int, overrides: Sequence[str]) -> None:
    log.info(f"\t#{number} : {' '.join(filter_overrides(overrides))}")


def died(number: int, reason: str) -> JobReturn:
    """A run whose process ended without a word. Says so in the run's folder, unless its results are there."""
    if number < len(launched) and not (launched[number] / "results.json").exists():
        Failure(reason).write(launched[number])
    dead = JobReturn(status=JobStatus.FAILED)
    dead.return_value = RunFailed(reason)
    return dead


def ended(number: int, returned: JobReturn) -> JobReturn:
    log.info(f"\t#{number} {'finished' if returned.status == JobStatus.COMPLETED else 'failed'}")
    return returned
