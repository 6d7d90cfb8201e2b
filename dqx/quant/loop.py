"""Quantize a model block by block: fit and fold transforms, then site by site correct, gather statistics, clip, round.

Inside a block the sites are done in data-flow order, (q, k, v), (o), (gate, up), (down). Before each the calibration
sequences run through the partly quantized block as far as that site's input, one at a time, and only statistics and
the inputs of the current block are kept. The output of the finished block feeds the next one. Attention is that of
the model itself: bidirectional, no mask.

O outputs, I inputs.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from rich import progress as bars
from rich.console import Console
from torch import Tensor, nn

from dqx.common.heartbeat import beat
from dqx.common.memory import peak_gpu, peak_ram
from dqx.formats.bits import UNQUANTIZED, ActivationBits, BitsConfig, WeightBits, block_range
from dqx.formats.integers import wide
from dqx.formats.weight import QuantizedWeight
from dqx.models.transformer import SITES, Block, MaskedDiffusionTransformer, compose
from dqx.quant.activations_store import Row
from dqx.quant.clip import ClipAtSite
from dqx.quant.home import Home, InMemory, Progress
from dqx.quant.linear import QuantLinear, scale_outputs
from dqx.quant.method import Method
from dqx.quant.protocols import Clip, Context, ModelChange, Quantizer, Rounding
from dqx.quant.report import KeptRow, LinearRow, QuantReport, stored_bits
from dqx.quant.stream import Stream, as_is, collect_paired, snapshot

JUDGED_OUTPUTS = 512  # at least so many outputs of a linear, where there are, make its output error
PRODUCER = {"mlp_out": "up", "attn_out": "v"}  # whose output channels are a site's input channels


class Batch(Protocol):
    """What the loop reads of a calibration batch."""

    @property
    def ids(self) -> Tensor:
        """Token ids [B, T]."""
        ...


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
    draw random numbers. At 16 bits transforms are applied all the same, which leaves the function as it was.
    Raises ValueError for a method and bits that cannot work together, for missing batches, for weights or activations
    that are not finite, and for a model that is quantized already. `quantize_checkpoint` does the same on disk.
    """
    return quantize_blocks(InMemory(model), method, bits, batches, seed=seed, progress=progress)


@torch.no_grad()
def quantize_blocks(
    home: Home,
    method: Method,
    bits: BitsConfig,
    batches: Sequence[Batch] = (),
    *,
    seed: int = 0,
    progress: bool = True,
) -> QuantReport:
    """`quantize` for a model wherever it lies, from where an earlier attempt has stopped."""
    started = time.perf_counter()
    arch, store, device = home.model.arch, home.store, home.device
    problems = method.problems(bits, arch) + home.problems()
    needed = method.streams(bits)
    if needed and not batches:
        problems.append(f"method {method.name} fits to activations; give at least one calibration batch")
    if problems:
        raise ValueError("\n".join(problems))

    ids = [batch.ids.to(device) for batch in batches] if needed else []
    report = QuantReport(method.name, bits.name, seed, variant=method.variant)
    report.calibration_sequences = sum(len(rows) for rows in ids)
    report.calibration_tokens = sum(rows.numel() for rows in ids)
    report.kv_bits = method.kv_bits(bits).bits
    report.transforms = list(method.transforms)
    report.from_disk = home.from_disk
    context = Context(arch, bits, method, seed, store=store)
    changes = method.changes(context, device)

    def stream(name: str, inputs: Row | None = None) -> Stream:
        return Stream(home.model, ids, mean=name == "mean", store=store, inputs=inputs)

    if home.progress is None:
        with home.outer():
            for change in changes:
                change.outer(home.model)
            streams = {name: stream(name) for name in sorted(needed)}
    else:
        streams = {name: stream(name, inputs) for name, inputs in home.progress.inputs.items()}
    done = home.progress or Progress()
    report.linears += done.rows

    def note(blocks: int) -> None:
        inputs = {name: stream.inputs for name, stream in streams.items()}
        report.seconds = done.seconds + time.perf_counter() - started
        report.peak_ram, report.peak_gpu = max(done.peak_ram, peak_ram()), max(done.peak_gpu, peak_gpu(device))
        home.note(Progress(blocks, report.linears, inputs, report.seconds, report.peak_ram, report.peak_gpu))

    with _progress_bar(progress) as bar:
        sites = len(SITES)
        task = bar.add_task(f"{method.name} {bits.name}", total=arch.n_blocks * sites, completed=done.blocks * sites)
        note(done.blocks)

        def advance() -> None:
            beat()
            bar.advance(task)

        for index in range(done.blocks, arch.n_blocks):
            of_block = context.at(index=index, bits=bits.of_block(index))
            report.linears += _one_block(home, method, changes, streams, of_block, advance)
            note(index + 1)
    report.kept = _kept(home.model, method, bits)
    return report


