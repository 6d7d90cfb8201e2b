"""What an artefact depends on. Its facts stand in it in plain text, and a hash of them is its name.

A model at full precision is the checkpoint (fingerprint of config and weights), dtype, device (the GPU's name, or the
CPU's vector instructions), planted outliers and mask token. A quantized one is that, the method, the widths, the
calibration (its settings and every token of it), the seed, the sources that quantize and the version of torch: by these
facts it is found without being made. What is measured on it depends on its digest besides: all of its tensors and the
settings of its modules.

The result of a task depends on

- the model, and the content of the checkpoint's other data files (tokenizer, chat template);
- the task's whole spec, how likelihoods are estimated or the number of denoising steps, the sampler, the seed, the
  limit, chat template use;
- data_root by relative path and content of its files. Without data_root, the datasets it reads by the commit that is
  read: the hub's newest, or where the hub cannot be reached that of the newest copy in the cache of `datasets`. (That
  cache itself is taken at its word: whoever edits its files in place sets reuse=false.);
- the sources of dqx that evaluate (models, diffusion, evaluate, data, assets), and the versions of torch,
  transformers, tokenizers, datasets and lm-eval.

Outlier statistics depend on the model, every token it is shown (text and denoising states), the thresholds and the
blocks whose surface is kept; denoising states on the model at full precision, the sampler, the prompts, the number of
new tokens and of steps, and the seed; predictions on the model, the sampler, every token and position they are asked
for, the answers of full precision, and the seed; rollouts on the model, the sampler, the text's tokens, the seed and
the settings of `calib`; all of them on the sources that measure and the version of torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dqx.common import accelerator
from dqx.common.digest import code_version, digest, files_digest
from dqx.common.environment import package_version
from dqx.common.files import jsonable
from dqx.common.tensors import tensor_digest
from dqx.data.hub import revisions
from dqx.data.texts import LOCAL_SUFFIXES, find_text
from dqx.evaluate.catalogue import leaves
from dqx.evaluate.settings import LikelihoodSettings
from dqx.evaluate.spec import TaskSpec, steps_of
from dqx.study.experiment import Experiment

EVALUATING = ("models", "diffusion", "evaluate", "data", "assets")
QUANTIZING = (
    *("models", "formats", "quant", "diffusion/noise.py"),
    *("data/calibration.py", "data/masking.py", "data/passes.py"),
)
MEASURING = (
    *("models", "diffusion", "data/masking.py", "data/passes.py", "diagnostics/fidelity.py", "diagnostics/passes.py"),
    *(f"diagnostics/activations/{name}.py" for name in ("measure", "meter", "moments", "sketch", "stats")),
)
VERSIONS = ("torch", "transformers", "tokenizers", "datasets", "lm_eval")
CHECKPOINT_TEXTS = ("*.json", "*.txt", "*.jinja", "*.model")


def model_facts(experiment: Experiment) -> dict[str, Any]:
    """What a model at full precision is."""
    device, model = experiment.device, experiment.config.model
    cpu = f"{device.type} {torch.backends.cpu.get_cpu_capability()}"
    return {
        "fingerprint": experiment.fingerprint,
        "dtype": str(experiment.dtype).removeprefix("torch."),
        "device": cpu if device.type == "cpu" else accelerator.name(device),
        "outliers": jsonable(model.outliers),
        "mask_token_id": model.mask_token_id,
    }


def evaluation_facts(experiment: Experiment) -> dict[str, Any]:
    """What every task's result at full precision depends on, besides the task."""
    config, folder = experiment.config, experiment.checkpoint.folder
    root = None if config.data_root is None else Path(config.data_root)
    return {
        **model_facts(experiment),
        "texts": files_digest(path for pattern in CHECKPOINT_TEXTS for path in folder.glob(pattern)),
        "chat": config.model.chat,
        "sampler": jsonable(config.model.sampler),
        "seed": config.seed,
        "limit": config.task.limit,
        "data": root and files_digest(root.rglob("*"), root),
        "code": EVALUATION_CODE,
        "versions": {name: package_version(name) for name in VERSIONS},
    }


def quantization_facts(
    original: Mapping[str, Any], *, method: Any, bits: Any, calib: Any, calibration: Sequence[Any], seed: int
) -> dict[str, Any]:
    """What a quantized model depends on. `original` has the facts of the model at full precision.

    `method`, `bits` and `calib` are sections of the config, `calib` None for methods that read no text, `calibration`
    its batches.
    """
    settings = jsonable({"method": method, "bits": bits, "calib": calib, "seed": seed})
    read = rows_digest(calibration, "ids", "mask_ratio", "passes")
    return {"original": dict(original), **settings, "calibration": read, **_made_by(QUANTIZATION_CODE)}


