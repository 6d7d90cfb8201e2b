"""From a configuration to the object that a run works with, or to everything that is wrong with it.

experiment = Experiment.of(config)      # for this machine
design = designed(config, arch, ...)    # for a plan, of a model that need not be here
problems(config, elsewhere=True)        # before a launcher hands a run to another machine
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from omegaconf import DictConfig

from dqx.common.devices import device_problems, dispatch_problems, dtype_of, pick_device
from dqx.common.parts import build_part, part_problems
from dqx.config.compose import as_part, resolve
from dqx.config.schema import Config, ConfigProblems
from dqx.evaluate.problems import sandbox_problems
from dqx.export.rehearsal import export_problems
from dqx.models.architecture import Architecture
from dqx.models.checkpoint import Checkpoint, CheckpointError, inspect, locate, read_config
from dqx.quant.backends import choice
from dqx.quant.fused import fused_problems
from dqx.study import checks, engine
from dqx.study.design import Design
from dqx.study.estimate.memory import Pool, memory_pools, memory_problems


@dataclass(frozen=True)
class Experiment(Design):
    """A run that can start: its parts and its checkpoint, of which no weight has been read."""

    checkpoint: Checkpoint  # with the configuration's mask token

    @classmethod
    def of(cls, config: Config) -> Experiment:
        """The experiment that a configuration describes, on this machine.

        Raises ConfigProblems with everything that is wrong, in the order of the config groups, as far as it can be
        told without reading a weight.
        """
        method, sampler, wrong = _parts(config)
        model = config.model
        if not model.path.strip():
            _refuse(wrong)
        if wrong and not checks.is_local(model.path):
            reason = "to download nothing for a run that cannot start"
            _refuse([*wrong, f"(model.path={model.path} was not looked at, {reason})"])
        try:
            checkpoint = inspect(model.path, model.revision, model.mask_token_id)
        except CheckpointError as error:
            named = "model.path=" if str(error).startswith(model.path) else ""
            raise ConfigProblems([*wrong, f"{named}{error}"]) from error
        wrong += checks.checkpoint_problems(config, checkpoint)
        wrong += checks.model_problems(config, checkpoint.arch, method, sampler)
        _refuse(wrong)
        dtype = dtype_of(model.dtype) or checkpoint.stored_dtype
        device = pick_device(model.device)
        experiment = cls(config, method, sampler, checkpoint.arch, dtype, device, checkpoint)
        _refuse(export_problems(config.export, method, config.bits, checkpoint.arch, dtype))
        _refuse(problems_here(experiment))
        _refuse(memory_problems(experiment.pools))  # what a run needs can be told of one that works
        return experiment

    @cached_property
    def pools(self) -> list[Pool]:
        """What the run needs of each kind of memory, and what it may take."""
        return memory_pools(self)

    @cached_property
    def kernels(self) -> dict[str, str]:
        """What computes each quantized linear that is not simulated: a kernel, or the engine of the whole model."""
        if self.config.backend == engine.LLAMA_CPP:
            return dict.fromkeys(choice.products(self.method, self.config.bits, self.arch), engine.LLAMA_CPP)
        return choice.chosen(self.config.backend, self.method, self.config.bits, self.arch, self.device)

    @cached_property
    def fingerprint(self) -> str:
        """The checkpoint's."""
        return self.checkpoint.fingerprint()


def designed(config: Config, arch: Architecture, dtype: torch.dtype, device: torch.device) -> Design:
    """The design of a run on any machine, judged by the model's shapes; nothing of the model has to be here.

    Raises ConfigProblems with everything that is wrong.
    """
    method, sampler, wrong = _parts(config, here=False)
    _refuse([*wrong, *checks.model_problems(config, arch, method, sampler)])
    _refuse(export_problems(config.export, method, config.bits, arch, dtype))
    _refuse(engine.problems(config, method, sampler, arch, dtype))
    return Design(config, method, sampler, arch, dtype, device)


def problems_here(design: Design) -> Iterator[str]:
    """What this machine's device cannot compute of a run."""
    config, device = design.config, design.device
    yield from fused_problems(config.model.fused, device)
    yield from choice.device_problems(config.backend, device)
    yield from engine.problems(config, design.method, design.sampler, design.arch, design.dtype, device)


def problems(config: Config | DictConfig, *, elsewhere: bool = False) -> list[str]:
    """Everything that is wrong with a run; [] where it can start.

    With `elsewhere` this machine only launches it: the device is not looked at, and of a checkpoint that is not here
    nothing but its config.json on the hub; where that cannot be had, the run alone can tell.
    """
    try:
        config = config if isinstance(config, Config) else resolve(config)
        if not elsewhere:
            Experiment.of(config)
            return []
        folder = locate(config.model.path, config.model.revision, files=("config.json",))
        designed(config, read_config(folder, config.model.mask_token_id)[1], torch.float32, torch.device("cpu"))
    except ConfigProblems as error:
        return error.problems
    except CheckpointError:
        pass
    return []


def _parts(config: Config, *, here: bool = True) -> tuple[Any, Any, list[str]]:
    """Method and sampler, each None where it cannot be built, and what is wrong with the settings.

    `here`: on the machine that runs it.
    """
    wrong = checks.setting_problems(config)
    wrong += device_problems(config.model.device) if here else ()
    wrong += dispatch_problems(config.dispatch, config.model.device, here=here)
    parts = {"model.sampler": config.model.sampler or None, "method": as_part(config.method)}
    unfit = {where: part_problems(part, where) for where, part in parts.items()}
    sampler, method = (None if unfit[where] or not part else build_part(part) for where, part in parts.items())
    wrong += [problem for told in unfit.values() for problem in told]
    wrong += checks.data_problems(config, method, sampler)
    wrong += checks.reuse_problems(config, method, sampler)
    wrong += sandbox_problems(config.task.suite) if here else ()
    return method, sampler, wrong


def _refuse(wrong: Iterable[str]) -> None:
    """Raise ConfigProblems where anything is wrong, with each problem once."""
    if told := list(dict.fromkeys(wrong)):
        raise ConfigProblems(told)
