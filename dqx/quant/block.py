"""One block on its way from full precision to quantized: transforms, then site by site correct, collect, clip, round.

O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from dqx.formats.binary import BinaryGrid
from dqx.formats.bits import UNQUANTIZED, ActivationBits, WeightBits
from dqx.formats.chunks import row_slices
from dqx.formats.integers import wide
from dqx.formats.weight import QuantizedWeight
from dqx.models.transformer import Block, RMSNorm, compose
from dqx.quant.clip import ClipAtSite
from dqx.quant.linear import QuantLinear, scale_outputs
from dqx.quant.method import Method
from dqx.quant.protocols import FINAL, BlockTransform, Clip, Context, Quantizer, Rounding, Stats
from dqx.quant.report import BINARY, LinearRow, stored_bits
from dqx.quant.stream import Seen, Stream, as_is, collect_outputs, collect_paired, snapshot

JUDGED_OUTPUTS = 512  # at least so many outputs of a linear, where there are, make its output error
PRODUCER = {"mlp_out": "up", "attn_out": "v"}  # whose output channels are a site's input channels


@dataclass(frozen=True)
class StackedLinears:
    """Linears of one site that are treated alike: their rows are stacked and rounded at once."""

    roles: list[str] = field(compare=False)
    rounding: Rounding | None
    clip: Clip | None
    weight_bits: WeightBits
    activation_bits: ActivationBits


class BlockWork:
    """The work on one block, with the streams that reach it."""

    def __init__(self, block: Block, method: Method, streams: Mapping[str, Stream], context: Context):
        self.block, self.streams, self.context = block, streams, context
        self.method, self.widths = method, context.widths
        self.compares = method.compares
        self.intact = block  # where a part looks at it: the block before rounding, once its transforms are in
        self.attended = block  # likewise: the block with attention rounded and the MLP as it was
        self.maps: dict[str, list[nn.Module]] = {}  # the transforms of every site that was reached
        self.site_maps: list[nn.Module] = []  # those of the site at work

    def quantize(self) -> Iterator[list[LinearRow]]:
        """Replace the linears site by site, yielding their rows."""
        self._check_weights()
        for name, transform in self.method.block_transforms.items():
            self._apply(name, transform)
        self.intact = self._snapshot()
        if (kv := self.method.kv) is not None:
            looks = kv.needs and self.widths.values.bits != UNQUANTIZED
            stream = self.streams["quantized"] if looks else None
            kv.install(self.block, self.widths.keys, self.widths.values, stream)
        for site, roles in self.method.steps(self.block.arch):
            if site not in self.maps:
                self._reach(site)
            self.site_maps = self.maps[site]
            rows = {row.role: row for stack in self._stacks(roles) for row in self._round(site, stack)}
            yield [rows[role] for role in roles]

    def _apply(self, name: str, transform: BlockTransform) -> None:
        """Fit a block's transform and fold it in; what it saw is let go."""
        keep = transform.stream == "fp"  # the function stays, so these outputs are the next block's inputs
        stream = self.streams.get(transform.stream)  # None: no part needs it
        stats = {} if stream is None else stream.collect(self.block, transform.needs, keep_outputs=keep)
        transform.apply(self.block, stats, self.context.at(name=name))

    def _snapshot(self) -> Block:
        """The block as it is now; itself where nothing compares, so that weights are let go as they are replaced."""
        twin: Block = snapshot(self.block) if self.compares else self.block
        return twin

    def _reach(self, site: str) -> None:
        """Correct and transform the input of a site, before the first of its linears is rounded."""
        self.maps[site] = self.site_maps = []
        for name, part in self.method.corrections.items():
            if part.site == site:
                stats = self._at(site, part.stream, part.needs, as_is)
                part.apply(self.block, stats, self.context.at(name=name))
        self._transform(site)
        if site == "mlp_in":
            self.attended = self._snapshot()

    def _check_weights(self) -> None:
        linears = self.block.linears()
        whole = torch.stack([torch.isfinite(linear.weight).all() for linear in linears.values()])  # type: ignore[arg-type]
        for role, good in zip(linears, whole.tolist(), strict=True):
            if not good:
                index = self.context.index
                raise ValueError(f"blocks.{index}.{role}.weight holds NaN or infinity; the checkpoint is broken")

    def _transform(self, site: str) -> None:
        """Find and install the site's own transforms, the same for all its linears."""
        linears = [getattr(self.block, role) for role in self.block.arch.sites[site]]
        for name, transform in self.method.site_transforms.items():
            stacked = torch.cat([linear.weight for linear in linears])
            stats = self._at(site, transform.stream, transform.needs, as_is)
            module = transform.fit(stacked, stats, self.context.at(name=name), site)
            if module is None:
                continue
            compose(self.block.inputs, site, module)
            self.site_maps.append(module)
            for linear in linears:
                linear.weight = nn.Parameter(module(linear.weight), requires_grad=False)

    def _stacks(self, roles: Sequence[str]) -> list[StackedLinears]:
        """The linears of a site, those with equal settings together."""
        method, widths, stacks = self.method, self.widths, list[StackedLinears]()
        for role in roles:
            activation = widths.activation[role] if method.quantizes_input(role) else ActivationBits(UNQUANTIZED)
            parts = method.rounding_of(role), method.clip_of(role)
            alone = StackedLinears([role], *parts, widths.weight[role], activation)
            if alone in stacks:
                stacks[stacks.index(alone)].roles.append(role)
            else:
                stacks.append(alone)
        return stacks

    def _at(self, site: str, stream: str, needs: frozenset[str], seen: Seen) -> dict[str, Any]:
        """Statistics of a site's input as it is now, from one of the streams."""
        if not needs:
            return {}
        if stream == "both":
            return self._paired(site, needs, seen, self.streams["fp"])
        if stream == "block":
            return self._paired(site, needs, seen, self.streams["quantized"])
        if stream == "fp":
            return self.streams["fp"].collect(self.intact, {site: needs}, self._mapped)[site]
        return self.streams[stream].collect(self.block, {site: needs}, seen)[site]

    def _paired(self, site: str, needs: frozenset[str], seen: Seen, intact: Stream) -> dict[str, Any]:
        both = (self.streams["quantized"], self.block, intact, self.intact)
        return collect_paired(*both, site, needs, seen, self._mapped)

    def correct_final(self, norm: RMSNorm) -> None:
        """Apply the corrections of the final norm; for the last block, when it is rounded."""
        for name, part in self.method.corrections.items():
            if part.site == FINAL:
                blocks = self.block, self.attended
                stats = collect_outputs(self.streams["quantized"], *blocks, norm, part.needs) if part.needs else {}
                part.apply(norm, stats, self.context.at(name=name))

    def _mapped(self, x: Tensor) -> Tensor:
        """A full-precision input in the coordinates of the site's own transforms."""
        for module in self.site_maps:
            x = module(x)
        return x

    def _round(self, site: str, stack: StackedLinears) -> list[LinearRow]:
        """Round the weights of a stack and put quantized linears in their place."""
        quantizer = self._input_quantizer(site, stack)

        def seen(x: Tensor) -> Tensor:
            return x if quantizer is None else quantizer(x, stack.activation_bits)

        rounded: dict[str, QuantizedWeight | None] = dict.fromkeys(stack.roles)
        linears: dict[str, nn.Linear] = {role: getattr(self.block, role) for role in stack.roles}
        stats: dict[str, Any] = {}
        factor_I = None  # of the inputs, which the linear before took over
        if stack.rounding is not None and stack.weight_bits.bits != UNQUANTIZED:
            stats, clip_stats = self._statistics(site, stack, seen)
            clip = None if stack.clip is None else ClipAtSite(stack.clip, clip_stats)
            rounded = self._rounded(stack, linears, stats, clip)
            for role, result in rounded.items():
                if result is not None and result.fold:
                    rounded[role], factor_I = result.folded()
                    self._fold(site, factor_I)
                    quantizer = self._input_quantizer(site, stack)
        return [
            self._replace(role, linear, rounded[role], stack, quantizer, stats.get("hessian"), factor_I)
            for role, linear in linears.items()
        ]

    def _rounded(
        self, stack: StackedLinears, linears: Mapping[str, nn.Linear], stats: Stats, clip: ClipAtSite | None
    ) -> dict[str, QuantizedWeight | None]:
        """The rounded weights by role: of all linears in one call, or one by one where the rounding asks for it.

        It is told then how many linears were `rounded_before` with the same statistics.
        """
        assert stack.rounding is not None
        one_by_one = getattr(stack.rounding, "one_by_one", False)
        calls = [[role] for role in stack.roles] if one_by_one else [stack.roles]
        rounded: dict[str, QuantizedWeight | None] = {}
        for i, roles in enumerate(calls):
            stacked = linears[roles[0]].weight if len(roles) == 1 else torch.cat([linears[r].weight for r in roles])
            seen = {**stats, "rounded_before": i} if one_by_one else stats
            try:
                result = stack.rounding(stacked, stack.weight_bits, seen, clip)
            except ValueError as error:
                raise ValueError(f"blocks.{self.context.index}, {', '.join(roles)}: {error}") from error
            split = result.split([linears[role].out_features for role in roles])
            rounded |= dict(zip(roles, split, strict=True))
        return rounded

    def _statistics(self, site: str, stack: StackedLinears, seen: Seen) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the stack's rounding and its clip need; one pass where both follow the same stream."""
        assert stack.rounding is not None
        clip_needs = frozenset() if stack.clip is None else stack.clip.needs
        stream = stack.rounding.stream
        if stack.clip is not None and stack.clip.stream == stream and stack.rounding.needs:
            together = self._at(site, stream, stack.rounding.needs | clip_needs, seen)
            return together, together
        stats = self._at(site, stream, stack.rounding.needs, seen)
        return stats, {} if stack.clip is None else self._at(site, stack.clip.stream, clip_needs, seen)

    def _input_quantizer(self, site: str, stack: StackedLinears) -> Quantizer | None:
        """The quantizer of the stack's input; None at 16 bits."""
        activation = self.method.activation
        if activation is None or stack.activation_bits.bits == UNQUANTIZED:
            return None
        return activation.fit(self._at(site, "quantized", activation.needs, as_is))

    def _fold(self, site: str, scale_I: Tensor) -> None:
        """Give a column scale to the linear whose outputs the site reads."""
        producer = getattr(self.block, PRODUCER.get(site, ""), None)
        if producer is None or not isinstance(self.block.inputs[site], nn.Identity):
            raise ValueError(f"a column scale at {site} cannot be folded into the linear before it")
        if isinstance(producer, QuantLinear):
            producer.scale_outputs(scale_I)
        else:
            scale_outputs(producer, scale_I)

    def _replace(
        self,
        role: str,
        linear: nn.Linear,
        rounded: QuantizedWeight | None,
        stack: StackedLinears,
        quantizer: Quantizer | None,
        hessian: Tensor | None,
        factor_I: Tensor | None,
    ) -> LinearRow:
        weight_error, output_error = 0.0, None
        if rounded is not None or quantizer is not None:
            module = QuantLinear(linear, stack.weight_bits, rounded, quantizer, stack.activation_bits)
            setattr(self.block, role, module)
        if rounded is not None:
            multiplied = wide(module.weight) if factor_I is None else wide(module.weight) * factor_I
            weight_error, output_error = _errors(linear.weight, multiplied, hessian)
        bits = stack.weight_bits if rounded is not None else replace(stack.weight_bits, bits=UNQUANTIZED)
        shape = (linear.out_features, linear.in_features)
        return LinearRow(
            name=f"blocks.{self.context.index}.{role}",
            block=self.context.index,
            role=role,
            shape=shape,
            bits=bits.bits,
            format=BINARY if rounded is not None and isinstance(rounded.grid, BinaryGrid) else bits.format,
            group_size=bits.group_size,
            symmetric=bits.symmetric,
            activation_bits=UNQUANTIZED if quantizer is None else stack.activation_bits.bits,
            rounding=None if rounded is None else type(stack.rounding).__name__,
            stored_bits=stored_bits(shape, bits, rounded),
            weight_error=weight_error,
            output_error=output_error,
            notes=() if rounded is None else rounded.notes,
        )


def _errors(w_OI: Tensor, quantized_OI: Tensor, hessian_II: Tensor | None) -> tuple[float, float | None]:
    """Squared error of the weight relative to its squared norm, and the same of the outputs under the Hessian.

    The outputs are sampled where there are many: all of them would take longer than the rounding.
    """

    def parts(rows: slice) -> tuple[Tensor, Tensor]:
        w = wide(w_OI[rows])
        return wide(quantized_OI[rows]) - w, w

    def ratio(part: Tensor, whole: Tensor) -> Tensor:
        return torch.where(whole > 0, part / whole, 0.0)

    squares = w_OI.new_zeros(2, dtype=torch.float64)
    for rows in row_slices(len(w_OI), w_OI.shape[1], w_OI.device):
        squares += torch.stack([x.square().sum(dtype=torch.float64) for x in parts(rows)])
    weight_error = ratio(*squares)
    if hessian_II is None:
        return weight_error.item(), None
    change, w = parts(slice(None, None, max(1, len(w_OI) // JUDGED_OUTPUTS)))
    output_error = ratio(*(((x @ hessian_II) * x).sum(dtype=torch.float64) for x in (change, w)))
    first, second = torch.stack((weight_error, output_error)).tolist()
    return first, second
