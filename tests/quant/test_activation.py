"""Activation quantizers: which values share a grid, symmetry, clipping, formats, static ranges from calibration."""

import weakref

import pytest
import torch
from tiny import TOY, Batch, ids, linears, logits, toy

from dqx.config.compose import build, compose, resolve
from dqx.formats.bits import FORMATS
from dqx.formats.floats import E4M3, MXFP4, NVFP4
from dqx.formats.integers import Grid
from dqx.quant import ActivationBits, BitsConfig, Method, WeightBits
from dqx.quant.activation import PerGroup, PerToken, Static, StaticRange, rescaled
from dqx.quant.linear import QuantLinear
from dqx.quant.loop import quantize
from dqx.quant.protocols import Context
from dqx.quant.rounding.rtn import RTN

X = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0)) + 0.3
X[0, 1, 7] = 30.0  # one token with an outlier
WIDTHS = {"int": 4, "fp8": 8, "mxfp4": 4, "nvfp4": 4}
EVERY_FORMAT = [ActivationBits(width, name != "int", name) for name, width in WIDTHS.items()]
EVERY_FORMAT.append(ActivationBits(4, symmetric=True))
STATIC = Static().fit({"minmax": torch.tensor([-2.5, 30.0])})
QUANTIZERS = {"per_token": PerToken(), "rescaled": PerToken(rescale=True), "static": STATIC}


def test_every_format_is_covered():
    assert set(WIDTHS) == {name for name, format in FORMATS.items() if not format.weights_only}


@pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=QUANTIZERS)
@pytest.mark.parametrize("bits", EVERY_FORMAT, ids=str)
def test_results_do_not_depend_on_the_batch(quantizer, bits):
    whole = quantizer(X, bits)
    assert not torch.equal(whole, X)
    for i in range(len(X)):
        assert torch.equal(quantizer(X[i : i + 1], bits)[0], whole[i])
        for t in range(X.shape[1]):
            assert torch.equal(quantizer(X[i, t], bits), whole[i, t])


@pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=QUANTIZERS)
@pytest.mark.parametrize("bits", EVERY_FORMAT, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_and_shape_stay(quantizer, bits, dtype):
    y = quantizer(X.to(dtype), bits)
    assert y.dtype == dtype
    assert y.shape == X.shape
    assert (y - X).abs().max() < 7  # mxfp4 saturates 30 at 24


@pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=QUANTIZERS)
def test_sixteen_bits_returns_the_input(quantizer):
    assert quantizer(X, ActivationBits(16)) is X
    assert quantizer(X, ActivationBits(16, True, "fp8")) is X


class Counted:
    """Rounds per token and counts how often."""

    def __init__(self):
        self.times = 0

    def __call__(self, x, bits):
        self.times += 1
        return PerToken()(x, bits)


def test_linears_that_read_one_input_round_it_once():
    counted, bits = Counted(), ActivationBits(bits=4)
    q, k, v = (
        QuantLinear(torch.nn.Linear(16, 8), WeightBits(bits=16), activation=counted, activation_bits=bits)
        for _ in range(3)
    )
    v.activation_bits = ActivationBits(bits=8)
    x = torch.randn(2, 3, 16)
    with torch.no_grad():
        for linear in (q, k, v, q, v):
            expected = torch.nn.functional.linear(PerToken()(x, linear.activation_bits), linear.weight, linear.bias)
            assert linear(x).equal(expected)
        assert counted.times == 4  # q and k together, v by itself; each of them anew after the other
        x.mul_(2)
        assert v(x).equal(torch.nn.functional.linear(PerToken()(x, v.activation_bits), v.weight, v.bias))
    with torch.inference_mode():
        q(torch.randn(2, 16))
    q.activation_bits = ActivationBits()
    alive = weakref.ref(x := torch.randn(2, 16))
    q(x)
    del x
    assert alive() is None


