"""The process that runs a program for `sandbox.py`: locks itself in, runs it, reports.

Started as `python -I sandbox_child.py FD`; standard input holds one line `CPU-SECONDS BYTES TOKEN`, then the program.
Writes to FD one line with the layers of isolation in force, then one with how the program ended. Imports little,
because it starts once per program.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import struct
import sys
import types

NOBODY = 65534
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
PR_SET_PDEATHSIG, PR_SET_KEEPCAPS, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 8, 22, 38
CAP_DAC_READ_SEARCH = 2
SIGKILL = 9

#: System calls that a computation does not need, as (x86_64, aarch64) numbers: 0 where there is none.
FORBIDDEN = {
    "fork": (57, 0), "vfork": (58, 0), "clone": (56, 220), "clone3": (435, 435),
    "execve": (59, 221), "execveat": (322, 281),
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "pidfd_send_signal": (424, 424),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "pidfd_getfd": (438, 438),
    "socket": (41, 198), "io_uring_setup": (425, 425),
    "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
    "mount": (165, 40), "umount2": (166, 39), "unshare": (272, 97), "setns": (308, 268), "chroot": (161, 51),
    "open_by_handle_at": (304, 265), "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "prctl": (157, 167),  # would undo that the program ends with the process that waits for it
    # limits and shares of the processor, also those of other processes
    "prlimit64": (302, 261), "setpriority": (141, 140), "ioprio_set": (251, 30), "sched_setaffinity": (203, 122),
    "sched_setparam": (142, 118), "sched_setscheduler": (144, 119), "sched_setattr": (314, 274),
    # what Landlock lets pass: attributes of any file that the user owns, and in its first versions its length
    "chmod": (90, 0), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, 0), "fchown": (93, 55), "lchown": (94, 0), "fchownat": (260, 54),
    "utime": (132, 0), "utimes": (235, 0), "futimesat": (261, 0), "utimensat": (280, 88), "truncate": (76, 45),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "setxattrat": (463, 463),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16), "removexattrat": (466, 466),
    "file_setattr": (469, 469),
    # anything but plain files: what is left behind is removed easily
    "mkdir": (83, 0), "mkdirat": (258, 34), "mknod": (133, 0), "mknodat": (259, 33),
    "link": (86, 0), "linkat": (265, 37), "symlink": (88, 0), "symlinkat": (266, 36),
}  # fmt: skip

#: Calls forbidden with one value of their second argument: signals of a descriptor go to another process.
FORBIDDEN_REQUESTS = [((72, 25), 8), ((72, 25), 15)]  # fcntl: F_SETOWN, F_SETOWN_EX

#: ioctl is as many calls as devices and file systems invent: attributes of files, snapshots, encryption, ... Allowed
#: are those that Python's own files need, by the value of the second argument.
IOCTL = (16, 29)
ALLOWED_IOCTLS = [
    0x5401, 0x802C542A,  # TCGETS, TCGETS2: is it a terminal?
    0x5413,  # TIOCGWINSZ: how wide?
    0x541B, 0x5421, 0x5450, 0x5451,  # FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
]  # fmt: skip

#: Where Landlock is missing: calls that remove or replace files, and the place of the flags of those that open them,
#: which may then only read.
REPLACING = {
    "unlink": (87, 0), "unlinkat": (263, 35), "rmdir": (84, 0), "creat": (85, 0), "openat2": (437, 437),
    "rename": (82, 0), "renameat": (264, 38), "renameat2": (316, 276),
}  # fmt: skip
OPENING = [((2, 0), 24), ((257, 56), 32)]  # open, openat
FOR_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

#: Functions taken away where the system itself offers no protection, as HumanEval's own scorer does.
GUARDED = {
    "os": "kill killpg fork forkpty posix_spawn posix_spawnp system popen execv execve remove unlink rmdir removedirs "
    "rename renames replace truncate ftruncate chmod fchmod chown lchown fchown fchdir link symlink mkdir makedirs "
    "mkfifo mknod utime setpriority putenv",
    "fcntl": "ioctl",
    "shutil": "rmtree move chown copytree",
    "subprocess": "Popen run call check_call check_output",
}

libc = ctypes.CDLL(None, use_errno=True)


def limit_resources(cpu: int, memory: int) -> None:
    """CPU seconds, address space in bytes; 1 MiB files, 32 open files, no further process, no core dump."""
    limits = {
        resource.RLIMIT_CPU: (cpu, cpu + 1),
        resource.RLIMIT_AS: (memory, memory),
        resource.RLIMIT_FSIZE: (1 << 20, 1 << 20),
        resource.RLIMIT_NOFILE: (32, 32),
        resource.RLIMIT_NPROC: (1, 1),
        resource.RLIMIT_CORE: (0, 0),
    }
    for name, (soft, hard) in limits.items():
        highest = resource.getrlimit(name)[1]
        if highest != resource.RLIM_INFINITY:
            soft, hard = min(soft, highest), min(hard, highest)
        if sys.platform == "darwin" and name == resource.RLIMIT_AS:
            continue  # macOS refuses this one
        resource.setrlimit(name, (soft, hard))


def leave_network(root: bool) -> bool:
    """Move into a network namespace without interfaces."""
    return libc.unshare(CLONE_NEWNET if root else CLONE_NEWUSER | CLONE_NEWNET) == 0


def become_nobody() -> bool:
    """Give up root. Where Python lies in a folder that only root may enter, the right to read files is kept."""
    keep_reading = not _world_readable(os.__file__)
    libc.prctl(PR_SET_KEEPCAPS, int(keep_reading), 0, 0, 0)
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    return keep_capabilities(1 << CAP_DAC_READ_SEARCH if keep_reading else 0)


def stop_reading() -> None:
    """Give up the right to read files too: without Landlock it would be one to read all of them.

    Raises PermissionError where no library of Python's could be imported any more.
    """
    readable = _world_readable(os.__file__)
    keep_capabilities(0)
    if not readable:
        raise PermissionError(
            f"{os.path.dirname(os.__file__)} can be entered by root alone, and this system has no Landlock to keep a "
            "program to it; install Python where every user may read it, or run as another user than root"
        )


def _world_readable(path: str) -> bool:
    parts = [path]
    while parts[-1] != os.path.dirname(parts[-1]):
        parts.append(os.path.dirname(parts[-1]))
    return all(os.stat(part).st_mode & 0o5 for part in parts)


def keep_capabilities(mask: int) -> bool:
    """Drop every capability but those in `mask`."""
    header = struct.pack("=Ii", 0x20080522, 0)
    return libc.capset(header, struct.pack("=6I", mask, mask, 0, 0, 0, 0)) == 0


def landlock() -> int:
    """The version of Landlock that the system has, 0 where it has none."""
    if sys.platform != "linux":
        return 0
    libc.syscall.restype = ctypes.c_long
    return max(0, int(libc.syscall(444, None, ctypes.c_size_t(0), 1)))


def restrict_files(folder: str) -> bool:
    """Landlock: read Python's own folders, write in `folder`, nothing else; no TCP, no signals to others."""
    abi = landlock()
    if abi < 1:
        return False
    files = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)) - 1
    attributes = struct.pack("=3Q", files, 0b11, 0b11)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    rules = libc.syscall(444, attributes, ctypes.c_size_t(len(attributes)), 0)
    if rules < 0:
        return False
    reading = (1 << 2 | 1 << 3) & files  # read a file, list a folder
    allowed = dict.fromkeys((sys.prefix, sys.base_prefix, "/usr", "/lib", "/lib64"), reading)
    allowed |= {"/etc/ld.so.cache": 1 << 2, "/dev/null": 1 << 1 | 1 << 2, "/dev/urandom": 1 << 2, folder: files & ~1}
    for path, access in allowed.items():
        if path in ("", "/") or not os.path.exists(path):
            continue
        if not os.path.isdir(path):
            access &= 1 << 1 | 1 << 2
        descriptor = os.open(path, os.O_PATH)
        added = libc.syscall(445, rules, 1, struct.pack("=Qi", access, descriptor), 0)
        os.close(descriptor)
        if added < 0:
            return False
    restricted = libc.syscall(446, rules, 0) == 0
    os.close(rules)
    return restricted


