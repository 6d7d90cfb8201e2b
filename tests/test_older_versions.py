"""Bundles and quantized folders of an older version, whose classes lay in other modules; see data/old/README.md."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file

from dqx.config.compose import build, resolve
from dqx.config.schema import CONF_DIR, Config
from dqx.diffusion.samplers import LLaDASampler
from dqx.quant import load_quantized
from dqx.quant.method import Method
from dqx.record.folder import RunFolder
from dqx.sharing import bundle
from dqx.sharing.replay import NAME, replayed
from dqx.study.experiment import problems

OLD = Path(__file__).parent / "data" / "old"
BUNDLE = OLD / "run.dqx.zip"


def shared_config() -> Config:
    """The configuration that `launch.py --from BUNDLE` runs."""
    _, *overrides = replayed([f"--from={BUNDLE}"])
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return resolve(compose(NAME, overrides=overrides))


def test_a_shared_run_can_be_run_again() -> None:
    config = shared_config()
    assert problems(config) == []
    assert isinstance(build(config.method), Method)
    assert isinstance(build(config.model.sampler), LLaDASampler)


def test_a_shared_run_reads_like_a_run(tmp_path: Path) -> None:
    record = RunFolder(bundle.read(BUNDLE).unpack(tmp_path)).read()
    assert set(record.full_precision) == set(record.quantized) == {"nano_facts", "nano_sums", "nano_code"}
    assert all(len(result.documents) == 2 for result in record.quantized.values())
    assert record.quantization["average_bits"] == 4.0703125


@pytest.mark.slow
def test_a_shared_run_gives_the_same_results(tmp_path: Path) -> None:
    places = [f"hydra.run.dir={tmp_path / 'run'}", f"cache_dir={tmp_path / 'cache'}", "wandb.mode=disabled"]
    command = [sys.executable, "launch.py", "--from", str(BUNDLE), *places]
    done = subprocess.run(command, cwd=CONF_DIR.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    again = RunFolder(tmp_path / "run").read(documents=False)
    assert again.quantization["average_bits"] == bundle.read(BUNDLE).json("quantization.json")["average_bits"]
    for task in again.full_precision:
        told = f"against {BUNDLE.name}: {task}, full precision: all 2 predictions are identical"
        assert told in again.warnings


@pytest.mark.parametrize("name", ["quarot_llada", "duquant_dream"])
def test_a_quantized_folder_gives_the_same_logits(name: str) -> None:
    recorded = load_file(OLD / "logits.safetensors")
    model, report = load_quantized(OLD / name)
    assert (report.method, len(report.linears)) == (name.split("_")[0], 14)
    with torch.no_grad():
        torch.testing.assert_close(model(recorded["ids"]), recorded[name], rtol=1e-4, atol=1e-5)
