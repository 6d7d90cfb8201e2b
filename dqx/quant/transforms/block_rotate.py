"""DuQuant's transform: rotate tiles of channels, deal the channels to other tiles, rotate again.

Lin et al. 2024, arXiv:2406.01721, section 3. The first rotation spreads each outlier over the channels of its tile,
the zigzag permutation (equation 5) gives all tiles an equal share of large channels, and the second rotation evens
out what the permutation brought together. All tiles share one rotation, found greedily: see `greedy_rotation.py`.
The linears that read the same input share the transform, as in the authors' code, where k and v copy q's.

Where the authors' code differs from the paper, both are options. Its greedy step takes the row of the largest entry
modulo the tile's width where the paper means its channel (`index`), and looks at one sequence only, the mean of all
calibration sequences position by position (`stream`). The default `index: channel` is the paper's: neither leaves a
smaller range or error (see dqx/quant/RESULTS.md), and a channel does not depend on how many tiles a token has.
`stream: mean` is the code's; the paper does not say.

N tokens, C channels, B tile width, R rotations, O = outputs, I = inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dqx.formats.integers import wide
from dqx.quant.protocols import Context, choice_problems
from dqx.quant.registry import storable
from dqx.quant.transforms.greedy_rotation import INDICES, base_rotation, greedy_rotation
from dqx.quant.transforms.tiles import group_problems, tile_of

STREAMS = ("mean", "quantized", "fp")


@dataclass(frozen=True)
class BlockRotate:
    """One orthogonal map per site: block rotation, then permutation and block rotation `permutations` times."""

    tile: int | str = 128  # neighbouring channels that are rotated together; must divide the inputs of every linear.
    # group: those that share a scale, see `tiles.py`
    steps: int = 256  # of the greedy search; the best prefix of them is kept
    permutations: int = 1  # each is followed by a rotation of its own
    index: str = "channel"  # the greedy step looks at an outlier's channel; row: at its tile's position (as published)
    stream: str = "mean"  # one averaged calibration sequence; quantized or fp: at least 512 tokens of all of them
    scope: ClassVar[str] = "site"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"inputs"} if self.stream == "mean" else {"tokens"})

    def fit(self, w_OI: Tensor, stats: Mapping[str, Any], context: Context, site: str) -> BlockRotation:
        x_NC = torch.cat([x.flatten(0, 1) for x in stats["inputs"]]) if self.stream == "mean" else stats["tokens"]
        tile = tile_of(self.tile, context, context.arch.sites[site]) or x_NC.shape[1]
        bases = [base_rotation(tile, context.generator(site, i)) for i in range(self.permutations + 1)]
        rotation = find_rotation(x_NC, bases, self.steps, self.index)
        return rotation.to(device=w_OI.device, dtype=wide(w_OI[:0]).dtype)

    def problems(self, where: str, context: Context) -> list[str]:
        problems = choice_problems(f"{where}.index", self.index, INDICES)
        problems += choice_problems(f"{where}.stream", self.stream, STREAMS)
        if isinstance(self.tile, str):
            told = [group_problems(f"{where}.tile", self.tile, context, roles) for roles in context.arch.sites.values()]
            problems += dict.fromkeys(problem for site in told for problem in site)
        elif self.tile < 2:
            problems.append(f"{where}.tile={self.tile} leaves nothing to rotate; 128 is usual")
        else:
            problems += tile_problems(f"{where}.tile", self.tile, context)
        for name, value, usual in (("steps", self.steps, 256), ("permutations", self.permutations, 1)):
            if value < 0:
                problems.append(f"{where}.{name}={value} must not be negative; {usual} is usual")
        return problems


def tile_problems(key: str, tile: int, context: Context) -> list[str]:
    """The widths of a model that `tile` does not divide, with tiles that divide all of them."""
    roles: dict[int, list[str]] = {}
    for role in context.arch.roles:
        roles.setdefault(context.arch.in_features(role), []).append(role)
    offenders = {width: readers for width, readers in roles.items() if width % tile}
    common = gcd(*roles)
    remedies = [str(2**n) for n in range(9, 2, -1) if common % 2**n == 0][:3] or [str(common)]
    return [
        f"{key}={tile} does not divide {width}, the inputs of {', '.join(readers)}; write {' or '.join(remedies)}"
        for width, readers in offenders.items()
    ]


@storable
class BlockRotation(nn.Module):
    """Rotation 0 of every tile, then for i = 1, 2, ...: permutation i - 1 of the channels and rotation i.

    Orthogonal; maps [..., C] to [..., C], in the dtype of x but computed in that of the rotations. Rows of a weight
    [O, C] are mapped like inputs, so that products stay the same.
    """

    rotations: Tensor  # [R, B, B]; tiles are multiplied from the right
    permutations: Tensor  # [R - 1, C]: the channel that each channel is taken from

    def __init__(self, rotations_RBB: Tensor, permutations_RC: Tensor):
        super().__init__()
        self.register_buffer("rotations", rotations_RBB)
        self.register_buffer("permutations", permutations_RC)

    def forward(self, x: Tensor) -> Tensor:
        values = _rotate_tiles(x.to(self.rotations.dtype), self.rotations[0])
        for permutation, rotation in zip(self.permutations, self.rotations[1:], strict=True):
            values = _rotate_tiles(permuted(values, permutation), rotation)
        return values.to(x.dtype)

    @property
    def options(self) -> dict[str, Any]:
        return {"rotations_RBB": self.rotations, "permutations_RC": self.permutations}

    def extra_repr(self) -> str:
        count, tile, _ = self.rotations.shape
        return f"{count} rotations of tiles of {tile}"


@torch.no_grad()
def find_rotation(x_NC: Tensor, bases: Sequence[Tensor], steps: int, index: str = "channel") -> BlockRotation:
    """The transform of inputs `x_NC`, one greedy search per base matrix [B, B]; see `greedy_rotation` for the rest.

    Each search, and each permutation before it, works on what the steps before have made of X. Rotations have the
    dtype of the base matrices.
    """
    x_NC = x_NC.float()
    rotations: list[Tensor] = []
    permutations: list[Tensor] = []
    for base in bases:
        base = base.to(x_NC.device)
        if rotations:
            permutations.append(zigzag_permutation(x_NC.abs().amax(0), len(base)))
            x_NC = permuted(x_NC, permutations[-1])
        rotations.append(greedy_rotation(x_NC, base, steps, index).rotation_BB)
        x_NC = _rotate_tiles(x_NC, rotations[-1].float())
    no_permutations = torch.empty(0, x_NC.shape[1], dtype=torch.long, device=x_NC.device)
    return BlockRotation(torch.stack(rotations), torch.stack(permutations) if permutations else no_permutations)


def zigzag_permutation(absmax_C: Tensor, tile: int) -> Tensor:
    """The new order of channels [C]: by descending maximum, dealt to tiles 0, 1, ..., K-1, K-1, ..., 1, 0, 0, 1, ..."""
    there = torch.arange(len(absmax_C) // tile, device=absmax_C.device)
    rounds = torch.cat((there, there.flip(0))).repeat((tile + 1) // 2)[: len(absmax_C)]
    by_size = torch.argsort(absmax_C, descending=True, stable=True)
    return by_size[torch.argsort(rounds, stable=True)]


def permuted(x: Tensor, order_C: Tensor) -> Tensor:
    """`x[..., order_C]` of x [..., C]; `index_select` is six times as fast, but only of a matrix."""
    return x.reshape(-1, x.shape[-1]).index_select(-1, order_C).view(x.shape)


def _rotate_tiles(x: Tensor, rotation_BB: Tensor) -> Tensor:
    return (x.unflatten(-1, (-1, len(rotation_BB))) @ rotation_BB).flatten(-2)
