"""Hub-format checkpoints: `config.json`, `*.safetensors` (single or sharded), tokenizer files. Nothing is executed.

A checkpoint is a local folder or a hub id. From the hub only data files are fetched, never `*.py`, and
`auto_map` entries are ignored: the families are written natively in this package.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dqx.common.files import PACKAGE, write_json
from dqx.common.heartbeat import beat
from dqx.models.architecture import Architecture
from dqx.models.family import families, family_of
from dqx.models.transformer import Block, MaskedDiffusionTransformer, block_of

HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
PACKAGED = "pkg://"  # pkg://dqx/assets/nano_llada: a folder inside the installed package
CHECKED_ROWS = 4096  # of a tensor, looked through for infinities at a time
INDEX = "model.safetensors.index.json"
QUANTIZED = "quantized.json"  # in the folder of a quantized checkpoint, see dqx/quant/checkpoint/folder.py


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and the tensor or key."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose config and tensor headers have been read and checked; no weight is in memory yet."""

    folder: Path
    config: dict[str, Any]
    arch: Architecture
    files: dict[str, Path]  # hub tensor name -> the file that holds it

    def fingerprint(self) -> str:
        """16 hex digits over config, tensor headers and 1 KiB from 16 places of each file.

        Sampled, so that 16 GB take milliseconds: it tells checkpoints apart, it is no proof against tampering.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for path in sorted(set(self.files.values())):
            size = path.stat().st_size
            with path.open("rb") as f:
                digest.update(f.read(8 + int.from_bytes(f.read(8), "little")))
                for i in range(16):
                    f.seek(max(0, (size - 1024) * i // 15))
                    digest.update(f.read(1024))
        return digest.hexdigest()[:16]

    def stored_dtype(self) -> torch.dtype:
        """The precision that the embedding is stored in."""
        name = tensor_names(self.arch)["embed.weight"]
        with safe_open(self.files[name], framework="pt") as f:
            dtype: torch.dtype = f.get_slice(name)[:1].dtype
        return dtype

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


def read_config(folder: Path) -> tuple[dict[str, Any], Architecture]:
    """Parse and check `config.json`. Raises CheckpointError naming the key."""
    path = folder / "config.json"
    if (folder / QUANTIZED).is_file():
        raise CheckpointError(f"{folder} holds a quantized model; read it with dqx.quant.load_quantized")
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; a checkpoint folder holds config.json and *.safetensors")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    model_type = config.get("model_type") if isinstance(config, dict) else None
    by_type = {family.model_type.lower(): family for family in families().values()}
    family = by_type.get(str(model_type).lower())
    if family is None:
        known = ", ".join(repr(f.model_type) for f in families().values())
        raise CheckpointError(f"{path}: model_type is {model_type!r}; dqx has {known}")
    for key, allowed in family.required.items():
        if key in config and config[key] not in allowed:
            raise CheckpointError(
                f"{path}: {key}={config[key]!r} is not supported (only {allowed[0]!r}); the logits would be wrong"
            )
    try:
        arch = family.architecture(config)
    except KeyError as error:
        raise CheckpointError(f"{path}: key {error} is missing") from error
    except TypeError as error:
        raise CheckpointError(f"{path}: a key has the wrong type ({error})") from error
    _check_geometry(path, arch)
    return config, arch


def _check_geometry(path: Path, arch: Architecture) -> None:
    sizes = ("vocab_size", "hidden_size", "mlp_size", "n_blocks", "n_heads", "n_kv_heads", "max_length")
    values = {name: getattr(arch, name) for name in sizes}
    problems = [f"{n}={v!r} is not a positive integer" for n, v in values.items() if type(v) is not int or v < 1]
    if not problems:
        if arch.hidden_size % arch.n_heads:
            problems.append(f"{arch.n_heads} heads do not divide the hidden size {arch.hidden_size}")
        if arch.n_heads % arch.n_kv_heads:
            problems.append(f"{arch.n_kv_heads} key/value heads do not divide {arch.n_heads} heads")
        for name in ("mask_token_id", "eos_token_id"):
            value = getattr(arch, name)
            if not isinstance(value, int) or not 0 <= value < arch.vocab_size:
                problems.append(f"{name}={value!r} lies outside the vocabulary of {arch.vocab_size}")
    if problems:
        raise CheckpointError(f"{path}: " + "; ".join(problems))


def inspect(path_or_id: str, revision: str | None = None) -> Checkpoint:
    """Read config and tensor headers and check them against each other, without reading a weight.

    Raises CheckpointError for a missing, truncated, foreign or mismatched file, naming file and tensor.
    """
    folder = locate(path_or_id, revision)
    config, arch = read_config(folder)
    files, shapes = _stored_tensors(folder)
    parameters = dict(skeleton(arch).named_parameters())
    expected = {hub: tuple(parameters[ours].shape) for ours, hub in tensor_names(arch).items()}
    missing = [n for n in expected if n not in shapes]
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} tensors of {len(expected)} are missing, first {missing[0]!r}; "
            f"config.json says {arch.n_blocks} blocks of family {arch.family}"
        )
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise CheckpointError(
                f"{files[name]}: tensor {name!r} is {list(shapes[name])}, config.json needs {list(shape)}"
            )
    extra = [n for n in shapes if n not in expected and not n.endswith("inv_freq")]
    if arch.tied_head:
        extra = [n for n in extra if n != family_of(arch.family).outer_names["head.weight"]]
    if extra:
        raise CheckpointError(
            f"{files[extra[0]]}: {len(extra)} tensors that the model has no place for, first {extra[0]!r}"
        )
    return Checkpoint(folder, config, arch, {n: files[n] for n in expected})


def _stored_tensors(folder: Path) -> tuple[dict[str, Path], dict[str, tuple[int, ...]]]:
    """File and shape by tensor name; safetensors itself checks that a header fits its file's length."""
    index = folder / INDEX
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{index} is no safetensors index: {type(error).__name__}: {error}") from error
        files = {name: folder / file for name, file in weight_map.items()}
        for path in sorted(set(files.values())):
            if path.parent != folder or not path.is_file():
                raise CheckpointError(f"{path} is named in {index.name} but does not exist")
        shapes = {path: _shapes(path) for path in set(files.values())}
        for name, path in files.items():
            if name not in shapes[path]:
                raise CheckpointError(f"{path}: tensor {name!r} is named in {index.name} but not in the file")
        return files, {name: shapes[path][name] for name, path in files.items()}
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        unsafe = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth")]
        hint = f"; {unsafe[0]} is pickled and is never read, convert it to safetensors" if unsafe else ""
        raise CheckpointError(f"{folder} holds no *.safetensors file{hint}")
    if len(shards) > 1:
        raise CheckpointError(f"{folder} holds {len(shards)} safetensors files but no {INDEX}")
    only = _shapes(shards[0])
    return dict.fromkeys(only, shards[0]), only


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(path, framework="pt") as f:
            names = f.keys()  # the file object itself cannot be iterated
            return {name: tuple(f.get_slice(name).get_shape()) for name in names}
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

    Raises CheckpointError for a tensor that cannot be read or is not finite.
    """
    model = skeleton(checkpoint.arch)
    load_outer(model, checkpoint, dtype, device)
    for index in range(checkpoint.arch.n_blocks):
        model.blocks[index] = load_block(checkpoint, index, dtype, device)
    return model


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
    for path in sorted({checkpoint.files[hub] for hub in names.values()}):
        try:
            with safe_open(path, framework="pt", device=str(device)) as f:
                for ours, hub in names.items():
                    if checkpoint.files[hub] == path:
                        tensor = f.get_tensor(hub)
                        if not all(bool(torch.isfinite(rows).all()) for rows in tensor.split(CHECKED_ROWS)):
                            raise CheckpointError(f"{path}: tensor {hub!r} holds values that are not finite")
                        mapped = tensor.device.type == "cpu"  # at a place in memory that decides last bits of products
                        tensors[ours] = tensor.to(dtype or tensor.dtype, copy=mapped)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
    return tensors


def save(
    model: MaskedDiffusionTransformer, config: dict[str, Any], folder: Path, max_shard_bytes: int = 5 * 10**9
) -> None:
    """Write `config.json` and safetensors in the family's hub format, sharded when larger than `max_shard_bytes`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    parameters = dict(model.named_parameters())
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for ours, hub in tensor_names(model.arch).items():
        tensor = parameters[ours].detach().cpu().contiguous()
        size += tensor.nbytes
        if shards[-1] and size > max_shard_bytes:
            shards.append({})
            size = tensor.nbytes
        shards[-1][hub] = tensor
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
