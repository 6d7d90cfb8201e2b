"""Quantized keys, values and queries: the official tensors of a block, and identities."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from dqx.formats.bits import ActivationBits, BitsConfig, KVBits
from dqx.models.checkpoint import inspect, load_weights
from dqx.models.transformer import apply_rope
from dqx.quant.activation import PerToken
from dqx.quant.kv import KeysValues
from dqx.quant.method import Method
from dqx.quant.protocols import Context

GOLDEN = Path(__file__).parents[1] / "golden"


def fresh(family="llada"):
    return load_weights(inspect(str(GOLDEN / f"{family}_tiny")), torch.float64)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("tile", [None, 16], ids=["head", "tile_16"])
def test_queries_and_keys_equal_official(tile):
    """QuaRot, 4 bits symmetric: rope, Hadamard, keys per token over all heads; queries stay."""
    golden = load_file(GOLDEN / "quarot_weights_and_block.safetensors")
    q, k, q_out, k_out = (golden[f"block0_w4a4kv4_sym.{name}"] for name in ("q_in", "k_in", "q_out", "k_out"))
    model = load_weights(inspect(str(GOLDEN / "llada_tiny")))
    rope, _ = model.context(torch.zeros(1, q.shape[2], dtype=torch.long))
    block = model.blocks[0]
    KeysValues(keys="token", rotate=True, tile=tile).install(block, ActivationBits(4, symmetric=True))
    torch.testing.assert_close(block.heads["q"](apply_rope(q, *rope)), q_out, atol=1e-5, rtol=0)
    torch.testing.assert_close(block.heads["k"](apply_rope(k, *rope)), k_out, atol=1e-5, rtol=0)


@pytest.mark.parametrize("share", ["token", "head"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("include_zero", [True, False])
def test_one_scale_per(share, symmetric, include_zero):
    """Every group of numbers that shares a scale lies on its own grid, which the ratio shrinks."""
    block = fresh("dream").blocks[0]
    part = KeysValues(keys=share, values=share, include_zero=include_zero, key_clip_ratio=0.5)
    part.install(block, ActivationBits(3, symmetric))
    x = random(2, 2, 5, 8) + 0.7
    for name, ratio in (("k", 0.5), ("v", 1.0)):
        y = block.heads[name](x)
        groups = x.transpose(1, 2).reshape(10, *((-1,) if share == "token" else (2, 8)))
        lo, hi = ratio * groups.amin(-1, keepdim=True), ratio * groups.amax(-1, keepdim=True)
        if symmetric:
            scale, zero = torch.maximum(-lo, hi) / 3, torch.tensor(4.0)
        else:
            lo, hi = (lo.clamp(max=0), hi.clamp(min=0)) if include_zero else (lo, hi)
            scale = (hi - lo) / 7
            zero = torch.round(-lo / scale)
        expected = (torch.round(groups / scale + zero).clamp(0, 7) - zero) * scale
        torch.testing.assert_close(y.transpose(1, 2).reshape(groups.shape), expected, atol=1e-12, rtol=0)


def test_which_tensors_are_rounded():
    x = random(1, 2, 5, 8)
    for part, rounded in (
        (KeysValues(), "kv"),
        (KeysValues(queries=True), "qkv"),
        (KeysValues(keys=None), "v"),
        (KeysValues(keys=None, rotate=True), "v"),
        (KeysValues(values=None), "k"),
    ):
        block = fresh("dream").blocks[0]
        part.install(block, ActivationBits(4))
        assert {name for name in "qkv" if not torch.equal(block.heads[name](x), x)} == set(rounded)


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_16_bits_change_nothing(family):
    model = fresh(family)
    ids = torch.arange(12).view(2, 6)
    before = model(ids)
    for block in model.blocks:
        KeysValues(queries=True, rotate=True).install(block, ActivationBits(16))
    assert torch.equal(model(ids), before)


@pytest.mark.parametrize("tile", [None, 4])
def test_rotation_leaves_attention_alone_and_helps_outliers(tile):
    """With 8 bits rotated attention scores stay close; with an outlier channel they are closer than without."""
    q, k = random(1, 8, 6, 8), random(1, 8, 6, 8, seed=1)
    k[..., 3] *= 50
    exact = q @ k.transpose(-1, -2)
    errors = []
    for rotate in (True, False):
        block = fresh("dream").blocks[0]
        KeysValues(keys="head", rotate=rotate, tile=tile).install(block, ActivationBits(8))
        scores = block.heads["q"](q) @ block.heads["k"](k).transpose(-1, -2)
        errors.append(F.mse_loss(scores, exact) / exact.square().mean())
    assert errors[0] < 1e-4
    assert errors[0] < errors[1]


def test_problems_say_what_to_write():
    arch = inspect(str(GOLDEN / "dream_tiny")).arch  # two key/value heads of width 8

    def problems(part, kv=4, head_size=8, **activation):
        bits = BitsConfig(activation=ActivationBits(**({"bits": 4} | activation)), kv=KVBits(kv))
        shape = replace(arch, hidden_size=head_size * arch.n_heads)
        return part.problems("method.kv", Context(shape, bits.resolve(shape).usual, Method(name="m", kv=part)))

    assert problems(KeysValues(keys="head", queries=True, rotate=True)) == []
    for part, expected in (
        (KeysValues(keys="channel"), "method.kv.keys=channel is unknown; write token, head, or null for 16 bit"),
        (KeysValues(values="all"), "method.kv.values=all is unknown"),
        (KeysValues(key_clip_ratio=0.0), "method.kv.key_clip_ratio=0.0 must lie above 0"),
        (KeysValues(value_clip_ratio=1.5), "method.kv.value_clip_ratio=1.5 must lie above 0"),
        (KeysValues(keys=None, queries=True), "write method.kv.keys=head, or method.kv.queries=false"),
        (KeysValues(rotate=True, tile=3), "method.kv.tile=3 does not divide 8, the width of a head"),
    ):
        (problem,) = problems(part)
        assert expected in problem
    (problem,) = problems(KeysValues(rotate=True), head_size=6)
    assert "method.kv.tile=null: the width of a head" in problem
    assert problems(KeysValues(rotate=True), kv=16, head_size=6) == []
    assert problems(KeysValues(keys="head", values="token"), format="nvfp4") == [
        "method.kv.keys=head: 8 channels cannot be cut into the blocks of 16 in which nvfp4 shares a scale; "
        "write method.kv.keys=null, or bits.kv.bits=16"
    ]
    assert problems(KeysValues(), format="nvfp4") == problems(KeysValues(keys="head"), kv=16, format="nvfp4") == []
    (problem,) = problems(KeysValues(), bits=8, format="fp8")
    assert "bits.kv.bits=4: keys and values have the format of the activations" in problem
    assert "write bits.kv.bits=8 or bits.kv.bits=16" in problem


def test_block_formats_round_keys_and_values():
    """nvfp4 cuts the channels of a token into blocks of 16, here two heads each."""
    block = fresh("dream").blocks[0]
    bits = ActivationBits(4, format="nvfp4")
    KeysValues().install(block, bits)
    x = random(2, 2, 5, 8)
    expected = PerToken()(x.transpose(1, 2).flatten(2), bits).view(2, 5, 2, 8).transpose(1, 2)
    assert torch.equal(block.heads["k"](x), expected)
    assert not torch.equal(expected, x)
