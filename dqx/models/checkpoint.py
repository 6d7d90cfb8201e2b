"""Hub-format checkpoints: `config.json`, `*.safetensors` (single or sharded), tokenizer files. Nothing is executed.

A checkpoint is a local folder or a hub id. From the hub only data files are fetched, never `*.py`, and
`auto_map` entries are ignored: the families are written natively in this package.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dqx.common import accelerator
from dqx.common.content import file_digests
from dqx.common.files import PACKAGE, write_json
from dqx.common.heartbeat import beat
from dqx.common.memory import GB
from dqx.models.architecture import Architecture
from dqx.models.family import family_of
from dqx.models.hub_config import CheckpointError, read_config, read_json
from dqx.models.transformer import Block, MaskedDiffusionTransformer, block_of

HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
PACKAGED = "pkg://"  # pkg://dqx/assets/nano_llada: a folder inside the installed package
CHECKED_ROWS = 4096  # of a tensor, looked through for infinities at a time
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LARGEST_INDEX = 64 * 2**20  # bytes
#: What weights are stored as, by safetensors' names.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


Header = tuple[str, tuple[int, ...]]  # of a tensor: dtype, by safetensors' name, and shape


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose config and tensor headers have been read and checked; no weight is in memory yet."""

    folder: Path
    config: dict[str, Any]
    arch: Architecture
    files: dict[str, Path]  # hub tensor name -> the file that holds it
    stored_dtype: torch.dtype  # of most numbers; norms may be stored in another

    def fingerprint(self) -> str:
        """16 hex digits over the config and every byte of the files that hold tensors."""
        config = json.dumps(self.config, sort_keys=True)
        files = sorted(set(self.files.values()))
        return hashlib.sha256("\n".join([config, *file_digests(files)]).encode()).hexdigest()[:16]

    def parameters(self) -> int:
        """How many numbers the model has."""
        return sum(p.numel() for p in skeleton(self.arch).parameters())


def locate(path_or_id: str, revision: str | None = None, files: Sequence[str] = HUB_FILES) -> Path:
    """The local folder of a checkpoint: the path itself, a packaged one, or the hub's snapshot of these `files`.

    Raises CheckpointError where neither a folder nor a reachable hub repository is meant.
    """
    if path_or_id.startswith(PACKAGED):
        folder = PACKAGE.parent / path_or_id.removeprefix(PACKAGED)
    else:
        folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(
            f"{path_or_id} is a file; a checkpoint is the folder that holds config.json and *.safetensors"
        )
    if path_or_id.count("/") != 1 or path_or_id.startswith((".", "/", "~")):
        raise CheckpointError(f"{path_or_id} does not exist; give a folder, or a hub id such as GSAI-ML/LLaDA-8B-Base")
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def update(self, n: float | None = 1) -> bool | None:
            beat()
            return super().update(n)

    try:
        return Path(snapshot_download(path_or_id, revision=revision, allow_patterns=list(files), tqdm_class=Bar))
    except Exception as error:
        raise CheckpointError(
            f"{path_or_id} is no local folder and could not be fetched from the hub ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no message'}); for a local copy set model.path=FOLDER"
        ) from error


def inspect(path_or_id: str, revision: str | None = None, mask_token_id: int | None = None) -> Checkpoint:
    """Read config and tensor headers and check them against each other, without reading a weight.

    Args:
        path_or_id: a folder, a packaged one, or a hub id.
        revision: of the hub repository.
        mask_token_id: what stands in place of config.json's; None: its own.

    Raises CheckpointError for a missing, truncated, foreign or mismatched file, naming file and tensor.
    """
    folder = locate(path_or_id, revision)
    config, arch = read_config(folder, mask_token_id)
    files, headers = _stored_tensors(folder)
    head = family_of(arch.family).outer_names["head.weight"]
    if arch.tied_head and head in headers:  # the flag says how it was trained; the file holds what it answers with
        arch = replace(arch, tied_head=False)
    parameters = dict(skeleton(arch).named_parameters())
    expected = {hub: tuple(parameters[ours].shape) for ours, hub in tensor_names(arch).items()}
    missing = [n for n in expected if n not in headers]
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} tensors of {len(expected)} are missing, first {missing[0]!r}; "
            f"config.json says {arch.n_blocks} blocks of family {arch.family}"
        )
    sizes: Counter[torch.dtype] = Counter()
    for name, shape in expected.items():
        dtype, stored = headers[name]
        if dtype not in DTYPES:
            raise CheckpointError(
                f"{files[name]}: tensor {name!r} is stored as {dtype}: codes of a quantized model, whose scales dqx "
                f"does not read; use the checkpoint in {', '.join(DTYPES)}"
            )
        if stored != shape:
            raise CheckpointError(f"{files[name]}: tensor {name!r} is {list(stored)}, config.json needs {list(shape)}")
        sizes[DTYPES[dtype]] += math.prod(shape)
    extra = [n for n in headers if n not in expected and not n.endswith("inv_freq")]
    if extra:
        raise CheckpointError(
            f"{files[extra[0]]}: {len(extra)} tensors that the model has no place for, first {extra[0]!r}"
        )
    return Checkpoint(folder, config, arch, {n: files[n] for n in expected}, sizes.most_common(1)[0][0])