def test_an_outlier_costs_its_token_its_group_or_everything():
    token, group = ActivationBits(4), ActivationBits(4, group_size=32)
    made = {"per_token": PerToken()(X, token), "per_group": PerToken()(X, group), "static": STATIC(X, token)}
    errors = {name: (rounded - X).abs() for name, rounded in made.items()}
    spoilt = {name: (error > 0.25).any(-1).sum().item() for name, error in errors.items()}  # tokens
    assert spoilt == {"per_token": 1, "per_group": 1, "static": 15}
    assert (errors["per_group"][0, 1, 32:] < 0.25).all()  # the other group of that token is fine
    assert (errors["per_token"][0, 1, 32:] > 0.25).any()


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_group_of_channels_has_a_grid_of_its_own(symmetric):
    groups = X.view(3, 5, 2, 32)
    expected = Grid(5, symmetric, exact_absmax=True).fake(groups).view_as(X)
    assert torch.equal(PerToken()(X, ActivationBits(5, symmetric, group_size=32)), expected)
    whole = PerToken()(X, ActivationBits(5, symmetric))
    assert torch.equal(PerToken()(X, ActivationBits(5, symmetric, group_size=64)), whole)
    assert torch.equal(PerGroup(32)(X, ActivationBits(5, symmetric)), expected)  # as earlier versions have stored it


@pytest.mark.parametrize("bits", [ActivationBits(3), ActivationBits(4, True, group_size=16), EVERY_FORMAT[2]], ids=str)
def test_a_rescaled_vector_has_its_own_product_with_itself(bits):
    """`<q, z> = <z, z>` for every vector with a scale; nothing else of the rounded vector changes."""
    size = 64 if bits.group_size == -1 else bits.group_size
    x = X.double().clone()
    x[2, 3] = 0
    plain = PerToken()(x, bits).unflatten(-1, (-1, size))
    y, z = PerToken(rescale=True)(x, bits).unflatten(-1, (-1, size)), x.unflatten(-1, (-1, size))
    torch.testing.assert_close((y * z).sum(-1), z.square().sum(-1))
    assert not torch.equal(y, plain)
    torch.testing.assert_close(torch.nn.functional.normalize(y, dim=-1), torch.nn.functional.normalize(plain, dim=-1))
    assert (y[2, 3] == 0).all()
    assert torch.equal(rescaled(X, torch.zeros_like(X)), torch.zeros_like(X))  # nothing is left to scale


@pytest.mark.parametrize("method", ["rtn", "gptq", "smoothquant", "quarot", "duquant", "gptaq"])
def test_every_method_that_quantizes_activations_takes_groups(method):
    """Groups are finer than tokens, so the logits have less error, but where DuQuant cuts their ranges to 0.9."""
    small = ["bits.weight.group_size=32", "method.transforms.rotate.tile=32", "method.transforms.rotate.steps=4"]
    errors = {}
    for size in (-1, 16):
        choice = ["bits=w4a4", "bits.weight.bits=8", f"bits.activation.group_size={size}", small[0]]
        choice.append("method.activation.clip_ratio=1.0")
        choice += small[1:] if method == "duquant" else []
        config = resolve(compose([f"method={method}", *choice]))
        model = toy()
        quantize(model, build(config.method), config.bits, [Batch(ids(1)), Batch(ids(3))], progress=False)
        errors[size] = (logits(model) - logits(toy())).square().mean().item()
        found = [linear.activation_bits for linear in linears(model).values()]
        assert {(bits.group_size, bits.bits) for bits in found} == {(size, 4)}
    assert errors[16] < errors[-1]


def test_static_asymmetric_steps():
    step = 3 / 15  # 4 bits over -1 ... 2, zero_point 5
    x = torch.tensor([-9.0, -1.0, -0.29, 0.0, 0.11, 2.0, 7.0])
    expected = torch.tensor([-5, -5, -1, 0, 1, 10, 10]) * step
    torch.testing.assert_close(StaticRange(-1.0, 2.0)(x, ActivationBits(4)), expected)


def test_static_symmetric_steps():
    x = torch.tensor([-9.0, -1.4, 0.9, 1.4, 7.0])
    expected = torch.tensor([-8.0, -1.0, 1.0, 1.0, 7.0]) * 1.0  # absmax 7 in 2^3 - 1 steps, and one more below
    assert torch.equal(StaticRange(-7.0, 2.0)(x, ActivationBits(4, symmetric=True)), expected)


def test_static_clip_ratio_shrinks_the_calibrated_range():
    fitted = Static(clip_ratio=0.5).fit({"minmax": torch.tensor([-2.0, 8.0])})
    assert (fitted.lo, fitted.hi) == (-1.0, 4.0)
    assert fitted(torch.tensor([100.0]), ActivationBits(8)).item() == pytest.approx(4.0, abs=0.02)


