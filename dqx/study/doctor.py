"""What dqx finds on this machine, a line for each topic: what there is, what is missing, and what to do about it.

    dqx doctor        versions, devices, memory, bfloat16, determinism, sandbox, hub cache, W&B, Slurm

Every line is made of what a run puts into its environment.json. Exit code 0, or 1 where something is missing that every
run needs.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

MARGIN = 14  # columns of the topics
#: Layers of the sandbox -> what they are called, and what to do where they are missing.
LAYERS = {
    "limits": ("limits on time and memory", ""),
    "network": ("no network", "allow user namespaces (sysctl user.max_user_namespaces)"),
    "user": ("another user", ""),  # only where root has something to give up
    "files": ("no other files", "a kernel with Landlock (5.13 or later, landlock among its lsm=) keeps files apart"),
    "calls": ("few system calls", "seccomp filters need Linux on x86_64 or aarch64"),
    "guard": ("Python's own guard", ""),
}


@dataclass(frozen=True)
class Line:
    """One topic: what there is, and what to do, if anything; `needed` where no run works without."""

    topic: str
    there: str
    advice: str = ""
    needed: bool = False

    def __str__(self) -> str:
        mark = "!" if self.needed else "-" if self.advice else " "
        return f"{mark} {self.topic:<{MARGIN}}{self.there}{f'; {self.advice}' if self.advice else ''}"


def examined(facts: Mapping[str, Any], place: str) -> Iterator[Line]:
    """The lines of an environment record; `place` is the hub's cache, which the record does not name."""
    yield _versions(facts)
    yield _devices(facts)
    memory = facts["memory"]
    yield Line("memory", f"{_size(memory['ram'])} of RAM for runs (plan=true says what one needs)")
    yield _bf16(facts)
    yield _determinism(facts)
    yield _sandbox(facts["sandbox"])
    yield _hub(facts["hub"], place)
    wandb = facts["wandb"]
    advice = {
        ("offline", False): "`wandb login`, then `dqx mirror runs` uploads what there is",
        ("offline", True): "WANDB_MODE=offline keeps copies here",
        ("disabled", True): "WANDB_MODE=disabled makes no copies",
        ("disabled", False): "WANDB_MODE=disabled makes no copies",
        ("online", False): "WANDB_MODE=online needs `wandb login`",
    }
    state = f"{'a login' if wandb['login'] else 'no login'}, copies of runs are {wandb['mode']}"
    yield Line("W&B", state, advice.get((wandb["mode"], wandb["login"]), ""))
    yield _slurm(facts["slurm"])


def _versions(facts: Mapping[str, Any]) -> Line:
    packages = {name: version for name, version in facts["packages"].items() if version}
    there = f"Python {facts['python']}, {', '.join(f'{name} {version}' for name, version in packages.items())}"
    wrong = list(unmet())
    if wrong:
        return Line("versions", there, f"dqx needs {', '.join(wrong)}: pip install -e . in its folder", needed=True)
    return Line("versions", there)


