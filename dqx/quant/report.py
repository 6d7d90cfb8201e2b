"""What quantization did: one row per linear, what stayed in 16 bit and why, and the average bits per weight.

Convention for bits per weight: codes at their width, one scale per group (16 bits for integers and fp8, 8 for mxfp4 and
nvfp4, which adds 32 per weight matrix), for asymmetric grids one b-bit zero point per group, and where `act_order`
scatters groups one 16-bit group index per input. A linear left alone counts 16 whatever dtype the model runs in.
Embedding, norms, biases and head are not in the average.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from dqx.formats.bits import FORMATS, UNQUANTIZED

INDEX_BITS = 16


def stored_bits(
    shape: tuple[int, int], bits: int, n_groups: int, *, symmetric: bool, scattered: bool = False, format: str = "int"
) -> int:
    """Bits that a weight [O, I] with `n_groups` groups per row takes, by the convention above."""
    n_out, n_in = shape
    if bits == UNQUANTIZED:
        return UNQUANTIZED * n_out * n_in
    scales = FORMATS[format]
    per_group = scales.scale_bits + (0 if symmetric or not scales.has_zero_point else bits)
    index = INDEX_BITS * n_in if scattered else 0
    return bits * n_out * n_in + per_group * n_out * n_groups + scales.tensor_bits + index


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

    @property
    def bits_per_weight(self) -> float:
        return self.stored_bits / (self.shape[0] * self.shape[1])


@dataclass(frozen=True)
class KeptRow:
    """Parameters that were left alone; `*` in the name stands for the blocks."""

    name: str
    count: int  # tensors
    parameters: int
    reason: str


@dataclass
class QuantReport:
    """The record of one call of `quantize`."""

    method: str
    bits: str
    seed: int
    variant: str = ""
    kv_bits: int = UNQUANTIZED  # keys and values
    transforms: list[str] = field(default_factory=list)  # by name, in order
    linears: list[LinearRow] = field(default_factory=list)
    kept: list[KeptRow] = field(default_factory=list)
    calibration_sequences: int = 0
    calibration_tokens: int = 0
    seconds: float = 0.0
    from_disk: bool = False  # block by block; else the model was in memory
    peak_ram: int = 0  # bytes; the largest resident size of the process (`dqx.common.memory.watch_peaks`)
    peak_gpu: int = 0  # bytes; the most that tensors on a CUDA device took

    @property
    def average_bits(self) -> float:
        """Bits per weight over the seven linears of all blocks, scales and zero points included."""
        weights = sum(row.shape[0] * row.shape[1] for row in self.linears)
        return sum(row.stored_bits for row in self.linears) / weights if weights else float(UNQUANTIZED)

    @property
    def changed(self) -> bool:
        """Whether the model computes anything else than before, be it only in the last digits."""
        rounded = any(row.bits < UNQUANTIZED or row.activation_bits < UNQUANTIZED for row in self.linears)
        return rounded or self.kv_bits < UNQUANTIZED or bool(self.transforms)

    @property
    def notes(self) -> list[str]:
        """Every departure from what was asked, by linear."""
        return [f"{row.name}: {note}" for row in self.linears for note in row.notes]

    @classmethod
    def from_dict(cls, report: Mapping[str, Any]) -> QuantReport:
        """The report that `to_dict` turned into JSON."""
        own = {f.name: report[f.name] for f in fields(cls) if f.name in report}
        rows = [LinearRow.from_dict(row) for row in own["linears"]]
        return cls(**own | {"linears": rows, "kept": [KeptRow(**row) for row in own["kept"]]})

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts and numbers, for JSON."""
        rows = [asdict(row) | {"shape": list(row.shape), "notes": list(row.notes)} for row in self.linears]
        return {
            "method": self.method,
            "bits": self.bits,
            "variant": self.variant,
            "kv_bits": self.kv_bits,
            "transforms": self.transforms,
            "seed": self.seed,
            "average_bits": self.average_bits,
            "calibration_sequences": self.calibration_sequences,
            "calibration_tokens": self.calibration_tokens,
            "seconds": self.seconds,
            "from_disk": self.from_disk,
            "peak_ram": self.peak_ram,
            "peak_gpu": self.peak_gpu,
            "linears": rows,
            "kept": [asdict(row) for row in self.kept],
            "notes": self.notes,
        }