def test_static_fp8_has_one_scale():
    scale = 30 / 448
    expected = (X / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    torch.testing.assert_close(STATIC(X, ActivationBits(8, True, "fp8")), expected)


def test_static_nvfp4_fixes_the_second_level_only():
    y = STATIC(X, ActivationBits(4, True, "nvfp4"))
    assert torch.equal(y, NVFP4().for_tensor(torch.tensor([-2.5, 30.0])).fake(X))
    blocks, tensor_scale = X.view(-1, 4, 16), torch.tensor(30 / 2688)
    scale = E4M3.nearest(blocks.abs().amax(-1) / (6 * tensor_scale)) * tensor_scale
    assert torch.equal(y.view(-1, 4, 16).abs().amax(-1), 6 * scale)


def test_per_token_formats():
    token = X[0, 1]
    assert torch.equal(PerToken()(X, ActivationBits(4, True, "mxfp4"))[0, 1], MXFP4().fake(token))
    assert torch.equal(PerToken()(X, ActivationBits(4, True, "nvfp4"))[0, 1], NVFP4().for_tensor(token).fake(token))
    scale = token.abs().max() / 448
    expected = (token / scale).to(torch.float8_e4m3fn).float() * scale
    assert torch.equal(PerToken()(X, ActivationBits(8, True, "fp8"))[0, 1], expected)


@pytest.mark.parametrize("clip_ratio", [0.9, 0.5])
def test_clip_ratio_saturates_the_token(clip_ratio):
    for bits in (ActivationBits(8, True), ActivationBits(8, True, "fp8")):
        y = PerToken(clip_ratio)(X, bits)
        torch.testing.assert_close(y.abs().amax(-1), X.abs().amax(-1) * clip_ratio, rtol=0.01, atol=0)


def test_static_ranges_come_from_calibration():
    """Two sequences: ranges cover both, and every linear of a site has the same."""
    model = toy()
    bits = BitsConfig("w16a8", WeightBits(16), ActivationBits(8))
    report = quantize(model, Method("rtn", RTN(), Static()), bits, [Batch(ids(1)), Batch(ids(3))], progress=False)
    assert report.calibration_sequences == 4
    found = {name: linear.activation for name, linear in linears(model).items()}
    assert found["blocks.0.q"] == found["blocks.0.v"] != found["blocks.0.o"]
    intact = toy()
    x = intact.blocks[0].attn_norm(torch.cat([intact.embed(row) for batch in (ids(1), ids(3)) for row in batch]))
    lo, hi = torch.aminmax(x)
    assert found["blocks.0.q"] == StaticRange(lo.item(), hi.item())
    assert ((logits(model) - logits(toy())).square().mean() / logits(toy()).var()) < 0.01


def test_static_needs_data():
    bits = BitsConfig("w4a8", WeightBits(4, 32), ActivationBits(8))
    with pytest.raises(ValueError, match="calibration"):
        quantize(toy(), Method("rtn", RTN(), Static()), bits, [], progress=False)
    weights_only = BitsConfig("w4a16", WeightBits(4, 32), ActivationBits(16))
    assert quantize(toy(), Method("rtn", RTN(), Static()), weights_only, [], progress=False).calibration_tokens == 0


def problems(part, bits: BitsConfig) -> list[str]:
    return part.problems("method.activation", Context(TOY, bits.resolve(TOY).usual, Method("rtn", RTN(), part)))


def test_problems():
    a8 = BitsConfig("w8a8", WeightBits(8, -1), ActivationBits(8))
    for part in (PerToken(0.0), Static(0.0)):
        (problem,) = problems(part, a8)
        assert problem.startswith("method.activation.clip_ratio=0.0 must lie above 0")
    assert problems(Static(), a8) == problems(PerToken(), a8) == []
    grouped = BitsConfig("w8a8", WeightBits(8, -1), ActivationBits(8, group_size=32))
    assert problems(PerToken(), grouped) == []
    assert problems(Static(), grouped) == [
        "method.activation has one calibrated range for all channels, but bits.activation.group_size=32 asks for one "
        "per group; write method.activation=per_token, or bits.activation.group_size=-1"
    ]


def test_problems_of_formats():
    mxfp4 = BitsConfig("w4a4", WeightBits(4, 32, True, "mxfp4"), ActivationBits(4, True, "mxfp4"))
    nvfp4 = BitsConfig("w4a4", WeightBits(4, 16, True, "nvfp4"), ActivationBits(4, True, "nvfp4"))
    (problem,) = problems(Static(), mxfp4)
    assert "could be static" in problem
    assert problem.endswith("write method.activation=per_token")
    assert problems(Static(), nvfp4) == problems(PerToken(), mxfp4) == problems(PerToken(), nvfp4) == []
