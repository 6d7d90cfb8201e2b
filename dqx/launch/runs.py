"""What the launchers say about their runs."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from hydra.core.utils import JobReturn, JobStatus, filter_overrides

from dqx.record.outcomes import Failure, RunFailed, failures, launched

log = logging.getLogger(__name__)


def announce(number: int, overrides: Sequence[str]) -> None:
    log.info(f"\t#{number} : {' '.join(filter_overrides(overrides))}")


def died(number: int, reason: str) -> JobReturn:
    """A run that was ended before it could say why. Says so in its folder, unless it has left results."""
    for folder in failures([launched[number]]):
        Failure(reason).write(folder)
    dead = JobReturn(status=JobStatus.FAILED)
    dead.return_value = RunFailed(reason)
    return dead


def ended(number: int, returned: JobReturn) -> JobReturn:
    log.info(f"\t#{number} {'finished' if returned.status == JobStatus.COMPLETED else 'failed'}")
    return returned
