"""Programs that a model wrote: right ones pass, wrong ones fail, and attacks do no harm."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pyarrow.parquet
import pytest

from dqx.evaluate import scoring
from dqx.evaluate.sandbox import isolation, run_program

DATA = Path(__file__).parent / "data"
HUMANEVAL = "openai/openai_humaneval/openai_humaneval/test-00000-of-00001.parquet"
MBPP = "google-research-datasets/mbpp/full/test-00000-of-00001.parquet"


def documents(root: Path, path: str) -> list[dict]:
    return pyarrow.parquet.read_table(root / path).to_pylist()


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("assert sum([1, 2]) == 3", "passed"),
        ("assert sum([1, 2]) == 4", "AssertionError"),
        ("def f(:", "SyntaxError"),
        ("import sys; sys.exit(0)", "SystemExit"),
        ("import os; os._exit(0)", "exited before its end"),
        ("print('passed')\nraise SystemExit", "SystemExit"),
        ("def f(n): return f(n)\nf(1)", "RecursionError"),
        ("x = bytearray(10**11)", "MemoryError"),
        ("input()", "EOFError"),
        ("import ctypes; ctypes.string_at(0)", "killed by signal 11"),
        # what ordinary programs do is allowed
        ("open('note', 'w').write('x'); assert open('note').read() == 'x'", "passed"),
        ("import os; assert os.listdir('.') == []", "passed"),
        ("from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\nassert A(1) == A(1)", "passed"),
        ("import math, re, heapq, collections, itertools, datetime, random, statistics, typing, hashlib", "passed"),
        ("if __name__ == '__main__':\n    assert False", "passed"),
    ],
)
def test_reason(source: str, reason: str) -> None:
    outcome = run_program(source, timeout=2)
    assert (outcome.reason, outcome.passed) == (reason, reason == "passed")


@pytest.mark.parametrize(
    "source",
    [
        "while True: pass",
        "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
        "import time; time.sleep(100)",
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        "while True: print('x' * 100_000)",
    ],
    ids=["loop", "loop that ignores the signal", "sleep", "fork bomb", "endless output"],
)
def test_endless_programs_are_ended(source: str) -> None:
    started = time.monotonic()
    outcome = run_program(source, timeout=1, wall=1.2)
    assert not outcome.passed
    assert outcome.reason == "took too long"
    assert time.monotonic() - started < 10


def test_a_program_that_floods_the_report_does_not_pass() -> None:
    flood = (
        "import os\nfor fd in range(3, 32):\n    try: os.write(fd, b'passed 0\\n' * 20_000)\n    except OSError: pass\n"
    )
    outcome = run_program(flood + "os._exit(0)", timeout=1)
    assert (outcome.passed, outcome.reason) == (False, "wrote too much")


def test_the_parent_cannot_be_killed() -> None:
    attack = "import os, signal\nfor pid in (os.getppid(), -1, 1):\n    try: os.kill(pid, signal.SIGKILL)\n"
    attack += "    except OSError as e: assert e.errno == 1\n    else: os._exit(0)\n"
    assert run_program(attack).passed  # every attempt was refused
    assert not run_program("import os; os.killpg(os.getpgid(os.getppid()), 9)").passed


def test_files_outside_cannot_be_touched(tmp_path: Path) -> None:
    kept = tmp_path / "home" / "thesis.txt"
    kept.parent.mkdir(mode=0o777)
    kept.write_text("years of work")
    kept.chmod(0o666)
    for attack in (
        f"import shutil; shutil.rmtree({str(kept.parent)!r})",
        f"import os; os.remove({str(kept)!r})",
        f"open({str(kept)!r}, 'w').write('gone')",
        f"import os; os.rename({str(kept)!r}, 'mine')",
        "import os, shutil; shutil.rmtree(os.path.expanduser('~root'))",
        "open('big', 'wb').write(bytes(10**8))",
    ):
        assert not run_program(attack).passed
    assert kept.read_text() == "years of work"


def test_secrets_of_the_environment_stay_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "s3cret")
    assert run_program("import os; assert 'API_KEY' not in os.environ").passed
    steal = "import os\nassert b'API_KEY' in open(f'/proc/{os.getppid()}/environ', 'rb').read()"
    assert not run_program(steal).passed


def test_no_network_and_no_other_programs() -> None:
    listen = "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen()"
    assert not run_program(listen).passed
    assert not run_program("import subprocess; subprocess.run(['true'], check=True)").passed


def test_isolation_is_reported_and_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tmp_path.chmod(0o755)
    descriptors = len(os.listdir("/proc/self/fd"))
    outcome = run_program("open('left', 'w').write('x')")
    assert outcome.isolation == isolation()
    assert "limits" in outcome.isolation
    assert {"files", "user", "guard"} & set(outcome.isolation)
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_canonical_solutions_pass_and_broken_ones_do_not() -> None:
    for doc in documents(DATA, HUMANEVAL):
        assert scoring.humaneval(doc, [doc["canonical_solution"]]) == {"pass@1": 1.0}
        assert scoring.humaneval(doc, ["    return None\n"]) == {"pass@1": 0.0}
    for doc in documents(DATA, MBPP):
        assert scoring.mbpp(doc, [doc["code"]]) == {"pass@1": 1.0}
        assert scoring.mbpp(doc, [f"```\n{doc['code']}"]) == {"pass@1": 0.0}
        assert scoring.mbpp(doc, [f"{doc['code']}\n```\nThis works because"]) == {"pass@1": 1.0}


@pytest.mark.slow
def test_every_canonical_solution_passes() -> None:
    """All of HumanEval and MBPP; `DATA_ROOT` is a folder with both in the hub's layout."""
    root = os.environ.get("DATA_ROOT")
    if root is None:
        pytest.skip("set DATA_ROOT to a folder that holds openai/openai_humaneval and google-research-datasets/mbpp")
    humaneval, mbpp = documents(Path(root), HUMANEVAL), documents(Path(root), MBPP)
    assert (len(humaneval), len(mbpp)) == (164, 500)
    failed = [d["task_id"] for d in humaneval if not scoring.humaneval(d, [d["canonical_solution"]])["pass@1"]]
    failed += [d["task_id"] for d in mbpp if not scoring.mbpp(d, [d["code"]])["pass@1"]]
    assert failed == []
