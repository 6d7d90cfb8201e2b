"""GGUF files read back by the package gguf: every type's weights to the bit, metadata, tokenizer, size, refusals."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFReader

import dqx
from dqx.api import Quantization
from dqx.config.schema import ConfigProblems, choices
from dqx.export.gguf import notes, problems, write
from dqx.export.gguf.tensors import IN_BLOCK, row_order
from dqx.formats.bits import BitsConfig, WeightBits
from dqx.formats.integers import Grid
from dqx.formats.weight import QuantizedWeight
from dqx.models.transformer import Block, compose
from dqx.quant.activation import PerToken
from dqx.quant.kv_quantizers import BeforeBias, HeadQuantizer
from dqx.quant.linear import QuantLinear
from dqx.quant.loop import quantize
from dqx.quant.method import Method
from dqx.quant.rounding.rtn import RTN
from dqx.quant.transforms.channel_scale import Divide
from dqx.quant.transforms.hadamard import OnlineHadamard
from dqx.study.export import export

MODELS = ("nano_llada", "nano_dream")
#: Type -> width, inputs per group, symmetric.
GRIDS = {
    "Q8_0": (8, 32, True), "Q4_0": (4, 128, True), "Q5_0": (5, 64, True), "Q4_1": (4, 32, False),
    "Q5_1": (5, 128, False), "Q4_K": (4, 256, False), "Q2_K": (2, 256, False), "Q6_K": (6, 256, True),
}  # fmt: skip


@cache
def loaded(name: str) -> dqx.DiffusionLM:
    return dqx.load(name, device="cpu")


def plain(name: str) -> dqx.DiffusionLM:
    """A model of one's own at full precision."""
    return replace(loaded(name), model=deepcopy(loaded(name).model))


def quantized(name: str, bits: WeightBits, rounding: Any = torch.Tensor.half) -> dqx.DiffusionLM:
    """A model by round to nearest, its scales then changed to ones that a file has."""
    lm, method, widths = plain(name), Method("rtn", rounding=RTN()), BitsConfig(weight=bits)
    lm.quantization = Quantization(method, widths, quantize(lm.model, method, widths, [], seed=0))
    for block in lm.model.blocks:
        assert isinstance(block, Block)
        for role, linear in block.linears().items():
            assert isinstance(linear, QuantLinear)
            block.add_module(role, changed(linear, rounding))
    return lm


def changed(linear: QuantLinear, rounding: Any) -> QuantLinear:
    """The linear with the same codes and other scales."""
    assert linear.scale is not None
    assert linear.zero_point is not None
    assert linear.group_index is not None
    assert linear.grid is not None
    scale = rounding(linear.scale).float()
    weight = QuantizedWeight(linear.codes(), scale, linear.zero_point, linear.group_index.long(), linear.grid)
    return QuantLinear(linear, linear.weight_bits, weight, linear.activation, linear.activation_bits)


def power_of_two(scale: torch.Tensor) -> torch.Tensor:
    """With such scales the minimum of a group is a number of float16, whatever the zero point."""
    return torch.exp2(torch.log2(scale).round())


def read(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in GGUFReader(path).tensors}


def weight_of(tensor: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))


