"""What quantization did: one row per linear, what stayed in 16 bit and why, and the average bits per weight.

Convention for bits per weight: codes at their width, one scale per group (16 bits for integers and fp8, 8 for mxfp4 and
nvfp4, which adds 32 per weight matrix; in GGUF's formats what the file takes for scales and minima), for asymmetric
integers one b-bit zero point per group, and where `act_order` scatters groups one 16-bit group index per input. Binary
grids (D2Quant, Quant-dLLM) have a sign per weight and term, 16 bits per term, group and row, 16 bits per column scale
that no other linear took over, and 2 bits per group where groups differ in their terms. A linear left alone counts 16
whatever dtype the model runs in.
Embedding, norms, biases and head are not in the average.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from html import escape
from statistics import fmean
from typing import Any

import torch
from torch import nn

from dqx.formats.binary import BinaryGrid
from dqx.formats.bits import FORMATS, UNQUANTIZED, BitsConfig, WeightBits, block_range
from dqx.formats.weight import QuantizedWeight
from dqx.quant.linear import QuantLinear
from dqx.quant.method import Method

INDEX_BITS = 16
BINARY = "binary"  # the format of a weight whose levels were fitted to it, in place of a format of `bits`
SCALE_BITS = 16  # of a row or column of a binary grid
TERMS_BITS = 2


def stored_bits(shape: tuple[int, int], bits: WeightBits, rounded: QuantizedWeight | None = None) -> int:
    """Bits that a weight of `shape` (outputs, inputs) takes; None: it is not rounded."""
    n_out, n_in = shape
    if rounded is None:
        return UNQUANTIZED * n_out * n_in
    index = INDEX_BITS * n_in if bool((rounded.group_index.diff() < 0).any()) else 0  # groups of scattered inputs
    if isinstance(rounded.grid, BinaryGrid):
        return _binary_bits(rounded) + index
    scales = FORMATS[bits.format]
    per_group = scales.scale_bits + (0 if bits.symmetric or scales.symmetric is not None else bits.bits)
    return bits.bits * n_out * n_in + per_group * n_out * rounded.scale.shape[1] + scales.tensor_bits + index


def _binary_bits(rounded: QuantizedWeight) -> int:
    """Signs, scales of rows and columns and, where groups differ in their terms, how many each has."""
    n_out, n_in = rounded.codes.shape
    terms = torch.tensor(rounded.terms or [rounded.grid.bits] * rounded.scale.shape[1])
    of_inputs = int(terms[rounded.group_index.cpu()].sum())  # terms, summed over inputs
    columns = 0 if rounded.column_scale is None else n_in if rounded.column_scale.shape[1] == 1 else of_inputs
    return n_out * of_inputs + SCALE_BITS * (n_out * int(terms.sum()) + columns) + TERMS_BITS * len(rounded.terms)


@dataclass(frozen=True)
class LinearRow:
    """One linear of one block."""

    name: str  # blocks.0.q
    block: int
    role: str
    shape: tuple[int, int]  # outputs, inputs
    bits: int
    group_size: int
    symmetric: bool
    activation_bits: int
    rounding: str | None  # the part that rounded the weight
    stored_bits: int
    weight_error: float  # ||W_q - W||^2 / ||W||^2
    output_error: float | None  # the same of (at least 512) outputs on the calibration tokens; None without data
    format: str = "int"
    notes: tuple[str, ...] = ()  # where the rounding could not do exactly what was asked

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> LinearRow:
        """The row that JSON has with lists for tuples."""
        return cls(**{**row, "shape": tuple(row["shape"]), "notes": tuple(row["notes"])})


@dataclass(frozen=True)
class KeptRow:
    """Parameters that were left alone; `*` in the name stands for the blocks."""

    name: str
    count: int  # tensors
    parameters: int
    reason: str


@dataclass(repr=False)
class QuantReport:
    """The record of one call of `quantize`."""

    method: str
    bits: str
    seed: int
    variant: str = ""
    kv_bits: int = UNQUANTIZED  # keys and values, the fewer of the two
    transforms: list[str] = field(default_factory=list)  # by name, in order
    linears: list[LinearRow] = field(default_factory=list)
    kept: list[KeptRow] = field(default_factory=list)
    calibration_sequences: int = 0
    calibration_tokens: int = 0
    seconds: float = 0.0
    from_disk: bool = False  # block by block; else the model was in memory
    peak_ram: int = 0  # bytes; the largest resident size of the process (`dqx.common.memory.watch_peaks`)
    peak_gpu: int = 0  # bytes; the most that tensors on an accelerator took

    @property
    def average_bits(self) -> float:
        """Bits per weight over the seven linears of all blocks, scales and zero points included."""
        weights = sum(row.shape[0] * row.shape[1] for row in self.linears)
        return sum(row.stored_bits for row in self.linears) / weights if weights else float(UNQUANTIZED)

    def __repr__(self) -> str:
        what = " ".join(filter(None, (self.method, self.variant, self.bits)))
        return f"QuantReport({what}: {len(self.linears)} linears, {self.average_bits:.2f} bits per weight)"

    def _repr_html_(self) -> str:
        """For notebooks: the linears of each role, and how far quantization moved them on average."""
        table = ["role", "linears", "weights, bits", "inputs, bits", "weight error", "output error"], *self._by_role()
        lines = ("".join(f"<td>{escape(cell)}</td>" for cell in line) for line in table)
        return f"<p>{escape(repr(self))}</p><table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"

    def _by_role(self) -> Iterator[list[str]]:
        for role in dict.fromkeys(row.role for row in self.linears):
            rows = [row for row in self.linears if row.role == role]
            errors = [row.weight_error for row in rows], [e for row in rows if (e := row.output_error) is not None]
            widths = {row.bits for row in rows}, {row.activation_bits for row in rows}
            yield [
                *(role, str(len(rows))),
                *("/".join(map(str, sorted(of_rows))) for of_rows in widths),
                *(f"{fmean(of_rows):.2e}" if of_rows else "" for of_rows in errors),
            ]

    @property
    def changed(self) -> bool:
        """Whether the model computes anything else than before, be it only in the last digits."""
        rounded = any(row.bits < UNQUANTIZED or row.activation_bits < UNQUANTIZED for row in self.linears)
        return rounded or self.kv_bits < UNQUANTIZED or bool(self.transforms)

    @property
    def notes(self) -> list[str]:
        return [f"{row.name}: {note}" for row in self.linears for note in row.notes]

    @classmethod
    def from_dict(cls, report: Mapping[str, Any]) -> QuantReport:
        own = {f.name: report[f.name] for f in fields(cls) if f.name in report}
        rows = [LinearRow.from_dict(row) for row in own["linears"]]
        return cls(**own | {"linears": rows, "kept": [KeptRow(**row) for row in own["kept"]]})

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts and numbers, for JSON and `from_dict`."""
        rows = [asdict(row) | {"shape": list(row.shape), "notes": list(row.notes)} for row in self.linears]
        return asdict(self) | {"linears": rows, "average_bits": self.average_bits, "notes": self.notes}


def kept_rows(model: nn.Module, method: Method, bits: BitsConfig) -> list[KeptRow]:
    """Every parameter that is not a rounded weight, with the reason; blocks with the same one are counted together."""
    sizes: dict[tuple[str, str], list[int]] = {}
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        owner = modules[name.rpartition(".")[0]]
        if isinstance(owner, QuantLinear) and owner.scale is not None and name.endswith(".weight"):
            continue
        row = re.sub(r"^blocks\.\d+\.", "blocks.*.", name), _reason(name, method, bits)
        sizes.setdefault(row, []).append(parameter.numel())
    return [KeptRow(name, len(counts), sum(counts), reason) for (name, reason), counts in sizes.items()]


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
    index, widths = int(name.split(".")[1]), bits.settings("weight")
    entry = next((entry for entry in bits.blocks if index in block_range(entry)), "")
    by_block, by_role = f"bits.blocks.{entry}", f"bits.overrides.{role}.weight"
    keys = (f"{by_block}.{role}.weight", by_role, f"{by_block}.weight", "bits.weight.bits")
    return next(f"{key}={widths[key]}" for key in keys if widths.get(key) is not None)
