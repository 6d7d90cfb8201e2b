"""The mean-shift correction: tensors, then a block."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from goldens import FAMILIES, tiny
from tiny import Batch
from torch import nn

from dqx.models.transformer import compose
from dqx.quant import ActivationBits, BitsConfig, Method, WeightBits, quantize
from dqx.quant.correct import MeanShift, expected_reduction, mean_shift
from dqx.quant.rounding.rtn import RTN
from dqx.quant.transforms.rotate import FoldNorms, ResidualRotation
from dqx.quant.transforms.smooth import Smooth


def streams(n_tokens=4000, n_channels=12):
    """Full-precision and quantized values [T, I] whose difference has a mean per channel, from none to large."""
    g = torch.Generator().manual_seed(0)
    x_fp = torch.randn(n_tokens, n_channels, generator=g, dtype=torch.float64)
    mean = torch.linspace(0, 1, n_channels, dtype=torch.float64)
    return x_fp, x_fp - mean - 0.3 * torch.randn(n_tokens, n_channels, generator=g, dtype=torch.float64)


def shift_of(x_fp, x_q):
    difference = x_fp - x_q
    return torch.stack((difference.mean(0), difference.var(0, unbiased=False)))


def test_the_mean_difference_vanishes_and_the_error_falls_as_expected():
    x_fp, x_q = streams()
    shift = shift_of(x_fp, x_q)
    bias = mean_shift(shift)
    assert torch.equal(bias, shift[0])
    assert (x_fp - (x_q + bias)).mean(0).abs().max() < 1e-12
    before, after = (x_fp - x_q).square().mean(0), (x_fp - x_q - bias).square().mean(0)
    torch.testing.assert_close(1 - after / before, expected_reduction(shift))


def test_equal_streams_need_no_correction():
    x_fp, _ = streams()
    for shrink in (False, True):
        assert (mean_shift(shift_of(x_fp, x_fp), shrink=shrink) == 0).all()


def test_shrinking_spares_unreliable_channels():
    shift = shift_of(*streams())
    ratio = mean_shift(shift, shrink=True) / mean_shift(shift)
    assert ratio[0] < 0.01  # a mean near zero beside a scatter of 0.3
    assert ratio[-1] > 0.9
    torch.testing.assert_close(ratio, expected_reduction(shift))


# ---- in whole models ------------------------------------------------------------------------------------------


def bits(weight):
    return BitsConfig(f"w{weight}a16", WeightBits(weight, 32), ActivationBits())


def sequences():
    return torch.randint(0, 96, (6, 24), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def norm_outputs(model):
    """Mean over tokens of the output of every norm before an MLP [blocks, D]."""
    found = []
    handles = [
        block.mlp_norm.register_forward_hook(lambda _, args, out: found.append(out.flatten(0, 1).double().mean(0)))
        for block in model.blocks
    ]
    model(sequences())
    for handle in handles:
        handle.remove()
    return torch.stack(found)


class Matrix(nn.Module):
    def __init__(self, matrix_II):
        super().__init__()
        self.register_buffer("matrix", matrix_II)

    def forward(self, x):
        return x @ self.matrix


@dataclass(frozen=True)
class Turn:
    """A site transform: a random orthogonal map per site."""

    scope: ClassVar[str] = "site"
    stream: ClassVar[str] = "quantized"
    needs: ClassVar[frozenset[str]] = frozenset()

    def fit(self, w_OI, stats, context, site):
        width = w_OI.shape[1]
        return Matrix(torch.linalg.qr(torch.randn(width, width, generator=context.generator(site)))[0])

    def problems(self, where, setting):
        return []


METHODS = {
    "plain": {},
    "residual_rotation": {"transforms": {"fold": FoldNorms(), "rotate": ResidualRotation(tile=16)}},
    "smooth": {"transforms": {"smooth": Smooth()}},
    "site_transform": {"transforms": {"turn": Turn()}},
}


@pytest.mark.parametrize("slots", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_norm_outputs_have_the_full_precision_mean(family, slots):
    """On the calibration tokens, in every block, whatever was rotated or scaled."""
    corrected, plain, intact = (tiny(family) for _ in range(3))
    batches = [Batch(sequences())]
    method = Method("m", RTN(), **slots)
    quantize(corrected, replace(method, corrections={"shift": MeanShift("fp")}), bits(3), batches, progress=False)
    quantize(plain, method, bits(3), batches, progress=False)
    quantize(intact, replace(method, rounding=None), bits(16), batches, progress=False)  # transforms only
    wanted = norm_outputs(intact)
    assert (norm_outputs(corrected) - wanted).abs().max() < 1e-5
    assert (norm_outputs(plain) - wanted).abs().max() > 1e-2
    with torch.no_grad():
        assert all(block.attn_norm.bias is None for block in corrected.blocks)
        assert all(block.mlp_norm.bias.abs().max() > 0 for block in corrected.blocks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_bias_has_the_dtype_of_the_model(dtype):
    model = tiny("dream", dtype)
    quantize(model, Method("m", RTN(), corrections={"s": MeanShift()}), bits(3), [Batch(sequences())], progress=False)
    assert {block.mlp_norm.bias.dtype for block in model.blocks} == {dtype}
    with torch.no_grad():
        assert model(sequences()).dtype == dtype


def test_nothing_quantized_before_the_norm_gives_zero():
    model = tiny("llada")
    untouched = dict.fromkeys(("q", "k", "v", "o"))
    method = Method("m", RTN(), rounding_by_role=untouched, corrections={"s": MeanShift()})
    quantize(model, method, bits(3), [Batch(sequences())], progress=False)
    assert (model.blocks[0].mlp_norm.bias == 0).all()
    assert (model.blocks[1].mlp_norm.bias == 0).all()  # that its input is wrong already, block 1 leaves as it is
    method, model = replace(method, corrections={"s": MeanShift("fp")}), tiny("llada")
    quantize(model, method, bits(3), [Batch(sequences())], progress=False)
    assert (model.blocks[1].mlp_norm.bias != 0).any()


def test_a_second_correction_finds_nothing_left():
    one, two = tiny("llada"), tiny("llada")
    first = {"a": MeanShift("fp")}
    for model, corrections in ((one, first), (two, first | {"b": MeanShift("fp")})):
        method = Method("m", RTN(), corrections=corrections)
        quantize(model, method, bits(3), [Batch(sequences())], progress=False)
    for a, b in zip(one.blocks, two.blocks, strict=True):
        torch.testing.assert_close(a.mlp_norm.bias, b.mlp_norm.bias, atol=1e-5, rtol=0)


def test_a_transform_between_norm_and_linears_is_refused(setting):
    block = tiny("llada").blocks[0]
    compose(block.inputs, "mlp_in", nn.Dropout())
    with pytest.raises(ValueError, match="at run time"):
        MeanShift().apply(block, {"shift": torch.zeros(2, 64)}, None)
    assert MeanShift().problems("method.corrections.s", setting) == []


def test_the_report_names_the_bias():
    model = tiny("llada")
    method = Method("m", RTN(), corrections={"s": MeanShift()})
    report = quantize(model, method, bits(3), [Batch(sequences())], progress=False)
    (row,) = [row for row in report.kept if row.name.endswith("norm.bias")]
    assert row.name == "blocks.*.mlp_norm.bias"
    assert row.parameters == 64 * len(model.blocks)
    assert "correction" in row.reason
