"""What the launchers say about their runs."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from hydra.core.utils import JobReturn, JobStatus, filter_overrides

from dqx.record.outcomes import Failure, RunFailed, failures, launched, manner, stage_of

log = logging.getLogger(__name__)


def announce(number: int, overrides: Sequence[str]) -> None:
    """Say what is started, where `verbose` asks for it: every run has a line when it ends."""
    log.debug(f"{launched[number].name}: {' '.join(filter_overrides(overrides))}")


def vanished(number: int, details: str) -> JobReturn:
    """A run whose process is gone without a word."""
    return died(number, f"it {manner(None, stage_of(launched[number]))} ({details})")


def died(number: int, reason: str) -> JobReturn:
    """A run that was ended before it could say why. Says so in its folder, unless it has left results."""
    for folder in failures([launched[number]]):
        Failure(reason).write(folder)
    dead = JobReturn(status=JobStatus.FAILED)
    dead.return_value = RunFailed(reason)
    return dead


def ended(number: int, returned: JobReturn) -> JobReturn:
    """Say in one line what came of a run that another process has done."""
    folder = launched[number]
    if returned.status == JobStatus.COMPLETED:
        from dqx.record.folder import RunFolder
        from dqx.report.terminal import print_line

        try:
            print_line(RunFolder(folder).read(documents=False), folder.name)
        except (OSError, ValueError) as error:
            log.warning(f"{folder.name}: no results here ({error})")
    else:
        reason = next((failure.reason for failure in failures([folder]).values()), "failed")
        log.warning(f"{folder.name}: {reason}")
    return returned
