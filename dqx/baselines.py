"""Full-precision results, computed once and reused by every run that would get the same ones.

One file per task, so that runs with different suites share the tasks they have in common. Its name is a hash of
all that the result depends on, and the same facts stand inside in plain text:

- the checkpoint: fingerprint of config and weights, content of the other data files (tokenizer, chat template);
- dtype, device (the GPU's name, or the CPU's vector instructions), planted outliers, mask token, chat template use;
- the task's whole spec, how likelihoods are estimated or the number of denoising steps, the sampler, the seed, the
  limit;
- data_root by relative path, size and time of change of its files, not by their content. Without data_root the
  data come from the hub's cache, of which nothing is checked: delete the baselines after a dataset has changed;
- the sources of dqx that evaluate (models, diffusion, evaluate, data, assets), and the versions of torch,
  transformers, tokenizers, datasets and lm-eval.

A file that is damaged, or whose content does not match its name, is reported, ignored and written anew.
Two runs that need the same baseline at the same time both compute it; the last one's file stays.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from dqx.evaluate.results import TaskResult
from dqx.evaluate.settings import LikelihoodSettings
from dqx.evaluate.spec import TaskSpec, steps_of
from dqx.store import file_name, jsonable, package_version, write_json

log = logging.getLogger(__name__)

EVALUATING = ("models", "diffusion", "evaluate", "data", "assets")
VERSIONS = ("torch", "transformers", "tokenizers", "datasets", "lm_eval")
CHECKPOINT_TEXTS = ("*.json", "*.txt", "*.jinja", "*.model")


def facts(
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
    """What every task's full-precision result depends on, besides the task.

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
        "code": code_version(),
        "versions": {name: package_version(name) for name in VERSIONS},
    }


def code_version(package: Path | None = None) -> str:
    """Hash of the files that decide what a full-precision evaluation gives."""
    root = package or Path(__file__).parent
    files = (p for name in EVALUATING for p in (root / name).rglob("*") if "__pycache__" not in p.parts)
    return _content((p for p in files if p.suffix != ".safetensors"), root)


class Baselines:
    """The cache: `get` before evaluating a task at full precision, `put` after."""

    def __init__(
        self,
        cache_dir: str | Path,
        facts: Mapping[str, Any],
        steps: int | None = None,
        likelihood: LikelihoodSettings | None = None,
    ):
        self.folder = Path(cache_dir)
        self.facts: dict[str, Any] = jsonable(facts)
        self.steps = steps  # the run's own number of denoising steps; None: the task's
        self.likelihood = likelihood or LikelihoodSettings()
        self.warnings: list[str] = []  # damaged files met, for the record

    def get(self, name: str, spec: TaskSpec) -> TaskResult | None:
        """The task's result, or None where it has to be computed."""
        wanted, path = self._place(name, spec)
        if not path.exists():
            return None
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["facts"] != wanted:
                raise ValueError("it was made with other settings than its name says")
            if stored["digest"] != _digest(stored["result"]):
                raise ValueError("its content does not match its checksum")
            return TaskResult.from_dict(stored["result"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
            self.warnings.append(f"the baseline {path} is damaged and was computed again ({reason})")
            log.warning(self.warnings[-1])
            return None

    def put(self, name: str, spec: TaskSpec, result: TaskResult) -> None:
        """Keep a result. A folder that cannot be written is reported, and the run goes on."""
        wanted, path = self._place(name, spec)
        stored = jsonable(result)
        try:
            write_json(path, {"facts": wanted, "digest": _digest(stored), "result": stored})
        except OSError as error:
            self.warnings.append(f"the baseline {path} could not be kept ({error})")
            log.warning(self.warnings[-1])

    def _place(self, name: str, spec: TaskSpec) -> tuple[dict[str, Any], Path]:
        task = jsonable(spec) | {"name": name, "steps": steps_of(spec, self.steps)}
        if spec.kind == "likelihood":
            task["likelihood"] = self.likelihood.deciding()
        if spec.text is not None and Path(spec.text).expanduser().is_file():
            task["content"] = _content([Path(spec.text).expanduser()])
        wanted = self.facts | {"task": task}
        return wanted, self.folder / f"{file_name(name)}-{_digest(wanted)[:20]}.json"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _content(paths: Iterable[Path], root: Path | None = None) -> str:
    """Hash over names and bytes of files."""
    digest = hashlib.sha256()
    for path in sorted(set(paths)):
        if path.is_file():
            name = str(path.relative_to(root)) if root else path.name
            digest.update(f"{name}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:20]


def _listing(root: Path) -> str:
    """Hash over relative names, sizes and times of change of all files in a folder."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.is_file():
            stat = path.stat()
            digest.update(f"{path.relative_to(root)}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:20]