def outlier_facts(
    model: Mapping[str, Any],
    *,
    batches: Sequence[Any],
    thresholds: Any,
    states: Sequence[Any] = (),
    surfaces: Sequence[int] = (),
) -> dict[str, Any]:
    """What outlier statistics depend on. `model` has the facts of the model, at full precision or quantized."""
    at = [(tensor_digest([("ids", s.ids)]), s.step, s.prompt, s.mask_ratio) for s in states]
    tokens = rows_digest(batches, "ids", "mask_ratio", "passes")
    return measurement_facts(model, tokens=tokens, states=at, thresholds=thresholds, surfaces=surfaces)


def prediction_facts(
    model: Mapping[str, Any], *, sampler: Any, questions: Sequence[Any], rollout: Any, seed: int
) -> dict[str, Any]:
    """What predictions on `questions` depend on, and how far they are from those of full precision.

    `model` as for `outlier_facts`; `rollout` has the answers of full precision.
    """
    asked = rows_digest(questions, "ids", "compared", "passes")
    at = [None if question.state is None else question.state.step for question in questions]
    return measurement_facts(model, sampler=sampler, questions=asked, at=at, answers=rollout.ids, seed=seed)


def measurement_facts(model: Mapping[str, Any], **shown: Any) -> dict[str, Any]:
    """What a measurement on a model depends on: the model, what it is shown (of tensors their digest), and settings."""
    plain = {k: tensor_digest([("ids", v)]) if isinstance(v, Tensor) else jsonable(v) for k, v in shown.items()}
    return {"model": dict(model), **plain, **_made_by(MEASUREMENT_CODE)}


def _made_by(code: str) -> dict[str, Any]:
    return {"code": code, "versions": {"torch": package_version("torch")}}


def task_facts(name: str, spec: TaskSpec, steps: int | None, likelihood: LikelihoodSettings) -> dict[str, Any]:
    """What a task's result depends on of its own. `steps` is the run's number of denoising steps, None the task's."""
    facts: dict[str, Any] = jsonable(spec) | {"name": name, "steps": steps_of(spec, steps)}
    if spec.kind == "likelihood":
        facts["likelihood"] = likelihood.deciding()
    if spec.text is not None:
        text = Path(spec.text).expanduser()
        if text.is_file():
            facts["content"] = files_digest([text])
        elif text.is_dir():
            facts["content"] = files_digest(text.rglob("*"), text)
    return facts


def hub_facts(spec: TaskSpec, *, chat: bool, limit: int | None) -> dict[str, str | None]:
    """The commits of the hub's datasets that a task reads; empty where it reads none."""
    if spec.kind == "text":
        text = find_text(spec.text or "", config=spec.config)
        here = Path(text.path).suffix in LOCAL_SUFFIXES or Path(text.path).is_dir()
        return {} if here else revisions([(text.path, text.config)])
    read = ((leaf.dataset, leaf.raw.get("dataset_name")) for leaf in leaves(spec.harness, chat=chat)[:limit])
    return revisions((dataset, config) for dataset, config in read if dataset is not None)


def model_digest(model: nn.Module) -> str:
    """Hash of a model as it computes: parameters and buffers with name, dtype and shape, and its modules' settings."""
    settings = {name: _settings(module) for name, module in model.named_modules()}
    return digest([settings, tensor_digest([*model.named_parameters(), *model.named_buffers()])])


def rows_digest(rows: Sequence[Any], *names: str) -> str:
    """Hash of the tensors that calibration batches, or questions, have under these names; None is left out."""
    named = ((f"{i}.{name}", getattr(row, name)) for i, row in enumerate(rows) for name in names)
    return tensor_digest((name, tensor) for name, tensor in named if tensor is not None)


def _settings(module: nn.Module) -> dict[str, str]:
    """What a module holds besides tensors and modules: grids, ranges found in calibration, clip ratios."""
    plain = {k: v for k, v in vars(module).items() if not k.startswith("_") and k != "training"}
    return {key: re.sub(r" at 0x[0-9a-f]+", "", repr(value)) for key, value in plain.items()}


#: Of the sources as they are when they are loaded: what is edited during a run is for the next one.
EVALUATION_CODE, QUANTIZATION_CODE, MEASUREMENT_CODE = map(code_version, (EVALUATING, QUANTIZING, MEASURING))
