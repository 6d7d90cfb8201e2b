"""Programs that a model wrote: right ones pass, wrong ones fail, and attacks do no harm."""

from __future__ import annotations

import ast
import contextlib
import gzip
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import DATA

from dqx.config.compose import compose, resolve
from dqx.evaluate import problems
from dqx.evaluate.scorers import programs, sandbox
from dqx.evaluate.scorers.programs import humaneval, mbpp
from dqx.evaluate.scorers.sandbox import isolation, run_program
from dqx.study import experiment

filtered = pytest.mark.skipif("calls" not in isolation(), reason="this system has no seccomp")


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
    ("source", "reason"),
    [
        ("while True: pass", "took too long"),
        ("import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass", "took too long"),
        ("import time; time.sleep(100)", "took too long"),
        ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", "took too long"),
        ("while True: print('x' * 100_000)", "took too long"),
        ("i = 0\nwhile True:\n    open(str(i), 'w').close()\n    i += 1", "wrote too much"),
        ("i = 0\nwhile True:\n    open(str(i), 'wb').write(bytes(2**20))\n    i += 1", "wrote too much"),
        ("held = []\nwhile True: held.append(bytearray(2**20))", "MemoryError"),
        ("import os\nwhile True: os.pipe()", "OSError"),
    ],
    ids=["loop", "loop that ignores the signal", "sleep", "fork bomb", "output", "files", "disk", "memory", "pipes"],
)
def test_endless_programs_are_ended(source: str, reason: str) -> None:
    started = time.monotonic()
    outcome = run_program(source, timeout=1, memory=1 << 28, wall=1 if "sleep" in source else None)
    assert (outcome.passed, outcome.reason) == (False, reason)
    assert time.monotonic() - started < 20  # not 100


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
    kept.parent.mkdir()
    kept.parent.chmod(0o777)
    kept.write_text("years of work")
    kept.chmod(0o666)
    for attack in (
        f"open({str(kept)!r}).read()",
        f"import os; os.listdir({str(kept.parent)!r})",
        f"import os; os.truncate({str(kept)!r}, 0)",
        f"import os; os.chmod({str(kept.parent)!r}, 0)",
        f"import os; os.symlink({str(kept.parent)!r}, 'link')",
        f"import os; os.link({str(kept)!r}, 'link')",
        f"import shutil; shutil.rmtree({str(kept.parent)!r})",
        f"import os; os.remove({str(kept)!r})",
        f"open({str(kept)!r}, 'w').write('gone')",
        f"import os; os.rename({str(kept)!r}, 'mine')",
        "import os, shutil; shutil.rmtree(os.path.expanduser('~root'))",
        "open('big', 'wb').write(bytes(10**8))",
    ):
        assert not run_program(attack).passed
    assert kept.read_text() == "years of work"
    assert (kept.stat().st_mode & 0o777, kept.parent.stat().st_mode & 0o777) == (0o666, 0o777)


@filtered
@pytest.mark.parametrize(
    "attempt",
    [
        "import resource; resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (0, 0))",
        "os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
        "os.sched_setaffinity(os.getppid(), {0})",
        "os.sched_setscheduler(os.getppid(), os.SCHED_IDLE, os.sched_param(0))",
        "import fcntl; fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, os.getppid())",
        "import fcntl, socket; fcntl.ioctl(socket.socketpair()[0], 0x8901, bytes(4))",
        # attributes as chattr sets them: FS_IOC_SETFLAGS, of 32 bits too, FS_IOC_FSSETXATTR; verity; the system call
        *(
            f"import fcntl; f = open('a', 'w'); fcntl.ioctl(f, {number}, bytes(128))"
            for number in (0x40086602, 0x40046602, 0x401C5820, 0x40806685)
        ),
        "import fcntl; fcntl.ioctl(open(os.__file__), 0x40086602, bytes(8))",
        "import ctypes; c = ctypes.CDLL(None, use_errno=True); c.syscall(469, -100, b'.', bytes(24), 24, 0); "
        "raise OSError(ctypes.get_errno(), '')",
        "os.kill(os.getpid(), 0)",
        "os.fork()",
        "open('a', 'w').close(); os.chmod('a', 0)",
        "open('a', 'w').close(); os.utime('a', (0, 0))",
        "open('a', 'w').close(); os.setxattr('a', 'user.b', b'c')",
        "open('a', 'w').close(); os.truncate('a', 9)",
        "os.mkdir('a')",
        "os.symlink('a', 'b')",
        "os.mkfifo('a')",
    ],
)
def test_refused_even_among_the_users_own(attempt: str) -> None:
    """For users other than root, who stay themselves, the parent and all their files are their own."""
    assert run_program(f"import os\n{attempt}").reason == "PermissionError"


