"""Each method on one block, twice: by dqx's parts, and by the transcriptions of `plain.py` one linear at a time.

Both sides get the same block, whose weights ask for no gradients, and the same recorded inputs of its linears. The
forward passes that record them are the same work for both and are left out of the times. DuQuant starts from a block
that is smoothed already.

S sequences, T tokens, N tokens of all, I inputs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dqx.benchmarks import plain
from dqx.benchmarks.cases import Case
from dqx.benchmarks.common import CPU, Say, clock
from dqx.common.memory import peak_ram, trim, watch_peaks
from dqx.formats.bits import BitsConfig
from dqx.models.transformer import Block, RMSNorm
from dqx.quant.clip import ClipAtSite, FixedRatio
from dqx.quant.method import Method
from dqx.quant.protocols import Context, own_tables
from dqx.quant.stats import collectors
from dqx.quant.transforms.block_rotate import BlockRotate, BlockRotation, zigzag_permutation
from dqx.quant.transforms.greedy_rotation import base_rotation, greedy_rotation

CLIP = "clip search and rounding"
CLIP_ROWS = 128  # of every linear, in the plain clip search by sums of products; its time is multiplied accordingly
BITS = {"gptq": "w4a16", "awq": "w4a16", "duquant": "w4a4"}
LEFT_TO_RIGHT = "method.rounding=gptq"  # as the plain side goes through the columns
SETTINGS = {"gptq": [LEFT_TO_RIGHT], "awq": [], "duquant": []}


@dataclass
class SideRun:
    """One side's work: its own block and the method; `say` hears what it is at.

    What came out: seconds by phase, of which those in `aside` do not count, and tensors by name, such as `codes.q`.
    """

    case: Case
    method: Method
    bits: BitsConfig
    say: Say = lambda text: None
    seconds: dict[str, float] = field(default_factory=dict)
    aside: dict[str, float] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    start: int = 0  # resident bytes when the inputs were there for the first time
    peak: int = 0  # the most since then, without what gathering inputs takes

    @property
    def context(self) -> Context:
        arch = self.case.block.arch
        return Context(arch, self.bits.resolve(arch).blocks[0], self.method, index=0)

    @property
    def sites(self) -> Mapping[str, tuple[str, ...]]:
        return self.case.block.arch.sites

    @contextmanager
    def timed(self, phase: str, detail: str, *, times: float = 1, aside: bool = False) -> Iterator[None]:
        """Add to a phase: the time of this process on one thread, so that other work on the machine does not count;
        wall-clock time on several threads. `times` for work that stands for more of its kind."""
        self.say(f"{phase}: {detail}")
        started = clock()
        yield
        seconds = self.aside if aside else self.seconds
        seconds[phase] = seconds.get(phase, 0.0) + times * (clock() - started)

    def keep(self, roles: tuple[str, ...], rounded: list[Any]) -> None:
        """Note what became of the weights of `roles`."""
        for role, result in zip(roles, rounded, strict=True):
            for name in ("codes", "scale", "zero_point"):
                self.tensors[f"{name}.{role}"] = getattr(result, name)

    def inputs(self) -> dict[str, Tensor]:
        """What the linears of every site read now."""
        self.say("forward pass")
        if self.start:
            self.note_peak()
        inputs = self.case.site_inputs()
        trim()
        watch_peaks(CPU)
        self.start = self.start or peak_ram()
        return inputs

    def note_peak(self) -> None:
        self.peak = max(self.peak, peak_ram())

    def weight(self, role: str) -> Tensor:
        weight: Tensor = getattr(self.case.block, role).weight
        return weight

    def keep_scaled(self) -> None:
        """Note what AWQ's scales were folded into: the norms' gains, a column of v and of up."""
        block = self.case.block
        for name, tensor in (("attn_norm", block.attn_norm.weight), ("mlp_norm", block.mlp_norm.weight),
                             ("v", block.v.weight[:, 0]), ("up", block.up.weight[:, 0])):  # fmt: skip
            self.tensors[f"channel_scale.{name}"] = tensor.clone()


def statistics(x: Tensor, needs: frozenset[str]) -> dict[str, Any]:
    """What dqx collects of a site's input [S, T, I], one sequence after the other as in its loop."""
    by_name = collectors(needs, x.shape[0] * x.shape[1])
    for sequence in x.split(1):
        for collector in by_name.values():
            collector.add(sequence)
    return {name: collector.value() for name, collector in by_name.items()}


def round_stacked(run: SideRun, roles: tuple[str, ...], weights: list[Tensor], stats: dict[str, Any]) -> None:
    """Round weights that read the same input in one call, and note the results."""
    part, clip = run.method.rounding_of(roles[0]), run.method.clip_of(roles[0])
    assert part is not None
    bound = None if clip is None else ClipAtSite(clip, stats)
    stacked = weights[0] if len(weights) == 1 else torch.cat(weights)
    rounded = part(stacked, run.context.widths.weight[roles[0]], stats, bound)
    run.keep(roles, rounded.split([len(w) for w in weights]))


