"""GGUF: weights by the package gguf, logits by llama.cpp."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dqx.api import DiffusionLM
from dqx.common.problems import raise_if
from dqx.engines.llama_cpp import LlamaCpp
from dqx.engines.model import EngineModel
from dqx.export.readers import Pair

LIBRARY, ENGINE = "gguf", "llama.cpp"
#: Types that are dtypes of torch: what stays in 16 bit is rounded to them.
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
#: What says where a file comes from and nothing of how it computes.
ABOUT = ("general.name", "general.description")


def tensors(lm: DiffusionLM, path: Path) -> Iterator[Pair]:
    """Every tensor. Raises ValueError where the file cannot be read."""
    from dqx.export.gguf.tensors import modules

    stored = {tensor.name: tensor for tensor in _reader(path).tensors}
    for name, module, rows in modules(lm.model):
        for part in ("weight", "bias"):
            expected = getattr(module, part, None)
            if isinstance(expected, Tensor):
                expected = expected.detach().cpu() if rows is None else expected.detach().cpu()[rows]
                yield _pair(f"{name}.{part}", stored.pop(f"{name}.{part}", None), expected)
    for name, tensor in stored.items():
        yield _pair(name, tensor, None)


def _pair(name: str, tensor: Any, expected: Tensor | None) -> Pair:
    import gguf

    if tensor is None:
        return Pair(name, "", None, expected)
    kind = tensor.tensor_type.name
    found = torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))
    if expected is not None:
        dtype = PLAIN.get(kind, expected.dtype)
        found, expected = found.to(dtype), expected.to(dtype)
    return Pair(name, kind, found, expected)


def _reader(path: Path) -> Any:
    import gguf

    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # of any kind: a file may be damaged anywhere
        raise ValueError(f"the package gguf cannot read {path}: {error}") from error


def metadata(lm: DiffusionLM, path: Path) -> list[str]:
    """The keys whose values are not those that dqx writes for this model: shape, logit shift, tokenizer."""
    import gguf

    from dqx.export.gguf.metadata import add_model, add_tokenizer

    reader = _reader(path)
    with TemporaryDirectory() as folder:
        writer = gguf.GGUFWriter(Path(folder, "metadata.gguf"), lm.model.arch.family)
        add_model(writer, lm, [tensor.tensor_type for tensor in reader.tensors if len(tensor.shape) > 1])
        add_tokenizer(writer, lm.tokenizer, lm.model.arch)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        expected, found = (_values(each) for each in (gguf.GGUFReader(Path(folder, "metadata.gguf")), reader))
    return sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))


def _values(reader: Any) -> dict[str, Any]:
    own = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    return {key: value for key, value in own.items() if key not in ABOUT}


def model(lm: DiffusionLM, path: Path) -> Callable[[Tensor], Tensor]:
    """llama.cpp's logits."""
    engine = LlamaCpp(path)
    raise_if(engine.unlike(lm.model.arch))
    return EngineModel(lm.model.arch, engine)
