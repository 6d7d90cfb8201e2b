"""Activations rounded by one kernel instead of a dozen.

Every step of it (range, scale, division, rounding, ...) is otherwise a kernel that reads and writes the whole
activation. `torch.compile` makes one of them, where that is asked for (`model.fused`), and only where it gives the same
numbers: the first activation of every grid and type is rounded both ways. Where a value differs, or nothing can be
compiled, the plain kernels stay in use; `said` has what was done.

N rows, of W values that share a grid or a few of them.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from dqx.formats.integers import Grid

#: What makes a compiled kernel compute as a plain one does, where this version of torch has it: true division, denormal
#: numbers kept, and the functions of PyTorch's own kernels.
AS_PLAIN = (
    "eager_numerics.division_rounding",
    "eager_numerics.disable_ftz",
    "eager_numerics.use_pytorch_libdevice",
    "emulate_precision_casts",
)
VARIANTS = 64  # of one function: types, numbers of dimensions, grids

log = logging.getLogger(__name__)
Rounds = Callable[..., Tensor]


@dataclass
class _Use:
    on: bool = False
    ways: dict[tuple[Any, ...], Rounds | None] = field(default_factory=dict)  # by grid and type; None: plain kernels
    said: list[str] = field(default_factory=list)


_use = _Use()


def use(on: bool) -> None:
    """Compile what rounds activations from now on, or do not; `said` begins anew."""
    global _use
    _use = _Use(on)
    if on:
        import torch._dynamo  # takes a second

        torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)


@contextmanager
def using(on: bool) -> Iterator[None]:
    """`use(on)` for a while."""
    use(on)
    try:
        yield
    finally:
        use(False)


def said() -> list[str]:
    """What is rounded how since `use(True)`, in plain words."""
    return list(_use.said)


def missing(device: torch.device) -> str | None:
    """What compiling for a device lacks here; None where nothing is known to."""
    names = [os.environ.get("CXX" if device.type == "cpu" else "CC"), *("g++", "clang++", "gcc", "clang", "cc")]
    if not any(name and shutil.which(name) for name in names):
        return "a C++ compiler (g++)" if device.type == "cpu" else "a C compiler (gcc)"
    return "triton" if device.type != "cpu" and find_spec("triton") is None else None


def wanted(asked: bool | None, device: torch.device) -> bool:
    """`model.fused` on this machine; None: on accelerators, where it can be compiled."""
    return asked if asked is not None else device.type in ("cuda", "xpu") and missing(device) is None


def fused_problems(asked: bool | None, device: torch.device) -> Iterator[str]:
    """Why `model.fused=true` cannot be had."""
    if asked and (lacks := missing(device)):
        yield f"model.fused=true needs {lacks}, which is not here; install it, or write model.fused=false"


def fake(grid: Grid, x: Tensor, clip_ratio: float = 1.0) -> Tensor:
    """`grid.fake`: x [..., W] rounded to grids of its own along the last dimension."""

    def plain(rows_NW: Tensor) -> Tensor:
        return grid.fake(rows_NW, clip_ratio=clip_ratio)

    return _rounded(plain, grid, clip_ratio, x)


def in_range(grid: Grid, x: Tensor, bounds: Tensor) -> Tensor:
    """x [..., W] rounded to the grid of the range `bounds` [2]; formats with blocks take it as that of a tensor."""

    def plain(rows_NW: Tensor, bounds: Tensor) -> Tensor:
        if grid.block is not None:
            return grid.for_tensor(bounds).fake(rows_NW)
        return grid.nearest(rows_NW, *grid.from_range(bounds[0], bounds[1])).to(rows_NW.dtype)

    return _rounded(plain, grid, "range", x, bounds)


def _rounded(plain: Rounds, grid: Grid, how: float | str, x: Tensor, *more: Tensor) -> Tensor:
    """What `plain` makes of x, by one kernel where that is in use. `how` tells functions of one grid apart."""
    if not _use.on or grid.identity or not x.numel():
        return plain(x, *more)
    rows, key = x.reshape(-1, x.shape[-1]), (grid, how, x.dtype, x.device.type)
    if key in _use.ways:
        return (_use.ways[key] or plain)(rows, *more).view(x.shape)
    expected = plain(rows, *more)
    try:
        way = torch.compile(plain, dynamic=True, fullgraph=True, options=_options())
        differ = int((way(rows, *more).nan_to_num() != expected.nan_to_num()).sum())
        outcome = f"plain kernels: one kernel rounds {differ} of {rows.numel()} values differently" if differ else ""
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers fail in many ways
        outcome = f"plain kernels: {type(error).__name__} when compiling"  # a record has no names of folders
        log.debug("%s", error)
    _use.ways[key] = None if outcome else way
    kind = "int" if type(grid) is Grid else type(grid).__name__.lower()
    name = f"{kind}, {grid.bits} bits, {str(x.dtype).removeprefix('torch.')}"
    _use.said.append(f"{name}: {outcome or 'one kernel, as the plain ones'}")
    if outcome:
        log.warning("%s: %s", name, outcome)
    return expected.view(x.shape)


def _options() -> dict[str, Any]:
    import torch._inductor

    known = torch._inductor.list_options()
    return {name: True for name in AS_PLAIN if name in known}
