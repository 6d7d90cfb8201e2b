"""Where activation outliers sit: statistics of every linear's input, streamed in one pass, nothing stored.

    measure.py    runs a model over text and its denoising states, or a block over hidden states, and shows the meters
                  what the linears read; surfaces, |x| over tokens and channels of one window
    meter.py      the running statistics of a site: fixed in size, however many tokens pass
    sketch.py     quantiles from a logarithmic histogram; moments.py: mean and central moments, merged
    stats.py      what is recorded
    findings.py   what it says, in plain sentences

Per block and site (`attn_in attn_out mlp_in mlp_out`), where the activation quantizer of the site's linears reads:
behind scalings and rotations, so that full precision and a quantized model differ by what a method's transforms do.

`dqx/diagnostics/README.md` says what an outlier is, and how exact the figures are.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dqx.diagnostics.activations.findings import findings, summary
from dqx.diagnostics.activations.stats import ChannelRow, OutlierStats, PartStats, SiteStats, Thresholds, TokenRow

if TYPE_CHECKING:
    from dqx.diagnostics.activations.measure import default_blocks, measure_activations, measure_block

__all__ = [
    "ChannelRow",
    "OutlierStats",
    "PartStats",
    "SiteStats",
    "Thresholds",
    "TokenRow",
    "default_blocks",
    "findings",
    "measure_activations",
    "measure_block",
    "summary",
]


def __getattr__(name: str) -> Any:
    """Load what measures on first use: a record of activations is read without torch."""
    if name in __all__:
        return getattr(import_module(f"{__name__}.measure"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