def _one_block(
    home: Home,
    method: Method,
    changes: Sequence[ModelChange],
    streams: Mapping[str, Stream],
    context: Context,
    advance: Callable[[], None],
) -> list[LinearRow]:
    """Quantize the block of the context and let the streams pass it; nothing here remembers it."""
    block = home.take(context.index)
    for change in changes:
        change.block(block)
    work = _BlockWork(block, method, streams, context)
    rows = []
    for found in work.quantize():
        rows += found
        advance()
    if context.index + 1 < context.arch.n_blocks:
        for name, stream in streams.items():
            stream.advance(work.intact if name == "fp" else block)
    home.put(context.index, block)
    return rows


@dataclass(frozen=True)
class Group:
    """Linears of one site that are treated alike: their rows are stacked and rounded at once."""

    roles: tuple[str, ...]
    rounding: Rounding | None
    clip: Clip | None
    weight: WeightBits
    activation: ActivationBits

    @property
    def rounds(self) -> bool:
        return self.rounding is not None and self.weight.bits != UNQUANTIZED


class _BlockWork:
    """One block on its way from full precision to quantized."""

    def __init__(self, block: Block, method: Method, streams: Mapping[str, Stream], context: Context):
        self.block, self.streams, self.context = block, streams, context
        self.method, self.bits = method, context.bits
        self.intact = block  # the block before rounding, once its transforms are in; of interest to "fp" alone
        self.site_maps: list[nn.Module] = []  # the transforms of the site at work

    def quantize(self) -> Iterator[list[LinearRow]]:
        """Replace the linears site by site, yielding their rows."""
        self._check_weights()
        for name, transform in self.method.block_transforms.items():
            keep = transform.stream == "fp"  # the function stays, so these outputs are the next block's inputs
            stats = (
                self.streams[transform.stream].collect(self.block, transform.needs, keep_outputs=keep)
                if any(transform.needs.values())
                else {}
            )
            transform.apply(self.block, stats, self.context.at(name=name))
        self.intact = snapshot(self.block) if "fp" in self.streams else self.block
        kv = self.method.kv_bits(self.bits)
        if self.method.kv is not None and kv.bits != UNQUANTIZED:
            self.method.kv.install(self.block, kv)
        for site, roles in SITES.items():
            self.site_maps = []
            for name, part in self.method.corrections.items():
                if part.site == site:
                    found = self._paired(site, part.needs, as_is) if part.needs else {}
                    part.apply(self.block, found, self.context.at(name=name))
            self._transform(site)
            rows: dict[str, LinearRow] = {}
            for group in self._groups(roles):
                rows |= {row.role: row for row in self._round(site, group)}
            yield [rows[role] for role in roles]

    def _check_weights(self) -> None:
        for role, linear in self.block.linears().items():
            if not torch.isfinite(linear.weight).all():  # type: ignore[arg-type]
                index = self.context.index
                raise ValueError(f"blocks.{index}.{role}.weight holds NaN or infinity; the checkpoint is broken")

    def _transform(self, site: str) -> None:
        """Find and install the site's own transforms, the same for all its linears."""
        linears = [getattr(self.block, role) for role in SITES[site]]
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

    def _groups(self, roles: Sequence[str]) -> list[Group]:
        """The linears of a site, those with equal settings together."""
        alike: list[tuple[tuple[Any, ...], list[str]]] = []
        for role in roles:
            activation = self.bits.activation_of(role)
            if not self.method.quantizes_input(role):
                activation = ActivationBits(UNQUANTIZED)
            rounding = self.method.rounding_of(role)
            settings = (rounding, self.method.clip_of(role), self.bits.weight_of(role), activation)
            for known, members in alike:
                if known == settings:
                    members.append(role)
                    break
            else:
                alike.append((settings, [role]))
        return [Group(tuple(members), *settings) for settings, members in alike]

    def _at(self, site: str, stream: str, needs: frozenset[str], seen: Any) -> dict[str, Any]:
        """Statistics of a site's input as it is now, from one of the streams."""
        if not needs:
            return {}
        if stream == "both":
            return self._paired(site, needs, seen)
        if stream == "fp":
            return self.streams["fp"].collect(self.intact, {site: needs}, self._mapped)[site]
        return self.streams[stream].collect(self.block, {site: needs}, seen)[site]

    def _paired(self, site: str, needs: frozenset[str], seen: Any) -> dict[str, Any]:
        both = (self.streams["quantized"], self.block, self.streams["fp"], self.intact)
        return collect_paired(*both, site, needs, seen, self._mapped)

    def _mapped(self, x: Tensor) -> Tensor:
        """A full-precision input in the coordinates of the site's own transforms."""
        for module in self.site_maps:
            x = module(x)
        return x

    def _round(self, site: str, group: Group) -> list[LinearRow]:
        """Round the weights of a group and put quantized linears in their place."""
        quantizer = self._input_quantizer(site, group)

        def seen(x: Tensor) -> Tensor:
            return x if quantizer is None else quantizer(x, group.activation)

        rounded: Mapping[str, QuantizedWeight | None] = dict.fromkeys(group.roles)
        linears: dict[str, nn.Linear] = {role: getattr(self.block, role) for role in group.roles}
        stats: dict[str, Any] = {}
        if group.rounding is not None and group.rounds:
            stats, clip_stats = self._statistics(site, group, seen)
            clip = None if group.clip is None else ClipAtSite(group.clip, clip_stats)
            stacked = torch.cat([linear.weight for linear in linears.values()])
            try:
                result = group.rounding(stacked, group.weight, stats, clip)
            except ValueError as error:
                raise ValueError(f"blocks.{self.context.index}, {', '.join(group.roles)}: {error}") from error
            split = result.split([linear.out_features for linear in linears.values()])
            rounded = dict(zip(group.roles, split, strict=True))
            if result.column_scale is not None:
                self._fold(site, result.column_scale)
                quantizer = self._input_quantizer(site, group)
        return [
            self._replace(role, linear, rounded[role], group, quantizer, stats.get("hessian"))
            for role, linear in linears.items()
        ]

    def _statistics(self, site: str, group: Group, seen: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the group's rounding and its clip need; one pass where both follow the same stream."""
        assert group.rounding is not None
        clip_needs = frozenset() if group.clip is None else group.clip.needs
        stream = group.rounding.stream
        if group.clip is not None and group.clip.stream == stream and group.rounding.needs:
            together = self._at(site, stream, group.rounding.needs | clip_needs, seen)
            return together, together
        stats = self._at(site, stream, group.rounding.needs, seen)
        return stats, {} if group.clip is None else self._at(site, group.clip.stream, clip_needs, seen)

    def _input_quantizer(self, site: str, group: Group) -> Quantizer | None:
        """The quantizer of the group's input; None at 16 bits."""
        activation = self.method.activation
        if activation is None or group.activation.bits == UNQUANTIZED:
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
        group: Group,
        quantizer: Quantizer | None,
        hessian: Tensor | None,
    ) -> LinearRow:
        weight_error, output_error = 0.0, None
        n_groups, scattered = 0, False
        if rounded is not None or quantizer is not None:
            module = QuantLinear(linear, group.weight, rounded, quantizer, group.activation)
            setattr(self.block, role, module)
        if rounded is not None:
            seen = wide(module.weight)
            if rounded.column_scale is not None:
                seen = seen * rounded.column_scale
            weight_error, output_error = _errors(linear.weight, seen, hessian)
            n_groups = rounded.scale.shape[1]
            scattered = bool((rounded.group_index.diff() < 0).any())
        width = UNQUANTIZED if rounded is None else group.weight.bits
        shape = (linear.out_features, linear.in_features)
        symmetric = group.weight.symmetric
        return LinearRow(
            name=f"blocks.{self.context.index}.{role}",
            block=self.context.index,
            role=role,
            shape=shape,
            bits=width,
            format=group.weight.format,
            group_size=group.weight.group_size,
            symmetric=symmetric,
            activation_bits=UNQUANTIZED if quantizer is None else group.activation.bits,
            rounding=None if rounded is None else type(group.rounding).__name__,
            stored_bits=stored_bits(
                shape, width, n_groups, symmetric=symmetric, scattered=scattered, format=group.weight.format
            ),
            weight_error=weight_error,
            output_error=output_error,
            notes=() if rounded is None else rounded.notes,
        )


