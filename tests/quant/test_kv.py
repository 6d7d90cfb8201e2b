"""Quantized keys, values and queries: the official tensors of a block, and identities."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from dqx.diffusion.block_engine import BlockEngine
from dqx.diffusion.engine import Engine, Prompt
from dqx.diffusion.samplers import LLaDASampler
from dqx.diffusion.samplers.sdar import SDARSampler
from dqx.formats.bits import ActivationBits, BitsConfig, KVBits, WeightBits
from dqx.formats.integers import Grid
from dqx.models.architecture import CAUSAL
from dqx.models.checkpoint import inspect, load_weights
from dqx.models.tokens import Tokens
from dqx.models.transformer import RMSNorm, Unchanged
from dqx.quant.activation import PerToken
from dqx.quant.checkpoint.folder import load_quantized, save_quantized
from dqx.quant.checkpoint.on_disk import quantize_checkpoint
from dqx.quant.kv import KeysValues, fold_gain
from dqx.quant.kv_quantizers import AllButRecent, Centered, ChannelQuantizer
from dqx.quant.loop import quantize
from dqx.quant.method import Method
from dqx.quant.protocols import Context
from dqx.quant.rounding.gptq import GPTQ
from dqx.quant.rounding.rtn import RTN

GOLDEN = Path(__file__).parents[1] / "golden"
GOLDEN3 = GOLDEN.parent / "golden3"


def fresh(family="llada"):
    return load_weights(inspect(str(GOLDEN / f"{family}_tiny")), torch.float64)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def install(part, block, bits):
    part.install(block, bits, bits)


@pytest.mark.parametrize("tile", [None, 16], ids=["head", "tile_16"])
def test_queries_and_keys_equal_official(tile):
    """QuaRot, 4 bits symmetric: rope, Hadamard, keys per token over all heads; queries stay."""
    golden = load_file(GOLDEN / "quarot_weights_and_block.safetensors")
    q, k, q_out, k_out = (golden[f"block0_w4a4kv4_sym.{name}"] for name in ("q_in", "k_in", "q_out", "k_out"))
    model = load_weights(inspect(str(GOLDEN / "llada_tiny")))
    rope, _ = model.context(torch.zeros(1, q.shape[2], dtype=torch.long))
    block = model.blocks[0]
    install(KeysValues(keys="token", rotate=True, tile=tile), block, ActivationBits(4, symmetric=True))
    torch.testing.assert_close(block.heads["q"](rope.query(q)), q_out, atol=1e-5, rtol=0)
    torch.testing.assert_close(block.heads["k"](rope.key(k)), k_out, atol=1e-5, rtol=0)


@pytest.mark.parametrize("share", ["token", "head"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("include_zero", [True, False])
def test_one_scale_per(share, symmetric, include_zero):
    """Every group of numbers that shares a scale lies on its own grid, which the ratio shrinks."""
    block = fresh("dream").blocks[0]
    part = KeysValues(keys=share, values=share, include_zero=include_zero, key_clip_ratio=0.5)
    install(part, block, ActivationBits(3, symmetric))
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
        install(part, block, ActivationBits(4))
        assert {name for name in "qkv" if not torch.equal(block.heads[name](x), x)} == set(rounded)


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("share", ["token", "channel"])
def test_16_bits_change_nothing(family, share):
    model = fresh(family)
    ids = torch.arange(12).view(2, 6)
    before = model(ids)
    for block in model.blocks:
        install(KeysValues(share, queries=True, rotate=True), block, ActivationBits(16))
        install(KeysValues(share, center="mean", recent=1, before_bias=True), block, ActivationBits(16))
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
        install(KeysValues(keys="head", rotate=rotate, tile=tile), block, ActivationBits(8))
        scores = block.heads["q"](q) @ block.heads["k"](k).transpose(-1, -2)
        errors.append(F.mse_loss(scores, exact) / exact.square().mean())
    assert errors[0] < 1e-4
    assert errors[0] < errors[1]


def test_problems_say_what_to_write():
    arch = inspect(str(GOLDEN / "dream_tiny")).arch  # two key/value heads of width 8

    def problems(part, kv=4, head_size=8, qkv_bias=True, **activation):
        bits = BitsConfig(activation=ActivationBits(**({"bits": 4} | activation)), kv=KVBits(kv))
        shape = replace(arch, hidden_size=head_size * arch.n_heads, qkv_bias=qkv_bias)
        return part.problems("method.kv", Context(shape, bits.resolve(shape).usual, Method(name="m", kv=part)))

    assert problems(KeysValues(keys="head", queries=True, rotate=True)) == []
    for part, expected in (
        (KeysValues(keys="row"), "method.kv.keys=row is unknown; write token, head, channel, or null for 16 bit"),
        (KeysValues(values="channel"), "method.kv.values=channel is unknown; write token, head, static, or null"),
        (KeysValues(keys="channel", queries=True), "write method.kv.queries=false, or method.kv.keys=head"),
        (KeysValues(token_group=32), "write method.kv.keys=channel, or method.kv.token_group=null"),
        (KeysValues(keys="channel", token_group=0), "method.kv.token_group=0 must be 1 or more, or null"),
        (KeysValues(recent=-1), "method.kv.recent=-1 must be 0"),
        (KeysValues(keys=None, before_bias=True), "write method.kv.keys=token, or method.kv.before_bias=false"),
        (KeysValues(rotate=True, before_bias=True), "write method.kv.rotate=false, or method.kv.before_bias=false"),
        (KeysValues(key_clip_ratio=0.0), "method.kv.key_clip_ratio=0.0 must lie above 0"),
        (KeysValues(value_clip_ratio=1.5), "method.kv.value_clip_ratio=1.5 must lie above 0"),
        (KeysValues(keys=None, queries=True), "write method.kv.keys=head, or method.kv.queries=false"),
        (KeysValues(center="median"), "method.kv.center=median is unknown; write mean, or null"),
        (KeysValues(keys=None, center="mean"), "write method.kv.keys=token, or method.kv.center=null"),
        (KeysValues(when="never"), "method.kv.when=never is unknown; write always or commit"),
        (
            KeysValues(keys="head", queries=True, when="commit"),
            "write method.kv.queries=false, or method.kv.when=always",
        ),
        (KeysValues(rotate=True, tile=3), "method.kv.tile=3 does not divide 8, the width of a head"),
    ):
        (problem,) = problems(part)
        assert expected in problem
    (problem,) = problems(KeysValues(before_bias=True), qkv_bias=False)
    assert "this model, of family dream, has no bias there; write method.kv.before_bias=false" in problem
    assert problems(KeysValues(before_bias=True), kv=16, qkv_bias=False) == []
    (problem,) = problems(KeysValues(fold_gain=True))
    assert "this model, of family dream, has no such norms; write method.kv.fold_gain=false" in problem
    assert problems(KeysValues(fold_gain=True), kv=16) == []
    (problem,) = problems(KeysValues(keys="channel", values=None), format="mxfp4")
    assert "method.kv.keys=channel has a scale per channel, but mxfp4 shares one among 32 channels" in problem
    (problem,) = problems(KeysValues(rotate=True), head_size=6)
    assert "method.kv.tile=null: the width of a head" in problem
    assert problems(KeysValues(rotate=True), kv=16, head_size=6) == []
    assert problems(KeysValues(keys="head", values="token"), format="nvfp4") == [
        "method.kv.keys=head: 8 channels cannot be cut into the blocks of 16 in which nvfp4 shares a scale; "
        "write method.kv.keys=null, or bits.kv.keys=16"
    ]
    assert problems(KeysValues(), format="nvfp4") == problems(KeysValues(keys="head"), kv=16, format="nvfp4") == []
    (problem,) = problems(KeysValues(), bits=8, format="fp8")
    assert "bits.kv.bits=4: keys and values have the format of the activations" in problem
    assert "write bits.kv.bits=8 or bits.kv.bits=16" in problem


def test_block_formats_round_keys_and_values():
    """nvfp4 cuts the channels of a token into blocks of 16, here two heads each."""
    block = fresh("dream").blocks[0]
    bits = ActivationBits(4, format="nvfp4")
    install(KeysValues(), block, bits)
    x = random(2, 2, 5, 8)
    expected = PerToken()(x.transpose(1, 2).flatten(2), bits).view(2, 5, 2, 8).transpose(1, 2)
    assert torch.equal(block.heads["k"](x), expected)
    assert not torch.equal(expected, x)


def padded(ids, left, right=0):
    """Ids [B, T] with padding of token 0 beside them, and what marks the real ones."""
    real = F.pad(torch.ones_like(ids), (left, right))
    return F.pad(ids, (left, right)), real


SEQUENCE_PARTS = {
    "centered": KeysValues(keys="head", center="mean"),
    "centered, rotated": KeysValues(center="mean", rotate=True),
    "channel": KeysValues(keys="channel", rotate=True, include_zero=False),
    "channel, groups": KeysValues(keys="channel", center="mean", token_group=3, recent=2),
    "recent": KeysValues(keys="head", recent=3),
}
BIAS_PARTS = {
    "bias": KeysValues(before_bias=True),
    "bias, centered": KeysValues(before_bias=True, keys="head", center="mean"),
    "bias, channel": KeysValues(before_bias=True, keys="channel", token_group=4, recent=1),
}


CASES = [(family, name) for family in ("llada", "dream") for name in SEQUENCE_PARTS]
CASES += [("dream", name) for name in BIAS_PARTS]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_a_row_depends_neither_on_padding_nor_on_other_rows(family, name):
    model, part = fresh(family), (SEQUENCE_PARTS | BIAS_PARTS)[name]
    for block in model.blocks:
        install(part, block, ActivationBits(3))
    ids = torch.arange(14).view(2, 7) + 3
    expected = torch.cat([model(row[None]) for row in ids])
    torch.testing.assert_close(model(ids), expected)
    both, marks = zip(padded(ids[:1], 3), padded(ids[1:], 1, 2), strict=True)
    logits = model(torch.cat(both), torch.cat(marks))
    first = 1 if model.arch.logit_shift else 0  # what a first token is predicted by may be padding
    torch.testing.assert_close(logits[0, 3 + first :], expected[0, first:])
    torch.testing.assert_close(logits[1, 1 + first : 8], expected[1, first:])
    where = torch.cat(marks).bool()
    where[:, :5] = False
    torch.testing.assert_close(model.logits_where(torch.cat(both), where, torch.cat(marks)), logits[where])


def test_keys_without_their_mean():
    """Softmax ignores the mean, so taking it off changes nothing by itself; and it takes no part of the grid."""
    model = fresh("dream")
    ids = torch.arange(12).view(2, 6)
    before = model(ids)
    for block in model.blocks:
        block.sequence["k"] = Centered(Unchanged())
    torch.testing.assert_close(model(ids), before)
    x = random(2, 2, 5, 8)
    real = torch.tensor([[False, True, True, True, True], [True, True, True, False, False]])
    left = Centered(Unchanged())(x, Tokens(real))
    for row in range(2):
        torch.testing.assert_close(left[row], x[row] - x[row][:, real[row]].mean(1, keepdim=True))
    install(KeysValues(keys="head", center="mean"), block, ActivationBits(4))
    large = x + 100 * random(2, 1, 8, seed=1)[None]
    torch.testing.assert_close(block.sequence["k"](large, Tokens(real)), block.sequence["k"](x, Tokens(real)))


@pytest.mark.parametrize(("family", "name"), CASES)
def test_windows_beside_a_cache_use_its_means_and_grids(family, name):
    """A window of an unchanged sequence changes nothing; batches of rows at different lengths and places write what one
    at a time writes."""
    model, part = fresh(family), (SEQUENCE_PARTS | BIAS_PARTS)[name]
    for block in model.blocks:
        install(part, block, ActivationBits(3))
    both, marks = zip(padded(torch.arange(7)[None] + 3, 3), padded(torch.arange(10)[None] + 9, 0), strict=True)
    ids, real = torch.cat(both), torch.cat(marks)
    where = real.bool()
    where[:, :5] = False
    expected, cache = model.logits_where(ids, where, real), model.empty_cache(*ids.shape)
    torch.testing.assert_close(model.logits_where(ids, where, real, cache), expected)
    stored = cache.store.clone()
    for first in ([3, 0], [4, 4]):
        torch.testing.assert_close(model.logits_where(ids, where, real, cache.window(first, 10)), expected)
        torch.testing.assert_close(cache.store, stored)

    sampler = LLaDASampler(threshold=0.2, cache={"llada": "prefix", "dream": "dual"}[family])
    schedule = {"gen_length": 8, "block_length": 4, "steps": 8}
    prompts = [Prompt([*range(3 + n, 8 + 2 * n)], ("task", n)) for n in range(4)]
    alone = [Engine(model, sampler, batch_size=1, **schedule).generate([prompt])[0] for prompt in prompts]
    assert Engine(model, sampler, batch_size=3, **schedule).generate(prompts) == alone


def test_a_window_by_hand():
    """Keys that the cache has not seen lose the mean of those it has, and are cut to their range."""
    block = fresh("dream").blocks[0]
    install(KeysValues(keys="channel", center="mean", token_group=3, recent=1), block, ActivationBits(2))
    x, new, found = random(1, 2, 8, 4), 3 * random(1, 2, 4, 4, seed=1), dict[str, torch.Tensor]()
    real = torch.ones(1, 8, dtype=torch.bool)
    block.sequence["k"](x, Tokens(real, statistics=found))
    keys = block.sequence["k"](new, Tokens(real, torch.tensor([[4, 5, 6, 7]]), found))
    mean = x.mean(2, keepdim=True)
    for column, group in ((0, [3, 4, 5]), (1, [3, 4, 5]), (2, [6])):
        stored = (x - mean)[:, :, group]
        scale, zero = Grid(2).fit(stored, dim=2)
        expected = Grid(2).nearest(new[:, :, [column]] - mean, scale, zero)
        torch.testing.assert_close(keys[:, :, [column]], expected)
    torch.testing.assert_close(keys[:, :, [3]], new[:, :, [3]] - mean)


def test_a_grid_per_channel():
    """By hand, token by token: groups begin with the first real token, the last ones stay, padding stays."""
    x, real = random(2, 2, 9, 4), torch.ones(2, 9, dtype=torch.bool)
    real[0, :2] = False
    real[1, 7:] = False
    block = fresh("dream").blocks[0]
    install(KeysValues(keys="channel", token_group=3, recent=1, include_zero=False), block, ActivationBits(2))
    keys, values = block.sequence["k"](x, Tokens(real)), block.sequence["v"](x, Tokens(real))
    for row, groups, left in ((0, ([2, 3, 4], [5, 6, 7]), [0, 1, 8]), (1, ([0, 1, 2], [3, 4, 5]), [6, 7, 8])):
        for group in groups:
            tokens = x[row][:, group]
            lo, hi = tokens.amin(1, keepdim=True), tokens.amax(1, keepdim=True)
            scale = (hi - lo) / 3
            zero = torch.round(-lo / scale)
            expected = (torch.round(tokens / scale + zero).clamp(0, 3) - zero) * scale
            torch.testing.assert_close(keys[row][:, group], expected)
            assert not torch.equal(values[row][:, group], tokens)
        assert torch.equal(keys[row][:, left], x[row][:, left])
    assert torch.equal(values[0][:, 8], x[0][:, 8])
    all_at_once = ChannelQuantizer(Grid(2), None, 1.0)
    torch.testing.assert_close(all_at_once(x), Grid(2).fake(x, dim=2))


def test_fewer_tokens_than_stay():
    """Nothing is rounded, and nothing that is not a number appears, be it at padding."""
    x, real = random(1, 2, 4, 8), torch.tensor([[False, True, True, True]])
    block = fresh("dream").blocks[0]
    install(KeysValues(keys="channel", recent=128, token_group=32), block, ActivationBits(2))
    for marks in (Tokens(real), None):
        assert torch.equal(block.sequence["k"](x, marks), x)


def test_keys_before_their_bias():
    """A large bias takes no part of the grid; and it is added once, so that nothing changes without rounding."""
    ids = torch.arange(12).view(2, 6)
    model, plain = fresh("dream"), fresh("dream")
    with torch.no_grad():
        for block in (*model.blocks, *plain.blocks):
            block.k.bias.copy_(100 * random(len(block.k.bias)))
    exact, errors = plain(ids), []
    for block in model.blocks:
        install(KeysValues(values=None, before_bias=True), block, ActivationBits(8))
    errors.append(F.mse_loss(model(ids), exact))
    for block in model.blocks:
        block.sequence["projected"].quantizer = Centered(AllButRecent(Unchanged(), 6), restore=True)
    torch.testing.assert_close(model(ids), exact)
    for block in plain.blocks:
        install(KeysValues(values=None), block, ActivationBits(8))
    errors.append(F.mse_loss(plain(ids), exact))
    assert errors[0] < errors[1] / 10


def test_a_bias_is_added_token_by_token_beside_a_cache():
    model, ids = fresh("dream"), torch.arange(12).view(2, 6)
    for block in model.blocks:
        install(KeysValues(before_bias=True), block, ActivationBits(8))
    where, cache = torch.ones_like(ids, dtype=torch.bool), model.empty_cache(*ids.shape)
    before = model.logits_where(ids, where, cache=cache)
    where[:, :3], where[:, 5:] = False, False
    again = model.logits_where(ids, where, cache=cache.window(2, 5))
    torch.testing.assert_close(again, before.view(2, 6, -1)[:, 3:5].flatten(0, 1))


@pytest.mark.parametrize(("family", "name"), CASES)
def test_what_a_cache_stores_is_rounded(family, name):
    """By hand: whole forwards as without rounding; windows read other columns as `always` rounds them there, and their
    own in full. Batches of rows at different lengths and places write what one at a time writes."""
    part = replace((SEQUENCE_PARTS | BIAS_PARTS)[name], when="commit")
    plain, model = fresh(family), fresh(family)
    for block in model.blocks:
        install(part, block, ActivationBits(3))
    ids, where = torch.arange(14).view(2, 7) + 3, torch.ones(2, 7, dtype=torch.bool)
    kept = model.empty_cache(*ids.shape)
    torch.testing.assert_close(model.logits_where(ids, where, cache=kept), plain.logits_where(ids, where))
    exact, before = plain.empty_cache(*ids.shape), kept.store.clone()
    plain.logits_where(ids, where, cache=exact)
    assert not torch.equal(exact.store, before)

    where[:, :4], where[:, 6:] = False, False
    found = model.logits_where(ids, where, cache=kept.window(3, 6))
    assert torch.equal(kept.store, before)
    exact.store.copy_(before)
    if part.rotate:  # the store has rotated keys; in float64 a rotation of both leaves scores alone
        for block, rotated in zip(plain.blocks, model.blocks, strict=True):
            block.heads.update({side: rotated.heads[side] for side in "qk"})
    torch.testing.assert_close(found, plain.logits_where(ids, where, cache=exact.window(3, 6)))

    sampler = LLaDASampler(threshold=0.2, cache={"llada": "prefix", "dream": "dual"}[family])
    schedule = {"gen_length": 8, "block_length": 4, "steps": 8}
    prompts = [Prompt([*range(3 + n, 8 + 2 * n)], ("task", n)) for n in range(4)]
    alone = [Engine(model, sampler, batch_size=1, **schedule).generate([prompt])[0] for prompt in prompts]
    assert Engine(model, sampler, batch_size=3, **schedule).generate(prompts) == alone


def test_what_is_stored_is_what_always_rounds():
    """Of the first block, whose input no rounding has touched: to the mean of keys, which a cache keeps."""
    ids = torch.arange(14).view(2, 7) + 3
    for name, part in ({"token": KeysValues()} | SEQUENCE_PARTS | BIAS_PARTS).items():
        stores = []
        for when in ("always", "commit"):
            model = fresh("dream")
            install(replace(part, when=when), model.blocks[0], ActivationBits(3))
            stores.append(model.empty_cache(*ids.shape))
            model.logits_where(ids, torch.ones_like(ids, dtype=torch.bool), cache=stores[-1])
        always, commit = (cache.store[0] for cache in stores)
        torch.testing.assert_close(commit[1], always[1])
        difference = commit[0] - always[0]
        if part.center and not part.before_bias:  # the mean, which all keys of a row share
            difference = difference - difference[:, :, :1]
        torch.testing.assert_close(difference, torch.zeros_like(difference), msg=name)


def with_norms(block, dtype):
    """The block with norms of queries and keys, whose gains are of all sizes and both signs."""
    for i, name in enumerate(("q_norm", "k_norm")):
        norm = RMSNorm(block.arch.head_size, 1e-6)
        norm.weight = torch.nn.Parameter(random(block.arch.head_size, seed=i), requires_grad=False)
        setattr(block, name, norm.to(dtype))
    block.k_norm.weight[3] *= 50
    return block


def scores(block, q, k):
    """Products of normalised queries and keys, the channels i and i + E/2 of keys turned by angles of their token."""
    angles = random(q.shape[2], q.shape[3] // 2, seed=9).to(q.dtype)

    def turned(x):
        first, second = x.chunk(2, dim=-1)
        return torch.cat(
            (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), -1
        )

    q, k = turned(block.q_norm(q)), block.heads["k"](turned(block.k_norm(k)))
    return q @ k.transpose(-1, -2)


def test_folded_gains_by_hand():
    """The largest of a pair over the median of all, to the nearest power of two, and never below 1."""
    block = with_norms(fresh("dream").blocks[0], torch.float32)
    block.k_norm.weight[:] = torch.tensor([1.0, -8.0, 0.1, 2.9, 1.0, 1.0, 2.8, 0.5])
    block.q_norm.weight[:] = 1.0
    fold_gain(block)
    s = torch.tensor([1.0, 8.0, 2.0, 4.0])  # 2.8 and 2.9 lie on the two sides of sqrt(8)
    assert torch.equal(block.q_norm.weight, s.repeat(2))
    assert torch.equal(block.k_norm.weight[1::4], torch.tensor([-1.0, 0.125]))


def test_folded_gains_help_keys_of_few_bits():
    q, k, errors = random(1, 2, 6, 8).float(), random(1, 2, 6, 8, seed=1).float(), []
    exact = scores(with_norms(fresh("dream").blocks[0], torch.float32), q, k)
    for fold in (False, True):
        block = with_norms(fresh("dream").blocks[0], torch.float32)
        install(KeysValues(fold_gain=fold), block, ActivationBits(4))
        errors.append(F.mse_loss(scores(block, q, k), exact))
    assert errors[1] < errors[0] / 2


def test_keys_and_values_have_widths_of_their_own():
    ids = torch.arange(12).view(2, 6)
    expected, found = fresh("dream"), fresh("dream")
    for block in expected.blocks:
        KeysValues(values=None).install(block, ActivationBits(4), ActivationBits(4))
        KeysValues(keys=None).install(block, ActivationBits(2), ActivationBits(2))
    bits = BitsConfig(kv=KVBits(bits=8, keys=4, values=2))
    report = quantize(found, Method(name="m", rounding=RTN(), kv=KeysValues()), bits, progress=False)
    assert torch.equal(found(ids), expected(ids))
    assert report.kv_bits == 2
    assert report.changed


def test_saved_models_keep_what_rounds_sequences(tmp_path):
    ids = torch.arange(12).view(2, 6)
    parts = [*(SEQUENCE_PARTS | BIAS_PARTS).values()]
    for i, part in enumerate([*parts, *(replace(part, when="commit") for part in (parts[0], parts[3], parts[-1]))]):
        model, method = fresh("dream"), Method(name="m", rounding=RTN(), kv=part)
        bits = BitsConfig(kv=KVBits(3))
        report = quantize(model, method, bits, progress=False)
        save_quantized(model, report, tmp_path / str(i), method=method, bits=bits)
        again, _ = load_quantized(tmp_path / str(i))
        mask = padded(ids, 0)[1]
        mask[0, :2] = 0
        assert torch.equal(again(ids, mask), model(ids, mask))
        stores = [one.empty_cache(*ids.shape) for one in (again, model)]
        for one, cache in zip((again, model), stores, strict=True):
            one.logits_where(ids, mask.bool(), mask, cache)
        assert torch.equal(stores[0].store, stores[1].store)


def test_from_disk_as_in_memory(tmp_path):
    """The bias that is added after rounding travels with the block."""
    source, ids = inspect(str(GOLDEN / "dream_tiny")), torch.arange(48).view(2, 24)
    part = KeysValues(keys="channel", center="mean", recent=2, before_bias=True)
    method, bits = (
        Method(name="m", rounding=GPTQ(), kv=part),
        BitsConfig(weight=WeightBits(4, group_size=-1), kv=KVBits(3)),
    )
    model = load_weights(source)
    quantize(model, method, bits, [ids], progress=False)
    quantize_checkpoint(source, tmp_path / "out", method, bits, [ids], progress=False)
    again, _ = load_quantized(tmp_path / "out")
    assert torch.equal(again(ids), model(ids))


def normed(family="sdar", seed=0):
    """A model whose norms of queries and keys have gains of all sizes, of both signs."""
    model = load_weights(inspect(str(GOLDEN3 / f"{family}_tiny"), mask_token_id=159), torch.float32)
    draw = torch.Generator().manual_seed(seed)
    for block in model.blocks:
        for norm in (block.q_norm, block.k_norm):
            norm.weight = torch.nn.Parameter(torch.randn(norm.weight.shape, generator=draw), requires_grad=False)
        block.k_norm.weight[3] *= 50
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folded_gains_leave_attention_alone_to_the_bit(dtype):
    model, ids = normed().to(dtype), torch.arange(24).view(2, 12)
    before, gains = model(ids), [block.k_norm.weight.clone() for block in model.blocks]
    for block, old in zip(model.blocks, gains, strict=True):
        fold_gain(block)
        new, half = block.k_norm.weight, len(old) // 2
        s = old / new
        assert torch.equal(s[:half], s[half:])
        assert torch.equal(s.log2(), s.log2().round())
        assert s.min() == 1
        assert s[3] >= 16
        assert new.abs().max() <= 1.5 * old.abs().median()  # sqrt(2), and what a dtype rounds
    assert torch.equal(model(ids), before)


STORED_PARTS = {
    "token": KeysValues(when="commit", fold_gain=True),
    "centered": KeysValues(keys="head", center="mean", rotate=True, when="commit"),
    "channel": KeysValues(keys="channel", token_group=3, center="mean", when="commit"),
}


@pytest.mark.parametrize("name", STORED_PARTS)
def test_what_is_stored_block_by_block_is_rounded(name):
    """Rows of different lengths, some of which store, as one at a time; what a forward computes it sees in full."""
    model, plain, lengths = normed().double(), normed().double(), (5, 3)
    for block in model.blocks:
        install(STORED_PARTS[name], block, ActivationBits(3))

    def forward(model, store, ids, keep, lengths):
        real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        feed = store.feed(real, [CAUSAL] * len(lengths), keep)
        logits = model.head_rows(ids, real, feed)
        feed.commit()
        return logits.split([*lengths])

    ids = torch.arange(20).view(2, 10)
    store = model.empty_store(2, 10)
    first = forward(model, store, ids[:, :5], [True, True], lengths)
    second = forward(model, store, ids[:, 5:9], [True, False], (4, 2))
    third = forward(model, store, ids[:, 9:], [False, False], (1, 1))
    for row in range(2):
        alone, own = model.empty_store(1, 10), ids[row : row + 1]
        for found, (start, length, keep) in zip(
            (first, second, third), ((0, lengths[row], True), (5, (4, 2)[row], not row), (9, 1, False)), strict=True
        ):
            (expected,) = forward(model, alone, own[:, start : start + length], [keep], [length])
            torch.testing.assert_close(found[row], expected)
        assert alone.lengths == [(9, 3)[row]]
        exact = plain.empty_store(1, 10)
        (expected,) = forward(plain, exact, own[:, : lengths[row]], [True], [lengths[row]])
        torch.testing.assert_close(first[row], expected)
        (expected,) = forward(plain, exact, own[:, 5:9], [False], [4])
        assert not torch.allclose(second[row], expected[: len(second[row])])

    settings = {"gen_length": 8, "steps": 8, "batch_size": 3}
    prompts = [Prompt([*range(3 + n, 8 + 3 * n)], ("task", n)) for n in range(4)]
    engine = BlockEngine(model, SDARSampler(block=4, threshold=0.05), **settings)
    assert engine.generate(prompts) == [engine.generate([prompt])[0] for prompt in prompts]
