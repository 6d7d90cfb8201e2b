"""Run programs that a model wrote, in a process that can do nothing but compute.

Each program gets a fresh Python process (`sandbox_child.py`) in an empty temporary folder, without our environment,
under limits on CPU time, memory, file size, open files and processes; what its files take together is watched from
here. On Linux it also loses, as far as the system allows: its user (root becomes nobody), the network (own network
namespace), files outside the temporary folder and Python's own (Landlock), and the system calls for processes, their
priorities and limits, signals, sockets, folders, links, file attributes and devices (seccomp); without Landlock it may
write no file at all, and read none that its user may not. `ProgramResult.isolation` says what was in force.

A program has passed when it ran to its end: only then does the child send back a token drawn for this run. Exiting
early, with whatever status, is no pass. What this does not stop is a program that searches the interpreter it runs
in for the token: it could as well return objects that equal everything.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

CHILD = Path(__file__).with_name("sandbox_child.py")
TIMEOUT = 3.0  # seconds of CPU time, as in HumanEval's scorer
MEMORY = 1 << 30  # bytes of address space
MAX_REPORT = 1 << 16  # bytes that are read from a child
MAX_FILES, MAX_BYTES = 1000, 1 << 24  # in the folder, together
WATCH = 0.1  # seconds between looks at the folder
ENVIRONMENT = {"PATH": os.defpath, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


@dataclass(frozen=True)
class ProgramResult:
    """Whether a program ran to its end, why not, and the layers of isolation it ran under."""

    passed: bool
    reason: str  # "passed", the exception's name, or what stopped it
    isolation: tuple[str, ...] = ()


def run_program(
    source: str, *, timeout: float = TIMEOUT, memory: int = MEMORY, wall: float | None = None
) -> ProgramResult:
    """Run Python `source` with at most `timeout` seconds of CPU time and `memory` bytes of address space.

    The clock on the wall ends it after `wall` seconds (None: five times `timeout` plus 5), which is generous so that a
    busy machine changes no score. Raises RuntimeError when the child process cannot be set up.
    """
    token = secrets.token_hex(16)
    order = f"{math.ceil(timeout)} {memory} {token}\n{source}"
    folder = tempfile.mkdtemp(prefix="dqx-sandbox-")
    report_end, child_end = os.pipe()
    try:
        if os.geteuid() == 0:
            os.chown(folder, 65534, 65534)
        process = subprocess.Popen(
            [sys.executable, "-I", str(CHILD), str(child_end)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=ENVIRONMENT | {"HOME": folder, "TMPDIR": folder},
            pass_fds=[child_end],
            start_new_session=True,
        )
        os.close(child_end)
        child_end = -1
        try:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError), process.stdin:
                process.stdin.write(order.encode("utf-8", "surrogatepass"))
            deadline = time.monotonic() + (5 * timeout + 5 if wall is None else wall)
            report, stopped = _read(report_end, folder, deadline)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            status = process.wait()
    finally:
        os.close(report_end)
        if child_end >= 0:
            os.close(child_end)
        with contextlib.suppress(RecursionError):  # folders in folders, where they cannot be forbidden
            shutil.rmtree(folder, ignore_errors=True)
    return _result(report, token, stopped, status)


@functools.cache
def isolation() -> tuple[str, ...]:
    """The layers that programs run under on this machine."""
    return run_program("").isolation


def _read(pipe: int, folder: str, deadline: float) -> tuple[bytes, str]:
    """Everything from `pipe` until it is closed, and "" or why it was read no further."""
    report, look = b"", time.monotonic() + WATCH
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while len(report) < MAX_REPORT:
            if selector.select(max(0.0, min(look, deadline) - time.monotonic())):
                part = os.read(pipe, 4096)
                if not part:
                    return report, ""
                report += part
            elif time.monotonic() >= deadline:
                return report, "took too long"
            if time.monotonic() >= look:
                if _is_full(folder):
                    return report, "wrote too much"
                look = time.monotonic() + WATCH
    return report, "wrote too much"


def _is_full(folder: str) -> bool:
    """Whether the files in `folder` are too many or too large."""
    n, size = 0, 0
    with os.scandir(folder) as files:
        for file in files:
            with contextlib.suppress(FileNotFoundError):
                n, size = n + 1, size + file.stat(follow_symlinks=False).st_size
            if n > MAX_FILES or size > MAX_BYTES:
                return True
    return False


def _result(report: bytes, token: str, stopped: str, status: int) -> ProgramResult:
    head, _, rest = report.decode(errors="replace").partition("\n")
    kind, _, layers = head.partition(" ")
    if kind != "ready":
        told = head.removeprefix("failed ")[:400] or "no report"
        raise RuntimeError(f"the sandbox could not be set up (exit status {status}): {told}")
    isolation = tuple(layers.split(","))
    if stopped:
        return ProgramResult(False, stopped, isolation)
    if rest == f"passed {token}\n":
        return ProgramResult(True, "passed", isolation)
    if rest.startswith("raised ") and len(rest) < 100:
        return ProgramResult(False, rest[len("raised ") :].strip(), isolation)
    if status in (-signal.SIGXCPU, -signal.SIGKILL):
        return ProgramResult(False, "took too long", isolation)
    return ProgramResult(False, f"killed by signal {-status}" if status < 0 else "exited before its end", isolation)
