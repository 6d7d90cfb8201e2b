"""compressed-tensors: its own code reads the weights back to the bit, transformers gives the same logits."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

import dqx
from dqx.export import compressed_tensors
from dqx.export.weights import leave_out_code, linears
from dqx.quant.linear import QuantLinear

TEXT = "Question: What is the job of Anna?\nAnswer:"
SYMMETRIC = "bits.weight.symmetric=true"
FULL_RANGE = "bits.activation.symmetric=true", "bits.activation.full_range=true"
#: Method, bits and overrides, and the models: Dream as Qwen2, LLaDA as Llama.
BOTH = ("nano_dream", "nano_llada")
CASES = {
    "w4a16": (BOTH, "gptq", "w4a16"),
    "w4a16 symmetric": (BOTH[1:], "rtn", "w4a16", SYMMETRIC),
    "w8a16 per row, o in 16 bit": (BOTH[:1], "rtn", "w8a16", "bits.weight.group_size=-1", "bits.overrides.o.weight=16"),
    "w8a8": (BOTH[:1], "rtn", "w8a8"),
    "w8a8, weights symmetric": (BOTH[1:], "rtn", "w8a8", SYMMETRIC),
    "w8a8 symmetric in the full range": (BOTH, "rtn", "w8a8", SYMMETRIC, *FULL_RANGE),
    "fp8": (BOTH[1:], "rtn", "fp8"),
    "fp8_w8a16": (BOTH[:1], "rtn", "fp8_w8a16"),
}
#: What is not written, by what is said of it.
REFUSED = {
    "attends block by block": ("nano_block", "rtn", "w4a16"),
    "codes of 3 bits": ("nano_llada", "rtn", "w3a16"),
    "have different grids": ("nano_llada", "rtn", "w4a16", "bits.overrides.down.weight=8"),
    "v stays in 16 bit": ("nano_dream", "rtn", "w4a16", "bits.overrides.v.weight=16"),
    "together with weights of 8 bits": ("nano_llada", "rtn", "w4a8"),
    "method.activation=per_token": ("nano_llada", "rtn", "w8a8", "method.activation=static"),
    "method.activation.include_zero=false": ("nano_llada", "rtn", "w8a8", "method.activation.include_zero=false"),
    "groups of neighbours": ("nano_llada", "gptq", "w4a16", "method.rounding.static_groups=false"),
    "at run time": ("nano_llada", "quarot", "w16a16"),
    "bits.weight.format=nvfp4": ("nano_llada", "rtn", "nvfp4_w4a16"),
    "bits.weight.format=q4_1": ("nano_llada", "rtn", "gguf_q4_1"),
    "bits.activation.scale_dtype=float16": ("nano_llada", "rtn", "w8a8", "bits.activation.scale_dtype=float16"),
}


def quantized(model: str, method: str, bits: str, *overrides: str, dtype: str = "float32") -> dqx.DiffusionLM:
    lm = dqx.load(model, dtype=dtype)
    lm.quantize(method, bits, calib=[TEXT], overrides=overrides)
    return lm


@cache
def reference(model: str) -> torch.Tensor:
    return dqx.load(model).logits(masked(model))


@cache
def masked(model: str) -> torch.Tensor:
    """Ids [1, T], every third of them masked."""
    lm = dqx.load(model)
    ids = lm.tokens(TEXT * 3)[None].clone()
    ids[0, ::3] = lm.model.arch.mask_token_id
    return ids


def assert_weights_are_equal(lm: dqx.DiffusionLM, folder: Path) -> None:
    """As the package's own code reads the folder."""
    config = QuantizationConfig.model_validate(json.loads((folder / "config.json").read_text())["quantization_config"])
    [scheme] = config.config_groups.values()
    compressor, stored = BaseCompressor.get_value_from_registry(config.format), load_file(folder / "model.safetensors")
    names = compressed_tensors.stored_names(lm)
    for name, _, linear in linears(lm.model):
        stem = names[f"{name}.weight"].removesuffix("weight")
        parts = {key.removeprefix(stem): tensor for key, tensor in stored.items() if key.startswith(stem)}
        if isinstance(linear, QuantLinear) and linear.scale is not None:
            assert parts["weight_scale"].dtype in (linear.weight.dtype, torch.float32)
            weight = compressor.decompress(parts, scheme)["weight"]
        else:
            assert stem.removesuffix(".") in config.ignore
            weight = parts["weight"]
        assert torch.equal(weight.to(linear.weight.dtype), linear.weight), name


def read_logits(lm: dqx.DiffusionLM, folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """The logits [1, T, V] of transformers' own class, each row predicting the token of its place."""
    packed = any("CompressedTensorsConfig" in note for note in compressed_tensors.notes(lm))
    own = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if packed else {}
    reader = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, dtype="auto", **own)
    with torch.no_grad():
        logits = reader(ids).logits
    return torch.cat((logits[:, :1], logits[:, :-1]), 1) if lm.model.arch.logit_shift else logits


