"""Quantized checkpoints: a folder of safetensors and one JSON file, from which the same model is built again.

    quantized.json             architecture, method, bits, report; of every other file SHA-256, bytes, the bytes in
                               memory of what it holds, and which linears are not packed, with the reason
    embed.safetensors          the embedding
    head.safetensors           the final norm and, where it is not the embedding's tensor, the head
    norm.safetensors           the final norm's bias, where quantization gave it one
    block-00000.safetensors    one file per block; `structure` in its header says which modules its tensors belong to

Rounded weights are stored at their true width, as codes, with the scales and zero points of their grids:
`packed_linear.py` has the tensors. All other parameters are stored as the model holds them. What else quantization put
into a block (quantizers of inputs, keys and values; rotations and divisions at run time) is described by its class and
options, of which tensors lie in the file. Only `storable` classes are built, so reading a checkpoint runs no code that
it names. Nothing is fitted again: weights, and so logits, are equal to the bit.

Version 1 had rounded weights in the model's dtype; its folders are read as well.

Files appear whole or not at all, and so does the folder.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dqx.common import accelerator
from dqx.common.files import write_json
from dqx.formats.binary import BinaryGrid
from dqx.formats.bits import ActivationBits, BitsConfig, WeightBits
from dqx.formats.floats import FP8, MXFP4, NVFP4
from dqx.formats.gguf import MinimumGrid, MinimumSuperblocks, SymmetricSuperblocks
from dqx.formats.integers import Grid
from dqx.models.checkpoint import CheckpointError, assign, skeleton, too_large
from dqx.models.family import family_of
from dqx.models.hub_config import QUANTIZED
from dqx.models.transformer import Architecture, Block, MaskedDiffusionTransformer, block_of
from dqx.quant.checkpoint.packed_linear import UNPACKED, packed
from dqx.quant.linear import QuantLinear
from dqx.quant.method import Method
from dqx.quant.registry import STORABLE, storable, storable_class
from dqx.quant.report import QuantReport

log = logging.getLogger(__name__)
VERSION = 2
READ = (1, 2)
EMBED, HEAD, NORM = "embed.safetensors", "head.safetensors", "norm.safetensors"
BLOCK = "block-{:05d}.safetensors"

GGUF = (MinimumGrid, MinimumSuperblocks, SymmetricSuperblocks)
for cls in (WeightBits, ActivationBits, Grid, FP8, MXFP4, NVFP4, BinaryGrid, *GGUF):
    storable(cls)


def save_quantized(
    model: MaskedDiffusionTransformer, report: QuantReport, folder: str | Path, *, method: Method, bits: BitsConfig
) -> None:
    """Write a model that `quantize` has changed, with its report, to a new folder.

    Raises ValueError where the folder exists, or for a module of a class that is not `storable`.
    """
    with new_folder(Path(folder)) as unfinished:
        shards = write_outer(unfinished, model)
        for index, block in enumerate(model.blocks):
            assert isinstance(block, Block)
            shards |= write_block(unfinished, index, block)
        shards |= write_norm(unfinished, model)
        write_recipe(unfinished, model.arch, report, shards, method=method, bits=bits)


def load_quantized(
    folder: str | Path, device: torch.device | str = "cpu", *, verify: bool = True
) -> tuple[MaskedDiffusionTransformer, QuantReport]:
    """The model that was saved, on `device` and in eval mode, and the report of its quantization.

    `verify` compares every file with its checksum first. Raises CheckpointError for a folder or file that is missing,
    damaged or of another version.
    """
    folder = Path(folder)
    recipe = read_recipe(folder)
    if verify:
        verify_shards(folder, recipe)
    shape = recipe["architecture"]
    shape["end_token_ids"] = tuple(shape.get("end_token_ids", ()))
    arch = family_of(shape["family"]).architecture_class.read(shape)
    model = skeleton(arch)
    size = sum(shard.get("bytes_in_memory", shard["bytes"]) for shard in recipe["shards"].values())
    with accelerator.advising(too_large(size)):
        read_outer(folder, model, device)
        for index in range(arch.n_blocks):
            model.blocks[index] = read_block(folder, index, arch, device)
    return model, QuantReport.from_dict(recipe["report"])


def read_recipe(folder: Path) -> dict[str, Any]:
    """What `quantized.json` says. Raises CheckpointError where there is none that this version reads."""
    path = folder / QUANTIZED
    try:
        recipe: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read; a quantized checkpoint is a folder that holds it") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if recipe.get("version") not in READ:
        known = " and ".join(map(str, READ))
        raise CheckpointError(f"{path} has version {recipe.get('version')}; this version of dqx reads {known}")
    return recipe


def verify_shards(folder: Path, recipe: Mapping[str, Any]) -> None:
    """Compare every file with its checksum. Raises CheckpointError naming those that differ."""
    expected = {folder / name: shard["sha256"] for name, shard in recipe["shards"].items()}
    if damaged := [path.name for path, sha in expected.items() if not path.is_file() or checksum(path) != sha]:
        raise CheckpointError(f"{folder}: {', '.join(damaged)} missing or changed since written; quantize again")


def write_recipe(
    folder: Path,
    arch: Architecture,
    report: QuantReport,
    shards: Mapping[str, Any],
    *,
    method: Method,
    bits: BitsConfig,
) -> None:
    """Write `quantized.json`, last: it stands for a finished checkpoint."""
    asked = {"version": VERSION, "architecture": asdict(arch), "method": described(method), "bits": asdict(bits)}
    write_json(folder / QUANTIZED, asked | {"report": report.to_dict(), "shards": dict(shards)})


def described(part: Any) -> Any:
    """A part, and the parts inside it, as the mapping with `_target_` that a configuration would have for it."""
    if is_dataclass(part) and not isinstance(part, type):
        options = {f.name: described(getattr(part, f.name)) for f in fields(part)}
        return {"_target_": f"{type(part).__module__}.{type(part).__qualname__}"} | options
    if isinstance(part, Mapping):
        return {name: described(value) for name, value in part.items()}
    return [described(value) for value in part] if isinstance(part, (list, tuple)) else part


def write_outer(folder: Path, model: MaskedDiffusionTransformer) -> dict[str, Any]:
    """Write what stands outside the blocks; the entries of `shards`."""
    head: dict[str, Tensor] = {"norm.weight": model.norm.weight}
    if model.head.weight is not model.embed.weight:
        head["head.weight"] = model.head.weight
    return write_shard(folder / EMBED, {"embed.weight": model.embed.weight}) | write_shard(folder / HEAD, head)


def write_norm(folder: Path, model: MaskedDiffusionTransformer) -> dict[str, Any]:
    """Write the final norm's bias, which is known when all blocks are; the entries of `shards`."""
    return {} if model.norm.bias is None else write_shard(folder / NORM, {"norm.bias": model.norm.bias})


