"""dqx: post-training quantization experiments for diffusion language models.

    import dqx
    lm = dqx.load("nano_llada")

`dqx.api` holds the Python interface, `dqx.study.run` what the command line does with it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dqx.api import DiffusionLM, load

__all__ = ["DiffusionLM", "load"]


def __getattr__(name: str) -> Any:
    """Load the API on first use: importing torch takes seconds, and `launch.py --help` does not need it."""
    if name in __all__:
        return getattr(import_module("dqx.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
