"""dqx: post-training quantization experiments for diffusion language models.

    import dqx
    lm = dqx.load("nano_llada")

`dqx.api` holds the Python interface, `dqx.run` what the command line does with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dqx.api import DiffusionLM, load

__all__ = ["DiffusionLM", "load"]


def __getattr__(name: str) -> Any:
    """Load the API on first use: importing torch takes seconds, and `launch.py --help` does not need it."""
    if name in __all__:
        from dqx import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