@filtered
@pytest.mark.parametrize(
    "attempt",
    [
        "open(kept, 'w')",
        "open(kept, 'a')",
        "open('new', 'x')",
        "os.open(kept, os.O_RDONLY | os.O_TRUNC)",
        "os.remove(kept)",
        "os.rename(kept, 'mine')",
        "shutil.rmtree(os.path.dirname(kept))",
        "fcntl.ioctl(os.open(kept, os.O_RDONLY), 0x40086602, struct.pack('l', 0x40))",  # chattr +d
    ],
)
def test_without_landlock_nothing_is_written(tmp_path: Path, attempt: str) -> None:
    kept = tmp_path / "thesis.txt"
    kept.write_text("years of work")
    program = f"""
import sys; sys.path.append({str(Path(sandbox.__file__).parent)!r})
import fcntl, os, shutil, struct, sandbox_child
kept = {str(kept)!r}
sandbox_child.libc.prctl(sandbox_child.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
assert sandbox_child.filter_system_calls(read_only=True)
assert open(kept).read() == "years of work"
{attempt}"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "PermissionError: [Errno 1]" in ended.stderr
    assert kept.read_text() == "years of work"


def test_what_python_asks_of_its_files_is_allowed() -> None:
    asked = "import fcntl, os\nread, write = os.pipe()\nassert not os.isatty(read)\nos.set_inheritable(read, True)\n"
    asked += "os.set_blocking(read, False)\nos.write(write, b'abc')\n"
    asked += "assert fcntl.ioctl(read, 0x541B, bytes(4))[0] == 3\nopen('a', 'w').write('x')"
    outcome = run_program(asked)
    assert outcome.passed, outcome.reason


WITHOUT_LANDLOCK = """
import sys; sys.path.append({folder!r})
import os, sandbox_child
sandbox_child.restrict_files = lambda folder: False
sandbox_child._world_readable = lambda path: {readable}  # False: as where Python lies in root's own folder
keep, sandbox_child.keep_capabilities = sandbox_child.keep_capabilities, lambda mask: print("mask", mask) or keep(mask)
if os.geteuid() != 0:  # who has nothing to give up gives it up in vain
    os.geteuid, keep = lambda: 0, lambda mask: True
    os.setgroups = os.setresgid = os.setresuid = lambda *_: None
print(sandbox_child.lock_in(1, 1 << 30))
"""


@pytest.mark.parametrize("readable", [True, False])
def test_without_landlock_the_right_to_read_all_files_is_not_kept(readable: bool) -> None:
    """Root's programs would read everybody's files; where they could not run without it, the sandbox says so."""
    source = WITHOUT_LANDLOCK.format(folder=str(Path(sandbox.__file__).parent), readable=readable)
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    masks = [line for line in done.stdout.splitlines() if line.startswith("mask")]
    assert masks == (["mask 0"] * 2 if readable else ["mask 4", "mask 0"])
    if readable:
        assert "'user'" in done.stdout
    else:
        assert "PermissionError" in done.stderr
        assert "can be entered by root alone, and this system has no Landlock" in done.stderr
        assert "install Python where every user may read it, or run as another user than root" in done.stderr


def test_a_sandbox_that_cannot_be_set_up_is_told_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("the sandbox could not be set up (exit status 1): no room")

    monkeypatch.setattr(problems, "isolation", broken)
    suite = compose(["task=nano"]).task.suite
    assert problems.sandbox_problems(suite) == [
        "task nano_code: the sandbox could not be set up (exit status 1): no room; or leave it out"
    ]
    config = resolve(compose(["task=nano"]))
    assert any("could not be set up" in problem for problem in experiment.problems(config))
    assert not any("could not be set up" in problem for problem in experiment.problems(config, elsewhere=True))
    assert problems.sandbox_problems(compose(["task=nano_facts"]).task.suite) == []


@filtered
def test_other_processes_cannot_be_traced_or_read() -> None:
    trace = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
    trace += "assert libc.ptrace(16, os.getppid(), 0, 0) == -1 and ctypes.get_errno() == 1"
    assert run_program(trace).passed
    for path in ("mem", "environ", "cwd/README.md", "fd/0", "task"):
        assert not run_program(f"import os; os.stat(f'/proc/{{os.getppid()}}/{path}'); open('/proc/1/{path}')").passed
    assert not run_program(f"open({str(Path(sandbox.__file__).parents[2] / 'pyproject.toml')!r})").passed


def test_nothing_survives_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in the folder, however deep, and no process."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tmp_path.chmod(0o755)
    nest = "import os\nfor _ in range(3000):\n    os.mkdir('a')\n    os.chdir('a')"
    daemon = "import os\nif os.fork() == 0:\n    os.setsid()\n    while True: pass"
    hold = "import os, time\nos.close(int(__import__('sys').argv[1]))\ntime.sleep(100)"  # reports its end, goes on
    for attack in (nest, daemon, hold):
        assert not run_program(attack).passed
    assert list(tmp_path.iterdir()) == []
    assert not running(tmp_path)


@filtered
def test_programs_end_with_their_evaluation(tmp_path: Path) -> None:
    """Also if that is killed, and they would rather not."""
    stay = "import ctypes, time\nctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\nopen('ready', 'w').close()\ntime.sleep(100)"
    folder = Path(sandbox.__file__).parent
    evaluation = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path.append({str(folder)!r}); import sandbox; sandbox.run_program({stay!r})",
        ],
        env={"TMPDIR": str(tmp_path)},
    )
    tmp_path.chmod(0o755)
    assert within(60, lambda: list(tmp_path.glob("*/ready")))
    assert running(tmp_path)
    evaluation.kill()
    evaluation.wait()
    assert within(60, lambda: not running(tmp_path))


def running(folder: Path) -> list[str]:
    """The processes whose home is in `folder`."""
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # of another user, or gone
            if f"HOME={folder}/".encode() in environment.read_bytes():
                found.append(environment.parent.name)
    return found


def within(seconds: float, happened: Callable[[], object]) -> bool:
    deadline = time.monotonic() + seconds
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(happened())


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


# scores


def documents(name: str, every: int = 1) -> list[dict]:
    with gzip.open(DATA / "programs" / f"{name}.jsonl.gz", "rt") as lines:
        return [json.loads(line) for line in lines][::every]


def solution(doc: dict) -> str:
    """The whole program, as an answer to MBPP's prompt would hold it."""
    return doc["code"] if "code" in doc else doc["prompt"] + doc["canonical_solution"]


