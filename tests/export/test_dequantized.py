"""Fake-quantized weights under the checkpoint's names: read again as a plain checkpoint, the logits are equal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import dqx
from dqx.export import dequantized
from dqx.models.checkpoint import inspect
from dqx.study.export import export

MODELS = ("nano_llada", "nano_dream", "nano_block")
TEXT = "Question: What is the job of Anna?\nAnswer:"
#: Model, method, bits, overrides; what is written as weights alone.
HELD = {
    "rtn": ("nano_llada", "rtn", "w4a16"),
    "gptq, down in 8 bit": ("nano_dream", "gptq", "w3a16", "bits.overrides.down.weight=8"),
    "awq": ("nano_llada", "awq", "w4a16", "method.transforms.scale.n_grid=2"),
    "rtn, nvfp4": ("nano_block", "rtn", "nvfp4_w4a16"),
}
#: And what is not, by what is said of it.
REFUSED = {
    "inputs of linears are rounded": ("rtn", "w8a8"),
    "change the inputs of linears at run time": ("quarot", "w16a16"),
    "keys or values at run time": ("rtn", "w4a16", "method.kv=per_head", "bits.kv.bits=8"),
}


def quantized(model: str, method: str, bits: str, *overrides: str) -> dqx.DiffusionLM:
    lm = dqx.load(model)
    lm.quantize(method, bits, calib=[TEXT], overrides=overrides)
    return lm


@pytest.mark.parametrize("case", HELD)
def test_what_is_read_again_gives_the_same_logits(case: str, tmp_path: Path):
    lm = quantized(*HELD[case])
    assert dequantized.problems(lm) == []
    dequantized.write(lm, tmp_path / "out")
    again = dqx.load(tmp_path / "out")
    assert again.quantization is None
    assert again.facts()["dtype"] == "float32"
    assert torch.equal(again.logits(TEXT), lm.logits(TEXT))
    assert not torch.equal(dqx.load(HELD[case][0]).logits(TEXT), lm.logits(TEXT))


@pytest.mark.parametrize("model", MODELS)
def test_names_and_files_are_the_sources(model: str, tmp_path: Path):
    lm = quantized(model, "rtn", "w4a16")
    dequantized.write(lm, tmp_path / "out")
    source, held = inspect(lm.config.path), inspect(str(tmp_path / "out"))
    assert held.files.keys() == source.files.keys()
    assert held.config == source.config | {"torch_dtype": "float32"}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (held.folder / name).read_bytes() == (source.folder / name).read_bytes()


def test_of_a_saved_model_config_json_is_written_anew(tmp_path: Path):
    lm = quantized("nano_block", "rtn", "w4a16")
    lm.save(tmp_path / "saved")
    saved = dqx.load(tmp_path / "saved")
    dequantized.write(saved, tmp_path / "out")
    assert torch.equal(dqx.load(tmp_path / "out").logits(TEXT), lm.logits(TEXT))


def test_a_head_that_rotations_untied_is_written(tmp_path: Path):
    """As the final norm's gain is folded into the head, it is no longer the embedding."""
    lm = dqx.load("nano_llada")
    lm.model.head.weight = lm.model.embed.weight
    lm.checkpoint.config["weight_tying"] = True
    assert dequantized.hub_config(lm)["weight_tying"] is True
    lm.quantize("quarot", "w16a16")
    for block in lm.model.blocks:  # leave what weights can hold
        for place in (block.inputs, block.heads):
            place.update({name: torch.nn.Identity() for name in place})
    assert dequantized.problems(lm) == []
    dequantized.write(lm, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["weight_tying"] is False
    assert torch.equal(dqx.load(tmp_path / "out").logits(TEXT), lm.logits(TEXT))


@pytest.mark.parametrize("said", REFUSED)
def test_what_happens_at_run_time_is_refused(said: str):
    problems = dequantized.problems(quantized("nano_dream", *REFUSED[said]))
    assert any(said in problem for problem in problems), problems


def test_a_bias_of_a_norm_is_refused():
    lm = dqx.load("nano_dream")
    lm.model.norm.bias = torch.nn.Parameter(torch.zeros(lm.model.arch.hidden_size))
    [problem] = dequantized.problems(lm)
    assert "norms have a bias" in problem


def test_a_folder_that_exists_is_left_alone(tmp_path: Path):
    with pytest.raises(ValueError, match="exists already"):
        dequantized.write(dqx.load("nano_llada"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_command_writes_it(tmp_path: Path):
    lm = quantized("nano_dream", "rtn", "w4a16")
    lm.save(tmp_path / "saved")
    assert export("dequantized", str(tmp_path / "saved"), tmp_path / "new" / "out") == []
    assert torch.equal(dqx.load(tmp_path / "new" / "out").logits(TEXT), lm.logits(TEXT))
