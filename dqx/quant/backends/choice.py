"""`backend=`: which kernel computes each linear of a quantized model.

`simulated` is `QuantLinear`: rounded weight and input, multiplied in the model's dtype. `int8` and `fp8` are kernels
that work on codes; every linear must be one that they take. `auto` gives each linear the kernel that takes it and that
is right on this device, and leaves the others simulated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache

import torch

from dqx.formats.bits import BitsConfig
from dqx.models.architecture import Architecture
from dqx.models.transformer import MaskedDiffusionTransformer
from dqx.quant.backends.fp8 import FP8Linear
from dqx.quant.backends.int8 import Int8Linear
from dqx.quant.backends.kernel import KernelLinear, Product
from dqx.quant.linear import QuantLinear
from dqx.quant.method import Method

KERNELS: dict[str, type[KernelLinear]] = {kernel.name: kernel for kernel in (Int8Linear, FP8Linear)}
SIMULATED, AUTO = "simulated", "auto"
BACKENDS = (SIMULATED, *KERNELS, AUTO)


def products(method: Method, bits: BitsConfig, arch: Architecture) -> dict[str, Product]:
    """What the linears of a model multiply after quantization, by their names (`blocks.0.q`)."""
    found = {}
    for index, widths in enumerate(bits.resolve(arch).blocks):
        for role in arch.roles:
            rounding, weight = method.rounding_of(role), widths.weight[role]
            found[f"blocks.{index}.{role}"] = Product(
                weight,
                None if rounding is None else rounding.grid(weight),
                widths.activation[role],
                method.quantizes_input(role) and getattr(method.activation, "grid_per_token", False),
                arch.in_features(role),
                arch.out_features(role),
            )
    return found


def backend_problems(backend: str, method: Method, bits: BitsConfig, arch: Architecture) -> Iterator[str]:
    """The linears that a kernel which is asked for by name does not take, and why; as far as settings tell."""
    if backend not in KERNELS:
        return
    kernel, reasons = KERNELS[backend], dict[str, dict[str, list[str]]]()
    for name, product in products(method, bits, arch).items():
        if told := ", ".join(kernel.unfit(product)):
            _, block, role = name.split(".")
            reasons.setdefault(told, {}).setdefault(role, []).append(f"b{block}")
    if reasons:
        listed = "; ".join(f"{_roles(roles, arch)} with {why}" for why, roles in reasons.items())
        yield (
            f"backend={backend} takes {kernel.takes}, and cannot take {listed}; write bits={kernel.bits} with a method "
            "that rounds both, or backend=auto, which simulates what no kernel takes"
        )


def _roles(blocks: Mapping[str, list[str]], arch: Architecture) -> str:
    """`q, k, down (b0, b1)`; blocks where they are not all."""
    return ", ".join(r if len(b) == arch.n_blocks else f"{r} ({', '.join(b)})" for r, b in blocks.items())


def device_problems(backend: str, device: torch.device) -> Iterator[str]:
    """What a kernel that is asked for by name gets wrong on this device."""
    if backend in KERNELS and (wrong := untrusted(backend, device)):
        yield f"backend={backend} cannot be had on this machine's {device.type}: {wrong}; write backend=simulated"


@cache
def untrusted(kernel: str, device: torch.device) -> str | None:
    """What a kernel gets wrong on a device; None where it is right. Tried once."""
    return KERNELS[kernel].untrusted(device)


def chosen(backend: str, method: Method, bits: BitsConfig, arch: Architecture, device: torch.device) -> dict[str, str]:
    """The kernel of every linear that has one, by the linear's name; the others are simulated."""
    tried = () if backend == SIMULATED else KERNELS if backend == AUTO else (backend,)
    right = [KERNELS[name] for name in tried if untrusted(name, device) is None]
    asked = products(method, bits, arch).items() if right else ()
    takers = {name: next((k.name for k in right if not any(k.unfit(product))), SIMULATED) for name, product in asked}
    return {name: kernel for name, kernel in takers.items() if kernel != SIMULATED}


def counted(kernels: Mapping[str, str], n_linears: int) -> dict[str, int]:
    """How many of a model's linears each kernel computes, and how many are simulated."""
    counts = dict(Counter(kernels.values()))
    return counts | ({SIMULATED: rest} if (rest := n_linears - len(kernels)) else {})


def install(model: MaskedDiffusionTransformer, kernels: Mapping[str, str]) -> None:
    """Put kernels into a quantized model, in place of the linears of these names; one weight at a time is held twice.

    Raises ValueError for a linear that is not quantized, or whose weight was changed afterwards.
    """
    for name, kernel in kernels.items():
        parent, _, role = name.rpartition(".")
        block = model.get_submodule(parent)
        linear = getattr(block, role)
        if not isinstance(linear, QuantLinear):
            raise ValueError(f"{name} is no quantized linear; quantize the model first")
        try:
            setattr(block, role, KERNELS[kernel](linear))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
