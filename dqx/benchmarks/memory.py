"""How much memory and time quantizing a whole model from disk takes: a random checkpoint of a model's full size.

    python -m dqx.benchmarks.memory FOLDER                                LLaDA-8B, rtn: 16 GB on disk, and the result
    python -m dqx.benchmarks.memory FOLDER --method gptq --samples 4      with 4 calibration sequences
    python -m dqx.benchmarks.memory FOLDER --method awq --blocks 2        the first two blocks

The checkpoint has a model's real shapes and random bfloat16 weights in the hub's format, one file per block, written
without ever holding it. It is quantized in a process of its own, whose largest resident size is the figure, and both
folders are removed at the end. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import shutil
import time
import zlib
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from dqx.benchmarks.cases import MODELS
from dqx.benchmarks.common import Say, check, in_process, options, write_figures
from dqx.common.files import write_json
from dqx.common.memory import GB
from dqx.config import compose
from dqx.models.checkpoint import inspect, save_shards, skeleton, tensor_names
from dqx.models.family import family_of
from dqx.models.transformer import Architecture
from dqx.quant import QuantReport, quantize_checkpoint
from dqx.quant.checkpoint.on_disk import Loading

POOL = 2**24 + 43  # random numbers that all weights are cut from; the prime keeps rows of a matrix apart
SOURCE, OUTPUT = "source", "quantized"  # in the folder


def write_checkpoint(arch: Architecture, folder: Path, seed: int = 0) -> int:
    """Write random weights of `arch` to a new folder, a file at a time; how many bytes. Same seed, same weights."""
    folder.mkdir(parents=True)
    write_json(folder / "config.json", family_of(arch.family).config(arch))
    pool = torch.randn(POOL, generator=torch.Generator().manual_seed(seed)).bfloat16()
    files = _files(arch)
    shards = ({hub: _random(name, shape, pool) for name, (hub, shape) in names.items()} for names in files)
    return save_shards(folder, shards, len(files))


def _files(arch: Architecture) -> list[dict[str, tuple[str, torch.Size]]]:
    """Hub name and shape by our name: embedding, head with the final norm, then block by block."""
    shapes = {name: parameter.shape for name, parameter in skeleton(arch).named_parameters()}

    def file(named: tuple[str, str]) -> str:
        first, second, *_ = named[0].split(".")
        return f"{first}.{second}" if first == "blocks" else first.replace("norm", "head")

    grouped = groupby(tensor_names(arch).items(), file)
    return [{name: (hub, shapes[name]) for name, hub in names} for _, names in grouped]


def _random(name: str, shape: torch.Size, pool: Tensor) -> Tensor:
    """Gains of 1 and biases of 0, a unit embedding, linears of N(0, 1/inputs)."""
    if len(shape) == 1:
        return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=pool.dtype)
    start = zlib.crc32(name.encode()) % len(pool)
    size = shape.numel()
    rolled = pool.roll(-start)
    values = rolled[:size] if size <= len(pool) else rolled.repeat(-(-size // len(pool)))[:size]
    return values.view(shape) * (1.0 if name.startswith("embed") else shape[1] ** -0.5)


def quantized(args: argparse.Namespace, say: Say) -> QuantReport:
    """Quantize the checkpoint in `args.folder`; what the process that is measured does."""
    torch.set_num_threads(args.threads)
    choice = compose.select(method=args.method, bits=args.bits)
    method, source = compose.build(choice.method), inspect(str(args.folder / SOURCE))
    noise = torch.Generator().manual_seed(1)
    ids = torch.randint(0, source.arch.vocab_size, (args.samples, args.length), generator=noise)
    batches = [ids] if method.needs_data else []
    loading, output = Loading(activations_gb=args.activations_gb), args.folder / OUTPUT
    return quantize_checkpoint(source, output, method, choice.bits, batches, loading=loading, progress=False)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = options("memory", __doc__)
    parser.add_argument("folder", type=Path, help="a new folder, with room for the checkpoint and the quantized one")
    parser.add_argument("--model", default="llada_8b", choices=MODELS, help="whose shapes (llada_8b)")
    parser.add_argument("--method", default="rtn", help="a choice of the config group `method` (rtn)")
    parser.add_argument("--bits", default="w4a16", help="a choice of the config group `bits` (w4a16)")
    parser.add_argument("--blocks", type=int, help="as many blocks only (all)")
    parser.add_argument("--samples", type=int, default=4, help="calibration sequences (4)")
    parser.add_argument("--length", type=int, default=256, help="tokens of each (256)")
    parser.add_argument("--activations-gb", type=float, default=1.0, help="RAM for their activations (1)")
    parser.add_argument("--threads", type=int, default=1, help="of the measured process (1)")
    args = parser.parse_args(argv)
    if args.folder.exists():
        parser.error(f"{args.folder} exists already; name a new folder")
    check(parser, args, "blocks", "samples", "length", "threads")
    return args


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    arch = MODELS[args.model]
    arch = arch if args.blocks is None else replace(arch, n_blocks=args.blocks)
    try:
        started = time.perf_counter()
        size = write_checkpoint(arch, args.folder / SOURCE)
        print(f"checkpoint: {size / GB:.2f} GB, written in {time.perf_counter() - started:.0f} s")
        report = in_process(quantized, args)
        quantized_size = sum(path.stat().st_size for path in (args.folder / OUTPUT).iterdir())
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)
    print(
        f"{args.model}, {arch.n_blocks} blocks, {report.method} {report.bits}, {report.calibration_tokens} calibration "
        f"tokens, {args.threads} threads: {report.seconds:.0f} s, at most {report.peak_ram / GB:.2f} GB resident"
    )
    figures = {
        "family": arch.family,
        "blocks": arch.n_blocks,
        "method": report.method,
        "bits": report.bits,
        "tokens": report.calibration_tokens,
        "threads": args.threads,
        "checkpoint_gb": size / GB,
        "quantized_gb": quantized_size / GB,
        "seconds": report.seconds,
        "peak_ram_gb": report.peak_ram / GB,
        "notes": len(report.notes),
    }
    write_figures(args.json, figures)


if __name__ == "__main__":
    main()
