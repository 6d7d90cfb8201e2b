"""What a run has to hold at its most expensive moments, in bytes, and whether there is room for it.

Weights are counted exactly. Evaluating takes besides them the activations of a batch, as the engine and the scorer plan
it. Quantizing takes the working copies of what is rounded at once, the sums of squares of one site with their factors,
the activations of one window, and, of all windows, the inputs and outputs of the current block for every stream and
what a scale search reads. From disk (`dqx/quant/checkpoint/on_disk.py`) only one block is held in place of the weights,
or embedding and head, and what belongs to all windows can lie in files. Both ways give the same numbers: which one a
run takes follows from `memory.ram_gb` and `memory.gpu_gb`.

These are estimates. LLaDA-8B from disk: 3.9 GB with RTN and 4.5 GB with GPTQ, where 3.54 and 3.59 GB were measured. A
run that has taken more than a setting allows says so in its record. On a GPU tensors cannot take more: quantizing goes
from memory to disk where the estimate was too low (`dqx/study/subjects.py`), batches are halved, and what does not fit
alone ends the run with what to change; blocks and documents that are finished are kept.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from dqx.common import accelerator
from dqx.common.devices import process_count
from dqx.common.memory import GB, gigabytes, machine_bytes
from dqx.diffusion.batches import token_bytes
from dqx.diffusion.engine import cache_bytes, row_bytes
from dqx.formats.bits import FORMATS, UNQUANTIZED, BitsConfig
from dqx.formats.weight import group_width
from dqx.models.architecture import Architecture
from dqx.models.transformer import MaskedDiffusionTransformer
from dqx.quant.method import Method
from dqx.quant.stats import COLLECTORS
from dqx.quant.token_weight import HEAD_TOKENS
from dqx.study.design import Design
from dqx.study.estimate.speed import batch_rows, block_parameters
from dqx.study.estimate.work import Work, fidelity_work, outlier_work, work_of_tasks

#: Copies in float32 of the linears of a site while they are rounded and judged.
COPIES = 5
#: RAM of a process besides: Python, the libraries, and what the C library keeps of freed memory.
FIXED = 800_000_000


@dataclass(frozen=True)
class MemoryNeeds:
    """Bytes where the model is: the weights, and what comes on top while quantizing and while evaluating."""

    weights: int
    quantizing: int = 0
    evaluating: int = 0

    @property
    def total(self) -> int:
        return self.weights + max(self.quantizing, self.evaluating)


@dataclass(frozen=True)
class Pool:
    """The RAM of a process, or its GPU's memory: bytes that may be taken, and that the parts of a run need."""

    name: str  # ram, gpu
    setting: float | None  # memory.ram_gb, memory.gpu_gb
    limit: int
    evaluating: int
    in_memory: int  # quantizing the loaded model
    from_disk: int  # quantizing block by block, all activations in files
    shared_by: int = 1  # processes that have as much each; together they have what the machine has

    @property
    def least(self) -> int:
        """What the run cannot do without."""
        return max(self.evaluating, min(self.in_memory, self.from_disk))