def score(doc: dict, program: str) -> float:
    if "code" in doc:
        return mbpp(doc, [program])["pass@1"]
    return humaneval(doc | {"prompt": ""}, [program])["pass@1"]


def reference(doc: dict, program: str) -> float:
    """What human-eval's `execution.py` does with a program that is safe: no exception, of whatever kind, is a pass."""
    tests = (
        [doc["test"], f"check({doc['entry_point']})"] if "test" in doc else [doc["test_setup_code"]] + doc["test_list"]
    )
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            exec("\n".join([program, *tests]), {})
    except BaseException:
        return 0.0
    return 1.0


def broken(program: str, body: str) -> str:
    """The program with `body` in place of that of every function."""
    tree = ast.parse(program)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.body = ast.parse(body).body
    return ast.unparse(tree)


def spoiled(program: str) -> str:
    """The program with another value in every return statement."""
    tree = ast.parse(program)
    for node in ast.walk(tree):
        if isinstance(node, ast.Return) and node.value is not None:
            node.value = ast.Tuple([ast.Constant("no"), node.value], ast.Load())
    return ast.unparse(ast.fix_missing_locations(tree))


@pytest.mark.filterwarnings("ignore:invalid escape sequence")  # in MBPP
@pytest.mark.parametrize(
    ("every", "n"), [(16, 72), pytest.param(1, 1138, marks=pytest.mark.slow)], ids=["a sample", "all"]
)
def test_canonical_solutions_pass_and_spoiled_ones_do_not(every: int, n: int) -> None:
    docs = documents("humaneval", every) + documents("mbpp", every)
    assert len(docs) == n
    failed = [doc["task_id"] for doc in docs if not score(doc, solution(doc)) == reference(doc, solution(doc)) == 1]
    assert failed == []
    failed = [doc["task_id"] for doc in docs if not score(doc, p := spoiled(solution(doc))) == reference(doc, p) == 0]
    assert failed == []


@pytest.mark.parametrize(
    "body",
    [
        "pass",
        "raise ValueError",
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "raise SystemExit",
        "quit()",
        "return broken",
        "import sys; sys.stdout.close(); sys.exit('passed')",
        "import builtins; builtins.BaseException = ValueError; raise KeyError",
        "import os; os.execv('/bin/true', ['true'])",
        "import ctypes; ctypes.string_at(0)",
    ],
)
def test_broken_programs_fail(body: str) -> None:
    for doc in (documents("humaneval")[3], documents("mbpp")[12]):
        assert score(doc, broken(solution(doc), body)) == 0.0


def test_endless_programs_fail() -> None:
    (doc,) = documents("humaneval", 164)
    assert humaneval(doc, ["    while True: pass\n"]) == {"pass@1": 0.0}


def test_answers_end_at_a_code_fence() -> None:
    doc = documents("mbpp")[12]
    assert mbpp(doc, [f"```\n{doc['code']}"]) == {"pass@1": 0.0}
    assert mbpp(doc, [f"{doc['code']}\n```\nThis works because"]) == {"pass@1": 1.0}


@pytest.mark.slow
def test_solutions_leave_room_to_the_limits() -> None:
    """A third of the CPU time and a quarter of the memory do, so that a slower machine gives the same scores."""
    for name, timeout in (("humaneval", sandbox.TIMEOUT), ("mbpp", programs.MBPP_TIMEOUT)):
        for doc in documents(name):
            tests = [doc["test"], f"check({doc['entry_point']})"] if "test" in doc else doc["test_list"]
            program = "\n".join([solution(doc), doc.get("test_setup_code", ""), *tests])
            outcome = run_program(program, timeout=timeout / 3, memory=sandbox.MEMORY // 4)
            assert outcome.passed, (doc["task_id"], outcome.reason)
