"""Whole runs on models with block-wise attention: tiny checkpoints in the hub's format, every family, every sampler."""

import json

import pytest

from dqx.config.compose import compose, resolve
from dqx.config.schema import ConfigProblems
from dqx.diffusion.samplers.sdar import SDARSampler
from dqx.models.family import family_of
from dqx.record.folder import RunFolder
from dqx.study.run import run

SMALL = [
    *("method=gptq", "bits=4", "task=nano", "task.limit=2", "calib.text=nano", "calib.samples=2", "calib.length=64"),
    *("outliers.samples=1", "task.suite.nano_facts.mc_samples=2", "model.dtype=float32", "wandb.mode=disabled"),
    "bits.weight.group_size=16",
]
CHOICES = {"sdar": "sdar_4b", "nemotron": "nemotron_8b", "fast_dllm": "fast_dllm_7b"}


@pytest.fixture
def launch(tmp_path, tiny_checkpoint):
    """Run a family's checkpoint with these overrides into a fresh folder."""
    checkpoints = {}

    def start(family, name, *overrides):
        if family not in checkpoints:
            checkpoints[family] = tiny_checkpoint(family)
        model = [f"model={CHOICES.get(family, 'nano_' + family)}", f"model.path={checkpoints[family]}"]
        cache = f"cache_dir={tmp_path / 'cache'}"
        return run(resolve(compose([*model, *SMALL, cache, *overrides])), tmp_path / name)

    return start


@pytest.mark.parametrize("family", CHOICES)
def test_a_run_is_whole_and_is_reused(family, launch, tmp_path):
    record = launch(family, "first")
    assert {row.name for row in record.deltas if row.kind == "task"} == {"nano_facts", "nano_sums", "nano_code"}
    assert all(result.n_forwards > 0 for side in (record.full_precision, record.quantized) for result in side.values())
    assert record.quantization["linears"]
    assert any(note.startswith("fidelity: ") for note in record.warnings)
    again = launch(family, "second")
    assert {source for side in again.sources.values() for source in side.values()} == {"reused"}
    assert again.deltas == record.deltas
    assert RunFolder(tmp_path / "first").read().results() == json.loads((tmp_path / "first/results.json").read_text())


#: A family, settings of its sampler, and what it would be asked that it has not learned.
REFUSED = [
    ("sdar", ["model.sampler=llada"], "write model.sampler=sdar"),
    ("nemotron", ["model.sampler=sdar"], "write model.sampler=nemotron"),
    ("fast_dllm", ["model.sampler=sdar"], "write model.sampler=fast_dllm"),
    ("sdar", ["model.sampler=fast_dllm"], "write model.sampler=sdar"),
    ("fast_dllm", ["model.sampler=autoregressive"], "write model.sampler=fast_dllm"),
    ("llada", ["model.sampler=nemotron"], "write model.sampler=llada"),
    ("dream", ["model.sampler=sdar"], "write model.sampler=dream"),
    ("fast_dllm", ["steps.count=8"], "steps=8 has no meaning"),
]


@pytest.mark.parametrize(("family", "settings", "told"), REFUSED)
def test_what_a_model_has_not_learned_is_refused(family, settings, told, launch):
    with pytest.raises(ConfigProblems, match=told):
        launch(family, "refused", *settings)


def test_a_block_that_is_not_the_checkpoints_is_noted():
    arch = family_of("sdar").published[1]
    assert SDARSampler(block=arch.block_length).model_notes(arch) == []
    assert "blocks of 8 tokens (model.sampler.block)" in SDARSampler(block=8).model_notes(arch)[0]