def _errors(w_OI: Tensor, quantized_OI: Tensor, hessian_II: Tensor | None) -> tuple[float, float | None]:
    """Squared error of the weight relative to its squared norm, and the same of the outputs under the Hessian.

    The outputs are sampled where there are many: all of them would take longer than the rounding.
    """
    w, change = wide(w_OI), wide(quantized_OI) - wide(w_OI)

    def ratio(part: Tensor, whole: Tensor) -> float:
        return float(part / whole) if whole > 0 else 0.0

    weight_error = ratio(change.square().sum(), w.square().sum())
    if hessian_II is None:
        return weight_error, None
    every = max(1, len(w) // JUDGED_OUTPUTS)
    w, change = w[::every], change[::every]
    return weight_error, ratio(((change @ hessian_II) * change).sum(), ((w @ hessian_II) * w).sum())


def _kept(model: nn.Module, method: Method, bits: BitsConfig) -> list[KeptRow]:
    """Every parameter that is not a rounded weight, with the reason; blocks with the same one are counted together."""
    found: dict[tuple[str, str], list[int]] = {}
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        owner = modules[name.rpartition(".")[0]]
        if isinstance(owner, QuantLinear) and owner.scale is not None and name.endswith(".weight"):
            continue
        row = re.sub(r"^blocks\.\d+\.", "blocks.*.", name), _reason(name, method, bits)
        found.setdefault(row, []).append(parameter.numel())
    return [KeptRow(name, len(sizes), sum(sizes), reason) for (name, reason), sizes in found.items()]


def _reason(name: str, method: Method, bits: BitsConfig) -> str:
    if name.startswith("embed"):
        return "embedding: rows are looked up, not multiplied"
    if name.startswith("head"):
        return "output head: kept in the study and by all methods here"
    if name.endswith("norm.bias"):
        return "bias of a norm, put there by a correction: one number per channel"
    if name.endswith("bias"):
        return "bias: one number per output"
    if "norm" in name:
        return "norm gain: one number per channel"
    role = name.split(".")[-2]
    if role in method.rounding_by_role and method.rounding_of(role) is None:
        return f"method.rounding_by_role.{role} is null"
    if method.rounding_of(role) is None:
        return f"method {method.name} rounds no weights"
    index, widths = int(name.split(".")[1]), bits.widths("weight")
    entry = next((entry for entry in bits.blocks if index in block_range(entry)), "")
    by_block, by_role = f"bits.blocks.{entry}", f"bits.overrides.{role}.weight"
    keys = (f"{by_block}.{role}.weight", by_role, f"{by_block}.weight", "bits.weight.bits")
    return next(f"{key}={widths[key]}" for key in keys if widths.get(key) is not None)


def _progress_bar(enabled: bool) -> bars.Progress:
    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(),
        bars.TextColumn("left"),
        bars.TimeRemainingColumn(),
    )
    return bars.Progress(*columns, console=Console(stderr=True), disable=not enabled)
