"""Outlier statistics against stored activations, planted outliers found where they were put, flat memory."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from tiny import PLAIN, ROLES, SITES, Batch, random_model
from torch import nn

from dqx.diagnostics.activations import OutlierStats, Thresholds, measure_activations, measure_block, meter

ARCH = replace(PLAIN, vocab_size=64, hidden_size=32, mlp_size=48, n_blocks=2, n_kv_heads=2, mask_token_id=63)


def model(seed=0, arch=ARCH):
    return random_model(arch, seed)


def batches(count=3, rows=2, length=11, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [Batch(torch.randint(1, 62, (rows, length), generator=generator)) for _ in range(count)]


def stored(net, data):
    """Every site's activations [N, C] in float64, the brute-force way."""
    kept = {(b, site): [] for b in range(len(net.blocks)) for site in SITES}
    hooks = []
    for b, block in enumerate(net.blocks):
        for site, roles in SITES.items():
            take = kept[b, site]
            hooks.append(
                getattr(block, roles[-1]).register_forward_pre_hook(lambda _, x, take=take: take.append(x[0].double()))
            )
    for batch in data:
        net(batch.ids)
    for hook in hooks:
        hook.remove()
    return {place: torch.cat([x.reshape(-1, x.shape[-1]) for x in parts]) for place, parts in kept.items()}


@pytest.mark.parametrize("chunk", [meter.CHUNK["cpu"], 7 * 48], ids=["whole", "in chunks"])
def test_equals_brute_force(monkeypatch, chunk):
    monkeypatch.setitem(meter.CHUNK, "cpu", chunk)
    net, data = model(), batches()
    net.blocks[1].mlp_norm.weight[5] = 40.0
    settings = Thresholds(channel_ratio=4.0, massive_absolute=2.0, massive_relative=6.0, top=5)
    stats = measure_activations(net, data, settings)
    assert (stats.sequences, stats.tokens, len(stats.rows)) == (6, 66, 8)
    ids = torch.cat([b.ids for b in data]).flatten()
    for place, x in stored(net, data).items():
        row, size = stats.at(*place), x.abs()
        assert (row.tokens, row.channels, row.not_finite) == (66, x.shape[1], 0)
        assert row.abs_max == size.max()
        centred = x - x.mean()
        assert row.mean == pytest.approx(float(x.mean()), rel=1e-9, abs=1e-12)
        assert row.std == pytest.approx(float(centred.pow(2).mean().sqrt()), rel=1e-10)
        assert row.kurtosis == pytest.approx(float(centred.pow(4).mean() / centred.pow(2).mean() ** 2), rel=1e-9)
        ordered = size.flatten().sort().values
        for name, share in (("median", 0.5), ("p99", 0.99), ("p999", 0.999), ("p9999", 0.9999)):
            truth = float(ordered[math.ceil(share * len(ordered)) - 1])
            assert abs(getattr(row, name) - truth) <= stats.relative_error * truth, (place, name)
        for kind, threshold in (("massive", max(2.0, 6 * row.median)), ("relative", 6 * row.median)):
            used = getattr(row, f"{kind}_threshold")
            assert threshold * (1 - 1 / 128) < used <= threshold
            assert getattr(row, f"{kind}_values") == int((size >= used).sum())
            touched = int((size >= used).any(1).sum())
            assert getattr(row, f"{kind}_tokens") == touched
            assert getattr(row, f"{kind}_token_share") == touched / 66
        hits = size > 4.0 * size.median(dim=1, keepdim=True).values
        assert row.outlier_channels == int((hits.double().mean(0) >= 0.5).sum())
        for c in row.top_channels:
            assert c.abs_max == size[:, c.channel].max()
            assert c.mean_abs == pytest.approx(float(size[:, c.channel].mean()), rel=1e-9)
            assert c.share == pytest.approx(float(hits[:, c.channel].double().mean()))
        massive = size.where(size >= row.massive_threshold, 0.0)
        channels, tokens = massive.any(0).nonzero()[:, 0], massive.any(1).nonzero()[:, 0]
        assert row.n_massive_channels == len(channels)
        assert {t.channel for t in row.massive_channels} <= set(channels.tolist())
        assert [abs(t.value) for t in row.massive_channels] == massive.amax(0).sort(descending=True).values[
            :5
        ].tolist()[: len(channels)]
        for t in row.massive_channels:
            token = t.sequence * 11 + t.position
            assert (t.token_id, t.value) == (ids[token], x[token, t.channel])
        assert row.n_massive_token_ids == len(ids[tokens].unique())
        assert set(row.massive_token_ids) <= set(ids[tokens].tolist())
        assert torch.equal(stats.maps["{}/{}/channel_max".format(*place)].double(), size.amax(0))
        best = size.max(1).values.sort(descending=True, stable=True).indices[:5]
        assert [t.sequence * 11 + t.position for t in row.top_tokens] == best.tolist()
        for t in row.top_tokens:
            token = t.sequence * 11 + t.position
            assert t.token_id == ids[token]
            assert t.value == x[token, t.channel]
            assert abs(t.value) == size[token].max()
        edges, counts = row.histogram["edges"], row.histogram["counts"]
        assert sum(counts) == x.numel()
        assert counts == [int(((size >= a) & (size < b)).sum()) for a, b in itertools.pairwise(edges)]


