"""What is shown of activations on denoising states: their largest value, and the share of tokens with massive ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.colors import LogNorm, Normalize

from dqx.diagnostics.activations import PartStats

NONE = 1e-9  # a share below is none


@dataclass(frozen=True)
class Measure:
    """One number of a part, and how it is drawn."""

    name: str  # of the figures made of it
    title: str
    label: str  # with its unit
    of: Callable[[PartStats], float]
    log: bool

    def norm(self, values: Sequence[float]) -> Normalize:
        """Colours from the smallest to the largest of the values; shares begin above 0, so that none is below them."""
        if self.log:
            drawn = [x for x in values if 0 < x < float("inf")] or [1.0]
            return LogNorm(min(drawn), max(max(drawn), 1.01 * min(drawn)))
        return Normalize(NONE, max(values, default=0.0) or 1.0)


def massive_share(part: PartStats) -> float:
    """Tokens with a massive value, in percent."""
    return 100 * part.massive_tokens / part.tokens if part.tokens else 0.0


MEASURES = (
    Measure("outliers", "Largest |x|", "largest |x|", lambda part: part.abs_max, log=True),
    Measure("massive", "Tokens with a massive value", "tokens, %", massive_share, log=False),
)
