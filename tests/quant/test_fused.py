"""One compiled kernel in place of the plain ones (dqx/quant/fused.py): equal to the bit, or not used."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dqx.formats.bits import ActivationBits
from dqx.formats.make import make_grid
from dqx.quant import fused
from dqx.quant.activation import PerGroup, PerToken, StaticRange
from dqx.quant.kv import HeadQuantizer

CPU = torch.device("cpu")
compiles = pytest.mark.skipif(fused.missing(CPU) is not None, reason="no C++ compiler")

INT4, INT8 = ActivationBits(4), ActivationBits(8)
CASES = {
    "int4": (PerToken(), INT4),
    "plain min ... max": (PerToken(include_zero=False), INT4),
    "int8, clipped": (PerToken(clip_ratio=0.9), INT8),
    "symmetric": (PerToken(), ActivationBits(4, symmetric=True)),
    "per group": (PerGroup(64), INT4),
    "static": (StaticRange(-3.0, 2.5), INT8),
    "fp8": (PerToken(), ActivationBits(8, format="fp8")),
    "mxfp4": (PerToken(), ActivationBits(4, format="mxfp4")),
    "nvfp4": (PerToken(), ActivationBits(4, format="nvfp4")),
    "static nvfp4": (StaticRange(-3.0, 2.5), ActivationBits(4, format="nvfp4")),
}


@pytest.fixture
def used() -> Iterator[None]:
    with fused.using(True):
        yield


def activation(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """With an outlier channel, zeros, and values half way between two codes."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    x[..., 3] *= 30
    x[..., 0, :] = 0
    x[..., 1, :] = torch.arange(shape[-1]) % 15 - 7.5
    return x.to(dtype)


@compiles
@pytest.mark.slow  # compiling takes seconds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_kernel_is_equal_to_the_bit(case, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    quantizer, bits = case
    shown = [activation(*shape, dtype=dtype) for shape in ((2, 37, 256), (1, 64, 256), (9, 128), (2, 37, 256))]
    expected = [quantizer(x, bits) for x in shown]
    request.getfixturevalue("used")
    assert all(torch.equal(quantizer(x, bits), rounded) for x, rounded in zip(shown, expected, strict=True))
    (said,) = fused.said()
    assert said.endswith("one kernel, as the plain ones")


@compiles
@pytest.mark.slow
@pytest.mark.usefixtures("used")
def test_keys_and_values_too() -> None:
    x = activation(2, 3, 16, 32)
    for share in ("token", "head"):
        quantizer = HeadQuantizer(make_grid(INT4), share, 1.0)
        first, second = quantizer(x), quantizer(x)
        assert torch.equal(first, second)
    assert fused.said() == ["int, 4 bits, float32: one kernel, as the plain ones"]


def compiled_as(monkeypatch: pytest.MonkeyPatch, kernel) -> list[int]:
    """`torch.compile` makes `kernel` of a function; how often that was called."""
    calls: list[int] = []

    def compiled(plain, **options):
        def run(*tensors):
            calls.append(len(tensors))
            return kernel(plain(*tensors))

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    return calls


@pytest.mark.usefixtures("used")
def test_the_first_activation_is_rounded_both_ways_and_the_others_by_the_kernel(monkeypatch) -> None:
    calls = compiled_as(monkeypatch, lambda x: x)
    x = activation(3, 8)
    for _ in range(3):
        PerToken()(x, INT4)
    assert len(calls) == 3
    for other in (x.bfloat16(), x[:0]):
        PerToken()(other, INT4)
    PerToken(clip_ratio=0.5)(x, INT4)
    PerToken()(x, ActivationBits(16))
    said = "int, 4 bits, {}: one kernel, as the plain ones"  # of two ratios there are two kernels
    assert fused.said() == [said.format(name) for name in ("float32", "bfloat16", "float32")]
    fused.use(False)
    assert fused.said() == []
    calls.clear()
    PerToken()(x, INT4)
    assert not calls


@pytest.mark.usefixtures("used")
def test_a_kernel_that_rounds_one_value_differently_is_not_used(monkeypatch, caplog) -> None:
    def other(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[0, 0] += 1
        return x

    calls = compiled_as(monkeypatch, other)
    x = activation(3, 8)
    for _ in range(3):
        assert torch.equal(PerToken()(x, INT4), make_grid(INT4, exact_absmax=True).fake(x))
    assert len(calls) == 1
    assert fused.said() == ["int, 4 bits, float32: plain kernels: one kernel rounds 1 of 24 values differently"]
    assert "rounds 1 of 24 values differently" in caplog.text


@pytest.mark.usefixtures("used")
def test_what_cannot_be_compiled_is_rounded_all_the_same(monkeypatch) -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such compiler in /home/me")

    calls = compiled_as(monkeypatch, broken)
    x, quantizer = activation(3, 8), StaticRange(-1.0, 1.0)
    first, second = quantizer(x, INT8), quantizer(x, INT8)
    assert len(calls) == 1
    assert fused.said() == ["int, 8 bits, float32: plain kernels: RuntimeError when compiling"]
    fused.use(False)
    assert torch.equal(first, quantizer(x, INT8))
    assert torch.equal(second, first)


def test_the_setting(monkeypatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(fused, "missing", lambda device: None)
    assert [fused.wanted(asked, device) for device in (CPU, gpu) for asked in (None, True, False)] == [
        False, True, False, True, True, False,
    ]  # fmt: skip
    monkeypatch.setattr(fused, "missing", lambda device: "triton")
    assert fused.wanted(None, gpu) is False
    assert list(fused.fused_problems(None, gpu)) == []
    assert list(fused.fused_problems(True, gpu)) == [
        "model.fused=true needs triton, which is not here; install it, or write model.fused=false"
    ]


def test_what_compiling_needs(monkeypatch) -> None:
    monkeypatch.setattr(fused.shutil, "which", lambda name: None)
    assert fused.missing(CPU) == "a C++ compiler (g++)"
    assert fused.missing(torch.device("cuda")) == "a C compiler (gcc)"
    monkeypatch.setattr(fused.shutil, "which", lambda name: name if name == "my-compiler" else None)
    monkeypatch.setenv("CXX", "my-compiler")
    assert fused.missing(CPU) is None
    monkeypatch.setenv("CC", "my-compiler")
    monkeypatch.setattr(fused, "find_spec", lambda name: None)
    assert fused.missing(torch.device("cuda")) == "triton"
