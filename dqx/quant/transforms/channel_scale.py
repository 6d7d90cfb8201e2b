"""Divide a site's input by a factor per channel and multiply the weights that read it by the same factor.

The division goes where it costs nothing: into the gain (and bias) of the norm before attn_in and mlp_in, into the rows
(and bias) of v before attn_out, of up before mlp_out. It happens at run time instead, as a module in `block.inputs`,
if a transform sits in between already (an online rotation), or if asked for.

I = inputs, K key/value heads, H heads, E head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dqx.formats.integers import wide
from dqx.models.transformer import Architecture, Block, RMSNorm, compose
from dqx.quant.registry import storable

SCALED = ("attn_in", "attn_out", "mlp_in", "mlp_out")  # the sites that have a norm or linear to divide


@storable
class Divide(nn.Module):
    """x [..., I] divided by a factor per channel."""

    channel_scale: Tensor

    def __init__(self, channel_scale: Tensor):
        super().__init__()
        self.register_buffer("channel_scale", channel_scale.clone())

    def forward(self, x: Tensor) -> Tensor:
        return x / self.channel_scale.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{len(self.channel_scale)} channels"


@torch.no_grad()
def scale_site(block: Block, site: str, channel_scale: Tensor, *, run_time: bool = False) -> None:
    """Divide the input of `site` by `channel_scale` [I] (positive) and multiply the columns of its weights by it.

    Raises ValueError at attn_out if the division is to go into v, but query heads that share a value head have
    different factors.
    """
    if run_time or not isinstance(block.inputs[site], nn.Identity):
        compose(block.inputs, site, Divide(channel_scale))
    elif site in ("attn_in", "mlp_in"):
        _divide_outputs(block.attn_norm if site == "attn_in" else block.mlp_norm, channel_scale)
    elif site == "mlp_out":
        _divide_outputs(block.up, channel_scale)
    else:
        heads = by_value_head(channel_scale, block.arch)
        if not torch.equal(heads, heads[:, :1].expand_as(heads)):
            raise ValueError(
                "query heads that share a value head have different channel scales at attn_out, which v cannot take "
                "over; share them or divide at run time"
            )
        _divide_outputs(block.v, heads[:, 0].reshape(-1))
    for role in block.arch.sites[site]:
        linear: nn.Linear = getattr(block, role)
        linear.weight = _parameter(wide(linear.weight) * channel_scale, linear.weight)


def by_value_head(channels: Tensor, arch: Architecture) -> Tensor:
    """Channels of attn_out [H * E] as [K, H / K, E]: query heads that read the same value head side by side."""
    return channels.view(arch.n_kv_heads, -1, arch.head_size)


def _divide_outputs(module: nn.Linear | RMSNorm, channel_scale: Tensor) -> None:
    weight, bias = module.weight, module.bias
    factor = channel_scale[:, None] if weight.dim() == 2 else channel_scale
    module.weight = _parameter(wide(weight) / factor, weight)
    if bias is not None:
        module.bias = _parameter(wide(bias) / channel_scale, bias)


def _parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    """A new parameter: others may hold the old one."""
    return nn.Parameter(value.to(like.dtype), requires_grad=False)