def _stored_tensors(folder: Path) -> tuple[dict[str, Path], dict[str, Header]]:
    """File, and dtype with shape, by tensor name; safetensors itself checks that a header fits its file's length."""
    index = folder / INDEX
    if not index.exists():
        only = _single_file(folder)
        headers = _headers(only)
        return dict.fromkeys(headers, only), headers
    content = read_json(index, LARGEST_INDEX)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index} is no safetensors index: it has no weight_map of file names")
    places = {file: folder / file for file in set(weight_map.values())}
    for file, path in sorted(places.items()):
        if not file or PurePath(file).is_absolute() or ".." in PurePath(file).parts or not _is_file(path):
            raise CheckpointError(f"{file[:200]!r} is named in {index}, but there is no such file in the folder")
    by_file = {path: _headers(path) for path in places.values()}
    files = {name: places[file] for name, file in weight_map.items()}
    for name, path in files.items():
        if name not in by_file[path]:
            raise CheckpointError(f"{path}: tensor {name!r} is named in {index.name} but not in the file")
    return files, {name: by_file[path][name] for name, path in files.items()}


def _single_file(folder: Path) -> Path:
    """The file of a checkpoint without an index: `model.safetensors`, or the only one that is no adapter."""
    if _is_file(folder / SINGLE):
        return folder / SINGLE
    shards = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("adapter"))
    if not shards:
        unsafe = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth")]
        hint = f"; {unsafe[0]} is pickled and is never read, convert it to safetensors" if unsafe else ""
        raise CheckpointError(f"{folder} holds no *.safetensors file with the weights of a model{hint}")
    if len(shards) > 1:
        raise CheckpointError(f"{folder} holds {len(shards)} safetensors files but no {INDEX}")
    if not _is_file(shards[0]):
        raise CheckpointError(f"{shards[0]} is no regular file")
    return shards[0]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file system takes
        return False


