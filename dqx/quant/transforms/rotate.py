"""Rotate the residual stream so that no channel of it stands out; the function computed stays the same.

Ashkboos et al. 2024 (QuaRot), arXiv:2404.00456, section 4, stage 1a: an orthogonal Q multiplies everything that is
added to the residual stream and is undone by everything that reads it. An RMS norm without gain commutes with Q, so
the norms' gains move into the linears behind them first. All products are float64, one weight at a time, chunk by
chunk; the results have the dtype of the weight.

The authors' code subtracts from every row of the embedding its mean, which is right for the LayerNorms of other
models and changes the function of RMS norms: offered as `subtract_embedding_mean`.

D hidden, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from dqx.models.transformer import Block, MaskedDiffusionTransformer, RMSNorm
from dqx.quant.protocols import Context, ModelChange, Part, choice_problems
from dqx.quant.transforms.hadamard import tile_problems, transform
from dqx.quant.transforms.tiles import group_problems, tile_of

#: x [..., D] -> x Q for an orthogonal Q, in the dtype of x
Rotation = Callable[[Tensor], Tensor]

KINDS = ("random_hadamard", "hadamard", "orthogonal")
CHUNK_VALUES = 2**18  # values of a weight in float64 at a time: 2 MiB, which stays in the cache


@dataclass(frozen=True)
class FoldNorms(Part):
    """Move the gain of every norm into the linears that read it: q, k, v; gate, up; the output head."""

    subtract_embedding_mean: bool = False  # as published; NOT function-preserving, see above
    scope: ClassVar[str] = "model"

    def prepare(self, context: Context, device: torch.device) -> ModelChange:
        def outer(model: MaskedDiffusionTransformer) -> None:
            fold_final_norm(model)
            if self.subtract_embedding_mean:
                subtract_embedding_mean(model)

        return ModelChange(outer, fold_block)


@dataclass(frozen=True)
class ResidualRotation:
    """Multiply the residual stream by one random orthogonal matrix, the same before every block."""

    kind: str = "random_hadamard"  # Hadamard with random signs; hadamard: without; orthogonal: uniformly random
    tile: int | str | None = (
        None  # rotate every `tile` neighbouring channels by themselves; None: all channels together;
    )
    # group: those that share a scale, see `tiles.py`
    equal_tiles: bool = False  # what is random is drawn once and the same in every tile
    scope: ClassVar[str] = "model"

    def prepare(self, context: Context, device: torch.device) -> ModelChange:
        width, tile = context.arch.hidden_size, tile_of(self.tile, context, _readers(context))
        rotation = make_rotation(self.kind, width, tile, context.generator(), device, equal_tiles=self.equal_tiles)
        return residual_rotation(rotation)

    def problems(self, where: str, context: Context) -> list[str]:
        problems = choice_problems(f"{where}.kind", self.kind, KINDS)
        width = context.arch.hidden_size
        ungrouped = group_problems(f"{where}.tile", self.tile, context, _readers(context))
        problems += ungrouped
        tile = None if ungrouped else tile_of(self.tile, context, _readers(context))
        if self.kind == "orthogonal" and tile is not None and (tile < 1 or width % tile):
            problems.append(f"{where}.tile={tile} does not divide {width}, the width of the residual stream")
        elif self.kind in ("hadamard", "random_hadamard") and not ungrouped:
            problems += tile_problems(f"{where}.tile", width, tile, "the width of the residual stream")
        earlier = list(context.method.transforms.values())
        earlier = earlier[: earlier.index(self)] if self in earlier else earlier
        if not any(isinstance(part, FoldNorms) for part in earlier):
            problems.append(
                f"{where} rotates between norms, which must have no gain; put fold_norms before it "
                "(+method.transforms.fold=fold_norms, then +method.transforms.rotate=residual_rotation)"
            )
        return problems


def _readers(context: Context) -> tuple[str, ...]:
    """The linears that read the residual stream."""
    return (*context.arch.sites["attn_in"], *context.arch.sites["mlp_in"])


@torch.no_grad()
def fold_final_norm(model: MaskedDiffusionTransformer) -> None:
    """Multiply the columns of the output head by the final norm's gain, which becomes 1. Unties a tied head."""
    if model.head.weight is model.embed.weight:
        model.head.weight = nn.Parameter(model.head.weight.clone(), requires_grad=False)
    _fold(model.norm, [model.head])


