"""The grids of GGUF's types: two-level scales, every rounding on them, float16 scales, full ranges, refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import TOY

from dqx.formats.bits import FORMATS, WEIGHT_FORMATS, ActivationBits, BitsConfig, RoleBits, WeightBits, label
from dqx.formats.gguf import GGUF_GRIDS, levels, two_level
from dqx.formats.integers import Grid
from dqx.formats.make import make_grid
from dqx.quant.activation import PerToken
from dqx.quant.bits_problems import bits_problems
from dqx.quant.method import Method
from dqx.quant.rounding.blockwise import Blockwise
from dqx.quant.rounding.gptaq import GPTAQ
from dqx.quant.rounding.gptq import GPTQ
from dqx.quant.rounding.rtn import RTN
from dqx.quant.transforms.awq import linear_judge

WEIGHTS = {
    name: WeightBits(FORMATS[name].widths[0], FORMATS[name].block or -1, bool(FORMATS[name].symmetric), name)
    for name in WEIGHT_FORMATS
}
SUPERBLOCKS = [name for name in WEIGHT_FORMATS if FORMATS[name].superblock]
NVFP4 = WeightBits(4, 16, True, "nvfp4")
WIDE = replace(TOY, hidden_size=256, mlp_size=512)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def half(x: torch.Tensor) -> torch.Tensor:
    return x.half().float()


def test_two_levels_are_integers_times_one_number_of_float16() -> None:
    x = normal(5, 32, seed=1).abs() * 0.01
    x[2], x[3, :8] = 0, 0
    found = two_level(x, 8, 63)
    parts = levels(found, 8, 63)
    assert parts is not None
    d, k = parts
    assert torch.equal(half(d), d)
    assert torch.equal(k.round(), k)
    assert k.min() == 1
    assert k.max() == 63
    assert torch.equal((d[..., None] * k).flatten(1), found)
    assert ((found - x).abs() <= d.repeat_interleave(8, 1) * 1.01).all()
    assert levels(x, 8, 63) is None


@pytest.mark.parametrize("rounding", [RTN(), GPTQ(), GPTQ(act_order=True, static_groups=True), GPTAQ()], ids=str)
@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_every_rounding_has_the_scales_of_the_file(name: str, rounding: RTN | GPTQ | GPTAQ) -> None:
    """And those of a format with superblocks are RTN's, found before the first column."""
    w, x = normal(24, 256, seed=2), normal(600, 256, seed=3) @ normal(256, 256, seed=4)
    stats = {"hessian": x.T @ x / 600, "cross": torch.zeros(256, 256)}
    rounded, nearest = rounding(w, WEIGHTS[name], dict(stats)), RTN()(w, WEIGHTS[name], {})
    if name in SUPERBLOCKS:
        assert torch.equal(rounded.scale, nearest.scale)
        assert torch.equal(rounded.zero_point, nearest.zero_point)
        grid = GGUF_GRIDS[name]
        for numbers in (rounded.scale, *([] if grid.symmetric else [-rounded.zero_point])):
            assert levels(numbers, grid.groups, grid.largest) is not None  # type: ignore[attr-defined]
    else:
        assert torch.equal(half(rounded.scale), rounded.scale)
        assert torch.equal(half(rounded.zero_point), rounded.zero_point)

    def error(weight: torch.Tensor) -> float:
        return float((((weight - w) @ stats["hessian"]) * (weight - w)).sum())

    ours, plain = error(rounded.dequantize()), error(nearest.dequantize())
    assert ours < 0.8 * plain or isinstance(rounding, RTN)
    assert error(nearest.dequantize()) < error(torch.zeros_like(w)) * (0.2 if name == "q2_k" else 0.05)


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_codes_are_read_off_weights_and_zero_weights_stay(name: str) -> None:
    w = normal(6, 512, seed=5) * 0.02
    w[1, :256], w[2], w[3, :40] = 0, 0, 0
    rounded = RTN()(w, WEIGHTS[name], {})
    weight = rounded.dequantize()
    assert weight.isfinite().all()
    at = rounded.scale[:, rounded.group_index], rounded.zero_point[:, rounded.group_index]
    assert torch.equal(rounded.grid.codes(weight, *at).to(torch.uint8), rounded.codes)
    assert weight[2].abs().max() < 1e-6
    assert (weight - w).abs().max() < 0.06


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_awq_judges_by_the_grid_that_rounding_has(name: str) -> None:
    w, x, scale = normal(20, 256, seed=6), normal(1, 40, 256, seed=7), torch.linspace(0.5, 3, 256)
    change = RTN()(w * scale, WEIGHTS[name], {}).dequantize() / scale - w
    loss = linear_judge(w, GGUF_GRIDS[name], WEIGHTS[name].group_size, [x])(scale, float("inf"))
    assert loss == pytest.approx((x[0] @ change.T).square().sum().item(), rel=1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_in_float16_are_there_before_codes_are(symmetric: bool) -> None:
    w, bits = normal(7, 64, seed=8), WeightBits(4, 32, symmetric, scale_dtype="float16")
    rounded, whole = RTN()(w, bits, {}), RTN()(w, replace(bits, scale_dtype="float32"), {})
    assert torch.equal(rounded.scale, half(whole.scale))
    assert not torch.equal(rounded.scale, whole.scale)
    at = rounded.scale[:, rounded.group_index], rounded.zero_point[:, rounded.group_index]
    assert torch.equal(rounded.codes, (w / at[0]).round().add(at[1]).clamp(0, 15).to(torch.uint8))


def test_activations_as_llama_cpp_rounds_them() -> None:
    """Codes by the scale in float32; that in float16 multiplies them."""
    x = normal(3, 64, seed=9)
    bits = ActivationBits(8, symmetric=True, group_size=32, scale_dtype="float16")
    scale = x.unflatten(-1, (2, 32)).abs().amax(-1, keepdim=True) / 127
    expected = (x.unflatten(-1, (2, 32)) / scale).round() * half(scale)
    assert torch.equal(PerToken()(x, bits), expected.flatten(1))


def test_the_full_range_of_symmetric_activations() -> None:
    """Steps of absmax / 127.5 and codes -128 ... 127, also where no value is negative."""
    x = torch.stack((normal(64, seed=10), normal(64, seed=11).abs()))
    scale = x.abs().amax(-1, keepdim=True) / 127.5
    expected = (x / scale).round().clamp(-128, 127) * scale
    assert torch.equal(PerToken()(x, ActivationBits(8, symmetric=True, full_range=True)), expected)
    assert make_grid(ActivationBits(8, True), exact_absmax=True) == Grid(8, True, exact_absmax=True)


def test_names() -> None:
    inputs = ActivationBits(8, True, group_size=32)
    assert label(BitsConfig("", WeightBits(4, 32, True, scale_dtype="float16"), inputs)) == "w4a8g32s16"
    assert label(BitsConfig("", WEIGHTS["q4_k"], ActivationBits(8, True, group_size=256))) == "w4a8g256_q4_k"
    assert label(BitsConfig("", WEIGHTS["q4_1"])) == "w4a16_q4_1"


def test_a_role_in_another_type_keeps_its_inputs_format() -> None:
    mixed = BitsConfig("", WEIGHTS["q4_k"], ActivationBits(8, True, group_size=256))
    mixed.overrides = {"down": RoleBits(6, group_size=16, format="q6_k")}
    assert bits_problems(mixed, WIDE) == []
    usual = mixed.resolve(WIDE).usual
    assert usual.weight["down"] == WEIGHTS["q6_k"]
    assert usual.activation["down"] == usual.activation["q"]


@pytest.mark.parametrize(
    ("bits", "told"),
    [
        (BitsConfig("", WEIGHTS["q4_k"]), "bits.weight.format=q4_k has superblocks of 256 inputs, which do not divide"),
        (BitsConfig("", replace(WEIGHTS["q4_1"], symmetric=True)), "but q4_1 has a minimum per group; write"),
        (BitsConfig("", replace(NVFP4, symmetric=False)), "but nvfp4 has no zero point; write"),
        (BitsConfig("", replace(WEIGHTS["q4_1"], group_size=64)), "q4_1 has a scale per 32 inputs; write"),
        (BitsConfig("", WeightBits(4, 32, scale_dtype="float8")), "bits.weight.scale_dtype=float8 is unknown"),
        (BitsConfig("", WeightBits(8, -1, True, "fp8", "float16")), "is for integers, and fp8 says itself"),
        (BitsConfig("", activation=ActivationBits(4, True, "q4_1")), "q4_1 is for weights alone; write"),
        (BitsConfig("", activation=ActivationBits(8, full_range=True)), "full_range=true is for symmetric integers"),
    ],
)
def test_what_cannot_be(bits: BitsConfig, told: str) -> None:
    (problem,) = bits_problems(bits, replace(WIDE, mlp_size=384))
    assert told in problem


@pytest.mark.parametrize(
    ("rounding", "told"),
    [
        (GPTQ(fresh_ranges=True), "write method.rounding.fresh_ranges=false"),
        (GPTQ(act_order=True), "add method.rounding.static_groups=true"),
        (Blockwise(), "write method.rounding=gptq"),
    ],
)
def test_roundings_that_read_ranges_on_their_way(rounding: GPTQ | Blockwise, told: str) -> None:
    (problem,) = Method("m", rounding).problems(BitsConfig("", WEIGHTS["q4_k"]), WIDE)
    assert problem.endswith(told)
