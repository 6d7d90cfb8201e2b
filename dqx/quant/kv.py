"""Keys, values and, where asked for, queries rounded at run time, as a cache of few bits would hold them.

Values are rounded as they leave their projection, keys after the rotary embedding, each token by itself: one grid per
token over all heads, or one per token and head. A Hadamard transform of queries and keys leaves their products alone
and spreads a key's outlier channels before it is rounded (Ashkboos et al. 2024, arXiv:2404.00456, section 4; DuQuant's
code does it in tiles). Queries stay in 16 bit by default, as in QuaRot; the published codes of SmoothQuant and DuQuant
for diffusion models round them like keys.

B batch, T tokens, H heads, E head width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from dqx.formats.bits import FORMATS, UNQUANTIZED, ActivationBits
from dqx.formats.integers import Grid
from dqx.formats.make import make_grid
from dqx.models.transformer import Block, compose
from dqx.quant.activation import clip_problems
from dqx.quant.fused import fake
from dqx.quant.protocols import Context
from dqx.quant.registry import storable
from dqx.quant.transforms.hadamard import OnlineHadamard, tile_problems

SHARES = ("token", "head")


@dataclass(frozen=True)
class KeysValues:
    """Which of keys, values and queries are rounded, and which numbers share a scale.

    Width, symmetry and format come from `bits.kv` and `bits.activation`. Symmetric: `scale = absmax / (2^(b-1) - 1)`.
    """

    keys: str | None = "token"  # token: one scale per token over all heads; head: per token and head; None: 16 bit
    values: str | None = "token"  # likewise
    queries: bool = False  # round queries too, like keys
    key_clip_ratio: float = 1.0  # share of the range of keys (and queries) that is kept
    value_clip_ratio: float = 1.0
    include_zero: bool = True  # asymmetric ranges hold zero
    rotate: bool = False  # Hadamard transform of queries and keys before keys are rounded
    tile: int | None = None  # channels per transform; None: the head's width

    def install(self, block: Block, bits: ActivationBits) -> None:
        """Put the quantizers behind what `block.heads` holds already."""
        grid = make_grid(bits, include_zero=self.include_zero, exact_absmax=True)
        if grid.identity:
            return
        if self.keys is not None:
            for part in ("q", "k"):
                if self.rotate:
                    compose(block.heads, part, OnlineHadamard(self.tile))
                if part == "k" or self.queries:
                    compose(block.heads, part, HeadQuantizer(grid, self.keys, self.key_clip_ratio))
        if self.values is not None:
            compose(block.heads, "v", HeadQuantizer(grid, self.values, self.value_clip_ratio))

    def problems(self, where: str, context: Context) -> list[str]:
        problems = []
        for name, share in (("keys", self.keys), ("values", self.values)):
            if share is not None and share not in SHARES:
                problems.append(f"{where}.{name}={share} is unknown; write token, head, or null for 16 bit")
        problems += clip_problems(f"{where}.key_clip_ratio", self.key_clip_ratio)
        problems += clip_problems(f"{where}.value_clip_ratio", self.value_clip_ratio)
        if self.queries and self.keys is None:
            problems.append(
                f"{where}.queries=true rounds queries like keys, but {where}.keys=null leaves keys alone; "
                f"write {where}.keys=head, or {where}.queries=false"
            )
        if self.rotate and self.keys is not None and context.widths.kv.bits != UNQUANTIZED:
            problems += tile_problems(f"{where}.tile", context.arch.head_size, self.tile, "the width of a head")
        return problems + self._format_problems(where, context)

    def _format_problems(self, where: str, context: Context) -> list[str]:
        """What keeps the format of the activations, which keys and values share, from being theirs."""
        bits, arch = context.widths.kv, context.arch
        if bits.bits == UNQUANTIZED or bits.format not in FORMATS:
            return []
        problems, known = [], FORMATS[bits.format]
        if bits.bits not in known.widths:
            widths = ", ".join(map(str, known.widths))
            problems.append(
                f"bits.kv.bits={bits.bits}: keys and values have the format of the activations, "
                f"bits.activation.format={bits.format}, which has {widths} bits; write bits.kv.bits={known.widths[-1]} "
                "or bits.kv.bits=16"
            )
        for name, share in (("keys", self.keys), ("values", self.values)):
            width = arch.head_size if share == "head" else arch.n_kv_heads * arch.head_size
            if share is not None and known.block and width % known.block:
                problems.append(
                    f"{where}.{name}={share}: {width} channels cannot be cut into the blocks of {known.block} in which "
                    f"{bits.format} shares a scale; write {where}.{name}=null, or bits.kv.bits=16"
                )
        return problems


@storable
class HeadQuantizer(nn.Module):
    """Rounds [B, H, T, E] to one grid per token (`share` "token") or per token and head ("head")."""

    def __init__(self, grid: Grid, share: str, clip_ratio: float):
        super().__init__()
        self.grid, self.share, self.clip_ratio = grid, share, clip_ratio

    def forward(self, x: Tensor) -> Tensor:
        if self.share == "head":
            return fake(self.grid, x, self.clip_ratio)
        tokens = x.transpose(1, 2)  # [B, T, H, E]
        rounded = fake(self.grid, tokens.flatten(2), self.clip_ratio)
        return rounded.view(tokens.shape).transpose(1, 2)

    def extra_repr(self) -> str:
        return f"{self.grid.bits} bits per {self.share}, clip_ratio={self.clip_ratio}"
