"""dqx: post-training quantization experiments for diffusion language models.

    import dqx
    lm = dqx.load("nano_llada")

`dqx.api` holds the Python interface, `dqx.study.run` what the command line does with it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dqx.api import DiffusionLM, load, quantize
    from dqx.config.schema import choices
    from dqx.quant.stream import block_statistics
    from dqx.record.collection import runs

#: Where each name lies. It is imported when it is used: torch takes seconds, and `launch.py --help` does not need it.
_HOMES = {
    "DiffusionLM": "dqx.api",
    "block_statistics": "dqx.quant.stream",
    "choices": "dqx.config.schema",
    "load": "dqx.api",
    "quantize": "dqx.api",
    "runs": "dqx.record.collection",
}

__all__ = ["DiffusionLM", "block_statistics", "choices", "load", "quantize", "runs"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name == "__version__":
        return import_module("dqx.common.environment").package_version("dqx")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
