"""Run a model once over text, and over its denoising states, or a single block, and say what the linears read.

Linears of one site (`q k v`, `o`, `gate up`, `down`) read the same tensor, so what is true of a site is true of its
roles. It is looked at as the activation quantizer of these linears gets it: behind scalings and rotations, also those
that run online.

B rows, T tokens, C channels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dqx.common.halving import in_batches
from dqx.diagnostics.activations.meter import MANTISSA_BITS, PART_MANTISSA_BITS, PartMeter, SiteMeter, Tokens
from dqx.diagnostics.activations.sketch import relative_error
from dqx.diagnostics.activations.stats import ALL, MOST_CELLS, OutlierStats, PartStats, SiteStats, Thresholds
from dqx.diffusion.rollout import TOGETHER, TOKEN_CLASSES, State
from dqx.models.architecture import Architecture
from dqx.models.layout import Layout, Passes
from dqx.models.transformer import Block, MaskedDiffusionTransformer
from dqx.quant.protocols import own_tables

Place = tuple[int, str]  # block and site
Pass = tuple[Tensor, Callable[[], object]]  # token ids [B, T], and the forward that reads them
See = Callable[[Place, Tensor], None]


class HasIds(Protocol):
    """A batch: token ids [B, T] as the model sees them. It may have `passes` (`CalibBatch`)."""

    @property
    def ids(self) -> Tensor: ...


@torch.no_grad()
def measure_activations(
    model: MaskedDiffusionTransformer,
    batches: Iterable[HasIds],
    thresholds: Thresholds | None = None,
    *,
    states: Sequence[State] = (),
    surfaces: Sequence[int] = (),
) -> OutlierStats:
    """The statistics of every linear's input, over `batches` and, by token class and step, over `states`.

    Works alike before and after quantization. Of the blocks `surfaces`, the activation surface of the first row of the
    first batch is kept besides. Raises ValueError without batches.
    """
    arch, settings = model.arch, thresholds or Thresholds()

    def passes() -> Iterator[Pass]:
        for batch in batches:
            ids = batch.ids.to(model.device)
            passes = getattr(batch, "passes", None)
            layout = None if passes is None else Passes(passes.to(model.device)).layout
            yield ids, partial(_forward, model, ids, layout)

    stats = _read(arch, dict(enumerate(model.blocks)), arch.vocab_size, passes(), settings, surfaces)
    parts = _parts(model, states, settings, {(row.block, row.site): row for row in stats.rows})
    return replace(stats, parts=parts, parts_relative_error=relative_error(PART_MANTISSA_BITS))


@torch.no_grad()
def measure_block(
    block: Block, inputs: Iterable[Tensor], thresholds: Thresholds | None = None, *, index: int = 0
) -> OutlierStats:
    """The statistics of what the linears of a single block read, without the rest of a model.

        inputs = [list(model.residual_states(ids))[3] for ids in batches]
        measure_block(model.blocks[3], inputs, index=3)

    The hidden states `inputs` [B, T, D] enter the block, on its device and in its dtype. Rows call it block `index`.
    Tokens are named by sequence and position alone: all have the id 0. Raises ValueError without inputs.
    """
    arch = block.arch

    def passes() -> Iterator[Pass]:
        for x in inputs:
            ids = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device)
            yield ids, partial(block, x, *own_tables(arch, x))

    return _read(arch, {index: block}, 1, passes(), thresholds or Thresholds())


def _read(
    arch: Architecture,
    blocks: Mapping[int, nn.Module],
    vocabulary: int,
    passes: Iterable[Pass],
    settings: Thresholds,
    surfaces: Sequence[int] = (),
) -> OutlierStats:
    """The statistics of every place over forwards, without parts."""
    device = next(next(iter(blocks.values())).parameters()).device
    meters = {
        (block, site): SiteMeter(arch.in_features(roles[0]), vocabulary, device, settings)
        for block in blocks
        for site, roles in arch.sites.items()
    }
    maps: dict[str, Tensor] = {}
    shown, sequences = Tokens(torch.empty(0, 3, dtype=torch.long)), 0

    def see(place: Place, x: Tensor) -> None:
        meters[place].update(x, shown)
        if not sequences and place[0] in surfaces:
            maps["{}/{}/surface".format(*place)] = surface(x[0])

    with watched(arch, blocks, see):
        for ids, forward in passes:
            shown = Tokens.of(ids, sequences)
            forward()
            sequences += len(ids)
    if not sequences:
        raise ValueError(
            "nothing to measure outliers on; give one batch at least, or set outliers.samples to 1 or more"
        )
    maps |= {f"{block}/{site}/channel_max": meter.channel_max.cpu() for (block, site), meter in meters.items()}
    rows = [meter.result(*place) for place, meter in meters.items()]
    return OutlierStats(settings, sequences, rows[0].tokens, rows, relative_error(MANTISSA_BITS), maps=maps)


@contextmanager
def watched(arch: Architecture, blocks: Mapping[int, nn.Module], see: See) -> Iterator[None]:
    """While it lasts, `see(place, x)` is called with what the linears of every place are about to read."""
    with ExitStack() as stack:
        for index, block in blocks.items():
            for site, roles in arch.sites.items():
                hook = getattr(block, roles[0]).register_forward_pre_hook(_calling(see, (index, site)))
                stack.callback(hook.remove)
        yield


def _calling(see: See, place: Place) -> Callable[..., None]:
    return lambda module, inputs: see(place, inputs[0])


def _forward(model: MaskedDiffusionTransformer, ids: Tensor, layout: Layout | None = None) -> None:
    """Every block, without the head."""
    deque(model.hidden_states(ids, layout=layout), maxlen=0)


def _parts(
    model: MaskedDiffusionTransformer, states: Sequence[State], settings: Thresholds, rows: dict[Place, SiteStats]
) -> list[PartStats]:
    """By token class over all states, then state by state. One forward serves both: steps are summed up to classes."""

    def fresh() -> dict[Place, PartMeter]:
        return {
            place: PartMeter(row.channels, len(TOKEN_CLASSES), model.device, settings, row)
            for place, row in rows.items()
        }

    def at_step(state: State) -> list[PartStats | None]:
        def seen(rows: range) -> dict[Place, PartMeter]:
            meters = fresh()
            _show(model, state, rows, meters)
            return meters

        meters, *others = in_batches(len(state.ids), TOGETHER, seen, model.device)
        for place, meter in meters.items():
            for other in others:
                meter.merge(other[place])
            over_all[place].merge(meter)
        return [meter.total().result(ALL, 0, state.step, state.mask_ratio) for meter in meters.values()]

    over_all = fresh()
    by_step = [part for state in states for part in at_step(state)]
    by_class = [meter.result(name, i) for meter in over_all.values() for i, name in enumerate(TOKEN_CLASSES)]
    return [part for part in (*by_class, *by_step) if part is not None]


def _show(model: MaskedDiffusionTransformer, state: State, rows: range, meters: dict[Place, PartMeter]) -> None:
    """Let the meters see some windows of a state. Token classes are their groups."""
    classes = torch.zeros_like(state.ids)
    for i, name in enumerate(TOKEN_CLASSES):
        classes[state.token_class(name)] = i
    ids, group = (t[rows.start : rows.stop].to(model.device) for t in (state.ids, classes))
    shown = Tokens.of(ids, rows.start, group)
    with watched(model.arch, dict(enumerate(model.blocks)), lambda place, x: meters[place].update(x, shown)):
        _forward(model, ids)


def surface(x: Tensor) -> Tensor:
    """|x| [T', C'] of x [T, C] in float32 on the CPU, the maximum of each patch where one axis is too long.

    T' = ceil(T / t) with the smallest whole t that gives at most 128, C' likewise at most 256; the last patch of an
    axis may be smaller. Values that are not finite count as 0.
    """
    size = x.detach().float().nan_to_num(0.0, 0.0, 0.0).abs()
    patch = [-(-n // most) for n, most in zip(x.shape, MOST_CELLS, strict=True)]
    return F.max_pool2d(size[None], patch, ceil_mode=True)[0].cpu()


def default_blocks(count: int) -> list[int]:
    """First, middle and last of `count` blocks."""
    return sorted({0, count // 2, count - 1})