def _headers(path: Path) -> dict[str, Header]:
    try:
        with safe_open(path, framework="pt") as f:
            names = f.keys()  # the file object itself cannot be iterated
            slices = {name: f.get_slice(name) for name in names}
            return {name: (view.get_dtype(), tuple(view.get_shape())) for name, view in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is corrupt or truncated: {error}") from error


def tensor_names(arch: Architecture) -> dict[str, str]:
    """Our parameter name -> the family's tensor name on the hub."""
    family = family_of(arch.family)
    names = dict(family.outer_names)
    if arch.tied_head:
        del names["head.weight"]
    for i in range(arch.n_blocks):
        prefix = family.block_prefix.format(i)
        for ours, theirs in family.block_names.items():
            names[f"blocks.{i}.{ours}.weight"] = f"{prefix}{theirs}.weight"
            if arch.qkv_bias and ours in ("q", "k", "v"):
                names[f"blocks.{i}.{ours}.bias"] = f"{prefix}{theirs}.bias"
    return names


def load_weights(
    checkpoint: Checkpoint, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> MaskedDiffusionTransformer:
    """The model with the checkpoint's weights, in `dtype` (None: as stored) on `device`, in eval mode.

    Raises CheckpointError for a tensor that cannot be read or is not finite, torch.OutOfMemoryError, with what to
    change, where the device is too small.
    """
    model = skeleton(checkpoint.arch)
    size = checkpoint.parameters() * (dtype or checkpoint.stored_dtype).itemsize
    with accelerator.advising(too_large(size, "a smaller model.dtype")):
        load_outer(model, checkpoint, dtype, device)
        for index in range(checkpoint.arch.n_blocks):
            model.blocks[index] = load_block(checkpoint, index, dtype, device)
    return model


def too_large(size: int, *choices: str) -> str:
    """What to do where a device has no room for weights of so many bytes."""
    instead = ", ".join((*choices, "a device with more memory"))
    return f"the model's weights take {size / GB:.3g} GB; choose {instead}, or model.device=cpu"


def skeleton(arch: Architecture) -> MaskedDiffusionTransformer:
    """A model without weights (on torch's meta device), in eval mode."""
    with torch.device("meta"):
        return MaskedDiffusionTransformer(arch).eval().requires_grad_(False)


def load_outer(
    model: MaskedDiffusionTransformer, checkpoint: Checkpoint, dtype: torch.dtype | None, device: torch.device | str
) -> None:
    """Load embedding, final norm and head into `model`. Raises CheckpointError as `load_weights` does."""
    names = {ours: hub for ours, hub in tensor_names(checkpoint.arch).items() if not ours.startswith("blocks.")}
    assign(model, _read(checkpoint, names, dtype, device))
    if checkpoint.arch.tied_head:
        model.head.weight = model.embed.weight


def load_block(checkpoint: Checkpoint, index: int, dtype: torch.dtype | None, device: torch.device | str) -> Block:
    """One block in eval mode. Raises CheckpointError as `load_weights` does."""
    prefix = f"blocks.{index}."
    names = {ours: hub for ours, hub in tensor_names(checkpoint.arch).items() if ours.startswith(prefix)}
    with torch.device("meta"):
        block = block_of(checkpoint.arch)
    state = _read(checkpoint, names, dtype, device)
    assign(block, {ours.removeprefix(prefix): tensor for ours, tensor in state.items()})
    return block.eval()


def assign(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Make tensors the parameters of these names, of those too that the module's class leaves out by default."""
    for path, tensor in tensors.items():
        owner, _, name = path.rpartition(".")
        setattr(module.get_submodule(owner), name, nn.Parameter(tensor, requires_grad=False))


def _read(
    checkpoint: Checkpoint, names: Mapping[str, str], dtype: torch.dtype | None, device: torch.device | str
) -> dict[str, Tensor]:
    """The tensors of `names` (our parameter name -> hub name), by our names."""
    tensors: dict[str, Tensor] = {}
    wanted = dtype or checkpoint.stored_dtype
    for path in sorted({checkpoint.files[hub] for hub in names.values()}):
        try:
            with safe_open(path, framework="pt", device=str(device)) as f:
                for ours, hub in names.items():
                    if checkpoint.files[hub] == path:
                        tensor = f.get_tensor(hub)
                        if not _finite(tensor):
                            raise CheckpointError(f"{path}: tensor {hub!r} holds values that are not finite")
                        mapped = tensor.device.type == "cpu"  # at a place in memory that decides last bits of products
                        tensors[ours] = tensor.to(wanted, copy=mapped)
                        if tensor.dtype != wanted and not _finite(tensors[ours]):
                            largest = tensor.abs().max().item()
                            raise CheckpointError(
                                f"{path}: tensor {hub!r} holds {largest:g}, beyond {wanted}; use dtype=bfloat16"
                            )
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
    return tensors


def _finite(tensor: Tensor) -> bool:
    return all(bool(torch.isfinite(rows).all()) for rows in tensor.split(CHECKED_ROWS))


def save(
    model: MaskedDiffusionTransformer, config: dict[str, Any], folder: Path, max_shard_bytes: int = 5 * 10**9
) -> None:
    """Write `config.json` and safetensors in the family's hub format, sharded when larger than `max_shard_bytes`."""
    arch = replace(model.arch, tied_head=model.head.weight is model.embed.weight)  # rotations untie the head
    parameters = dict(model.named_parameters())
    tensors = ((hub, parameters[ours]) for ours, hub in tensor_names(arch).items())
    save_tensors(tensors, config, folder, max_shard_bytes)


def save_tensors(
    tensors: Iterable[tuple[str, Tensor]], config: dict[str, Any], folder: Path, max_shard_bytes: int = 5 * 10**9
) -> None:
    """`save` for tensors by name."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors:
        stored = tensor.detach().cpu().contiguous()
        size += stored.nbytes
        if shards[-1] and size > max_shard_bytes:
            shards.append({})
            size = stored.nbytes
        shards[-1][name] = stored
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
    else:
        save_shards(folder, shards, len(shards))


def save_shards(folder: Path, shards: Iterable[dict[str, Tensor]], count: int) -> int:
    """Write `count` files of tensors by hub name, one after the other, and their index; how many bytes of tensors."""
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{count:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
        total += sum(tensor.nbytes for tensor in shard.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return total
