"""What an artefact depends on. Its facts stand in it in plain text, and a hash of them is its name.

The result of a task depends on

- the checkpoint: fingerprint of config and weights, content of the other data files (tokenizer, chat template);
- dtype, device (the GPU's name, or the CPU's vector instructions), planted outliers, mask token, chat template use;
- the task's whole spec, how likelihoods are estimated or the number of denoising steps, the sampler, the seed, the
  limit;
- data_root by relative path, size and time of change of its files, not by their content. Without data_root the
  data come from the hub's cache, of which nothing is checked: set reuse=false after a dataset has changed;
- the sources of dqx that evaluate (models, diffusion, evaluate, data, assets), and the versions of torch,
  transformers, tokenizers, datasets and lm-eval;
- after quantization, also on the method, the widths, the calibration (its settings and every token of it), the sources
  that quantize, and the digest of the model that is evaluated: all of its tensors and the settings of its modules.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dqx.evaluate.settings import LikelihoodSettings
from dqx.evaluate.spec import TaskSpec, steps_of
from dqx.store import file_name, jsonable, package_version

EVALUATING = ("models", "diffusion", "evaluate", "data", "assets")
QUANTIZING = ("quant", "calib.py", "masking.py")
VERSIONS = ("torch", "transformers", "tokenizers", "datasets", "lm_eval")
CHECKPOINT_TEXTS = ("*.json", "*.txt", "*.jinja", "*.model")


@dataclass(frozen=True)
class Key:
    """The name of an artefact: its kind (`results`), what people call it, and the facts it depends on."""

    kind: str
    name: str
    facts: Mapping[str, Any]  # as JSON has it

    @property
    def digest(self) -> str:
        return digest(self.facts)

    @property
    def path(self) -> Path:
        """Where its files are in a cache, without their suffix."""
        return Path(self.kind, f"{file_name(self.name)}-{self.digest[:20]}")


def evaluation_facts(
    *,
    checkpoint: Path,
    fingerprint: str,
    model: Any,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int,
    limit: int | None,
    data_root: str | None,
) -> dict[str, Any]:
    """What every task's result at full precision depends on, besides the task.

    `checkpoint` is the folder, `fingerprint` its `Checkpoint.fingerprint()`, `model` the `model` section of the
    config (`outliers`, `mask_token_id`, `chat` and `sampler` are read), `dtype` and `device` those in use.
    """
    device = torch.device(device)
    cuda = device.type == "cuda"
    return {
        "fingerprint": fingerprint,
        "texts": _content(path for pattern in CHECKPOINT_TEXTS for path in checkpoint.glob(pattern)),
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device)
        if cuda
        else f"{device.type} {torch.backends.cpu.get_cpu_capability()}",
        "outliers": jsonable(model.outliers),
        "mask_token_id": model.mask_token_id,
        "chat": model.chat,
        "sampler": jsonable(model.sampler),
        "seed": seed,
        "limit": limit,
        "data": None if data_root is None else _listing(Path(data_root)),
        "code": EVALUATION_CODE,
        "versions": {name: package_version(name) for name in VERSIONS},
    }


def quantization_facts(
    *, method: Any, bits: Any, calib: Any, calibration: Sequence[Any], seed: int, model: nn.Module
) -> dict[str, Any]:
    """What the results of a quantized model depend on besides.

    `method`, `bits` and `calib` are sections of the config, `calib` null for methods that read no text, `calibration`
    its batches, `model` the quantized model.
    """
    return {
        "method": jsonable(method),
        "bits": jsonable(bits),
        "calib": jsonable(calib),
        "calibration": tensor_digest(
            (f"{i}.{name}", tensor)
            for i, batch in enumerate(calibration)
            for name, tensor in (("ids", batch.ids), ("mask_ratio", batch.mask_ratio))
        ),
        "seed": seed,
        "code": QUANTIZATION_CODE,
        "model": model_digest(model),
    }


def task_facts(name: str, spec: TaskSpec, steps: int | None, likelihood: LikelihoodSettings) -> dict[str, Any]:
    """What a task's result depends on of its own. `steps` is the run's number of denoising steps, null the task's."""
    facts: dict[str, Any] = jsonable(spec) | {"name": name, "steps": steps_of(spec, steps)}
    if spec.kind == "likelihood":
        facts["likelihood"] = likelihood.deciding()
    if spec.text is not None and Path(spec.text).expanduser().is_file():
        facts["content"] = _content([Path(spec.text).expanduser()])
    return facts


def code_version(parts: Sequence[str], package: Path | None = None) -> str:
    """Hash of the files of dqx, by name or below folders, that decide what a result is."""
    root = package or Path(__file__).parents[1]
    files = (p for name in parts for p in ((root / name).rglob("*") if (root / name).is_dir() else [root / name]))
    return _content((p for p in files if "__pycache__" not in p.parts and p.suffix != ".safetensors"), root)


def model_digest(model: nn.Module) -> str:
    """Hash of a model as it computes: parameters and buffers with name, dtype and shape, and its modules' settings."""
    settings = {name: _settings(module) for name, module in model.named_modules()}
    return digest([settings, tensor_digest([*model.named_parameters(), *model.named_buffers()])])


def tensor_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hash of named tensors, one at a time on the CPU."""
    found = hashlib.sha256()
    for name, tensor in tensors:
        found.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _settings(module: nn.Module) -> dict[str, str]:
    """What a module holds besides tensors and modules: grids, ranges found in calibration, clip ratios."""
    plain = {k: v for k, v in vars(module).items() if not k.startswith("_") and k != "training"}
    return {key: re.sub(r" at 0x[0-9a-f]+", "", repr(value)) for key, value in plain.items()}


def digest(value: Any) -> str:
    """Hash of what JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _content(paths: Iterable[Path], root: Path | None = None) -> str:
    """Hash over names and bytes of files."""
    found = hashlib.sha256()
    for path in sorted(set(paths)):
        if path.is_file():
            name = str(path.relative_to(root)) if root else path.name
            found.update(f"{name}\0{path.stat().st_size}\0".encode())
            found.update(path.read_bytes())
    return found.hexdigest()[:20]


def _listing(root: Path) -> str:
    """Hash over relative names, sizes and times of change of all files in a folder."""
    found = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.is_file():
            stat = path.stat()
            found.update(f"{path.relative_to(root)}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return found.hexdigest()[:20]


#: Of the sources as they are when they are loaded: what is edited during a run is for the next one.
EVALUATION_CODE, QUANTIZATION_CODE = code_version(EVALUATING), code_version(QUANTIZING)
