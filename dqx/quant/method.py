"""A quantization method as a composition of parts, and which bits it can be asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import gcd

from dqx.models.transformer import ROLES, Architecture
from dqx.quant.activation import PerToken
from dqx.quant.bits import UNQUANTIZED, WIDTHS, BitsConfig
from dqx.quant.rounding import Rounding

QUANTIZES = ("weights", "weights_and_activations")


@dataclass(frozen=True)
class Method:
    """What `conf/method/*.yaml` fills in.

    `rounding` null: weights stay as they are (fp16). `activation` null: a weight-only method. `rounding_by_role`
    replaces the rounding of single roles (`down: {_target_: ...}`; null leaves the role in 16 bit, its input too).
    `quantizes` decides what `bits=N` means: "weights" is N-bit weights in groups of 128 with 16-bit activations,
    "weights_and_activations" is N bits for both. `calib_*` is the calibration of the method's authors, which the
    `calib` config group reads: text, windows, tokens per window.
    """

    name: str
    rounding: Rounding | None = None
    activation: PerToken | None = None
    rounding_by_role: Mapping[str, Rounding | None] = field(default_factory=dict)
    quantizes: str = "weights"
    calib_text: str = "wikitext2"
    calib_samples: int = 128
    calib_length: int = 2048

    def rounding_of(self, role: str) -> Rounding | None:
        """The rounding part of a role, or None where the role's linear stays in 16 bit."""
        return self.rounding_by_role.get(role, self.rounding)

    def quantizes_input(self, role: str) -> bool:
        """True if the role's input goes through the activation quantizer (which 16 bits makes a no-op)."""
        left_alone = role in self.rounding_by_role and self.rounding_by_role[role] is None
        return self.activation is not None and not left_alone

    @property
    def needs_data(self) -> bool:
        """True if some rounding fits to calibration activations."""
        return any(r.needs for role in ROLES if (r := self.rounding_of(role)) is not None)

    @property
    def streams(self) -> frozenset[str]:
        """Whose activations the parts look at: "quantized", "fp", both or none."""
        parts = [r for role in ROLES if (r := self.rounding_of(role)) is not None and r.needs]
        return frozenset(getattr(part, "stream", "quantized") for part in parts)

    def problems(self, bits: BitsConfig, arch: Architecture) -> list[str]:
        """Everything about this method at these bits on this architecture that cannot work, with the remedy."""
        return [
            *self._part_problems(),
            *_width_problems(bits),
            *self._pair_problems(bits),
            *_group_problems(bits, arch),
        ]

    def _part_problems(self) -> list[str]:
        found = []
        if self.quantizes not in QUANTIZES:
            found.append(f"method.quantizes={self.quantizes} is unknown; write {' or '.join(QUANTIZES)}")
        if self.quantizes == "weights_and_activations" and self.activation is None:
            found.append(
                "method.quantizes=weights_and_activations needs an activation part; set method.activation, "
                "or method.quantizes=weights"
            )
        unknown = [role for role in self.rounding_by_role if role not in ROLES]
        if unknown:
            found.append(f"method.rounding_by_role has {', '.join(unknown)}; the roles are {', '.join(ROLES)}")
        if self.rounding is not None:
            found += self.rounding.problems("method.rounding")
        for role, part in self.rounding_by_role.items():
            if part is not None:
                found += part.problems(f"method.rounding_by_role.{role}")
        if self.activation is not None:
            found += self.activation.problems("method.activation")
        return found

    def _pair_problems(self, bits: BitsConfig) -> list[str]:
        w, a = bits.weight.bits, bits.activation.bits
        rounds_weights = any(self.rounding_of(role) is not None for role in ROLES)
        if not rounds_weights and self.activation is None:
            if (w, a) != (UNQUANTIZED, UNQUANTIZED):
                return [
                    f"bits={bits.name}: {self.name} quantizes nothing; bits must be w16a16. "
                    "Full precision is part of every run: in a sweep over bits leave this method out"
                ]
            return []
        found = []
        if not rounds_weights and w != UNQUANTIZED:
            found.append(f"bits.weight.bits={w}, but method {self.name} rounds no weights; write bits.weight.bits=16")
        if self.activation is None and a != UNQUANTIZED:
            found.append(
                f"bits.activation.bits={a}, but method {self.name} quantizes weights only; write bits=w{w}a16, "
                "or take a method that quantizes activations (rtn does)"
            )
        return found


def _width_problems(bits: BitsConfig) -> list[str]:
    found = []
    for key, value in (("bits.weight.bits", bits.weight.bits), ("bits.activation.bits", bits.activation.bits)):
        if isinstance(value, bool) or value not in WIDTHS:
            found.append(f"{key}={value} is no width dqx has; 2, 3, 4, 5, 6, 7, 8 and 16 (not quantized) are")
    return found


def _group_problems(bits: BitsConfig, arch: Architecture) -> list[str]:
    size = bits.weight.group_size
    if bits.weight.bits == UNQUANTIZED or size == -1:
        return []
    roles_by_width: dict[int, list[str]] = {}
    for role in ROLES:
        roles_by_width.setdefault(arch.in_features(role), []).append(role)
    common = gcd(*roles_by_width)
    powers = [2**n for n in range(17, 3, -1) if common % 2**n == 0][:3]
    remedy = ", ".join(map(str, powers)) + " and -1 do" if powers else "-1 (one group per row) does"
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        return [f"bits.weight.group_size={size} is no number of inputs; for this model {remedy}"]
    return [
        f"bits.weight.group_size={size} does not divide {width}, the inputs of {', '.join(roles)} "
        f"({arch.n_blocks} blocks); {remedy}"
        for width, roles in roles_by_width.items()
        if width % size
    ]