def read_outer(folder: Path, model: MaskedDiffusionTransformer, device: torch.device | str) -> None:
    """Put into `model` what `write_outer` and `write_norm` wrote."""
    for name in (EMBED, HEAD, NORM):
        if name != NORM or (folder / NORM).is_file():
            _assign(folder / name, model, read_shard(folder / name, device)[0])
    if model.head.weight.is_meta and model.arch.tied_head:
        model.head.weight = model.embed.weight
    outer = {name: p for name, p in model.named_parameters() if not name.startswith("blocks.")}
    _check_whole(folder, outer, device)


def write_block(folder: Path, index: int, block: Block) -> dict[str, Any]:
    """Write one block; its entry of `shards`."""
    tensors: dict[str, Tensor] = {}
    sites = {f"inputs.{site}": module for site, module in block.inputs.items()}
    heads = {f"heads.{part}": module for part, module in block.heads.items()}
    sequence = {f"sequence.{part}": module for part, module in block.sequence.items()}
    stored = {f"stored.{part}": module for part, module in block.stored.items()}
    places = {**block.linears(), **sites, **heads, **sequence, **stored}
    added = {path: module for path, module in places.items() if not isinstance(module, nn.Identity | nn.Linear)}
    rounded = {path: packed(module) for path, module in added.items() if type(module) is QuantLinear and module.grid}
    structure = {path: encode(rounded.get(path) or module, tensors, path) for path, module in added.items()}
    for name, parameter in block.named_parameters():
        if not any(name.startswith(f"{path}.") for path in added):
            tensors[name] = parameter
    [(name, entry)] = write_shard(folder / BLOCK.format(index), tensors, structure).items()
    entry["bytes_in_memory"] = sum(tensor.nbytes for tensor in block.state_dict().values())
    if unpacked := [path for path, of_file in rounded.items() if of_file is None]:
        entry["unpacked"] = dict.fromkeys(unpacked, UNPACKED)
        log.warning(f"blocks.{index}: {', '.join(unpacked)} stored at full width: {UNPACKED}")
    return {name: entry}