@torch.no_grad()
def fold_block(block: Block) -> None:
    """Multiply the columns of the linears behind both norms by their gains, which become 1."""
    for norm, readers in readers_of_norms(block):
        _fold(norm, readers)


def _fold(norm: RMSNorm, readers: Iterable[nn.Linear]) -> None:
    gain = norm.weight.double()
    for linear in readers:
        map_rows(linear.weight, lambda rows: rows * gain)
    norm.weight.fill_(1)


@torch.no_grad()
def subtract_embedding_mean(model: MaskedDiffusionTransformer) -> None:
    """Give every row of the embedding the mean 0. This changes the function of a model with RMS norms."""
    map_rows(model.embed.weight, lambda rows: rows - rows.mean(-1, keepdim=True))


def residual_rotation(rotate: Rotation) -> ModelChange:
    """The same function with residual stream x Q: `W Q` for every reader, `Q^T W` and `bias Q` for o and down.

    `rotate` maps rows x [..., D] to x Q; for a matrix, `lambda x: x @ Q`. The change raises ValueError if a norm has a
    gain or a bias, or the head shares the embedding's tensor: norms are folded first.
    """

    @torch.no_grad()
    def outer(model: MaskedDiffusionTransformer) -> None:
        _rotate_readers(model.norm, [model.head], rotate)
        if model.head.weight is model.embed.weight:
            raise ValueError("the head shares the embedding's tensor; fold norms first, which unties it")
        map_rows(model.embed.weight, rotate)

    @torch.no_grad()
    def within(block: Block) -> None:
        for norm, readers in readers_of_norms(block):
            _rotate_readers(norm, readers, rotate)
        for writer in (block.o, block.down):
            map_outputs(writer, rotate)

    return ModelChange(outer, within, rotate)


def _rotate_readers(norm: RMSNorm, readers: Iterable[nn.Linear], rotate: Rotation) -> None:
    if norm.bias is not None or not bool((norm.weight == 1).all()):
        raise ValueError("a norm has a gain or a bias, which a rotation would not leave alone; fold norms first")
    for linear in readers:
        map_rows(linear.weight, rotate)


def readers_of_norms(block: Block) -> list[tuple[RMSNorm, list[nn.Linear]]]:
    """Both norms of a block with the linears that read their outputs."""
    return [(block.attn_norm, [block.q, block.k, block.v]), (block.mlp_norm, [block.gate, block.up])]


def make_rotation(
    kind: str,
    width: int,
    tile: int | None,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
    *,
    equal_tiles: bool = False,
) -> Rotation:
    """A random rotation of `width` channels; see `ResidualRotation` for the kinds. Raises ValueError for others."""
    if kind == "hadamard":
        return lambda x: transform(x, tile)
    if kind == "random_hadamard":
        drawn = tile if equal_tiles and tile is not None else width
        signs = (2 * torch.randint(2, (drawn,), generator=generator) - 1).repeat(width // drawn).to(device)
        return lambda x: transform(x * signs, tile)
    if kind != "orthogonal":
        raise ValueError(f"kind={kind} is unknown; write {', '.join(KINDS[:-1])} or {KINDS[-1]}")
    size = width if tile is None else tile
    matrices = random_orthogonal(1 if equal_tiles else width // size, size, generator).to(device)
    matrices = matrices.expand(width // size, size, size)
    return lambda x: torch.einsum("...gi,gij->...gj", x.unflatten(-1, (-1, size)), matrices.to(x.dtype)).flatten(-2)


def random_orthogonal(count: int, size: int, generator: torch.Generator) -> Tensor:
    """`count` orthogonal matrices [size, size] in float64, uniform over all of them (QR with positive diagonal)."""
    q, r = torch.linalg.qr(torch.randn(count, size, size, generator=generator, dtype=torch.float64))
    return q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None, :]


@torch.no_grad()
def map_rows(weight: Tensor, change: Callable[[Tensor], Tensor]) -> None:
    """Replace the rows of `weight` [O, I] in place by `change(rows)`, computed in float64."""
    for rows in weight.split(max(1, CHUNK_VALUES // weight.shape[1])):
        rows.copy_(change(rows.double()))


def map_outputs(linear: nn.Linear, change: Callable[[Tensor], Tensor]) -> None:
    """Replace the columns of a weight [O, I], which `change` sees as rows, and the bias in place."""
    for rows in (linear.weight.T,) if linear.bias is None else (linear.weight.T, linear.bias[None]):
        map_rows(rows, change)
