"""One run of W&B, written whole or not at all.

    RUN/wandb/offline-run-<time>-<id>/      what `wandb sync` uploads; run-<time>-<id> of a run that was online
    RUN/wandb/staged-<id>-<attempt>/        files of its artifacts until they are uploaded, by absolute path
    RUN/wandb/unfinished-<id>/              an attempt under way, or one that was killed

W&B cannot resume a run offline, and a process that dies leaves a torn file. So an attempt is written apart and gets its
name when it is complete; then those before it, finished or not, are removed. Each attempt writes everything, so what
the server may have of an earlier one is replaced: the id is given without `resume`, which would append. W&B itself
stages the files of artifacts (every table has one) below the home folder, where `wandb sync` from another machine would
not find them. It stages each twice and leaves empty folders: what the run does not name goes when the run is written.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from dqx.report.wandb.login import Mode

INIT_TIMEOUT = 20.0  # seconds for the server to answer
FINISH_TIMEOUT = 60.0  # seconds for the upload; what is missing then stays on disk for `wandb sync`
FILE_HEADER = 7  # bytes of a W&B file that holds nothing yet
BLOCK, BLOCK_HEADER = 32768, 7  # bytes of such a file that are one block, and those at its start that are no content
STAGING = "WANDB_DATA_DIR"
Fill = Callable[[Any], None]  # of a W&B run


def write(
    folder: Path, mode: Mode, run_id: str, settings: Mapping[str, Any], config: Mapping[str, Any], fill: Fill
) -> dict[str, Any]:
    """Write the W&B run `run_id` of the run in `folder`, filled by `fill`, and say where it is.

    `settings` has project, entity, group and tags. Raises what W&B or the disk raises.
    """
    import wandb

    place = folder / "wandb"
    unfinished, staged = place / f"unfinished-{run_id}", place / f"staged-{run_id}-{uuid4().hex[:8]}"
    shutil.rmtree(unfinished, ignore_errors=True)
    (unfinished / "wandb").mkdir(parents=True)  # else wandb silently writes to a temporary folder
    quiet = wandb.Settings(
        init_timeout=INIT_TIMEOUT, finish_timeout=FINISH_TIMEOUT, silent=True, console="off", host="",
        disable_git=True, disable_code=True, x_disable_meta=True, x_disable_machine_info=True, x_disable_stats=True,
        x_save_requirements=False,  # the config has the versions that matter
    )  # fmt: skip
    where = {key: settings[key] for key in ("project", "entity", "group", "tags")}
    names: dict[str, Any] = {"id": run_id, "name": folder.name, "mode": mode, "dir": str(unfinished), **where}
    with _staging(staged), wandb.init(**names, config=dict(config), reinit="create_new", settings=quiet) as run:
        fill(run)
        url = run.url if mode == "online" else None
        file = Path(run.settings.sync_file)
    _wait_until_written(file)
    remove_unnamed(staged, file)
    for made in (staged, file.parent):
        _remove_empty(made)
    finished = place / file.parent.name
    shutil.rmtree(finished, ignore_errors=True)  # of the same second
    os.replace(file.parent, finished)
    _remove_others(place, run_id, {finished, staged})
    return {"state": "written", "mode": mode, "id": run_id, "folder": str(finished), "url": url}


def give_up() -> None:
    """After a failed start: W&B's service of this process holds the id until it ends. A caller's own run keeps it."""
    import wandb

    if wandb.run is None:
        wandb.teardown()


@contextmanager
def _staging(folder: Path) -> Iterator[None]:
    """Files of artifacts go to `folder` until they are uploaded; not where the user has set a place for them."""
    if os.environ.get(STAGING):
        yield
        return
    os.environ[STAGING] = str(folder)
    try:
        yield
    finally:
        del os.environ[STAGING]


def _wait_until_written(file: Path, at_most: float = 5.0) -> None:
    """W&B's writer, a process of its own, is still closing its file when `finish` returns: wait until it rests."""
    deadline, size, last = time.monotonic() + at_most, -1, 0
    while (size != last or size <= FILE_HEADER) and time.monotonic() < deadline:
        time.sleep(0.1)
        last, size = size, file.stat().st_size


def remove_unnamed(staged: Path, file: Path) -> None:
    """Remove the staged files that the W&B file does not name: nothing will read them."""
    content = file.read_bytes()
    named = b"".join(content[at + BLOCK_HEADER : at + BLOCK] for at in range(0, len(content), BLOCK))
    for path in [*staged.rglob("*")]:
        if path.is_file() and path.name.encode() not in named:
            path.unlink()


def _remove_empty(folder: Path) -> None:
    """Remove the folders in and below `folder` that hold no file, itself too."""
    for path, _, _ in os.walk(folder, topdown=False):
        with suppress(OSError):  # it is not empty
            os.rmdir(path)


def _remove_others(place: Path, run_id: str, kept: set[Path]) -> None:
    """Remove earlier attempts at the same run of W&B, and nothing else that may lie there."""
    mine = (f"*run-*-{run_id}", f"staged-{run_id}-*", f"unfinished-{run_id}")
    for path in {path for pattern in mine for path in place.glob(pattern)} - kept:
        shutil.rmtree(path, ignore_errors=True)
