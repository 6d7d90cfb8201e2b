"""The benchmark of memory: its random checkpoints are checkpoints, and the whole command runs on a small one."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from dqx.benchmarks import memory
from dqx.benchmarks.cases import MODELS
from dqx.models.checkpoint import inspect, load_weights

SIZES = {"vocab_size": 64, "hidden_size": 128, "mlp_size": 256, "n_blocks": 2, "n_heads": 2, "n_kv_heads": 1}
TOKENS = {"mask_token_id": 1, "eos_token_id": 2, "max_length": 64}


@pytest.fixture(params=MODELS)
def small(request):
    return replace(MODELS[request.param], **SIZES, **TOKENS)


def test_a_random_checkpoint_is_a_checkpoint(small, tmp_path):
    size = memory.write_checkpoint(small, tmp_path / "a")
    source = inspect(str(tmp_path / "a"))
    assert source.arch == small
    model = load_weights(source)
    assert (model.dtype, size) == (torch.bfloat16, 2 * sum(p.numel() for p in model.parameters()))
    assert len(set(source.files.values())) == small.n_blocks + 2
    for name, p in model.named_parameters():
        spread = 0.0 if p.dim() == 1 else 1.0 if name.startswith("embed") else p.shape[1] ** -0.5
        assert p.float().std().item() == pytest.approx(spread, rel=0.1)
    assert not torch.equal(model.blocks[0].q.weight, model.blocks[1].q.weight)
    memory.write_checkpoint(small, tmp_path / "b")
    assert inspect(str(tmp_path / "b")).fingerprint() == source.fingerprint()


def test_full_sizes_are_those_of_the_published_models():
    for arch in MODELS.values():
        assert sum(len(names) for names in memory._files(arch)) == len(memory.tensor_names(arch))


def test_the_command_measures_and_cleans_up(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(memory.MODELS, "llada_8b", replace(MODELS["llada_8b"], **SIZES, **TOKENS))
    options = ["--method=gptq", "--blocks=1", "--samples=2", "--length=16", f"--json={tmp_path / 'figures.json'}"]
    memory.main([str(tmp_path / "work"), *options])
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert (figures["method"], figures["bits"], figures["blocks"], figures["tokens"]) == ("gptq", "w4a16", 1, 32)
    assert figures["peak_ram_gb"] > 0.05
    assert 0 < figures["quantized_gb"] < figures["checkpoint_gb"]
    assert "llada_8b, 1 blocks, gptq w4a16, 32 calibration tokens" in capsys.readouterr().out
    assert not (tmp_path / "work").exists()


def test_mistakes_are_told(tmp_path, capsys):
    with pytest.raises(SystemExit):
        memory.arguments([str(tmp_path)])
    assert "exists already; name a new folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        memory.arguments([str(tmp_path / "new"), "--blocks=0"])
    assert "--blocks=0 must be at least 1" in capsys.readouterr().err
