"""Quantized linears computed on codes (dqx/quant/backends): equal to the simulation, and refused where they are not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from torch import nn

from dqx.config.compose import build, compose
from dqx.formats.bits import ActivationBits, BitsConfig, RoleBits, WeightBits
from dqx.quant.activation import PerToken, StaticRange
from dqx.quant.backends import choice, fp8, int8
from dqx.quant.backends.choice import backend_problems, chosen, counted, install
from dqx.quant.backends.fp8 import FP8Linear
from dqx.quant.backends.int8 import Int8Linear
from dqx.quant.linear import QuantLinear
from dqx.quant.loop import quantize
from dqx.quant.method import Method
from dqx.quant.rounding.rtn import RTN, rtn_round
from dqx.study import experiment

CPU = torch.device("cpu")
W8A8 = BitsConfig("w8a8", WeightBits(8, -1), ActivationBits(8))
FP8 = BitsConfig("fp8", WeightBits(8, -1, True, "fp8"), ActivationBits(8, True, "fp8"))
METHOD = Method("rtn", rounding=RTN(), activation=PerToken())

trusted = pytest.mark.skipif(choice.untrusted("int8", CPU) is not None, reason=str(choice.untrusted("int8", CPU)))
trusted_fp8 = pytest.mark.skipif(choice.untrusted("fp8", CPU) is not None, reason=str(choice.untrusted("fp8", CPU)))


def quantized(bits: BitsConfig, rounding: RTN, activation, n_in: int = 256, n_out: int = 64) -> QuantLinear:
    g = torch.Generator().manual_seed(0)
    linear = nn.Linear(n_in, n_out)
    linear.weight.data = torch.randn(n_out, n_in, generator=g) + 0.3  # zero points that are not in the middle
    linear.bias.data = torch.randn(n_out, generator=g)
    rounded = rtn_round(linear.weight.data, rounding.grid(bits.weight))
    return QuantLinear(linear, bits.weight, rounded, activation, bits.activation)


def inputs(n_in: int = 256) -> torch.Tensor:
    """[2, 9, I] with an outlier channel, a token of zeros, one of positive numbers and one far from zero."""
    x = torch.randn(2, 9, n_in, generator=torch.Generator().manual_seed(1))
    x[..., 3] *= 40
    x[0, 0] = 0
    x[0, 1] = x[0, 1].abs() + 0.5
    x[0, 2] = 100 + x[0, 2] / 100
    return x


INTEGERS = {
    "asymmetric": (RTN(), PerToken(), False, False),
    "symmetric": (RTN(), PerToken(), True, True),
    "symmetric weights": (RTN(exact_absmax=True), PerToken(clip_ratio=0.9), True, False),
    "symmetric inputs": (RTN(), PerToken(), False, True),
    "ranges without zero": (RTN(include_zero=False), PerToken(include_zero=False), False, False),
    "one range for all tokens": (RTN(), StaticRange(-3.0, 40.0), False, False),
}


@trusted
@pytest.mark.parametrize("case", INTEGERS.values(), ids=INTEGERS)
def test_integers_are_those_of_the_simulation(case) -> None:
    """Sums equal exact ones; outputs the simulation's within what its I roundings to float32 can make."""
    rounding, activation, symmetric_weight, symmetric_input = case
    bits = replace(
        W8A8, weight=WeightBits(8, -1, symmetric_weight), activation=ActivationBits(8, symmetric=symmetric_input)
    )
    linear, x = quantized(bits, rounding, activation), inputs()
    kernel = Int8Linear(linear)
    rows = x.flatten(0, 1)
    grid, scale, zero = activation.token_grid(rows, bits.activation)
    codes = grid.codes(rows, scale, zero).double() - zero.double()
    exact = codes @ (linear.codes().double() - linear.zero_point.double()).t()
    found_codes, _, found_zero, sums = kernel.encode(rows)
    assert torch.equal(kernel.sums(found_codes, found_zero, sums).double(), exact)
    magnitudes = linear.quantize_input(x).double().abs() @ linear.weight.double().abs().t()
    assert ((kernel(x) - linear(x)).abs() <= 256 * 2**-24 * (magnitudes + 1)).all()