def unmet() -> Iterator[str]:
    """What dqx asks for and this installation of Python does not have. Nothing where dqx itself is not installed."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    try:
        own = metadata.metadata("dqx")
    except metadata.PackageNotFoundError:
        return
    pythons = "".join(own.get_all("Requires-Python") or [])
    if not SpecifierSet(pythons).contains(platform.python_version(), prereleases=True):
        yield f"Python {pythons}"
    for text in metadata.requires("dqx") or []:
        required = Requirement(text)
        if required.marker is not None and not required.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(required.name)
        except metadata.PackageNotFoundError:
            yield str(required)
            continue
        if not required.specifier.contains(version, prereleases=True):
            yield f"{required} (here {version})"


def _devices(facts: Mapping[str, Any]) -> Line:
    names, cores = facts["accelerators"], f"{facts['cores']} cores"
    if not names:
        advice = "for a GPU install the torch of its maker (pytorch.org), and its driver"
        return Line("devices", f"the CPU ({facts['capability']}, {cores}), no GPU that torch sees", advice)
    counted = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    details = [facts["capability"], f"CUDA {facts['cuda']}" if facts["cuda"] else None, cores]
    size = facts["memory"]["device"]
    first = [f"{_size(size)} of memory"] if size else []
    return Line("devices", ", ".join([counted, *first, *(detail for detail in details if detail)]))


def _bf16(facts: Mapping[str, Any]) -> Line:
    device = facts["device"].upper() if facts["device"] == "cpu" else facts["device"]
    if facts["bf16"] == "emulated":
        advice = "model.dtype=float32 may be faster where memory allows"
        return Line("bfloat16", f"the {device} emulates it, slowly", advice)
    known = "computes in it itself" if facts["bf16"] == "native" else "does not say how it computes in it"
    return Line("bfloat16", f"the {device} {known}")


def _determinism(facts: Mapping[str, Any]) -> Line:
    settings = facts["determinism"]
    precision, threads = settings["float32_matmul_precision"], settings["threads"]
    said = [
        f"float32 products at precision {precision}",
        f"{threads} thread{'' if threads == 1 else 's'}",
        f"deterministic algorithms {'on' if settings['deterministic_algorithms'] else 'not asked for'}",
    ]
    advice = []
    if precision != "highest":
        advice.append("unset TORCH_ALLOW_TF32_CUBLAS_OVERRIDE: Hessians and rotations need all digits")
    if settings.get("cudnn_benchmark"):
        advice.append("torch.backends.cudnn.benchmark is on and may choose other kernels each time")
    if "cublas_workspace" in settings and settings["cublas_workspace"] is None:
        advice.append("export CUBLAS_WORKSPACE_CONFIG=:4096:8 lets cuBLAS repeat itself to the last bit")
    return Line("determinism", ", ".join(said), "; ".join(advice))


def _sandbox(facts: Mapping[str, Any]) -> Line:
    layers, version = facts["layers"], facts["landlock"]
    if not layers:
        return Line(
            "sandbox", "cannot be set up here", "tasks that run programs (humaneval, mbpp) will fail, and say why"
        )
    by = {"files": f" (Landlock {version})", "calls": " (seccomp)"}
    there = ", ".join(f"{LAYERS[layer][0]}{by.get(layer, '')}" for layer in layers)
    advice = [remedy for layer, (_, remedy) in LAYERS.items() if remedy and layer not in layers]
    return Line("sandbox", f"programs have {there}", "; ".join(advice))


def _hub(facts: Mapping[str, Any], place: str) -> Line:
    there = f"{place}, {_size(facts['free'])} free"
    if facts["offline"]:
        return Line("hub cache", f"{there}, offline (HF_HUB_OFFLINE)", "what is not there has to be copied there")
    if not facts["writable"]:
        return Line("hub cache", f"{there}, read-only", "set HF_HOME to a folder that can be written")
    if facts["free"] < 20e9:
        return Line("hub cache", there, "LLaDA-8B takes 16 GB: set HF_HOME to a disk with room")
    return Line("hub cache", there)


def _slurm(facts: Mapping[str, Any]) -> Line:
    if facts["job"]:
        return Line("Slurm", "inside a job")
    if not facts["sbatch"]:
        return Line("Slurm", "no sbatch here")
    if not facts["submitit"]:
        return Line("Slurm", "sbatch", "pip install -e '.[slurm]' for hydra/launcher=slurm")
    return Line("Slurm", "sbatch and submitit: hydra/launcher=slurm")


def _size(number: float) -> str:
    from dqx.common.memory import gigabytes

    return gigabytes(number)


def shortened(path: Path) -> str:
    """A path, with ~ for the home folder."""
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the lines. Returns the exit code."""
    argparse.ArgumentParser(
        prog="dqx doctor",
        description="What dqx finds on this machine, what is missing (marked - or, where no run works without, !), "
        "and what to do.",
    ).parse_args(argv)
    from dqx.common.devices import pick_device
    from dqx.common.environment import environment
    from dqx.study.surroundings import hub_cache, surroundings

    facts = environment(pick_device("auto")) | surroundings()
    lines = list(examined(facts, shortened(hub_cache())))
    print("\n".join(map(str, lines)))
    return 1 if any(line.needed for line in lines) else 0