def dqx_gptq(run: SideRun) -> None:
    part = run.method.rounding
    assert part is not None
    for site, x in run.inputs().items():
        with run.timed("rounding", ", ".join(run.sites[site])):
            roles = run.sites[site]
            round_stacked(run, roles, [run.weight(role) for role in roles], statistics(x, part.needs))


def plain_gptq(run: SideRun) -> None:
    for site, x in run.inputs().items():
        for role in run.sites[site]:
            with run.timed("rounding", role):
                weight = run.bits.weight
                rounded = plain.gptq(run.weight(role), x.flatten(0, 1), weight.bits, weight.group_size)
            run.keep((role,), [rounded])


def dqx_awq(run: SideRun) -> None:
    (name, transform), *_ = run.method.block_transforms.items()
    inputs = run.inputs()
    with run.timed("scale search", "all sites"):
        stats = {site: statistics(inputs.pop(site), needs) for site, needs in transform.needs.items()}
        transform.apply(run.case.block, stats, run.context.at(name=name))
        del stats
    run.keep_scaled()
    clip = run.method.clip
    assert clip is not None
    for site, x in run.inputs().items():
        for skipped in (True, False):
            roles = tuple(role for role in run.sites[site] if (role in clip.skip_roles) == skipped)
            if roles:
                with run.timed(CLIP, ", ".join(roles)):
                    stats_here = statistics(x, frozenset() if skipped else clip.needs)
                    round_stacked(run, roles, [run.weight(role) for role in roles], stats_here)


def plain_awq(run: SideRun) -> None:
    block, bits, size = run.case.block, run.bits.weight.bits, run.bits.weight.group_size
    tables = own_tables(block.arch, run.case.hidden)
    scaled: dict[str, tuple[RMSNorm | nn.Linear, Callable[[Tensor], Tensor]]] = {  # what takes over, what judges
        "attn_in": (block.attn_norm, lambda x: block.attention(x, *tables)),
        "attn_out": (block.v, block.o),
        "mlp_in": (block.mlp_norm, block.mlp),
        "mlp_out": (block.up, block.down),
    }
    if block.arch.n_kv_heads != block.arch.n_heads:
        del scaled["attn_out"]  # v cannot take over a factor per query head
    inputs = run.inputs()
    scales = {}
    for site, (_, judge) in scaled.items():
        linears = [getattr(block, role) for role in run.sites[site]]
        with run.timed("scale search", ", ".join(run.sites[site])):
            scales[site] = plain.awq_scale(linears, inputs[site], judge, bits, size)[0]
    for site, scale in scales.items():
        for role in run.sites[site]:
            run.weight(role).mul_(scale)
        producer, _ = scaled[site]
        producer.weight.div_(scale if producer.weight.dim() == 1 else scale[:, None])
        if producer.bias is not None:
            producer.bias.div_(scale)
    run.keep_scaled()
    for site, x in run.inputs().items():
        for role in run.sites[site]:
            w = run.weight(role)
            if role not in ("q", "k"):
                some = w[:CLIP_ROWS]
                with run.timed(CLIP, f"{role}, {len(some)} rows", times=len(w) / len(some)):
                    plain.awq_clip(some, x.flatten(0, 1), bits, size)
                with run.timed(CLIP, f"{role} by matrix products", aside=True):
                    limits = plain.awq_clip(w, x.flatten(0, 1), bits, size, rows=64, matmul=True)
                w = plain.clamp_groups(w, limits)
            with run.timed(CLIP, role):
                rounded = plain.rtn(w, bits, size)
            run.keep((role,), [rounded])


def smoothed(run: SideRun) -> dict[str, Tensor]:
    """What the linears read once the block is smoothed, all tokens as one sequence."""
    (name, smooth), *_ = run.method.block_transforms.items()
    inputs = run.inputs()
    stats = {site: statistics(inputs[site], needs) for site, needs in smooth.needs.items()}
    smooth.apply(run.case.block, stats, run.context.at(name=name))
    return {site: x.reshape(1, -1, x.shape[-1]) for site, x in run.inputs().items()}


def rotation_part(run: SideRun) -> tuple[str, BlockRotate]:
    (name, part), *_ = run.method.site_transforms.items()
    assert isinstance(part, BlockRotate)
    return name, part


def _tile(part: BlockRotate) -> int:
    assert isinstance(part.tile, int)
    return part.tile


def bases(run: SideRun, site: str) -> list[Tensor]:
    """The random matrices that both sides start from."""
    name, part = rotation_part(run)
    return [base_rotation(_tile(part), run.context.at(name=name).generator(site, i)) for i in range(2)]


def dqx_duquant(run: SideRun) -> None:
    name, part = rotation_part(run)
    for site, x in smoothed(run).items():
        weights = [run.weight(role) for role in run.sites[site]]
        with run.timed("rotation search", site):
            stats = statistics(x, part.needs)
            rotation: nn.Module = part.fit(torch.cat(weights), stats, run.context.at(name=name), site)
        with run.timed("rotating and rounding", ", ".join(run.sites[site])):
            round_stacked(run, run.sites[site], [rotation(weight) for weight in weights], {})


