"""Are two mathematical answers equal? math_verify says so, in a process that can be stopped.

math_verify stops long computations with an alarm signal, which cannot interrupt big-integer arithmetic (a model that
answers `9^{9^{9^9}}` hangs it) and works in the main thread only. One helper process answers all questions and is
replaced when it takes too long.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import selectors
import subprocess
import sys
import threading
import time

TIMEOUT = 10.0  # seconds per comparison
STARTUP = 60.0  # seconds to import sympy on a busy machine
MEMORY = 4 << 30  # bytes of address space of the helper

_lock = threading.Lock()
_helper: subprocess.Popen[bytes] | None = None


def equal_answers(solution: str, answer: str, *, timeout: float = TIMEOUT) -> bool:
    """Whether the final answer of `answer` equals that of `solution`; False where it takes over `timeout` seconds."""
    global _helper
    with _lock:
        if _helper is None or _helper.poll() is not None:
            _helper = _start()
        assert _helper.stdin is not None
        try:
            _helper.stdin.write(json.dumps([solution, answer]).encode() + b"\n")
            _helper.stdin.flush()
            return _answer(_helper, timeout) == b"1\n"
        except (TimeoutError, BrokenPipeError):
            stop()
            return False


def _start() -> subprocess.Popen[bytes]:
    helper = subprocess.Popen(
        [sys.executable, "-P", __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    try:
        ready = _answer(helper, STARTUP)
    except TimeoutError:
        ready = b""
    if ready != b"ready\n":
        helper.kill()
        raise RuntimeError("the process that compares answers did not start; is math-verify installed?")
    return helper


def _answer(helper: subprocess.Popen[bytes], timeout: float) -> bytes:
    """The helper's next line; b"" where it died. Raises TimeoutError."""
    assert helper.stdout is not None
    line, deadline = b"", time.monotonic() + timeout
    with selectors.DefaultSelector() as selector:
        selector.register(helper.stdout, selectors.EVENT_READ)
        while not line.endswith(b"\n"):
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise TimeoutError
            part = os.read(helper.stdout.fileno(), 64)
            if not part:
                return b""
            line += part
    return line


@atexit.register
def stop() -> None:
    """End the helper, if there is one."""
    global _helper
    if _helper is not None:
        _helper.kill()
        for pipe in (_helper.stdin, _helper.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()
        _helper.wait()
        _helper = None


def serve() -> None:
    """Answer questions from standard input, one JSON pair per line, with 1 or 0."""
    import resource

    from math_verify import parse, verify

    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    verify(parse("$1$"), parse("$1$"))
    print("ready", flush=True)
    for line in sys.stdin:
        solution, answer = json.loads(line)
        try:
            equal = verify(parse(solution), parse(answer))
        except Exception:  # whatever a model's text does to the parser, it is no right answer
            equal = False
        print(int(bool(equal)), flush=True)


if __name__ == "__main__":
    serve()