def fields(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


def assert_linears_equal(lm: dqx.DiffusionLM, stored: dict[str, Any]) -> None:
    for index, block in enumerate(lm.model.blocks):
        assert isinstance(block, Block)
        for role, linear in block.linears().items():
            rows, name = row_order(lm.model.arch, role), f"blk.{index}.{IN_BLOCK[role]}"
            found = weight_of(stored[f"{name}.weight"])
            assert torch.equal(found, linear.weight if rows is None else linear.weight[rows]), name
            if linear.bias is not None:
                bias = linear.bias if rows is None else linear.bias[rows]
                assert torch.equal(weight_of(stored[f"{name}.bias"]), bias), name


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("name", MODELS)
def test_the_weights_of_a_type_are_those_of_the_model(tmp_path: Path, name: str, kind: str) -> None:
    bits, size, symmetric = GRIDS[kind]
    rounding = power_of_two if kind.endswith("_1") else torch.Tensor.half
    lm = quantized(name, WeightBits(bits, size, symmetric), rounding)
    assert problems(lm) == []
    write(lm, tmp_path / "a.gguf", "f32")
    stored = read(tmp_path / "a.gguf")
    assert {tensor.tensor_type.name for n, tensor in stored.items() if n.startswith("blk") and "norm" not in n} <= {
        kind, "F32"
    }  # fmt: skip
    assert_linears_equal(lm, stored)
    for ours, theirs in (("embed", "token_embd"), ("norm", "output_norm"), ("head", "output")):
        assert torch.equal(weight_of(stored[f"{theirs}.weight"]), getattr(lm.model, ours).weight)
    assert list(tmp_path.iterdir()) == [tmp_path / "a.gguf"]


#: Choice of `bits` -> bits per weight of its type.
PRESETS = {
    "gguf_q8_0": 8.5, "gguf_q5_0": 5.5, "gguf_q4_0": 4.5, "gguf_q5_1": 6.0, "gguf_q4_1": 5.0,
    "gguf_q6_k": 6.5625, "gguf_q4_k": 4.5, "gguf_q3_k": 3.4375, "gguf_q2_k": 2.625,
}  # fmt: skip


def test_every_preset_is_covered() -> None:
    assert set(PRESETS) == {choice for choice in choices("bits") if choice.startswith("gguf")}


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", MODELS)
def test_presets_are_files_as_they_are(tmp_path: Path, name: str, preset: str, method: str) -> None:
    """Quantized, saved and loaded again: the file has the same weights to the bit, at the bits that the report says."""
    lm, kind = plain(name), preset.removeprefix("gguf_").upper()
    tokens = torch.randint(2, 490, (2, 64), generator=torch.Generator().manual_seed(1))
    report = lm.quantize(method, preset, calib=list(tokens))
    assert report.average_bits == PRESETS[preset]
    lm.save(tmp_path / "saved")
    again = dqx.load(str(tmp_path / "saved"), device="cpu")
    assert torch.equal(again.model(tokens), lm.model(tokens))
    assert problems(again) == []
    assert notes(again) == []  # inputs are rounded as the engine does
    write(again, tmp_path / "a.gguf", "f32")
    stored = read(tmp_path / "a.gguf")
    assert stored["blk.0.ffn_down.weight"].tensor_type.name == kind
    assert_linears_equal(lm, stored)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_a_model_at_full_precision(tmp_path: Path, name: str, dtype: str) -> None:
    assert export("gguf", name, tmp_path / "a.gguf", dtype) == []
    lm, stored = loaded(name), read(tmp_path / "a.gguf")
    if dtype == "f32":
        assert_linears_equal(lm, stored)
    of = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[dtype]
    assert torch.equal(weight_of(stored["output.weight"]), lm.model.head.weight.to(of).float())
    assert stored["token_embd.weight"].tensor_type.name == dtype.upper()
    assert stored["blk.0.attn_norm.weight"].tensor_type.name == "F32"


def test_llada_has_neighbours_where_dqx_has_halves(tmp_path: Path) -> None:
    """llama.cpp turns channels 2i and 2i + 1 of a head by the angle by which dqx turns i and E / 2 + i."""
    lm = plain("nano_llada")
    write(lm, tmp_path / "a.gguf", "f32")
    rows, E = weight_of(read(tmp_path / "a.gguf")["blk.1.attn_k.weight"]), lm.model.arch.head_size
    k = lm.model.blocks[1].k.weight
    assert torch.equal(rows[E + 6], k[E + 3])
    assert torch.equal(rows[E + 7], k[E + E // 2 + 3])


@pytest.mark.parametrize("name", MODELS)
def test_what_the_engine_has_to_know(tmp_path: Path, name: str) -> None:
    lm = quantized(name, WeightBits(4, 256, False))
    write(lm, tmp_path / "a.gguf")
    known, arch, family = fields(tmp_path / "a.gguf"), lm.model.arch, lm.model.arch.family
    shape = {
        "vocab_size": 512, "context_length": 4096, "embedding_length": 256, "block_count": 3,
        "feed_forward_length": 512, "attention.head_count": 4, "attention.head_count_kv": arch.n_kv_heads,
        "rope.freq_base": 10000.0, "rope.dimension_count": 64, "attention.causal": False,
        "attention.layer_norm_rms_epsilon": pytest.approx(arch.norm_eps),
    }  # fmt: skip
    assert {key: known[f"{family}.{key}"] for key in shape} == shape
    assert known["general.architecture"] == family
    assert known["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_K_S
    assert known["diffusion.shift_logits"] is (family == "dream")
    assert known["tokenizer.ggml.mask_token_id"] == arch.mask_token_id == 1
    assert known["tokenizer.ggml.eos_token_id"] == 0
    assert known["tokenizer.ggml.add_bos_token"] is False
    assert known["tokenizer.ggml.model"] == "gpt2"
    names, types = known["tokenizer.ggml.tokens"], known["tokenizer.ggml.token_type"]
    assert len(names) == len(types) == 512
    assert names[:3] == lm.tokenizer.convert_ids_to_tokens([0, 1, 2])
    assert (types[1], types[490], types[511]) == (3, 1, 5)
    assert len(known["tokenizer.ggml.merges"]) == 1  # the bundled tokenizers have none, llama.cpp asks for one


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q4_K"])
def test_size_on_disk(tmp_path: Path, kind: str) -> None:
    """Blocks of 32 take what the report's average bits say. K types have sub-scales too: 4.5 bits in place of 4.08."""
    bits, _, symmetric = GRIDS[kind]
    lm = quantized("nano_dream", WeightBits(bits, 256 if kind == "Q4_K" else 32, symmetric))
    write(lm, tmp_path / "a.gguf", "f16")
    assert lm.quantization is not None
    report = lm.quantization.report
    weights = sum(row.shape[0] * row.shape[1] for row in report.linears)
    vectors = sum(p.numel() for p in lm.model.parameters() if p.dim() == 1)
    others = 2 * (lm.model.embed.weight.numel() + lm.model.head.weight.numel()) + 4 * vectors
    average = 4.5 if kind == "Q4_K" else report.average_bits
    size = (tmp_path / "a.gguf").stat().st_size
    assert size == pytest.approx(weights * average / 8 + others, rel=0.02)


# ---- refusals --------------------------------------------------------------------------------------------------


def test_what_runs_beside_the_weights_is_refused() -> None:
    lm = plain("nano_dream")
    block = lm.model.blocks[1]
    compose(block.inputs, "mlp_out", OnlineHadamard(None))
    compose(block.inputs, "attn_in", Divide(torch.ones(256)))
    block.mlp_norm.bias = torch.nn.Parameter(torch.zeros(256))
    block.sequence["projected"] = BeforeBias(None, torch.zeros(2, 1, 64))
    told = problems(lm)
    assert len(told) == 4
    assert told[0].startswith("the input of attn_in is transformed at run time (Divide)")
    assert told[1].startswith("the input of mlp_out is transformed at run time (OnlineHadamard)")
    assert told[2].startswith("queries, keys or values pass through BeforeBias")
    assert told[3].startswith("a norm has a bias, put there by a correction")
    assert all("(first in block 1)" in problem for problem in told)


def test_scales_and_groups_that_no_file_has() -> None:
    as_fitted = "\n".join(problems(quantized("nano_dream", WeightBits(4, 128, True), torch.Tensor.float)))
    assert "scales that float16 does not have; write bits=gguf_q4_0" in as_fitted
    lm = quantized("nano_dream", WeightBits(4, 128, True))
    linear = lm.model.blocks[2].down
    linear.group_index = linear.group_index.flip(0)
    assert problems(lm) == [
        "down: groups of scattered inputs (act_order); set method.rounding.static_groups=true (first in block 2)"
    ]
    assert "format mxfp4" in "\n".join(problems(quantized("nano_dream", WeightBits(4, 32, True, "mxfp4"))))


@pytest.mark.parametrize(
    ("bits", "told"),
    [
        (WeightBits(3, 128, True), "there is no type of 3 bits, symmetric; use 4, 5 or 8 bits"),
        (WeightBits(8, 128, False), "there is no type of 8 bits, asymmetric; use bits.weight.symmetric=true"),
        (WeightBits(6, 128, True), "6 bits in groups of 128: Q6_K needs bits.weight.group_size=256"),
        (WeightBits(4, 128, False), "minima that float16 does not have"),
        (WeightBits(4, 16, True), "set bits.weight.group_size to a multiple of 32"),
    ],
)
def test_grids_without_a_type(bits: WeightBits, told: str) -> None:
    assert told in "\n".join(problems(quantized("nano_dream", bits)))


def test_other_families_and_an_existing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigProblems, match="does not denoise models of family sdar"):
        export("gguf", "nano_block", tmp_path / "a.gguf")
    (tmp_path / "b.gguf").write_text("mine")
    with pytest.raises(FileExistsError, match="exists already"):
        export("gguf", "nano_llada", tmp_path / "b.gguf")
    with pytest.raises(ConfigProblems, match="--dtype f64 is no choice of gguf"):
        export("gguf", "nano_llada", tmp_path / "c.gguf", "f64")


def test_what_the_engine_does_otherwise_is_told() -> None:
    lm = quantized("nano_llada", WeightBits(4, 128, True))
    assert notes(lm) == ["llama.cpp on a CPU rounds inputs of rounded weights to 8 bits; bits=gguf_... does so in dqx"]
    lm.model.blocks[0].down.activation = PerToken()
    assert any("inputs were rounded in dqx" in note for note in notes(lm))
    lm = plain("nano_llada")
    compose(lm.model.blocks[0].heads, "k", HeadQuantizer(Grid(4), "token", 1.0))
    assert problems(lm) == []
    assert any("llama.cpp keeps them whole" in note for note in notes(lm))