def plain_duquant(run: SideRun) -> None:
    _, part = rotation_part(run)
    assert isinstance(run.method.clip, FixedRatio)
    for site, x in smoothed(run).items():
        first, second = (base.float() for base in bases(run, site))
        with run.timed("rotation search", site):  # k and v copy q's, up copies gate's
            rotation = plain.duquant(x[0], (first, second), part.steps)
        for role in run.sites[site]:
            with run.timed("rotating and rounding", role):
                turned = plain.duquant_apply(run.weight(role), rotation)
                rounded = plain.rtn(turned, run.bits.weight.bits, -1, clip_ratio=run.method.clip.ratio)
            run.keep((role,), [rounded])
        for i, half in enumerate((rotation[0], rotation[2])):
            run.tensors[f"channels.{site}.{i}"] = torch.tensor(half.channels, dtype=torch.long)
            run.tensors[f"matrix.{site}.{i}"] = half.matrix
        run.tensors[f"order.{site}"] = rotation[1]


def compare_duquant(run: SideRun, theirs: Mapping[str, Tensor]) -> dict[str, float]:
    """Every step of dqx from what the plain side had before that step; see `differences`.

    From end to end the two part ways in float32: among thousands of channels some maxima are equal but for rounding,
    hence are sorted differently, and the second search then works on another matrix.
    """
    _, part = rotation_part(run)
    ours: dict[str, Tensor] = {}
    for site, x in smoothed(run).items():
        order, matrices = theirs[f"order.{site}"], [theirs[f"matrix.{site}.{i}"] for i in range(2)]
        turned = x[0].unflatten(-1, (-1, _tile(part))) @ matrices[0]
        run.say(f"checking: {site}")
        ours[f"order.{site}"] = zigzag_permutation(turned.flatten(1).abs().amax(0), _tile(part))
        for i, matrix in enumerate((x[0], turned.flatten(1)[:, order])):
            search = greedy_rotation(matrix, bases(run, site)[i], part.steps, part.index)
            ours[f"channels.{site}.{i}"] = torch.tensor(search.indices, dtype=torch.long)
            ours[f"matrix.{site}.{i}"] = search.rotation_BB
        module = BlockRotation(torch.stack(matrices), order[None])
        round_stacked(run, run.sites[site], [module(run.weight(role)) for role in run.sites[site]], {})
    return differences(theirs, ours | run.tensors)


#: The plain side and dqx's by method.
SIDES = {"gptq": (plain_gptq, dqx_gptq), "awq": (plain_awq, dqx_awq), "duquant": (plain_duquant, dqx_duquant)}


@torch.no_grad()
def block_error(run: SideRun, intact: Case) -> float:
    """Squared error of the block's output with the rounded weights, relative to that of what `intact` adds to its
    input; the block gets these weights."""
    wanted = [block_output(intact.block, x) for x in intact.hidden.split(1)]
    for role in run.case.block.arch.roles:
        codes, scale, zero_point = (run.tensors[f"{name}.{role}"] for name in ("codes", "scale", "zero_point"))
        run.weight(role).copy_(plain.Rounded(codes, scale, zero_point).dequantize())
    got = [block_output(run.case.block, x) for x in intact.hidden.split(1)]
    error = sum(float((a - b).square().sum()) for a, b in zip(got, wanted, strict=True))
    return error / sum(float((a - x).square().sum()) for a, x in zip(wanted, intact.hidden.split(1), strict=True))


def block_output(block: Block, x: Tensor) -> Tensor:
    output: Tensor = block(x, *own_tables(block.arch, x))
    return output


def compare(method: str, run: SideRun, theirs: Mapping[str, Tensor]) -> dict[str, float]:
    """How far dqx's tensors are from the plain ones; `run` is fresh for duquant, else the one that dqx worked on."""
    return compare_duquant(run, theirs) if method == "duquant" else differences(theirs, run.tensors)


def differences(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> dict[str, float]:
    """How far the tensors of two sides are from equal, over all linears.

    Of codes and zero points the share that differs, of other integers their number, of scales the share that differs by
    more than 1e-4 of itself, of matrices the largest difference of an entry.
    """
    unequal: dict[str, list[Tensor]] = defaultdict(list)
    for name, tensor in theirs.items():
        kind, other = name.split(".")[0], ours[name]
        if kind in ("channels", "order"):
            unequal[kind].append(torch.tensor([not torch.equal(tensor, other)]))
        elif kind == "matrix":
            unequal[kind].append((tensor.double() - other.double()).abs().flatten())
        else:
            apart = tensor != other if kind == "codes" else (tensor - other).abs() > 1e-4 * tensor.abs()
            unequal[kind].append(apart.flatten())
    whole = {kind: torch.cat(parts) for kind, parts in unequal.items()}
    return {
        kind: float(x.max()) if kind == "matrix" else float(x.sum()) / (1 if kind in ("channels", "order") else len(x))
        for kind, x in whole.items()
    }
