"""compressed-tensors: weights by the package of that name, logits by transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from dqx.api import DiffusionLM
from dqx.common.problems import ConfigProblems
from dqx.export.compressed_tensors import stored_names
from dqx.export.readers import Pair
from dqx.export.readers.dequantized import stored
from dqx.models.hub_config import LARGEST_CONFIG, read_json
from dqx.models.transformer import shift_logits

LIBRARY, ENGINE = "compressed-tensors", "transformers"
#: The layout whose zero points transformers reads only where it unpacks all weights.
UNPACKED = "pack-quantized"


def tensors(lm: DiffusionLM, path: Path) -> Iterator[Pair]:
    """Every weight, unpacked by the package's own code. Raises ValueError where the folder cannot be read."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    config = QuantizationConfig.model_validate(_quantization(path))
    [scheme] = config.config_groups.values()
    compressor, there = BaseCompressor.get_value_from_registry(config.format), stored(path)
    parameters = dict(lm.model.named_parameters())
    for ours, theirs in stored_names(lm).items():
        stem, expected = theirs.removesuffix("weight"), parameters[ours].detach().cpu()
        if theirs.endswith(".weight") and f"{stem}weight_scale" in there:
            parts = {key.removeprefix(stem): there.pop(key) for key in list(there) if key.startswith(f"{stem}weight")}
            try:
                found = compressor.decompress(parts, scheme)["weight"].to(expected.dtype)
            except Exception as error:  # of any kind: parts may be damaged
                raise ValueError(f"the package {LIBRARY} cannot unpack {theirs} of {path}: {error}") from error
            yield Pair(theirs, config.format, found, expected)
        else:
            found = there.pop(theirs, None)
            yield Pair(theirs, "" if found is None else str(found.dtype).removeprefix("torch."), found, expected)
    for name, tensor in there.items():
        yield Pair(name, str(tensor.dtype).removeprefix("torch."), tensor, None)


def _quantization(path: Path) -> dict[str, object]:
    config: dict[str, object] = read_json(path / "config.json", LARGEST_CONFIG)["quantization_config"]
    return config


def model(lm: DiffusionLM, path: Path) -> Callable[[Tensor], Tensor]:
    """The logits of transformers' own class."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    packed = _quantization(path)["format"] == UNPACKED
    own = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if packed else {}
    try:
        reader = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False, dtype="auto", **own)
    except Exception as error:
        raise ConfigProblems([f"transformers cannot load {path}: {error}"]) from error

    def logits(ids: Tensor) -> Tensor:
        with torch.no_grad():
            rows = reader(ids).logits.float()
        return shift_logits(rows) if lm.model.arch.logit_shift else rows

    return logits
