"""What training resumes from: weights, optimiser state and counters in one safetensors file; nothing is pickled."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


def save_state(path: Path, model: nn.Module, optimiser: torch.optim.Optimizer, counters: dict[str, float]) -> None:
    """Write the state; the file appears whole or not at all."""
    tensors: dict[str, Tensor] = {f"model/{name}": value for name, value in model.state_dict().items()}
    for index, entries in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser/{index}/{name}": value for name, value in entries.items()}
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, metadata={name: repr(value) for name, value in counters.items()})
    temporary.replace(path)


def load_state(path: Path, model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, float]:
    """Put the state into `model` and `optimiser`, which were made as those that were saved; returns the counters."""
    with safe_open(path, framework="pt") as f:
        names = f.keys()
        tensors = {name: f.get_tensor(name) for name in names}
        counters = {name: float(value) for name, value in (f.metadata() or {}).items()}
    model.load_state_dict({n.removeprefix("model/"): t for n, t in tensors.items() if n.startswith("model/")})
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimiser/"):
            _, index, entry = name.split("/")
            state.setdefault(int(index), {})[entry] = tensor
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    return counters