@trusted
def test_no_sum_is_too_long() -> None:
    """The worst case at the inputs of Dream's down: all codes at their end."""
    linear = quantized(W8A8, RTN(), PerToken(), 18944, 8)
    linear.scale, linear.zero_point = torch.ones(8, 1), torch.zeros(8, 1)
    linear.weight.data = torch.full((8, 18944), 255.0)
    linear.bias = None
    kernel = Int8Linear(linear)
    codes = torch.full((3, 18944), 127, dtype=torch.int8)
    assert (kernel.sums(codes, torch.full((3, 1), -128.0), None) == 255 * 255 * 18944).all()


@trusted
def test_a_token_does_not_depend_on_the_others() -> None:
    linear, x = Int8Linear(quantized(W8A8, RTN(), PerToken())), inputs()
    assert torch.equal(linear(x)[1, 4:5], linear(x[1, 4:5]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_codes_are_those_of_the_weight_to_the_bit(dtype) -> None:
    """In bfloat16 too, where in lopsided rows the code nearest to a weight may be another number's."""
    lopsided = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).abs() + 0.01
    rounded = rtn_round(lopsided, RTN().grid(W8A8.weight))
    linear = QuantLinear(nn.Linear(256, 64, dtype=dtype), W8A8.weight, rounded, PerToken(), W8A8.activation)
    kernel = Int8Linear(linear)
    steps = kernel.codes.t().double() - kernel.zero.double()[:, None]
    assert torch.equal((steps.float() * linear.scale).to(dtype), linear.weight)


def test_a_weight_that_was_changed_is_refused() -> None:
    for bits, kernel in ((W8A8, "int8"), (FP8, "fp8")):
        model = tiny.toy()
        quantize(model, METHOD, bits, progress=False)
        model.blocks[1].up.weight[3, 5] *= 1.001
        with pytest.raises(ValueError, match=rf"blocks.1.up: its weights are no longer values .* backend={kernel} "):
            install(model, dict.fromkeys(["blocks.1.up"], kernel))


@trusted_fp8
def test_fp8_is_the_simulation() -> None:
    linear, x = quantized(FP8, RTN(), PerToken()), inputs()
    magnitudes = linear.quantize_input(x).double().abs() @ linear.weight.double().abs().t()
    assert ((FP8Linear(linear)(x) - linear(x)).abs() <= 256 * 2**-24 * (magnitudes + 1)).all()


def test_numbers_of_e4m3() -> None:
    """The cast of torch is the grid's, between all neighbours, at their middle and beyond the largest."""
    values = fp8.E4M3.decode(torch.arange(127))
    middles = (values[1:] + values[:-1]) / 2
    x = torch.cat((values, middles, middles * (1 + 2**-20), middles * (1 - 2**-20), torch.tensor([460.0, 1e9])))
    x = torch.cat((x, -x))
    assert torch.equal(fp8.encode(x).float(), fp8.E4M3.nearest(x))


def saturating(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """What a CPU without VNNI makes of a product: two at a time are added in 16 bits."""
    pairs = left.int()[:, :, None] * right.int()[None]
    return pairs.unflatten(1, (-1, 2)).sum(2).clamp(-(2**15), 2**15 - 1).sum(1)


def test_a_product_that_saturates_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(int8, "TESTED", ((17, 256, 32),))
    assert Int8Linear.untrusted(CPU) is None or choice.untrusted("int8", CPU) is not None
    monkeypatch.setattr(torch, "_int_mm", saturating)
    told = Int8Linear.untrusted(CPU)
    assert told is not None
    assert "gives 4194176 for a sum of 256 products that is 4194304" in told or "that is 4129024" in told


def test_what_cannot_be_called_is_refused(monkeypatch) -> None:
    def absent(*tensors, **options):
        raise NotImplementedError("not on this device")

    monkeypatch.setattr(torch, "_int_mm", absent)
    monkeypatch.setattr(torch, "_scaled_mm", absent)
    for kernel, call in ((Int8Linear, "_int_mm"), (FP8Linear, "_scaled_mm")):
        assert kernel.untrusted(CPU) == f"torch.{call} cannot be used (not on this device)"


def test_a_sum_with_few_digits_is_refused(monkeypatch) -> None:
    def short(left, right, *scales, out_dtype):
        total = torch.zeros(len(left), right.shape[1])
        for at in range(0, left.shape[1], 512):
            total = (total + left[:, at : at + 512].float() @ right[at : at + 512].float()).bfloat16().float()
        return total

    monkeypatch.setattr(torch, "_scaled_mm", short)
    told = FP8Linear.untrusted(CPU)
    assert told is not None
    assert told.startswith("torch._scaled_mm is off by")


def problems(backend: str, bits: BitsConfig, method: Method = METHOD) -> list[str]:
    return list(backend_problems(backend, method, bits, tiny.TOY))


def test_what_a_kernel_takes() -> None:
    assert problems("int8", W8A8) == problems("fp8", FP8) == problems("auto", FP8) == problems("simulated", FP8) == []
    mixed = replace(W8A8, overrides={"down": RoleBits(weight=4)}, blocks={"b1": {"q": {"group_size": 32}}})
    (told,) = problems("int8", mixed)
    assert "cannot take down with weights in 4 bits; q (b1) with weights in groups of 32; write bits=w8a8" in told
    (told,) = problems("fp8", W8A8)
    assert "q, k, v, o, gate, up, down with weights in 8 bits, inputs in 8 bits; write bits=fp8" in told
    (told,) = problems("int8", BitsConfig())
    assert "with weights in 16 bit, inputs in 16 bit" in told
    (told,) = problems("int8", W8A8, replace(METHOD, rounding_by_role={"q": None}))
    assert "q with weights in 16 bit" in told
    (told,) = problems("int8", W8A8, replace(METHOD, activation=PerToken(rescale=True)))
    assert "no method.activation that gives a token one scale" in told


@trusted
@pytest.mark.parametrize("said", ["method=smoothquant", "method=quarot", "method=duquant"])
def test_a_whole_model_whose_inputs_are_rotated_or_divided(said: str) -> None:
    config = compose([said, "bits=w8a8", "model=nano_dream"])
    method = build(config.method)
    model = tiny.toy(arch=replace(tiny.TOY, mlp_size=256, hidden_size=128))
    bits = BitsConfig("w8a8", WeightBits(8, -1), ActivationBits(8))
    if said == "method=quarot":
        bits = replace(bits, activation=ActivationBits(8, symmetric=True))
    quantize(model, method, bits, [tiny.Batch(tiny.ids())], progress=False)
    before = tiny.logits(model)
    kernels = chosen("int8", method, bits, model.arch, CPU)
    install(model, kernels)
    assert counted(kernels, 21) == {"int8": 21}
    assert all(isinstance(linear, Int8Linear) for linear in tiny.linears(model).values())
    assert (tiny.logits(model) - before).abs().max() < 0.05 * before.std()  # codes next to a border may fall either way


@trusted
def test_auto_takes_what_it_can() -> None:
    mixed = replace(W8A8, overrides={"down": RoleBits(weight=4)})
    model = tiny.toy()
    quantize(model, METHOD, mixed, progress=False)
    kernels = chosen("auto", METHOD, mixed, model.arch, CPU)
    install(model, kernels)
    assert counted(kernels, 21) == {"int8": 18, "simulated": 3}
    assert {name for name, linear in tiny.linears(model).items() if isinstance(linear, QuantLinear)} == {
        f"blocks.{i}.down" for i in range(3)
    }
    assert chosen("simulated", METHOD, mixed, model.arch, CPU) == {}


def test_a_configuration_is_refused_before_weights_load() -> None:
    (told,) = experiment.problems(compose(["method=rtn", "bits=w4a16", "backend=int8"]))
    assert told.startswith("backend=int8 takes 8-bit integers with one scale per row of a weight")
    (told,) = experiment.problems(compose(["method=rtn", "bits=w8a8", "backend=int4"]))
    assert told == "backend=int4 is unknown; did you mean int8?"


def test_a_device_on_which_a_kernel_is_wrong_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(choice, "untrusted", lambda kernel, device: "it adds in 16 bits")
    (told,) = experiment.problems(compose(["method=rtn", "bits=w8a8", "backend=int8"]))
    assert told == "backend=int8 cannot be had on this machine's cpu: it adds in 16 bits; write backend=simulated"
    assert chosen("auto", METHOD, W8A8, tiny.TOY, CPU) == {}


def test_only_quantized_linears_have_codes() -> None:
    with pytest.raises(ValueError, match="q is no quantized linear"):
        install(tiny.toy(), {"blocks.0.q": "int8"})