def memory_pools(design: Design, gpu_bytes: int | None = None) -> list[Pool]:
    """What a run needs where, beside what it may take; the RAM comes first.

    `gpu_bytes` is the memory of the GPU, where it is not the one that is here.
    """
    config, arch, dtype, device = design.config, design.arch, design.dtype, design.device
    needs, settings = memory_needs(design, smallest=True), config.memory
    outer, block = _outer_bytes(arch, dtype), block_parameters(arch) * dtype.itemsize
    working = block + _working_bytes(design)
    if design.asks_confidence:  # embedding and head stay beside the blocks, until all are passed
        working = max(working, sum(outer) + block + row_bytes(arch, design.window_tokens, HEAD_TOKENS))
    evaluating, in_memory = needs.weights + needs.evaluating, needs.weights + needs.quantizing
    count = (
        1 if "LOCAL_WORLD_SIZE" in os.environ else process_count(config.dispatch, config.model.device)
    )  # a worker is told its own share
    limit = _limit(settings.ram_gb, machine_bytes() // count)
    if device.type == "cpu":
        from_disk = max(sum(outer) + max(outer), working) if needs.quantizing else 0
        return [Pool("ram", settings.ram_gb, limit, FIXED + evaluating, FIXED + in_memory, FIXED + from_disk, count)]
    staged = FIXED + 2 * max(*outer, block)  # tensors on their way to a file, or from one
    from_disk = max(sum(outer), working) if needs.quantizing else 0
    there = _limit(settings.gpu_gb, accelerator.total_memory(device) if gpu_bytes is None else gpu_bytes)
    return [
        Pool("ram", settings.ram_gb, limit, staged, staged, staged, count),
        Pool("gpu", settings.gpu_gb, there, evaluating, in_memory, from_disk),
    ]


def streams_from_disk(pools: Sequence[Pool]) -> bool:
    """Whether the model is quantized from disk because it does not fit together with what quantizing it needs."""
    return any(pool.in_memory > pool.limit for pool in pools)


def room_for_activations(pools: Sequence[Pool]) -> int:
    """Bytes of RAM for calibration activations while the model is quantized from disk; the others go to files."""
    return max(0, pools[0].limit - pools[0].from_disk)


def memory_problems(pools: Sequence[Pool]) -> Iterator[str]:
    """Why a run cannot start."""
    for pool in pools:
        if pool.least <= pool.limit:
            continue
        needed = (
            f"about {gigabytes(pool.least)} are needed ({gigabytes(pool.evaluating)} to evaluate the model, "
            f"{gigabytes(pool.from_disk)} to quantize it from disk, block by block)"
        )
        remedy = "choose a smaller model.dtype or likelihood.batch_tokens, or a machine with more"
        if pool.setting is not None:
            least = math.ceil(pool.least / GB * 100) / 100
            yield f"memory.{pool.name}_gb={pool.setting:g} is too little: {needed}; give {least:g} or more"
        else:
            kind = pool.name.upper()
            there = f"there are for each of {pool.shared_by} processes" if pool.shared_by > 1 else "there are"
            fewer = "fewer processes (dispatch), or " if pool.shared_by > 1 else ""
            yield f"the run does not fit into the {gigabytes(pool.limit)} of {kind} {there}: {needed}; {fewer}{remedy}"


def exceeded(pools: Sequence[Pool], peak: dict[str, int]) -> Iterator[str]:
    """What has taken more than a setting allows, for the record."""
    for pool in pools:
        if pool.setting is not None and peak[pool.name] > pool.limit:
            yield f"memory.{pool.name}_gb={pool.setting:g}, but {gigabytes(peak[pool.name])} were taken"


def memory_needs(design: Design, *, smallest: bool = False) -> MemoryNeeds:
    """Of a run.

    Batches are those that keep the device busy; with `smallest` the least a GPU can do with, where they adapt to what
    there is.
    """
    config, device = design.config, design.device
    works, fidelity = list(work_of_tasks(design).values()), config.fidelity
    works += [outlier_work(1, design.window_tokens)] if config.outliers.samples else []
    if fidelity.samples:
        works += fidelity_work(1, fidelity.length, fidelity.gen_length, steps=1, states=1, guided=False)
    one = smallest and device.type != "cpu"
    rows = [(work, 1 if one else batch_rows(work, device.type)) for work in works]
    return MemoryNeeds(
        weights=weight_bytes(design.arch, design.dtype),
        quantizing=_working_bytes(design) + _stored_bytes(design) if design.changes_model else 0,
        evaluating=evaluating_bytes(design.arch, design.dtype, rows),
    )


def weight_bytes(arch: Architecture, dtype: torch.dtype) -> int:
    """All parameters, a tied head once."""
    with torch.device("meta"):
        return sum(p.numel() for p in MaskedDiffusionTransformer(arch).parameters()) * dtype.itemsize


def quantized_bytes(arch: Architecture, dtype: torch.dtype, method: Method, bits: BitsConfig) -> int:
    """About what the files of a quantized model take: codes at their width, scales and zero points."""
    saved = 0  # bits
    for widths in bits.resolve(arch).blocks:
        for role, weight in widths.weight.items():
            if weight.bits == UNQUANTIZED or method.rounding_of(role) is None:
                continue
            n_in, n_out = arch.in_features(role), arch.out_features(role)
            groups = -(-n_in // group_width(n_in, weight.group_size))
            format = FORMATS[weight.format]
            of_group = 32 + weight.bits if format.block is None else format.scale_bits
            saved += n_out * (n_in * (8 * dtype.itemsize - weight.bits) - groups * of_group)
    return weight_bytes(arch, dtype) - saved // 8


def _outer_bytes(arch: Architecture, dtype: torch.dtype) -> tuple[int, int]:
    """Embedding and head."""
    embed = arch.vocab_size * arch.hidden_size * dtype.itemsize
    return embed, 0 if arch.tied_head else embed


def _working_bytes(design: Design) -> int:
    """While one block is quantized, on top of its weights."""
    method, arch = design.method, design.arch
    largest = max(sum(arch.in_features(r) * arch.out_features(r) for r in roles) for roles in arch.sites.values())
    if not design.streams:
        return COPIES * largest * 4
    parts = [method.rounding, *method.rounding_by_role.values(), *method.corrections.values()]
    needs = {name for part in parts if part is not None for name in part.needs}
    factors = sum(COLLECTORS[name].factors for name in needs)
    wide = max(arch.hidden_size, arch.mlp_size)
    return (COPIES * largest + factors * wide**2) * 4 + row_bytes(arch, design.window_tokens, 0)


def _stored_bytes(design: Design) -> int:
    """The activations of all calibration windows that are held at a time."""
    method, arch, calib = design.method, design.arch, design.config.calib
    windows = sum(1 if stream == "mean" else calib.samples for stream in design.streams)
    widths = [
        arch.in_features(arch.sites[site][0])
        for transform in method.block_transforms.values()
        for site, needs in transform.needs.items()
        if "inputs" in needs
    ]
    if method.clip is not None and "inputs" in method.clip.needs:  # of one site at a time
        widths.append(max(arch.in_features(role) for role in arch.roles))
    return (2 * windows * arch.hidden_size + calib.samples * sum(widths)) * design.window_tokens * design.dtype.itemsize


def evaluating_bytes(arch: Architecture, dtype: torch.dtype, works: Iterable[tuple[Work, int]]) -> int:
    """The largest batch of all work, each with its number of sequences, as engine and scorer estimate it."""
    return max((rows * _sequence_bytes(arch, dtype, work) for work, rows in works), default=0)


def _sequence_bytes(arch: Architecture, dtype: torch.dtype, work: Work) -> int:
    if work.kind == "generation":
        kept = cache_bytes(arch, work.length, dtype.itemsize) if work.computed else 0
        return row_bytes(arch, work.length, round(work.read)) + kept
    return work.length * token_bytes(arch, dtype.itemsize, work.length, work.target / work.length)


def _limit(setting: float | None, there: int) -> int:
    return there if setting is None else int(setting * GB)
