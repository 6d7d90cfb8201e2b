"""What is measured of a model on the pretend device: outliers, denoising states, fidelity, a text's likelihood."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_saved import configured
from tiny import Batch

import dqx
from dqx.api import DiffusionLM
from dqx.config.compose import build, compose, resolve
from dqx.config.schema import CalibConfig
from dqx.data.masking import rollouts
from dqx.diagnostics.activations import measure_activations, measure_block
from dqx.diagnostics.fidelity import Reference, from_tensors, measure_fidelity, predict, questions, to_tensors
from dqx.diffusion.rollout import Rollout, write
from dqx.diffusion.samplers import DreamSampler, LLaDASampler, Sampler
from dqx.evaluate.results import TaskResult
from dqx.evaluate.settings import LikelihoodSettings
from dqx.quant import quantize
from pretend.test_quantization import METHODS

SAMPLERS: dict[str, Sampler] = {
    "guidance": LLaDASampler(temperature=0.5, cfg_scale=1.0),
    "dual cache": LLaDASampler(cache="dual", threshold=0.1),
    "origin": DreamSampler("origin", temperature=0.7),
    "entropy": DreamSampler(suppress_mask=True),
}
TOKENS = torch.randint(0, 256, (3, 16), generator=torch.Generator().manual_seed(0))
families = pytest.mark.parametrize("family", ["llada", "dream"])


def load(folder: Path, device: str) -> DiffusionLM:
    lm = dqx.load(folder, device=device, dtype="float32")
    assert lm.model.device.type == device
    return lm


def states(model: Any, sampler: Sampler) -> Rollout:
    return write(model, sampler, TOKENS[:, :8], gen_length=8, steps=4, seed=1, together=2)


@families
@pytest.mark.usefixtures("pretend")
def test_outliers(family: str, small_checkpoint: Path) -> None:
    """Before and after a quantization with rotations, over windows and denoising states, and of a single block."""
    found = []
    for device in ("cpu", "pretend"):
        model = load(small_checkpoint, device).model
        shown = states(model, LLaDASampler()).states(2)
        batches = [Batch(TOKENS), Batch(TOKENS[:1, :9])]
        before = measure_activations(model, batches, states=shown, surfaces=[1])
        x = list(model.residual_states(TOKENS.to(model.device)))[1]
        block = measure_block(model.blocks[1], [x], index=1)
        config = configured(family, METHODS["quarot"])
        quantize(model, build(config.method), config.bits, batches, progress=False)
        after = measure_activations(model, batches, states=shown, surfaces=[0])
        found.append((before, block, after))
    for expected, ours in zip(*found, strict=True):
        assert ours.to_dict() == expected.to_dict()
        assert ours.maps.keys() == expected.maps.keys()
        assert all(torch.equal(tensor, expected.maps[name]) for name, tensor in ours.maps.items())


@pytest.mark.parametrize("family", ["dream"])
@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.usefixtures("pretend")
def test_states_and_fidelity(sampler: Sampler, family: str, small_checkpoint: Path) -> None:
    """Answers, states and predictions of full precision, and how far a quantized model is from them."""
    found = []
    for device in ("cpu", "pretend"):
        model = load(small_checkpoint, device).model
        rollout = states(model, sampler)
        asked = questions(TOKENS, rollout.states(2), rollout.mask_token_id, seed=1)
        said = to_tensors(predict(model, sampler, asked, steps=4, seed=1, together=2))
        config = configured(family, METHODS["quarot"])
        method = build(config.method)
        quantize(model, method, config.bits, [Batch(TOKENS)], progress=False)
        reference = Reference(rollout, asked, from_tensors(said))
        undo = method.residual_map(config.bits, model.arch, seed=0)
        moved = measure_fidelity(model, sampler, reference, seed=1, residual_map=undo)
        found.append((rollout.ids, said, moved))
    (ids, said, moved), (our_ids, ours, our_moved) = found
    assert torch.equal(our_ids, ids)
    assert {tensor.device.type for tensor in ours.values()} == {"cpu"}
    assert all(torch.equal(tensor, said[name]) for name, tensor in ours.items())
    assert our_moved == moved
    assert min(row["agreement"] for row in moved["by_mask_ratio"]) < 1


@pytest.mark.parametrize("family", ["llada"])
@pytest.mark.usefixtures("pretend")
def test_calibration_states_that_the_model_visits(family: str, small_checkpoint: Path) -> None:
    calib = CalibConfig("trajectory", text="nano", samples=3, length=16, gen_length=8, block_length=4, rollout=True)
    ids, ours = (
        rollouts(
            load(small_checkpoint, device).model, LLaDASampler(cfg_scale=0.5), TOKENS, calib, seed=0, progress=False
        )[0]
        for device in ("cpu", "pretend")
    )
    assert ours.device.type == "cpu"
    assert torch.equal(ours, ids)


@families
@pytest.mark.usefixtures("pretend")
def test_a_texts_likelihood(family: str, small_checkpoint: Path) -> None:
    (spec,) = resolve(compose(["task=nano_text"])).task.suite.values()
    spec.length, spec.mc_samples = 24, 4

    def scored(device: str) -> dict[str, Any]:
        settings = LikelihoodSettings(batch_tokens=60)
        result: TaskResult = load(small_checkpoint, device).evaluate_suite(
            {"text": spec}, limit=2, likelihood=settings
        )["text"]
        return result.to_dict() | {"seconds": 0}

    assert scored("pretend") == scored("cpu")
