"""The share of the values' range by attention: what tokens receive, what is found, and with which methods it goes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, partial

import pytest
import torch
from goldens import GOLDEN, tiny
from test_saved import assert_same
from tiny import TOY, ids, toy

from dqx.config.compose import build, select
from dqx.formats.bits import ActivationBits
from dqx.formats.integers import Grid
from dqx.models.checkpoint import inspect
from dqx.quant import load_quantized, quantize, quantize_checkpoint
from dqx.quant.kv import KeysValues
from dqx.quant.kv_quantizers import FixedRange, HeadQuantizer
from dqx.quant.protocols import Context
from dqx.quant.stream import Stream
from dqx.quant.token_weight import MaskState
from dqx.quant.value_clip import ValueClip, attention_received, value_range

COARSE = ["method.kv.value_clip=attention", "method.kv.value_clip.n_grid=5"]  # shares 1, 0.8, 0.6, 0.4
QUICK = {"awq": ["method.clip.n_grid=5"], "quarot": ["method.clip.n_grid=5"]}


@cache
def configured(name, *overrides):
    quick = ["model=nano_llada", "bits.weight.group_size=32", *QUICK.get(name, [])]
    kv = [] if name == "quarot" else ["method.kv=per_head"]
    return select(method=name, bits="w4a16", overrides=[*quick, "bits.kv.values=2", *kv, *overrides])


@torch.no_grad()
def quantized(name, *overrides, part=None, model=None):
    settings = configured(name, *overrides)
    method, model = replace(build(settings.method), token_weight=part), model or tiny("dream")
    rows = ids(4, 24, 80)
    rows[:, ::3] = model.arch.mask_token_id
    return model, quantize(model, method, settings.bits, rows, progress=False)


def of_values(model):
    found = [m for block in model.blocks for m in block.heads["v"].modules() if isinstance(m, HeadQuantizer)]
    assert len(found) == len(model.blocks)
    return [m.clip_ratio for m in found]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- what tokens receive -------------------------------------------------------------------------------------


def test_attention_by_hand():
    """One key head read by two query heads: the first looks at token 0 alone, the second at both alike."""
    k = torch.tensor([[[[100.0, 0], [0, 0]]]])
    q = torch.tensor([[[[10.0, 0], [10, 0]], [[0, 0], [0, 0]]]])
    torch.testing.assert_close(attention_received(q, k), torch.tensor([[1.5, 0.5]]))
    torch.testing.assert_close(attention_received(q[:, :1], k), torch.tensor([[2.0, 0.0]]))


def test_attention_is_that_of_softmax(monkeypatch):
    q, k = random(1, 4, 9, 8), random(1, 2, 9, 8, seed=1)
    scores = (q @ k.repeat_interleave(2, dim=1).transpose(-1, -2) / 8**0.5).softmax(-1)[0]
    expected = scores.sum(1).view(2, 2, 9).mean(1)
    torch.testing.assert_close(attention_received(q, k), expected)
    weight = torch.rand(1, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    weighted = (scores * weight[0, :, None]).sum(1).view(2, 2, 9).mean(1)
    torch.testing.assert_close(attention_received(q, k, weight), weighted)
    monkeypatch.setattr("dqx.quant.value_clip.SCORES", 100)
    torch.testing.assert_close(attention_received(q, k, weight), weighted)


@torch.no_grad()
def test_heads_are_what_attention_reads():
    model, rows = toy(torch.float64), ids()
    stream, block = Stream(model, [rows]), model.blocks[0]
    q, k, v = stream.heads(block, 2)
    mixed = torch.nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
    )
    read = stream.input_at(block, 2, "attn_out")
    torch.testing.assert_close(mixed.transpose(1, 2).flatten(2), read)
    assert (q.shape[1], k.shape[1], v.shape[1]) == (4, 2, 2)


# ---- what is found -------------------------------------------------------------------------------------------


@dataclass
class Shown:
    """Stands for a stream: one sequence's queries, keys and values, and the weights of its tokens."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    weights: torch.Tensor | None = None
    inputs = (None,)

    def heads(self, block, i):
        return self.q, self.k, self.v

    def weight(self, i):
        return self.weights

    def tables(self, i):
        return None, None


def rounds(v, ratio, grid=Grid(2)):  # noqa: B008  a grid is frozen
    return grid.fake(v, clip_ratio=ratio)


def looking_at(token):
    """Queries and keys of which all of the attention goes to one of two tokens."""
    k = torch.zeros(1, 1, 2, 8)
    k[0, 0, token, 0] = 100
    return torch.full((1, 1, 2, 8), 10.0), k


def two_tokens():
    """Values of two tokens: a range does well to cut the first's outlier; the second's lie on the grid of theirs."""
    v = torch.tensor([[1.0, 1, 1, 1, 1, 1, 1, 1.8], [0, 3, 0, 3, 0, 3, 0, 3]])
    return v.view(1, 1, 2, 8)