def filter_system_calls(read_only: bool) -> bool:
    """seccomp: what FORBIDDEN and FORBIDDEN_REQUESTS list fails with "not permitted", as do all ioctls but
    ALLOWED_IOCTLS; `read_only`: so does writing."""
    column, audit_arch = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}.get(os.uname().machine, (0, 0))
    if not audit_arch:
        return False
    forbidden = [*FORBIDDEN.values(), *(REPLACING.values() if read_only else ())]
    numbers = [pair[column] for pair in forbidden if pair[column]]
    load, equal, at_least, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, deny, kill = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000
    code = [(load, 0, 0, 4), (equal, 1, 0, audit_arch), (answer, 0, 0, kill), (load, 0, 0, 0)]
    code += [(at_least, 0, 1, 0x40000000), (answer, 0, 0, deny)]  # the x32 calls
    for number in numbers:
        code += [(equal, 0, 1, number), (answer, 0, 0, deny)]
    for pair, value in FORBIDDEN_REQUESTS:
        code += [(equal, 0, 4, pair[column]), (load, 0, 0, 24), (equal, 0, 1, value), (answer, 0, 0, deny)]
        code += [(load, 0, 0, 0)]
    n = len(ALLOWED_IOCTLS)
    code += [(equal, 0, n + 3, IOCTL[column]), (load, 0, 0, 24)]
    code += [(equal, n - i, 0, value) for i, value in enumerate(ALLOWED_IOCTLS)]
    code += [(answer, 0, 0, deny), (load, 0, 0, 0)]
    for pair, flags in OPENING if read_only else ():
        if pair[column]:
            code += [(equal, 0, 4, pair[column]), (load, 0, 0, flags), (any_bit, 0, 1, FOR_WRITING)]
            code += [(answer, 0, 0, deny), (load, 0, 0, 0)]
    code += [(answer, 0, 0, allow)]
    buffer = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in code))
    program = struct.pack("@HP", len(code), ctypes.addressof(buffer))
    return libc.prctl(PR_SET_SECCOMP, 2, ctypes.c_char_p(program), 0, 0) == 0