def read_block(folder: Path, index: int, arch: Architecture, device: torch.device | str) -> Block:
    """The block that `write_block` wrote. Raises CheckpointError for a file that does not hold it."""
    path = folder / BLOCK.format(index)
    tensors, structure = read_shard(path, device)
    with torch.device("meta"):
        block = block_of(arch)
    for place, value in structure.items():
        parent, _, name = place.rpartition(".")
        try:
            module = decode(value, tensors)
            usual = block.get_parameter(f"{place}.weight") if place in block.linears() else None
            setattr(block.get_submodule(parent), name, module)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise CheckpointError(f"{path}: {place} cannot be built from it: {error}") from error
        if usual is not None and module.weight.shape != usual.shape:
            raise CheckpointError(f"{path}: {place} has shape {_shape(module.weight)}, not {_shape(usual)}")
        tensors = {n: tensor for n, tensor in tensors.items() if not n.startswith(f"{place}.")}
    _assign(path, block, tensors)
    _check_whole(path, dict(block.named_parameters()), device)
    return block.eval().requires_grad_(False)


def _assign(path: Path, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Make a file's tensors the parameters of these names. Raises CheckpointError where the model has others."""
    for name, parameter in module.named_parameters():
        if name in tensors and tensors[name].shape != parameter.shape:
            raise CheckpointError(f"{path}: {name} has shape {_shape(tensors[name])}, not {_shape(parameter)}")
    try:
        assign(module, tensors)
    except AttributeError as error:
        raise CheckpointError(f"{path} has a tensor that the model has no place for: {error}") from error


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def _check_whole(path: Path, parameters: Mapping[str, Tensor], device: torch.device | str) -> None:
    """Raises CheckpointError where a file has left out parameters."""
    missing = [name for name, parameter in parameters.items() if parameter.is_meta]
    if missing and torch.device(device).type != "meta":
        raise CheckpointError(f"{path}: {', '.join(missing)} missing")


def encode(value: Any, tensors: dict[str, Tensor], path: str) -> Any:
    """`value` for JSON; its tensors join `tensors` under names that begin with `path`.

    Raises ValueError for an object whose class is not `storable`.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        tensors[path] = value
        return {"tensor": path}
    if isinstance(value, nn.Sequential):
        return [encode(part, tensors, f"{path}.{i}") for i, part in enumerate(value)]
    kind = type(value).__name__
    if STORABLE.get(kind) is not type(value):
        raise ValueError(
            f"{path} is a {kind}, which no quantized checkpoint can hold yet; put @dqx.quant.storable before its class"
        )
    names = inspect.signature(type(value)).parameters
    options = value.options if hasattr(value, "options") else {name: getattr(value, name) for name in names}
    return {"kind": kind} | {name: encode(option, tensors, f"{path}.{name}") for name, option in options.items()}


def decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The object behind what `encode` gave. Raises CheckpointError for a class that is not `storable`."""
    if isinstance(value, list):
        return nn.Sequential(*(decode(part, tensors) for part in value))
    if not isinstance(value, dict):
        return value
    if (name := value.get("tensor")) is not None:
        if name not in tensors:
            raise CheckpointError(f"tensor {name} is missing")
        return tensors[name]
    cls = storable_class(value["kind"])
    if cls is None:
        raise CheckpointError(f"no class {value['kind']} is known; import the module whose @storable class it is")
    options = {key: decode(option, tensors) for key, option in value.items() if key != "kind"}
    return getattr(cls, "restored", cls)(**options)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its name at the end, and is removed if anything goes wrong.

    Raises ValueError where `folder` exists.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists already; remove it, or write elsewhere")
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_shard(path: Path, tensors: Mapping[str, Tensor], structure: Any = None) -> dict[str, Any]:
    """Write a safetensors file, whole or not at all; its entry of `shards`: {name: {bytes, sha256}}."""
    temporary = path.with_name(f".{path.name}")
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        shared = own.data_ptr() in {other.data_ptr() for other in stored.values()}
        stored[name] = own.clone() if shared else own  # a file has no tensors that share memory
    save_file(stored, temporary, metadata={"format": "pt", "structure": json.dumps(structure)})
    with temporary.open("rb") as f:
        os.fsync(f.fileno())
    entry = {"bytes": temporary.stat().st_size, "sha256": checksum(temporary)}
    temporary.replace(path)
    return {path.name: entry}


def read_shard(path: Path, device: torch.device | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and structure of a file. Raises CheckpointError where it cannot be read.

    On the CPU they are copied out of the mapped file: the last bits of a product depend on where a matrix begins.
    """

    def own(tensor: Tensor) -> Tensor:
        return tensor.clone() if tensor.device.type == "cpu" else tensor

    try:
        with safe_open(path, framework="pt", device=str(device)) as f:
            names = f.keys()  # the file object itself cannot be iterated
            return {name: own(f.get_tensor(name)) for name in names}, json.loads(f.metadata()["structure"]) or {}
    except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def checksum(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
