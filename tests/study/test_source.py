"""Where an exported model comes from: a run's folder, a saved model, a name; what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dqx
from dqx.config.compose import compose, resolve
from dqx.config.schema import ConfigProblems
from dqx.study.run import run
from dqx.study.source import is_quantized, loaded

SMALL = ("task=nano_facts", "task.limit=1", "outliers.samples=0", "fidelity.samples=0", "wandb.mode=disabled")


def test_the_model_of_a_run_is_made_again(tmp_path: Path) -> None:
    settings = ("model.device=cpu", "method=rtn", "bits=w4a16", f"cache_dir={tmp_path / 'cache'}", *SMALL)
    run(resolve(compose(settings)), tmp_path / "run")
    lm, other = loaded(str(tmp_path / "run")), dqx.load("nano_llada", device="cpu")
    other.quantize("rtn", "w4a16")
    assert lm.quantization is not None
    assert lm.quantization.report.method == "rtn"
    assert torch.equal(lm.logits("a"), other.logits("a"))
    assert is_quantized(str(tmp_path / "run"))
    results = tmp_path / "run" / "quantization.json"
    results.write_text(results.read_text().replace('"weight_error": 0.', '"weight_error": 1.'))
    with pytest.raises(ConfigProblems, match="another than the run's"):
        loaded(str(tmp_path / "run"))


def test_saved_models_and_names(tmp_path: Path) -> None:
    lm = dqx.load("nano_dream", device="cpu")
    lm.quantize("rtn", "w4a16")
    lm.save(tmp_path / "saved")
    assert torch.equal(loaded(str(tmp_path / "saved")).logits("a"), lm.logits("a"))
    assert loaded("nano_dream").quantization is None
    assert is_quantized(str(tmp_path / "saved"))
    assert not is_quantized("nano_dream")


def test_a_run_at_full_precision_is_not_quantized(tmp_path: Path) -> None:
    settings = ("model.device=cpu", "method=fp16", f"cache_dir={tmp_path / 'cache'}", *SMALL)
    run(resolve(compose(settings)), tmp_path / "run")
    assert not is_quantized(str(tmp_path / "run"))
    assert loaded(str(tmp_path / "run")).quantization is None


def test_a_run_that_has_not_finished_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(ConfigProblems, match="has not finished"):
        loaded(str(tmp_path))


def test_a_format_that_is_none() -> None:
    told = subprocess.run(
        [sys.executable, "-m", "dqx", "export", "ggml", "nano_llada", "--out", "x"], capture_output=True, text=True
    )
    assert told.returncode == 2
    assert "invalid choice: 'ggml'" in told.stderr
