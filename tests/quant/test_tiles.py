"""Tiles of a rotation that are the groups of a site's inputs: which they are, that nothing else changes, refusals."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from goldens import tiny
from test_saved import assert_same

from dqx.config.compose import build, select
from dqx.models.transformer import MaskedDiffusionTransformer
from dqx.quant import load_quantized, quantize
from dqx.quant.checkpoint.folder import save_quantized
from dqx.quant.protocols import Context
from dqx.quant.transforms.block_rotate import BlockRotate, BlockRotation
from dqx.quant.transforms.hadamard import OnlineHadamard, transform
from dqx.quant.transforms.rotate import ResidualRotation
from dqx.quant.transforms.tiles import group_of

SMALL = ["model=nano_llada", "bits.weight.group_size=32", "bits.kv.bits=16", "method.clip=null"]
GROUPS_OF_32 = ["bits=w4a4g128", "bits.activation.group_size=32"]


@cache
def chosen(method, *overrides):
    settings = select(method=method, bits="4", overrides=[*SMALL, *overrides])
    return build(settings.method), settings.bits


def context(*overrides, method="rtn"):
    method, bits = chosen(method, *overrides)
    arch = tiny("llada").arch
    return Context(arch, bits.resolve(arch).usual, method)


def modules(model: MaskedDiffusionTransformer, kind: type):
    return [m for block in model.blocks for m in block.inputs.modules() if isinstance(m, kind)]


@torch.no_grad()
def quantized(method, *overrides, dtype=torch.float32):
    model = tiny("llada", dtype)
    part, bits = chosen(method, *overrides)
    report = quantize(model, part, bits, torch.arange(96).view(4, 24) % 80, progress=False)
    return model, part, bits, report


@pytest.mark.parametrize(
    ("overrides", "size"),
    [
        (["bits=mxfp4"], 32),
        (["bits=nvfp4", "bits.weight.group_size=16"], 16),
        (["bits=w4a4g128"], 128),
        (GROUPS_OF_32, 32),
        (["bits=w4a4"], -1),
        (["bits=w4a16", "bits.weight.group_size=64"], 64),
        (["bits=w4a4g128", "bits.activation.group_size=64", "+method.rounding_by_role.q=null"], 64),
    ],
)
def test_what_shares_a_scale(overrides, size):
    assert group_of(context(*overrides), "k") == size


def test_inputs_that_a_method_leaves_in_16_bit_have_the_groups_of_the_weight():
    assert group_of(context("bits=w4a4g128", "+method.rounding_by_role.q=null"), "q") == 32
    assert group_of(context("bits=w4a16", method="gptq"), "q") == 32


@pytest.mark.parametrize("bits", [GROUPS_OF_32, ["bits=mxfp4"]], ids=["int", "mxfp4"])
def test_group_is_its_number(bits):
    """DuQuant, and QuaRot with both of its tiles: to the bit."""
    short = ["method.transforms.rotate.steps=4", *bits]
    for method, tiles in [("duquant", ("rotate",)), ("quarot", ("rotate", "down"))]:
        own = short if method == "duquant" else bits
        made = [
            quantized(method, *own, *(f"method.transforms.{name}.tile={t}" for name in tiles)) for t in ("group", 32)
        ]
        assert_same(made[0][0], made[1][0])
        kinds = BlockRotation if method == "duquant" else OnlineHadamard
        assert modules(made[0][0], kinds)


@pytest.mark.parametrize("rounding", ["rtn", "gptaq"])
def test_the_matched_rotation_turns_each_group_once(rounding, tmp_path):
    """Also under GPTAQ; the folder gives the same model."""
    overrides = ["bits=mxfp4", "method.transforms.rotate=matched_rotation", "method.transforms.rotate.steps=4"]
    model, part, bits, report = quantized("duquant", *overrides, f"method.rounding={rounding}")
    found = modules(model, BlockRotation)
    assert len(found) == 4 * len(model.blocks)
    assert all(m.rotations.shape == (1, 32, 32) and not len(m.permutations) for m in found)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    other = x.clone()
    other[:, :32] += 1
    with torch.no_grad():
        assert torch.equal(found[0](x)[:, 32:], found[0](other)[:, 32:])  # no channel leaves its group
    save_quantized(model, report, tmp_path / "q", method=part, bits=bits)
    assert_same(model, load_quantized(tmp_path / "q")[0])


@pytest.mark.parametrize("method", ["duquant", "quarot"])
@torch.no_grad()
def test_the_function_stays(method):
    """At 16 bits, where the groups are those that the weights would have."""
    ids = torch.arange(48).view(2, 24)
    before = tiny("llada", torch.float64)(ids)
    tiles = [f"method.transforms.{name}.tile=group" for name in ("rotate", "down")[: 1 + (method == "quarot")]]
    tiles += ["method.transforms.rotate.steps=4"] if method == "duquant" else []
    model, *_ = quantized(method, "bits=w16a16", *tiles, dtype=torch.float64)
    torch.testing.assert_close(model(ids), before, atol=1e-9, rtol=1e-9)


def test_the_rotation_of_the_residual_stream_is_that_of_the_groups():
    where = context("bits=mxfp4")
    change = ResidualRotation("hadamard", "group").prepare(where, torch.device("cpu"))
    x = torch.randn(2, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(change.residual(x), transform(x, 32))


def test_refusals():
    key = "method.transforms.rotate"
    rotate = BlockRotate("group")
    assert rotate.problems(key, context("bits=mxfp4")) == []
    found = rotate.problems(key, context("bits=w4a4"))
    assert found[0].startswith(f"{key}.tile=group: the inputs of q, k, v have one scale for all channels, no groups")
    assert found[0].endswith(f"write bits=w4a4g128 or bits=mxfp4, or {key}.tile=128")
    assert replace(rotate, tile="match").problems(key, context("bits=mxfp4")) == [
        f"{key}.tile=match is unknown; write a number of channels, or group for those that share a scale"
    ]
    mixed = context(*GROUPS_OF_32, "bits.overrides.k.format=nvfp4")
    (problem,) = rotate.problems(key, mixed)
    assert "has groups of different sizes (q 32, k 16, v 32)" in problem
    for name in ("rotate", "down"):
        part, bits = chosen("quarot", "bits=w4a4", f"method.transforms.{name}.tile=group")
        (problem,) = part.problems(bits, tiny("llada").arch)
        assert f"method.transforms.{name}.tile=group: the inputs of" in problem
    part, bits = chosen("quarot", "bits=mxfp4", "method.transforms.rotate.tile=group")
    assert part.problems(bits, tiny("llada").arch) == []