def best(v, counts, clip):
    shares = [1 - i / clip.n_grid for i in range(int(clip.max_shrink * clip.n_grid))]
    errors = [((rounds(v, s) - v).square().sum(-1) * counts).sum().item() for s in shares]
    return shares[errors.index(min(errors))]


def test_the_share_is_that_of_the_tokens_that_are_read():
    v, clip = two_tokens(), ValueClip()
    found = [clip.share(None, Shown(*looking_at(token), v), rounds) for token in (0, 1)]
    assert found == [best(v, torch.tensor([2.0, 0]), clip), best(v, torch.tensor([0, 2.0]), clip)]
    assert found[0] < found[1] == 1.0
    equal = replace(clip, importance="equal").share(None, Shown(*looking_at(0), v), rounds)
    assert equal == best(v, torch.ones(2), clip)


def test_equal_attention_is_no_attention():
    v, nothing = random(1, 2, 6, 8, seed=3), torch.zeros(1, 2, 6, 8)
    shares = [ValueClip(name).share(None, Shown(nothing, nothing, v), rounds) for name in ("attention", "equal")]
    assert shares[0] == shares[1] < 1


def test_weights_of_queries_weigh_what_they_read():
    """Two queries, each reading another token: the one whose weight is 0 does not count."""
    q = torch.tensor([[[[10.0] + [0] * 7, [-10.0] + [0] * 7]]])
    k = torch.tensor([[[[100.0] + [0] * 7, [-100.0] + [0] * 7]]])
    v = two_tokens()
    for token in (0, 1):
        weight = torch.tensor([[2.0, 0.0] if token == 0 else [0.0, 2.0]])
        found = ValueClip().share(None, Shown(q, k, v, weight), rounds)
        assert found == ValueClip().share(None, Shown(*looking_at(token), v), rounds)


# ---- one range for all tokens --------------------------------------------------------------------------------


def test_a_fixed_range_by_hand():
    """Two channels of one head: 2 bits between 0 and 3, and between -2 and 1; what lies beyond is cut."""
    rounds_values = FixedRange(Grid(2), torch.tensor([[[0.0, -2]]]), torch.tensor([[[3.0, 1]]]))
    x = torch.tensor([[0.4, -1.6], [2.6, 0.9], [7.0, -9.0]]).view(1, 1, 3, 2)
    assert rounds_values(x).view(3, 2).tolist() == [[0, -2], [3, 1], [3, -2]]


@torch.no_grad()
def test_the_range_is_that_of_all_tokens():
    model, rows = toy(torch.float64), ids()
    stream, block = Stream(model, [rows[:2], rows[2:]]), model.blocks[0]
    v = block.v(block.attn_norm(model.embed(rows))).view(-1, 2, 16)
    for found, expected in zip(value_range(block, stream), (v.amin(0), v.amax(0)), strict=True):
        torch.testing.assert_close(found, expected[:, None])


def test_a_token_that_nobody_reads_may_be_cut():
    """Of two tokens the second has a large value in one channel: it is kept where the second is read."""
    v = torch.tensor([[0.0, 3, 1, 2, 0, 3, 1, 2], [0, 3, 1, 2, 0, 3, 1, 30]]).view(1, 1, 2, 8)
    v = torch.cat((v[:, :, :1], v), dim=2)
    q, k = (torch.zeros(1, 1, 3, 8) for _ in range(2))
    lo, hi = v.amin(2)[0, :, None], v.amax(2)[0, :, None]
    lo = torch.zeros_like(lo)

    def fixed(values, ratio):
        return FixedRange(Grid(2), lo * ratio, hi * ratio)(values)

    found = {}
    for token in (0, 2):
        k[:] = 0
        k[0, 0, token, 0], q[..., 0] = 100, 10
        found[token] = ValueClip(n_grid=40, max_shrink=0.95).shares(None, Shown(q, k, v), fixed)[0, 0]
    assert found[0][7] <= 0.21 < found[2][7] == 1.0
    assert torch.equal(found[0][:7], found[2][:7])


@pytest.mark.parametrize("clip", [None, ValueClip(n_grid=5), ValueClip("equal", n_grid=5)])
@torch.no_grad()
def test_fixed_ranges_are_those_that_were_found(clip):
    model, rows = toy(), ids()
    stream, block = Stream(model, [rows]), model.blocks[0]
    lo, hi = value_range(block, stream)
    part = KeysValues(values="static", value_clip=clip)
    part.install(block, ActivationBits(16), ActivationBits(2), stream)
    found = block.heads["v"]
    shares = torch.maximum(found.lo / lo, found.hi / hi)
    if clip is None:
        assert torch.equal(shares, torch.ones_like(shares))
    else:
        nearest = (shares[..., None] - torch.tensor([1.0, 0.8, 0.6, 0.4])).abs().amin(-1)
        assert nearest.max() < 1e-6
        assert shares.min() < 1
    with pytest.raises(ValueError, match="values=static and value_clip look at calibration text"):
        part.install(toy().blocks[0], ActivationBits(16), ActivationBits(2))


