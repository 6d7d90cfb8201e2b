"""Where a run was computed: versions, platform, device, memory, commit.

What a run finds around it besides, such as a login, is in `dqx/study/surroundings.py`.
"""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from typing import TYPE_CHECKING, Any

from dqx.common.files import PACKAGE
from dqx.common.processes import processes

if TYPE_CHECKING:
    import torch

PACKAGES = ("dqx", "torch", "transformers", "lm_eval", "datasets", "hydra-core", "accelerate", "safetensors", "wandb")


def environment(device: torch.device | str) -> dict[str, Any]:
    """Versions, platform and device. No host, user or folder names."""
    import torch  # a second: versions are also asked for where nothing is computed

    from dqx.common import accelerator
    from dqx.common.memory import machine_bytes

    device = torch.device(device)
    return {
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "commit": commit(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "device": accelerator.name(device),
        "capability": accelerator.capability(device),
        "cuda": accelerator.cuda_version(device),
        "accelerators": accelerator.names(),
        "memory": {
            "ram": machine_bytes(),
            "device": None if device.type == "cpu" else accelerator.total_memory(device),
        },
        "bf16": accelerator.bf16(device),
        "determinism": accelerator.settings(device),
        "processes": processes().count,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }


def package_version(package: str) -> str | None:
    """The version of an installed distribution, None where it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The git commit of dqx's own sources, `-changed` appended where files differ; None outside a clone."""
    root = PACKAGE.parent
    if not (root / ".git").exists():
        return None
    try:
        head, state = (
            subprocess.run(
                ["git", "-C", str(root), *args], capture_output=True, text=True, timeout=5, check=True
            ).stdout
            for args in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.strip() + ("-changed" if state.strip() else "")
