"""Whether W&B can be reached from here, as far as this machine alone can tell."""

from __future__ import annotations

import netrc
import os
from contextlib import suppress
from pathlib import Path
from typing import Literal, get_args
from urllib.parse import urlsplit

Mode = Literal["online", "offline", "disabled"]
MODES = ("auto", *get_args(Mode))


def pick_mode(wanted: str) -> Mode:
    """`auto` is W&B's own WANDB_MODE where set, else online where a login exists, else offline.

    Raises ValueError for an unknown mode.
    """
    if wanted not in MODES:
        raise ValueError(f"wandb.mode={wanted} is unknown; it is one of {', '.join(MODES)}")
    chosen = os.environ.get("WANDB_MODE", "") if wanted == "auto" else wanted
    for mode in get_args(Mode):
        if mode == chosen:
            return mode
    return "online" if has_login() else "offline"


def has_login() -> bool:
    """Whether W&B would find an API key: in the environment, or in netrc for its server. The key is not read out."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    chosen = os.environ.get("NETRC")
    known: set[str] = set()
    for path in [Path(chosen)] if chosen else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        with suppress(OSError, netrc.NetrcParseError):
            known |= set(netrc.netrc(path).hosts)
    return bool(known) and any(urlsplit(url).netloc in known for url in servers())  # which imports wandb


def servers() -> list[str]:
    """Addresses under which W&B would look for a login: the one that is set, else its own (wandb 0.31 changed it)."""
    chosen = os.environ.get("WANDB_BASE_URL")
    if chosen:
        return [chosen]
    import wandb

    return [wandb.Settings().base_url, "https://api.wandb.ai"]