def test_normal_outlier_channels_are_found():
    net = model()
    net.blocks[0].attn_norm.weight[[3, 17]] *= 64.0
    for role in ("q", "k", "v"):
        getattr(net.blocks[0], role).weight[:, [3, 17]] /= 64.0
    stats = measure_activations(net, batches())
    for row in stats.rows:
        if (row.block, row.site) == (0, "attn_in"):
            assert row.outlier_channels == 2
            assert {c.channel for c in row.top_channels[:2]} == {3, 17}
            assert row.top_channels[0].share > 0.9
            assert row.massive_values == 0
        else:
            assert row.outlier_channels == 0, (row.block, row.site)


def test_massive_outlier_is_found_at_its_token():
    """One unit of the MLP that answers to one token only, as in the published models: few tokens, at mlp_out."""
    net = model()
    token, unit, block = 9, 31, net.blocks[1]
    data = batches()
    for batch in data:  # the token at known places only
        batch.ids[batch.ids == token] = 10
    data[1].ids[1, 4] = data[2].ids[0, 7] = token
    places = [3 * 11 + 4, 4 * 11 + 7]
    x = stored(net, data)[1, "mlp_in"][places]
    reader = torch.linalg.lstsq(x, torch.full((2, 1), 100.0, dtype=x.dtype)).solution[:, 0]  # answers 100 at both
    block.gate.weight[unit] = block.up.weight[unit] = reader.float()
    size = stored(net, data)[1, "mlp_out"].abs()
    stats = measure_activations(net, data, Thresholds(massive_absolute=5000.0))
    row = stats.at(1, "mlp_out")
    assert row.massive_values >= 2
    assert row.massive_tokens == int((size >= row.massive_threshold).any(1).sum())
    found = [(t.sequence, t.position, t.token_id, t.channel) for t in row.top_tokens[:2]]
    assert sorted(found) == [(3, 4, token, unit), (4, 7, token, unit)]
    assert stats.worst("mlp_out").block == 1
    assert all(r.massive_values == 0 for r in stats.rows if (r.block, r.site) != (1, "mlp_out"))


def test_both_conditions_are_needed_for_massive():
    net = model()
    net.blocks[0].attn_norm.weight[:] = 1000.0  # everything large: over the absolute threshold, not the relative one
    net.blocks[1].attn_norm.weight[:] = 1e-4
    net.blocks[1].attn_norm.weight[2] = 10.0  # large relative to the median, small in absolute terms
    stats = measure_activations(net, batches())
    large, small = stats.at(0, "attn_in"), stats.at(1, "attn_in")
    assert large.median > 100
    assert (large.massive_values, large.relative_values) == (0, 0)
    assert small.massive_values == 0
    assert small.relative_values > 60
    assert small.relative_token_share > 0.9


