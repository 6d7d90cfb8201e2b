"""What a run finds around it, for its record, without places and names: sandbox, hub cache, W&B, Slurm."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from dqx.evaluate.scorers.sandbox import isolation
from dqx.evaluate.scorers.sandbox_child import landlock
from dqx.report.wandb.login import has_login, pick_mode


def surroundings() -> dict[str, Any]:
    """What `environment` (dqx/common/environment.py) cannot say, as JSON."""
    try:
        layers = list(isolation())
    except (OSError, RuntimeError):
        layers = []
    place = hub_cache()
    standing = next(folder for folder in (place, *place.parents) if folder.exists())
    return {
        "sandbox": {"layers": layers, "landlock": landlock()},
        "hub": {
            "offline": bool(constants.HF_HUB_OFFLINE),
            "writable": os.access(standing, os.W_OK),
            "free": shutil.disk_usage(standing).free,
        },
        "wandb": {"login": has_login(), "mode": pick_mode("auto")},
        "slurm": {
            "job": "SLURM_JOB_ID" in os.environ,
            "sbatch": shutil.which("sbatch") is not None,
            "submitit": find_spec("submitit") is not None,
        },
    }


def hub_cache() -> Path:
    """Where the hub's client keeps what it has fetched."""
    return Path(constants.HF_HUB_CACHE).expanduser().absolute()
