"""What each slot of a method holds, the interfaces of its parts, and what the parts are told about where they work.

A part is a frozen dataclass whose fields are its options. `needs` names statistics of `dqx.quant.stats`, `stream` says
whose activations they are taken from:

* "fp": the untouched model;
* "quantized": the model as quantized so far;
* "both": the two in lockstep, for paired statistics (the others are then of the quantized model);
* "block": likewise, but the other side is this block before rounding on the quantized model's input;
* "mean": as quantized, but of one sequence only, the mean of all calibration sequences (DuQuant's).

B batch, T tokens, O outputs, I inputs, G groups of W inputs, H heads, E head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from dqx.diffusion.noise import Key, generator
from dqx.formats.bits import ActivationBits, BlockWidths, WeightBits
from dqx.formats.integers import Grid, wide
from dqx.formats.weight import BoundClip, QuantizedWeight
from dqx.models.layout import Layout
from dqx.models.rope import Rope, rope_tables
from dqx.models.transformer import Architecture, Block, MaskedDiffusionTransformer
from dqx.quant.activations_store import ActivationStore

STREAMS = ("quantized", "fp", "both", "block", "mean")
FINAL = "final_norm"  # where a correction works that is no site of a block
Needs = frozenset[str]
Tables = tuple[Rope, Tensor | None]  # what a block needs besides its input: rotary tables, and a mask [1, 1, T, T]
Stats = Mapping[str, Any]


class Composition(Protocol):
    """What a part can ask the method it belongs to."""

    @property
    def transforms(self) -> Mapping[str, Transform]: ...

    def rounding_of(self, role: str) -> Rounding | None: ...

    def clip_of(self, role: str) -> Clip | None: ...

    def quantizes_input(self, role: str) -> bool: ...


@dataclass(frozen=True)
class Context:
    """Where a part works: looked at before weights load, to tell whether it can, and while it is applied."""

    arch: Architecture
    widths: BlockWidths
    method: Composition
    seed: int = 0
    name: str = ""  # the part's name in the method
    index: int = -1  # of the block; -1: the whole model
    store: ActivationStore = field(default_factory=ActivationStore)  # for what grows with the calibration text
    tables: Callable[[int], Tables] | None = None  # of calibration sequence i; None: `own_tables`

    def at(self, **changes: object) -> Context:
        """The context of another part or block."""
        return replace(self, **changes)  # type: ignore[arg-type]

    def generator(self, *key: Key) -> torch.Generator:
        """Random numbers as a pure function of seed, part, block and `key`."""
        return generator(self.seed, "quantize", self.name, self.index, *key)

    def grid(self, role: str) -> tuple[Grid, int] | None:
        """The grid and group size that the role's weight will be rounded to; None where it stays in 16 bit."""
        rounding, bits = self.method.rounding_of(role), self.widths.weight[role]
        grid = None if rounding is None else rounding.grid(bits)
        return None if grid is None or grid.identity else (grid, bits.group_size)


def own_tables(arch: Architecture, x: Tensor) -> Tables:
    """What a block needs besides a sequence x [B, T, D] without padding, with the attention of the architecture."""
    layout = Layout.of(x[..., 0], None, arch.attention)
    return rope_tables(arch, layout.positions, wide(x[:0]).dtype), layout.mask


def choice_problems(key: str, value: str, choices: Sequence[str]) -> list[str]:
    """What is wrong with the option at config key `key`, which must be one of `choices`."""
    known = f"{', '.join(choices[:-1])} or {choices[-1]}"
    return [] if value in choices else [f"{key}={value} is unknown; write {known}"]


class Part(Protocol):
    """What all parts have."""

    def problems(self, where: str, context: Context) -> list[str]:
        """What cannot work, with the remedy; `where` is the part's config key. Here nothing."""
        return []


class Fitted(Protocol):
    """A part that looks at activations: the statistics it `needs` of a site's input, and whose input that is."""

    @property
    def stream(self) -> str: ...

    @property
    def needs(self) -> Needs: ...


class Transform(Part, Protocol):
    """Changes the network without changing its function. `scope` says which of the three kinds below it is."""

    scope: ClassVar[str]


@dataclass(frozen=True)
class ModelChange:
    """What a model transform does to what stands outside the blocks, and to each block by itself, in place.

    `residual` maps the residual stream x [..., D] of the model as it was to what the changed one has in its place.
    """

    outer: Callable[[MaskedDiffusionTransformer], None]
    block: Callable[[Block], None]
    residual: Callable[[Tensor], Tensor] | None = None  # None: it stays

    def apply(self, model: MaskedDiffusionTransformer) -> None:
        """Change a model that is in memory as a whole."""
        self.outer(model)
        for block in model.blocks:
            self.block(block)  # type: ignore[arg-type]


