"""Where a `DiffusionLM` comes from: a name in `conf/model`, a checkpoint, a saved model, or a file for llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dqx.api.language_model import SETTINGS, DiffusionLM, Quantization, told_plainly
from dqx.common.devices import DTYPES, device_problems, dtype_of, pick_device
from dqx.common.names import did_you_mean
from dqx.common.parts import build_part
from dqx.common.problems import raise_if
from dqx.config.compose import build, choices, compose
from dqx.config.mistakes import explain
from dqx.config.schema import ConfigProblems, ModelConfig
from dqx.engines.llama_cpp import LlamaCpp
from dqx.engines.model import EngineModel, engine_problems
from dqx.formats.bits import BitsConfig
from dqx.models.checkpoint import Checkpoint, CheckpointError, inspect, load_weights, skeleton
from dqx.models.family import family_of
from dqx.models.hub_config import QUANTIZED
from dqx.models.plant import plant_outliers
from dqx.models.tokenizer import load_tokenizer
from dqx.quant.checkpoint.folder import load_quantized, read_recipe


@told_plainly
def load(name_or_path: str | Path = "nano_llada", *, gguf: str | Path | None = None, **overrides: Any) -> DiffusionLM:
    """A model by its name in `conf/model`, a checkpoint by folder or hub id with its family's default sampler, or what
    `DiffusionLM.save` has written.

    With `gguf`, a file of this model, llama.cpp computes its logits from that file; no weight of the checkpoint is
    read, and everything else (tokenizer, sampler, tasks) is as without it. Keyword arguments override the model's
    config: `load("llada_8b_base", path="/data/llada", dtype="float16")`.
    Raises ConfigProblems or CheckpointError, which say what cannot be used and what to write instead.
    """
    config = _model_config(str(name_or_path), {key: _plain(value) for key, value in overrides.items()})
    if gguf is not None:
        return _load_gguf(config, Path(gguf))
    folder = Path(config.path).expanduser()
    return _load_saved(folder, config) if (folder / QUANTIZED).is_file() else load_configured(config)


def load_configured(config: ModelConfig) -> DiffusionLM:
    """The model that a `model` config describes. Raises CheckpointError where its files cannot be used."""
    lm = _without_weights(config)
    lm.model = load_weights(lm.checkpoint, dtype_of(config.dtype), pick_device(config.device))
    plant_outliers(lm.model, config.outliers.gain, config.outliers.channels)
    return lm


def _without_weights(config: ModelConfig) -> DiffusionLM:
    """Everything of a model but its weights. Raises as `load_configured` does."""
    checkpoint = inspect(config.path, config.revision, config.mask_token_id)
    if checkpoint.arch.mask_token_id >= checkpoint.arch.vocab_size:
        raise CheckpointError(
            f"mask_token_id={config.mask_token_id} lies outside the vocabulary of {checkpoint.arch.vocab_size}"
        )
    tokenizer, sampler = load_tokenizer(checkpoint), build(config.sampler)
    raise_if([f"model.sampler: {problem}" for problem in sampler.model_problems(checkpoint.arch)])
    return DiffusionLM(skeleton(checkpoint.arch), tokenizer, checkpoint, sampler, config)


def _load_gguf(config: ModelConfig, file: Path) -> DiffusionLM:
    """A model whose logits llama.cpp computes. Raises as `load_configured` and `LlamaCpp` do."""
    lm = _without_weights(config)
    raise_if(engine_problems(lm.sampler))
    engine = LlamaCpp(file)
    raise_if(engine.unlike(lm.model.arch))
    lm.model = EngineModel(lm.model.arch, engine)
    return lm


def _model_config(name: str, overrides: dict[str, Any]) -> ModelConfig:
    """The config of what `load` was asked for. Raises ConfigProblems."""
    folder = Path(name).expanduser()
    if name in choices("model"):
        known: Any = compose([f"model={name}"]).model
    elif (folder / SETTINGS).is_file():
        here: dict[str, Any] = {"path": name, "revision": None, "dtype": "auto", "device": "auto", "outliers": {}}
        known = OmegaConf.create(json.loads((folder / SETTINGS).read_text()) | here)
    elif "/" not in name and not folder.exists():
        near = did_you_mean(name, choices("model"))
        raise ConfigProblems([f"{name} is no name in conf/model and no folder; {near} (a hub id has a /)"])
    else:
        family = family_of(inspect(name, mask_token_id=overrides.get("mask_token_id")).arch.family)
        known = ModelConfig(folder.name, family.name, name, dtype="auto", sampler=dict(family.sampler))
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), known, overrides))
    except OmegaConfBaseException as error:
        raise ConfigProblems([f"model.{problem}" for problem in explain(error)]) from error
    assert isinstance(config, ModelConfig)
    problems = [*device_problems(config.device)]
    if config.dtype not in DTYPES:
        problems.append(f"model.dtype={config.dtype} is unknown; {did_you_mean(config.dtype, DTYPES)}")
    if problems:
        raise ConfigProblems(problems)
    return config


def _load_saved(folder: Path, config: ModelConfig) -> DiffusionLM:
    """A quantized model that `DiffusionLM.save` has written."""
    model, report = load_quantized(folder, pick_device(config.device))
    recipe = read_recipe(folder)
    bits = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(BitsConfig), recipe["bits"]))
    assert isinstance(bits, BitsConfig)
    checkpoint = Checkpoint(folder, {}, model.arch, {}, model.embed.weight.dtype)
    done = Quantization(build_part(recipe["method"]), bits, report)
    return DiffusionLM(model, load_tokenizer(checkpoint), checkpoint, build(config.sampler), config, done)


def _plain(value: Any) -> Any:
    """A setting as a config file has it: `float16` for torch.float16, text for a path."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return str(value) if isinstance(value, Path | torch.device) else value
