"""Dequantized folders: weights by safetensors. No class outside of dqx computes LLaDA or Dream without a file of code,
so that logits are those of dqx's own loading of the folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from dqx.api import DiffusionLM, load
from dqx.export.readers import Pair
from dqx.export.weights import held_architecture
from dqx.models.checkpoint import tensor_names

LIBRARY, ENGINE = "safetensors", "dqx.load"


def tensors(lm: DiffusionLM, path: Path) -> Iterator[Pair]:
    """Every tensor. Raises ValueError where the folder cannot be read."""
    there, parameters = stored(path), dict(lm.model.named_parameters())
    for ours, theirs in tensor_names(held_architecture(lm.model)).items():
        found = there.pop(theirs, None)
        yield Pair(theirs, _kind(found), found, parameters[ours].detach().cpu())
    for name, tensor in there.items():
        yield Pair(name, _kind(tensor), tensor, None)


def _kind(tensor: Tensor | None) -> str:
    return "" if tensor is None else str(tensor.dtype).removeprefix("torch.")


def stored(path: Path) -> dict[str, Tensor]:
    """The tensors of a folder by name. Raises ValueError where a file is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        try:
            tensors |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} cannot be read: {error}") from error
    return tensors


def model(lm: DiffusionLM, path: Path) -> Callable[[Tensor], Tensor]:
    """The logits of the folder as dqx loads it."""
    return load(path, device=str(lm.model.device), mask_token_id=lm.model.arch.mask_token_id).logits
