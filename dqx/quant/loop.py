"""Quantize a model block by block, each as `block.py` does it; the output of a finished block feeds the next one.

Calibration sequences run one at a time, and only statistics and the inputs of the current block are kept. Attention is
that of the model itself, or of the passes of its sampler where a batch has them (`CalibBatch.passes`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from rich import progress as bars
from rich.console import Console
from torch import Tensor

from dqx.common import accelerator
from dqx.common.heartbeat import beat
from dqx.common.memory import peak_ram
from dqx.formats.bits import UNQUANTIZED, BitsConfig
from dqx.models.transformer import MaskedDiffusionTransformer
from dqx.models.vocabulary import id_problems
from dqx.quant.activations_store import Row
from dqx.quant.block import BlockWork
from dqx.quant.home import Home, Progress
from dqx.quant.linear import QuantLinear
from dqx.quant.method import Method
from dqx.quant.protocols import Context, ModelChange
from dqx.quant.report import LinearRow, QuantReport, kept_rows
from dqx.quant.stream import Stream
from dqx.quant.token_weight import token_weights


class Batch(Protocol):
    """What the loop reads of a calibration batch: its token ids [B, T]."""

    @property
    def ids(self) -> Tensor: ...


#: What to do where the model and its quantization do not fit into a device together.
IN_MEMORY = "take fewer or shorter calibration windows, or dqx.quant.quantize_checkpoint: one block in memory at a time"

#: Calibration batches, or their token ids alone: tensors [B, T] or [T], or lists of ids.
Batches = Tensor | Sequence[Batch | Tensor | Sequence[int]]


@dataclass(frozen=True)
class Assignment:
    """What is to be done to a model, wherever it lies."""

    method: Method
    bits: BitsConfig
    ids: Sequence[Tensor] = ()  # [B, T], of the calibration batches
    seed: int = 0  # for parts that draw random numbers
    progress: bool = True  # show a bar
    committed: Sequence[Tensor] = ()  # [B, T], when each token is written, if the batches say so (`CalibBatch`)
    passes: Sequence[Tensor | None] = ()  # [B, 4, T] of each batch, who sees whom (`CalibBatch`)


def quantize(
    model: MaskedDiffusionTransformer,
    method: Method,
    bits: BitsConfig,
    batches: Batches = (),
    *,
    seed: int = 0,
    progress: bool = True,
) -> QuantReport:
    """Quantize `model` in place: its linears become `QuantLinear`s. `quantize_checkpoint` does the same on disk.

    Args:
        model: a loaded model that is not quantized yet.
        method: what is done; at 16 bits transforms are applied all the same, which leaves the function as it was.
        bits: widths, groups and formats.
        batches: the calibration text, as `CalibBatch`es or token ids; none where the method needs no data (rtn).
        seed: for parts that draw random numbers.
        progress: show a bar.

    Returns:
        What was done, linear by linear.

    Raises:
        ValueError: for a method and bits that cannot work together, for batches that are missing or no token ids, for
            weights or activations that are not finite, and for a model that is quantized already, or in part by an
            attempt that failed.
        torch.OutOfMemoryError: where the device is too small, with what to change.
    """
    with accelerator.advising(IN_MEMORY):
        asked = Assignment(method, bits, token_ids(batches), seed, progress, commitments(batches), layouts(batches))
        return quantize_blocks(Home(model, model.device), asked)


def token_ids(batches: Batches) -> list[Tensor]:
    """The token ids [B, T] of calibration batches. Raises ValueError for what are none."""
    rows: list[Tensor] = []
    for i, batch in enumerate([batches] if isinstance(batches, Tensor) else batches):
        try:
            ids = torch.as_tensor(getattr(batch, "ids", batch))
        except (TypeError, ValueError, RuntimeError):
            ids = torch.empty(0)
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or ids.dim() not in (1, 2):
            what = f"{ids.dtype} tensor {list(ids.shape)}" if isinstance(batch, Tensor) else type(batch).__name__
            raise ValueError(
                f"batches[{i}] is of type {what}; calibration takes token ids, as integer tensors [B, T] or [T], such "
                "as tokenizer(text, return_tensors='pt').input_ids"
            )
        rows.append(ids if ids.dim() == 2 else ids[None])
    return rows


def commitments(batches: Batches) -> list[Tensor]:
    """When the tokens of calibration batches are written, their `committed` [B, T]; [] where one does not say."""
    times = [getattr(batch, "committed", None) for batch in batches]
    return [time for time in times if time is not None] if all(time is not None for time in times) else []


def layouts(batches: Batches) -> list[Tensor | None]:
    """Who sees whom in each batch, its `passes` [B, 4, T]; None for text, [] where all of them are."""
    passes = [getattr(batch, "passes", None) for batch in batches]
    return [] if all(table is None for table in passes) else passes


@torch.no_grad()
def quantize_blocks(home: Home, asked: Assignment) -> QuantReport:
    """`quantize` for a model wherever it lies, from where an earlier attempt has stopped."""
    started = time.perf_counter()
    method, bits, arch, device = asked.method, asked.bits, home.model.arch, home.device
    problems = method.problems(bits, arch)
    if home.progress is None and any(isinstance(module, QuantLinear) for module in home.model.modules()):
        problems.append("the model is quantized already; load its weights again")
    elif home.model.unfinished:
        problems.append("an attempt to quantize the model has failed on the way; load its weights again")
    widths = bits.resolve(arch)
    needed = method.streams(widths)
    if needed and not asked.ids:
        problems.append(f"method {method.name} fits to activations; give at least one calibration batch")
    wrong = {problem for rows in asked.ids for problem in id_problems(rows, arch.vocab_size)}
    problems += [f"the calibration text: {problem}" for problem in sorted(wrong)[:1]]
    if problems:
        raise ValueError("\n".join(problems))

    home.model.unfinished = True
    ids = [rows.to(device) for rows in asked.ids] if needed else []
    done = home.progress or Progress()
    report = QuantReport(
        method.name,
        bits.name,
        asked.seed,
        variant=method.variant,
        kv_bits=UNQUANTIZED if method.kv is None else min(widths.usual.keys.bits, widths.usual.values.bits),
        transforms=list(method.transforms),
        linears=list(done.rows),
        calibration_sequences=sum(len(rows) for rows in ids),
        calibration_tokens=sum(rows.numel() for rows in ids),
        from_disk=home.from_disk,
    )
    context = Context(arch, widths.usual, method, asked.seed, store=home.store)
    changes = method.changes(context, device)

    weights = done.weights

    def stream(name: str, inputs: Row | None = None) -> Stream:
        mean, passes = name == "mean", asked.passes if needed else ()
        return Stream(home.model, ids, mean=mean, store=home.store, inputs=inputs, weights=weights, passes=passes)

    if home.progress is None:
        with home.outer():
            if method.token_weight is not None and needed:
                weights = token_weights(method.token_weight, home, ids, asked.committed, asked.passes)
            for change in changes:
                change.outer(home.model)
            streams = {name: stream(name) for name in sorted(needed)}
    else:
        streams = {name: stream(name, inputs) for name, inputs in done.inputs.items()}

    tables = next(iter(streams.values())).tables if streams else None

    def note(blocks: int) -> None:
        inputs = {name: stream.inputs for name, stream in streams.items()}
        report.seconds = done.seconds + time.perf_counter() - started
        report.peak_ram = max(done.peak_ram, peak_ram())
        report.peak_gpu = max(done.peak_gpu, accelerator.peak_memory(device))
        home.note(Progress(blocks, report.linears, inputs, weights, report.seconds, report.peak_ram, report.peak_gpu))

    with _progress_bar(asked.progress) as bar:
        steps = len(method.steps(arch))
        name = f"{method.name} {bits.name}"
        task = bar.add_task(name, total=arch.n_blocks * steps, completed=done.blocks * steps)
        note(done.blocks)

        def advance() -> None:
            beat()
            bar.advance(task)
            block = min(int(bar.tasks[task].completed) // steps + 1, arch.n_blocks)
            bar.update(task, description=f"{name}, block {block} of {arch.n_blocks}")

        for index in range(done.blocks, arch.n_blocks):
            work = context.at(index=index, widths=widths.blocks[index], tables=tables)
            report.linears += _one_block(home, method, changes, streams, work, advance)
            note(index + 1)
    report.kept = kept_rows(home.model, method, bits)
    del home.model.unfinished  # back to the class's False: a model that was stored and loaded is the same
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
    work = BlockWork(block, method, streams, context)
    rows: list[LinearRow] = []
    for rows_of_site in work.quantize():
        rows += rows_of_site
        advance()
    if context.index + 1 == context.arch.n_blocks:
        work.correct_final(home.model.norm)
    else:
        for name, stream in streams.items():
            stream.advance(work.intact if name == "fp" else block)
    home.put(context.index, block)
    return sorted(rows, key=lambda row: context.arch.roles.index(row.role))


def _progress_bar(enabled: bool) -> bars.Progress:
    done = bars.TextColumn("{task.description}"), bars.BarColumn(), bars.MofNCompleteColumn(), bars.TextColumn("sites")
    time_left = bars.TextColumn("left"), bars.TimeRemainingColumn()
    console = Console(stderr=True)
    return bars.Progress(
        *done,
        bars.TimeElapsedColumn(),
        *time_left,
        console=console,
        disable=not enabled,
        transient=console.is_terminal,
    )