@pytest.mark.parametrize(("case", "model"), [(case, model) for case, (models, *_) in CASES.items() for model in models])
def test_weights_are_equal_to_the_bit_and_logits_agree(case: str, model: str, tmp_path: Path):
    lm = quantized(model, *CASES[case][1:])
    assert compressed_tensors.problems(lm) == []
    assert not any("127.5" in note for note in compressed_tensors.notes(lm))
    compressed_tensors.write(lm, tmp_path / "out")
    assert_weights_are_equal(lm, tmp_path / "out")
    ids = masked(model)
    ours, theirs = lm.logits(ids), read_logits(lm, tmp_path / "out", ids)
    assert (ours - theirs).abs().max() < 2e-4  # of a standard deviation of 3 to 6
    assert (ours - reference(model)).abs().max() > 0.1


def test_symmetric_inputs_are_read_in_other_steps(tmp_path: Path):
    """Of absmax / 127.5, not absmax / 127: that moves logits, and the export says so."""
    lm = quantized("nano_dream", "rtn", "w8a8", SYMMETRIC, "bits.activation.symmetric=true")
    assert any("absmax / 127.5" in note for note in compressed_tensors.notes(lm))
    compressed_tensors.write(lm, tmp_path / "out")
    assert_weights_are_equal(lm, tmp_path / "out")
    ids = masked("nano_dream")
    ours, theirs = lm.logits(ids), read_logits(lm, tmp_path / "out", ids)
    assert 0.05 < (ours - theirs).abs().mean() < 0.15 * ours.std()  # measured: 0.24 of 3.2
    assert (ours.argmax(-1) == theirs.argmax(-1)).float().mean() > 0.9


@pytest.mark.parametrize("case", ["w4a16", "w8a8", "fp8"])
def test_weights_of_bfloat16_are_equal_to_the_bit(case: str, tmp_path: Path):
    """A code of 8 bits is not always what the rounded weight is nearest to."""
    lm = quantized("nano_llada", *CASES[case][1:], dtype="bfloat16")
    assert compressed_tensors.problems(lm) == []
    compressed_tensors.write(lm, tmp_path / "out")
    assert_weights_are_equal(lm, tmp_path / "out")
    assert any("scales are float32" in note for note in compressed_tensors.notes(lm))


@pytest.mark.parametrize("symmetric", ["true", "false"])
def test_size_on_disk_is_that_of_the_report(symmetric: str, tmp_path: Path):
    lm = quantized("nano_llada", "rtn", "w4a16", f"bits.weight.symmetric={symmetric}", dtype="bfloat16")
    compressed_tensors.write(lm, tmp_path / "out")
    assert lm.quantization is not None
    report = lm.quantization.report
    weights = sum(row.shape[0] * row.shape[1] for row in report.linears)
    kept = sum(row.parameters for row in report.kept) * 2
    wide = weights // 128 * 2  # bytes: scales are float32, and the report counts 16 bits
    expected = weights * report.average_bits / 8 + kept + wide
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == pytest.approx(expected, rel=0.02)


def test_the_folder_says_what_readers_need(tmp_path: Path):
    lm = quantized("nano_llada", "rtn", "w4a16", "bits.overrides.o.weight=16")
    lm.model.arch = lm.checkpoint.arch.__class__.read(vars(lm.model.arch) | {"rope_theta": 5e5, "attention": {}})
    compressed_tensors.write(lm, tmp_path / "out")
    reader = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    assert type(reader).__name__ == "LlamaForCausalLM"
    assert reader.config.rope_parameters["rope_theta"] == 5e5
    assert reader.config.is_causal is False
    assert reader.config.mask_token_id == lm.model.arch.mask_token_id
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=False)
    assert tokenizer(TEXT)["input_ids"] == lm.tokens(TEXT).tolist()


@pytest.mark.parametrize("said", REFUSED)
def test_what_the_format_cannot_hold_is_refused(said: str):
    problems = compressed_tensors.problems(quantized(*REFUSED[said]))
    assert any(said in problem for problem in problems), problems


def test_full_precision_is_refused():
    assert any("no weight is quantized" in problem for problem in compressed_tensors.problems(dqx.load("nano_llada")))


def test_a_tokenizer_in_a_file_of_code_becomes_transformers_own(tmp_path: Path):
    """As Dream's checkpoints name theirs; other settings and other files stay."""
    lm = dqx.load("nano_dream")
    named = {"auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]}, "model_max_length": 77}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named | {"tokenizer_class": "DreamTokenizer"}))
    (tmp_path / "tokenizer.json").write_bytes((lm.checkpoint.folder / "tokenizer.json").read_bytes())
    leave_out_code(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    assert tokenizer(TEXT)["input_ids"] == lm.tokens(TEXT).tolist()
    assert tokenizer.model_max_length == 77