def guard() -> None:
    """Take dangerous functions out of Python's modules: no real barrier, but it stops accidents."""

    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError("not allowed here")

    for module_name, names in GUARDED.items():
        module = __import__(module_name)
        for name in names.split():
            if hasattr(module, name):
                setattr(module, name, forbidden)


def lock_in(cpu: int, memory: int) -> list[str]:
    """Everything above that works here; returns its names."""
    limit_resources(cpu, memory)
    layers = ["limits"]
    if sys.platform == "linux":
        root = os.geteuid() == 0
        layers += ["network"] * leave_network(root)
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        if root:
            layers += ["user"] * become_nobody()
        else:
            keep_capabilities(0)
        libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
        layers += ["files"] * restrict_files(os.getcwd())
        if root and "files" not in layers:
            stop_reading()
        layers += ["calls"] * filter_system_calls(read_only="files" not in layers)
    if not {"user", "files"} & set(layers) or not {"user", "calls"} & set(layers):
        guard()
        layers.append("guard")
    return layers


def main() -> None:
    """Read the order, lock in, run the program, report."""
    report, write, finish = int(sys.argv[1]), os.write, os._exit
    head, _, source = sys.stdin.buffer.read().decode("utf-8", "surrogatepass").partition("\n")
    cpu, memory, token = head.split()
    try:
        layers = lock_in(int(cpu), int(memory))
    except (OSError, ValueError) as error:
        write(report, f"failed {error}\n".encode())
        finish(1)
    write(report, f"ready {','.join(layers)}\n".encode())
    program = sys.modules["program"] = types.ModuleType("program")
    try:
        exec(compile(source, "<program>", "exec"), program.__dict__)
    except BaseException as error:
        write(report, f"raised {type(error).__name__[:80]}\n".encode())
        finish(0)
    write(report, f"passed {token}\n".encode())
    finish(0)


if __name__ == "__main__":
    main()
