"""Quantize a model block by block; the only place that knows about hooks and devices.

Inside a block the linears are done in data-flow order, (q, k, v), (o), (gate, up), (down). Before each step the
calibration sequences run through the partly quantized block as far as that step's input, one at a time, and only
statistics and the inputs of the current block are kept. The output of the finished block feeds the next one.
Attention is that of the model itself: bidirectional, no mask.

B sequences of a batch, T tokens, D hidden, O outputs, I inputs.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from dqx.models.transformer import SITES, MaskedDiffusionTransformer
from dqx.quant.bits import UNQUANTIZED, BitsConfig
from dqx.quant.grid import wide
from dqx.quant.linear import QuantLinear
from dqx.quant.method import Method
from dqx.quant.report import KeptRow, LinearRow, QuantReport, stored_bits
from dqx.quant.rounding import Rounding
from dqx.quant.stats import COLLECTORS, Collector


class Batch(Protocol):
    """What the loop reads of a calibration batch."""

    @property
    def ids(self) -> Tensor:
        """Token ids [B, T]."""
        ...


@torch.no_grad()
def quantize(
    model: MaskedDiffusionTransformer,
    method: Method,
    bits: BitsConfig,
    batches: Sequence[Batch] = (),
    *,
    seed: int = 0,
    progress: bool = True,
) -> QuantReport:
    """Quantize `model` in place: its linears become `QuantLinear`s. Returns what was done.

    `batches` may be empty for methods that need no data (rtn); then no forward pass is run. `seed` is for parts that
    draw random numbers and is recorded; rtn and gptq draw none. Raises ValueError for a method and bits that cannot
    work together, for missing batches, for weights or activations that are not finite, and for a model that is
    quantized already.
    """
    started = time.perf_counter()
    problems = method.problems(bits, model.arch)
    if any(isinstance(module, QuantLinear) for module in model.modules()):
        problems.append("the model is quantized already; load its weights again")
    needs_data = method.needs_data and bits.weight.bits != UNQUANTIZED
    if needs_data and not batches:
        problems.append(f"method {method.name} fits to activations; give at least one calibration batch")
    if problems:
        raise ValueError("\n".join(problems))

    report = QuantReport(method.name, bits.name, seed)
    streams: dict[str, Stream] = {}
    if needs_data:
        streams = {name: Stream(model, [batch.ids for batch in batches]) for name in method.streams}
        report.calibration_sequences = sum(batch.ids.shape[0] for batch in batches)
        report.calibration_tokens = sum(batch.ids.numel() for batch in batches)
    with _progress_bar(progress) as bar:
        task = bar.add_task(f"{method.name} {bits.name}", total=len(model.blocks) * len(SITES))
        for index, block in enumerate(model.blocks):
            for rows in _quantize_block(block, index, method, bits, streams):
                report.linears += rows
                bar.advance(task)
            if "quantized" in streams and index + 1 < len(model.blocks):
                streams["quantized"].collect(block, {})
    report.kept = _kept(model, method, bits)
    report.seconds = time.perf_counter() - started
    return report


class Stream:
    """The inputs of the current block [1, T, D], one per calibration sequence, in one version of the model.

    Sequences run one at a time whatever the batches were, so the result does not depend on batching, to the bit.
    """

    def __init__(self, model: MaskedDiffusionTransformer, ids: Sequence[Tensor]):
        self.model = model
        self.ids = [row for batch in ids for row in batch.to(model.device).split(1)]
        self.inputs = [model.embed(row) for row in self.ids]

    def collect(
        self,
        block: nn.Module,
        sites: Mapping[str, frozenset[str]],
        seen: Callable[[Tensor], Tensor] = lambda x: x,
        *,
        stop_at: str | None = None,
    ) -> dict[str, dict[str, Tensor]]:
        """Run every sequence through `block` and return the statistics that `sites` asks for, by site and name.

        `seen` maps a linear's input to what its matmul sees. With `stop_at` a pass ends at that site's input and
        the stream stays where it is; without, the stream moves on to the block's output.
        """
        collectors: dict[str, dict[str, Collector]] = {
            site: {need: COLLECTORS[need]() for need in needs} for site, needs in sites.items()
        }

        def hook_at(site: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                for collector in collectors.get(site, {}).values():
                    collector.add(seen(args[0]))
                if site == stop_at:
                    raise _Reached

            return hook

        hooks = [getattr(block, SITES[site][0]).register_forward_pre_hook(hook_at(site)) for site in collectors]
        try:
            for i, (ids, x) in enumerate(zip(self.ids, self.inputs, strict=True)):
                try:
                    output = block(x, *self.model.context(ids))
                except _Reached:
                    continue
                self.inputs[i] = output
        finally:
            for handle in hooks:
                handle.remove()
        return {site: {need: c.value() for need, c in by_need.items()} for site, by_need in collectors.items()}


class _Reached(Exception):
    """Ends a forward pass at the input that was asked for."""


def _quantize_block(
    block: nn.Module, index: int, method: Method, bits: BitsConfig, streams: Mapping[str, Stream]
) -> Iterator[list[LinearRow]]:
    """Replace the linears of one block site by site, yielding their rows."""

    def wanted(site: str, stream: str) -> frozenset[str]:
        parts = [part for part, _ in _by_rounding(method, SITES[site]) if part is not None and part.needs]
        return frozenset().union(*(p.needs for p in parts if getattr(p, "stream", "quantized") == stream))

    def seen(x: Tensor) -> Tensor:
        return x if method.activation is None else method.activation(x, bits.activation)

    intact: dict[str, dict[str, Tensor]] = {}
    if "fp" in streams:  # one pass through the untouched block serves all four sites and moves the stream on
        intact = streams["fp"].collect(block, {site: wanted(site, "fp") for site in SITES})
    for site, roles in SITES.items():
        stats = {"fp": intact.get(site, {})}
        if "quantized" in streams and (needs := wanted(site, "quantized")):
            stats["quantized"] = streams["quantized"].collect(block, {site: needs}, seen, stop_at=site)[site]
        rows = []
        for part, members in _by_rounding(method, roles):
            data = stats.get(getattr(part, "stream", "quantized"), {})
            rows += _quantize_linears(block, index, members, part, method, bits, data)
        yield rows


def _by_rounding(method: Method, roles: Sequence[str]) -> list[tuple[Rounding | None, list[str]]]:
    """Roles with equal rounding parts together: their weights are stacked and rounded in one call."""
    groups: list[tuple[Rounding | None, list[str]]] = []
    for role in roles:
        part = method.rounding_of(role)
        for known, members in groups:
            if known == part:
                members.append(role)
                break
        else:
            groups.append((part, [role]))
    return groups


def _quantize_linears(
    block: nn.Module,
    index: int,
    roles: list[str],
    part: Rounding | None,
    method: Method,
    bits: BitsConfig,
    stats: Mapping[str, Tensor],
) -> list[LinearRow]:
    """Round the weights of `roles`, which read the same input and share one rounding part."""
    linears: dict[str, nn.Linear] = {role: getattr(block, role) for role in roles}
    for role, linear in linears.items():
        if not torch.isfinite(linear.weight).all():
            raise ValueError(f"blocks.{index}.{role}.weight holds NaN or infinity; the checkpoint is broken")
    rounds = part is not None and bits.weight.bits != UNQUANTIZED
    rounded: Mapping[str, Any] = {}
    if part is not None and rounds:
        stacked = torch.cat([linear.weight for linear in linears.values()])
        try:
            result = part(stacked, bits.weight, stats)
        except ValueError as error:
            raise ValueError(f"blocks.{index}, {', '.join(roles)}: {error}") from error
        rounded = dict(zip(roles, result.split([linear.out_features for linear in linears.values()]), strict=True))

    rows = []
    for role, linear in linears.items():
        activation_bits = bits.activation.bits if method.quantizes_input(role) else UNQUANTIZED
        weight_error, output_error = 0.0, None
        weight, grid = linear.weight, rounded.get(role)
        if rounds or activation_bits != UNQUANTIZED:
            activation = method.activation if activation_bits != UNQUANTIZED else None
            setattr(block, role, QuantLinear(linear, bits.weight, grid, activation, bits.activation))
            weight_error, output_error = _errors(weight, getattr(block, role).weight, stats.get("hessian"))
        n_groups = 0 if grid is None else grid.scale.shape[1]
        scattered = grid is not None and bool((grid.group_index.diff() < 0).any())
        rows.append(
            LinearRow(
                name=f"blocks.{index}.{role}",
                block=index,
                role=role,
                shape=(linear.out_features, linear.in_features),
                bits=bits.weight.bits if rounds else UNQUANTIZED,
                group_size=bits.weight.group_size,
                symmetric=bits.weight.symmetric,
                activation_bits=activation_bits,
                rounding=type(part).__name__ if rounds else None,
                stored_bits=stored_bits(
                    (linear.out_features, linear.in_features),
                    bits.weight.bits if rounds else UNQUANTIZED,
                    n_groups,
                    symmetric=bits.weight.symmetric,
                    scattered=scattered,
                ),
                weight_error=weight_error,
                output_error=output_error,
                notes=() if grid is None else grid.notes,
            )
        )
    return rows


def _errors(w_OI: Tensor, quantized_OI: Tensor, hessian_II: Tensor | None) -> tuple[float, float | None]:
    """Squared error of the weight relative to its squared norm, and the same of the outputs under the Hessian."""
    w, change = wide(w_OI), wide(quantized_OI) - wide(w_OI)

    def ratio(part: Tensor, whole: Tensor) -> float:
        return float(part / whole) if whole > 0 else 0.0

    weight_error = ratio(change.square().sum(), w.square().sum())
    if hessian_II is None:
        return weight_error, None
    return weight_error, ratio(((change @ hessian_II) * change).sum(), ((w @ hessian_II) * w).sum())


def _kept(model: nn.Module, method: Method, bits: BitsConfig) -> list[KeptRow]:
    """Every parameter that is not a rounded weight, blocks counted together, with the reason."""
    found: dict[str, list[int]] = {}
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        owner = modules[name.rpartition(".")[0]]
        if isinstance(owner, QuantLinear) and owner.scale is not None and name.endswith(".weight"):
            continue
        found.setdefault(re.sub(r"^blocks\.\d+\.", "blocks.*.", name), []).append(parameter.numel())
    return [KeptRow(name, len(sizes), sum(sizes), _reason(name, method, bits)) for name, sizes in found.items()]


def _reason(name: str, method: Method, bits: BitsConfig) -> str:
    if name.startswith("embed"):
        return "embedding: rows are looked up, not multiplied"
    if name.startswith("head"):
        return "output head: kept in the study and by all methods here"
    if name.endswith("bias"):
        return "bias: one number per output"
    if "norm" in name:
        return "norm gain: one number per channel"
    role = name.split(".")[-2]
    if role in method.rounding_by_role and method.rounding_of(role) is None:
        return f"method.rounding_by_role.{role} is null"
    return (
        f"bits.weight.bits={bits.weight.bits}"
        if method.rounding_of(role)
        else f"method {method.name} rounds no weights"
    )


def _progress_bar(enabled: bool) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), disable=not enabled)