@pytest.mark.parametrize("name", ["gptaq", "quarot"])
def test_fixed_ranges_in_a_method(name, tmp_path):
    overrides = [*COARSE, "method.kv.values=static"]
    model, _ = quantized(name, *overrides)
    source, settings = inspect(str(GOLDEN / "dream_tiny")), configured(name, *overrides)
    rows = ids(4, 24, 80)
    rows[:, ::3] = source.arch.mask_token_id
    quantize_checkpoint(source, tmp_path / "out", build(settings.method), settings.bits, rows, progress=False)
    again, _ = load_quantized(tmp_path / "out")
    assert_same(model, again)
    ranges = [m for block in again.blocks for m in block.heads["v"].modules() if isinstance(m, FixedRange)]
    assert len(ranges) == len(again.blocks)
    with torch.no_grad():
        assert torch.equal(model(rows), again(rows))


# ---- in a method ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rtn", "gptq", "gptaq", "awq", "quarot"])
def test_every_block_has_a_share_of_its_own(name):
    model, report = quantized(name, *COARSE)
    shares = of_values(model)
    assert set(shares) <= {1.0, 0.8, 0.6, 0.4}
    assert min(shares) < 1  # at 2 bits cutting helps
    assert len(report.linears) == 7 * len(model.blocks)
    assert torch.isfinite(model(ids(2, 12, 80))).all()


def test_one_candidate_changes_nothing():
    """A search among the whole range alone, and none."""
    alone, _ = quantized("gptq", *COARSE, "method.kv.value_clip.max_shrink=0.2")
    plain, _ = quantized("gptq")
    assert of_values(alone) == [1.0] * len(alone.blocks)
    assert_same(alone, plain)


@torch.no_grad()
def test_the_first_block_is_searched_as_it_was():
    model, rows = tiny("dream"), ids(4, 24, 80)
    rows[:, ::3] = model.arch.mask_token_id
    stream = Stream(model, [rows])
    grid = Grid(2)
    expected = ValueClip(n_grid=5).share(model.blocks[0], stream, partial(rounds, grid=grid))
    found, _ = quantized("rtn", *COARSE)
    assert of_values(found)[0] == expected


@torch.no_grad()
def test_16_bits_stay_a_no_op():
    settings = configured("rtn", *COARSE, "bits=w16a16", "bits.kv.values=16")
    model, before = tiny("dream"), tiny("dream")(ids(2, 12, 80))
    method = build(settings.method)
    assert method.needs_data
    assert method.streams(settings.bits.resolve(model.arch)) == frozenset()
    quantize(model, method, settings.bits, progress=False)
    assert torch.equal(model(ids(2, 12, 80)), before)


def test_from_disk_and_stored(tmp_path):
    source, settings = inspect(str(GOLDEN / "dream_tiny")), configured("gptq", *COARSE)
    rows = ids(4, 24, 80)
    rows[:, ::3] = source.arch.mask_token_id
    quantize_checkpoint(source, tmp_path / "out", build(settings.method), settings.bits, rows, progress=False)
    again, _ = load_quantized(tmp_path / "out")
    model, _ = quantized("gptq", *COARSE)
    assert_same(model, again)
    assert of_values(again) == of_values(model)


def test_token_weights_have_something_to_weigh():
    model, _ = quantized("rtn", *COARSE, part=MaskState(1.0, 1.0))
    assert of_values(model) == of_values(quantized("rtn", *COARSE)[0])
    with pytest.raises(ValueError, match="method rtn has no part that looks at one"):
        quantized("rtn", part=MaskState())


def test_refusals():
    settings = configured("rtn", *COARSE)
    part = build(settings.method).kv
    context = Context(TOY, settings.bits.resolve(TOY).usual, build(settings.method))

    def problem(**changes):
        (found,) = replace(part, **changes).problems("method.kv", context)
        return found

    assert part.problems("method.kv", context) == []
    assert replace(part, values="static").problems("method.kv", context) == []
    blocks = ActivationBits(4, format="mxfp4", symmetric=True)
    in_blocks = replace(context, widths=replace(context.widths, values=blocks))
    (found,) = KeysValues("token", "static", value_clip_ratio=0.9).problems("method.kv", in_blocks)
    assert "method.kv.values=static has a fixed range per channel, but mxfp4 shares one among 32 channels" in found
    with pytest.raises(ValueError, match="method rtn has no part that looks at one"):
        quantized("rtn", "method.kv.values=static", part=MaskState())
    assert problem(values=None).startswith("method.kv.value_clip is for values that are rounded, but")
    assert "write method.kv.value_clip_ratio=1.0, or method.kv.value_clip=null" in problem(value_clip_ratio=0.9)
    assert "value_clip.importance=mean is unknown; write attention or equal" in problem(value_clip=ValueClip("mean"))
    assert "value_clip.n_grid=0 must be at least 1" in problem(value_clip=ValueClip(n_grid=0))
    assert "value_clip.max_shrink=1 must lie between" in problem(value_clip=ValueClip(max_shrink=1))
