"""The object that a run works with: built once, or everything that is wrong told at once."""

from __future__ import annotations

import pytest
import torch

from dqx.benchmarks.cases import MODELS
from dqx.config.compose import compose, resolve
from dqx.config.schema import ConfigProblems
from dqx.diffusion.samplers.llada import LLaDASampler
from dqx.study.experiment import Experiment, designed


def test_all_parts_are_there() -> None:
    experiment = Experiment.of(resolve(compose(["method=rtn", "model.dtype=auto", "model.mask_token_id=5"])))
    assert (experiment.method.name, experiment.dtype, experiment.device.type) == ("rtn", torch.bfloat16, "cpu")
    assert isinstance(experiment.sampler, LLaDASampler)
    assert experiment.checkpoint.arch is experiment.arch
    assert experiment.arch.mask_token_id == 5
    assert experiment.changes_model
    assert experiment.reads_text  # to measure outliers


def test_a_design_needs_no_checkpoint() -> None:
    config = resolve(compose(["model=llada_8b_base", "method=fp16", "outliers.samples=0", "model.device=cuda:7"]))
    design = designed(config, MODELS["llada_8b"], torch.bfloat16, torch.device("cuda"))
    assert not design.changes_model
    assert not design.reads_text


def test_keys_and_values_alone_change_a_model() -> None:
    """At 16 bits nothing does; with `values=static` the method also reads text."""
    for more, changes, reads in (
        ([], False, False),
        (["bits.kv.values=4"], True, False),
        (["bits.kv.values=4", "method.kv.values=static"], True, True),
    ):
        overrides = ["model=llada_8b_base", "method=rtn", "bits=w16a16", "method.kv=per_head", "outliers.samples=0"]
        design = designed(
            resolve(compose([*overrides, "model.device=cuda:7", *more])),
            MODELS["llada_8b"],
            torch.bfloat16,
            torch.device("cuda"),
        )
        assert (design.changes_model, design.reads_text) == (changes, reads)


def test_settings_parts_and_widths_are_told_together() -> None:
    config = resolve(compose(["seed=-1", "bits.weight.group_size=100", "model.sampler.temperature=-1"]))
    with pytest.raises(ConfigProblems) as refused:
        Experiment.of(config)
    problems = "\n".join(refused.value.problems)
    assert all(key in problems for key in ("seed=-1", "group_size=100", "model.sampler.temperature=-1"))