def test_random_model_has_no_outliers():
    stats = measure_activations(model(seed=3), batches(count=4, rows=3, length=16))
    for row in stats.rows:
        assert row.massive_values == row.massive_tokens == row.relative_values == 0
        assert row.outlier_channels == 0
        assert row.max_over_median < 100


class RoundedLinear(nn.Module):
    """A replaced linear: rounded weights and inputs, as after quantization."""

    def __init__(self, linear):
        super().__init__()
        self.weight = nn.Parameter((linear.weight * 4).round() / 4)

    def forward(self, x):
        return (x * 2).round() / 2 @ self.weight.T


def test_replaced_linears_are_measured_at_their_input():
    net, data = model(), batches(count=1)
    for block in net.blocks:
        for role in ROLES:
            setattr(block, role, RoundedLinear(getattr(block, role)))
    stats = measure_activations(net, data)
    for place, x in stored(net, data).items():
        assert stats.at(*place).abs_max == x.abs().max()
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_values_that_are_not_finite_are_counted_and_left_out():
    net, data = model(), batches(count=1)
    net.blocks[1].mlp_norm.weight[4] = math.nan
    stats = measure_activations(net, data)
    row = stats.at(1, "mlp_in")
    assert row.not_finite == 22
    assert math.isfinite(row.abs_max)
    assert math.isfinite(row.std)
    assert sum(row.histogram["counts"]) == 22 * 31
    assert stats.at(1, "mlp_out").not_finite == 22 * 48  # nothing left: no percentile
    assert math.isnan(stats.at(1, "mlp_out").median)
    assert stats.at(1, "attn_out").not_finite == 0


def test_a_silent_site_has_no_relative_threshold():
    net = model()
    net.blocks[0].v.weight[:] = 0
    row = measure_activations(net, batches(count=1)).at(0, "attn_out")
    assert (row.abs_max, row.median, row.kurtosis, row.relative_threshold, row.max_over_median) == (
        0,
        0,
        None,
        None,
        None,
    )
    assert row.relative_values == row.massive_values == row.outlier_channels == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    net = model().to(dtype)
    row = measure_activations(net, batches(count=1)).at(1, "mlp_in")
    size = stored(net, batches(count=1))[1, "mlp_in"].abs()
    assert row.abs_max == size.max().float()
    assert row.median == pytest.approx(float(size.median()), rel=2**-8)


def test_round_trip_and_no_batches():
    stats = measure_activations(model(), batches(count=1))
    assert OutlierStats.from_dict(stats.to_dict()) == stats
    with pytest.raises(ValueError, match=r"outliers\.samples"):
        measure_activations(model(), [])


def test_a_single_block_is_measured_without_its_model():
    """Its rows are those of the whole model, but for the ids of tokens, which a block does not know."""

    def nameless(row):
        top, massive = ([replace(t, token_id=0) for t in tokens] for tokens in (row.top_tokens, row.massive_channels))
        return replace(row, top_tokens=top, massive_channels=massive, massive_token_ids=[], n_massive_token_ids=0)

    net, data, settings = model(), batches(), Thresholds(massive_absolute=2.0, massive_relative=6.0)
    whole = measure_activations(net, data, settings)
    inputs = [list(net.residual_states(batch.ids))[1] for batch in data]
    alone = measure_block(net.blocks[1], inputs, settings, index=1)
    assert [nameless(row) for row in alone.rows] == [nameless(whole.at(1, site)) for site in SITES]
    assert (alone.sequences, alone.tokens, alone.parts) == (whole.sequences, whole.tokens, [])
    largest = max(row.abs_max for row in alone.rows)
    assert repr(alone).startswith(f"OutlierStats(4 rows over 66 tokens; largest |x| {largest:.3g} at ")
    with pytest.raises(ValueError, match="nothing to measure outliers on"):
        measure_block(net.blocks[1], [])
