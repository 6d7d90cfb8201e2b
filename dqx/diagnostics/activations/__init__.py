"""Where activation outliers sit: statistics of every linear's input, streamed in one pass, nothing stored.

    measure.py    runs a model over text and its denoising states, or a block over hidden states, and shows the meters
                  what the linears read; surfaces, |x| over tokens and channels of one window
    meter.py      the running statistics of a site: fixed in size, however many tokens pass
    sketch.py     quantiles from a logarithmic histogram; moments.py: mean and central moments, merged
    stats.py      what is recorded
    findings.py   what it says, in plain sentences

Per block and site (`attn_in attn_out mlp_in mlp_out`), where the activation quantizer of the site's linears reads:
behind scalings and rotations, so that full precision and a quantized model differ by what a method's transforms do.

Memory is a constant per site, about 0.5 MB plus a few numbers per channel and one per entry of the vocabulary; for
parts 65 kB and one number per channel, six times (three token classes, of one step and of all), however many steps.
For LLaDA-8B that is 170 MB while text is read, then 90 MB:

- extremes and moments are exact (float64);
- percentiles of a site are within 0.4 % of the order statistic they stand for, of its parts within 1.6 %
  (`relative_error`, `parts_relative_error`);
- counts above a threshold come from the same histogram, and tokens from one of each token's maximum. A threshold is
  moved down to the nearest bin edge (by less than 1/128 of it); counts are exact for the edge, which the record states.

A *normal* outlier is a channel that is large for most tokens: |x| > `channel_ratio` times the token's own median
over channels, for at least `channel_share` of the tokens. A *massive* outlier is a single value with
|x| >= `massive_absolute` and >= `massive_relative` times the median over all values; the count by the relative
condition alone is reported beside it, since small models are small in absolute terms.

*Parts* look at denoising states (`dqx/diffusion/rollout.py`): each class of tokens (given, committed by now, still
masked) over all steps, and all tokens step by step, with the thresholds of the site's row over calibration windows.
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
