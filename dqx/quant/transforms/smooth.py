"""SmoothQuant: outlier channels of an input are divided down, the weights that read them multiplied up.

Xiao et al. 2023, arXiv:2211.10438, equation 4: `s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)` per input channel j. A
larger alpha moves more of the difficulty from activations to weights. All scales come from the original weights.

`max|W_j|` runs over all linears that share the input, as the authors have it. The code of the study of diffusion models
takes q alone and up alone (`one_linear`), raises scales below 0.01 to it (`floor`), and where heads are grouped divides
the input of o at run time, because a factor per query head does not fit into the shared v (`grouped_heads: run_time`).
With `grouped_heads: shared` the heads that read one value head get one factor, from the largest of their inputs and
weights, which costs nothing at run time.

O = outputs, I = inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dqx.formats.integers import wide
from dqx.models.transformer import Architecture, Block
from dqx.quant.protocols import Context, choice_problems
from dqx.quant.transforms.channel_scale import SCALED, by_value_head, scale_site

SMALLEST = 1e-5  # maxima below are raised to it, so that dead channels give no infinity
ONE_LINEAR = {"attn_in": "q", "attn_out": "o", "mlp_in": "up", "mlp_out": "down"}
GROUPED_HEADS = ("shared", "run_time")


@dataclass(frozen=True)
class Smooth:
    """SmoothQuant's channel scales, folded into what comes before each site."""

    alpha: float = 0.5  # 1: inputs become level; 0: weights do
    floor: float = 0.01  # smaller scales are raised to it
    sites: list[str] | None = None  # of SCALED; None: all
    one_linear: bool = False  # max|W| of q alone and up alone
    grouped_heads: str = "shared"  # attn_out where heads share a value head: one scale for them, or run_time division
    stream: str = "fp"
    scope: ClassVar[str] = "block"
    candidates: ClassVar[int] = 0  # a formula, no search

    @property
    def needs(self) -> Mapping[str, frozenset[str]]:
        return {site: frozenset({"absmax"}) for site in scaled_sites(self.sites)}

    @torch.no_grad()
    def apply(self, block: Block, stats: Mapping[str, Mapping[str, Any]], context: Context) -> None:
        scales = {site: self.channel_scale(block, site, stats[site]["absmax"]) for site in self.needs}
        for site, scale in scales.items():
            scale_site(block, site, scale, run_time=self._at_run_time(site, block.arch))

    def channel_scale(self, block: Block, site: str, absmax_I: Tensor) -> Tensor:
        """The factor of every input channel [I] of a site."""
        roles = (ONE_LINEAR[site],) if self.one_linear else block.arch.sites[site]
        w_max = column_absmax([getattr(block, role).weight for role in roles])
        x_max = absmax_I.to(w_max.dtype)
        identity = isinstance(block.inputs[site], nn.Identity)
        if site == "attn_out" and identity and not self._at_run_time(site, block.arch):
            x_max, w_max = _over_shared_heads(x_max, block.arch), _over_shared_heads(w_max, block.arch)
        return smooth_scale(x_max, w_max, self.alpha, self.floor)

    def problems(self, where: str, context: Context) -> list[str]:
        problems = site_problems(self.sites, where)
        problems += choice_problems(f"{where}.grouped_heads", self.grouped_heads, GROUPED_HEADS)
        if not 0 <= self.alpha <= 1:
            problems.append(f"{where}.alpha={self.alpha} must lie in 0 ... 1; 0.5 is usual")
        if self.floor <= 0:
            problems.append(
                f"{where}.floor={self.floor} must be positive, since inputs are divided by it; 0.01 is usual"
            )
        return problems

    def _at_run_time(self, site: str, arch: Architecture) -> bool:
        return site == "attn_out" and arch.n_kv_heads < arch.n_heads and self.grouped_heads == "run_time"


def smooth_scale(x_absmax_I: Tensor, w_absmax_I: Tensor, alpha: float, floor: float) -> Tensor:
    """Equation 4 for the largest |x| and |w| of every input channel [I]."""
    x_max, w_max = x_absmax_I.clamp(min=SMALLEST), w_absmax_I.clamp(min=SMALLEST)
    return (x_max.pow(alpha) / w_max.pow(1 - alpha)).clamp(min=floor)


def column_absmax(weights: Sequence[Tensor]) -> Tensor:
    """The largest |w| of every column [I] over weights [O, I] that read the same input."""
    return wide(torch.stack([weight.abs().amax(0) for weight in weights]).amax(0))


def scaled_sites(sites: Sequence[str] | None) -> Sequence[str]:
    """The sites that are asked for: all where None are named."""
    return SCALED if sites is None else sites


def site_problems(sites: Sequence[str] | None, where: str) -> list[str]:
    """What is wrong with a list of sites."""
    if sites is not None and not sites:
        return [f"{where}.sites is empty, so nothing would be scaled; leave the transform out instead"]
    strange = [site for site in scaled_sites(sites) if site not in SCALED]
    return [f"{where}.sites has {', '.join(map(str, strange))}; the sites are {', '.join(SCALED)}"] if strange else []


def _over_shared_heads(channels: Tensor, arch: Architecture) -> Tensor:
    """The largest value over the query heads that read the same value head, for each of them [I]."""
    heads = by_value_head(channels, arch)
    return heads.amax(1, keepdim=True).expand_as(heads).reshape(-1)