class ModelTransform(Transform, Protocol):
    """`scope = "model"`: the same change everywhere, before any data. Blocks come one at a time."""

    def prepare(self, context: Context, device: torch.device) -> ModelChange: ...


class BlockTransform(Transform, Protocol):
    """`scope = "block"`: on one block before any of its weights is rounded; `needs` by site.

    `candidates` is how often its search sends the calibration text through a part of the block, for estimates of time.
    """

    @property
    def candidates(self) -> int: ...

    @property
    def stream(self) -> str: ...

    @property
    def needs(self) -> Mapping[str, Needs]: ...

    def apply(self, block: Block, stats: Mapping[str, Stats], context: Context) -> None: ...


class SiteTransform(Transform, Fitted, Protocol):
    """`scope = "site"`: an orthogonal map of one site's input, found right before its weights are rounded.

    The loop puts the module in front of the site's linears and replaces each weight by `module(weight)`.
    """

    def fit(self, w_OI: Tensor, stats: Stats, context: Context, site: str) -> nn.Module | None: ...


class Clip(Part, Fitted, Protocol):
    """Which range of a group of weights is represented; the rest saturates. A `BoundClip` is one with its `stats`."""

    clamps: ClassVar[bool]

    @property
    def skip_roles(self) -> list[str]: ...

    def __call__(self, w_OGW: Tensor, grid: Grid, stats: Stats, columns_GW: Tensor) -> tuple[Tensor, Tensor]: ...


class Rounding(Part, Fitted, Protocol):
    """A weight and the statistics of its input in, codes out. Linears with equal settings share one call.

    Rows of the weight must be rounded independently of each other: the loop stacks q, k, v and gate, up. A rounding
    whose rows belong together has a property `one_by_one` that is true, and sees a linear at a time.
    """

    def grid(self, bits: WeightBits) -> Grid: ...

    def __call__(
        self, w_OI: Tensor, bits: WeightBits, stats: Stats, clip: BoundClip | None = None
    ) -> QuantizedWeight: ...


class Quantizer(Protocol):
    """Fake-quantizes the input [..., I] of a linear at run time; 16 bits returns x itself."""

    def __call__(self, x: Tensor, bits: ActivationBits) -> Tensor: ...


class Activation(Part, Protocol):
    """How a linear's input is rounded. `fit` gives the quantizer of one site; dynamic ones need no statistics."""

    @property
    def needs(self) -> Needs: ...

    def fit(self, stats: Stats) -> Quantizer: ...


class KeysValues(Part, Protocol):
    """Puts quantizers of keys and values [B, H, T, E] into `block.heads`, `sequence` and `stored`; none for 16 bits.

    `whole_sequence` says whether they look at all tokens of a sequence; `stored_only` whether they act on nothing but
    what a sampler's cache stores; `final_problems` what is wrong beside a sampler that stores final tokens once. Where
    `needs` is not empty and values are rounded, `install` gets the stream of the quantized model, before anything of
    the block is rounded.
    """

    @property
    def needs(self) -> Needs: ...

    @property
    def stored_only(self) -> bool: ...

    def final_problems(self, where: str) -> list[str]: ...

    @property
    def whole_sequence(self) -> bool: ...

    def install(self, block: Block, keys: ActivationBits, values: ActivationBits, stream: Any = None) -> None: ...


class TokenWeight(Part, Protocol):
    """How much each calibration token counts where a statistic is an average over tokens, as ratios to the others.

    `facts` are "masked" [1, T] (bool) and, where `needs` names it, "confidence" [1, T]: the probability that the
    full-precision model gives to its first choice at each masked token, 0 elsewhere; and "committed" [1, T]: the share
    of the sampler's steps that have passed when the token is written, -1 for those that are given. Weights [1, T] must
    be finite and not negative. With a property `by_position` that is true, the loop takes their mean over all
    sequences, position by position. It divides them by their mean over all tokens; before that by the mean over each
    sequence, with `per_sequence`.
    """

    @property
    def needs(self) -> Needs: ...

    @property
    def per_sequence(self) -> bool: ...

    def __call__(self, facts: Mapping[str, Tensor]) -> Tensor: ...


class Correction(Part, Protocol):
    """Repairs the full-precision side of a site after the linears before it were rounded.

    `place` is the block or, for a correction whose site is `FINAL`, the final norm after the last block.
    """

    site: ClassVar[str]

    @property
    def stream(self) -> str: ...

    @property
    def needs(self) -> Needs: ...

    def apply(self, place: Any, stats: Stats, context: Context) -> None: ...
