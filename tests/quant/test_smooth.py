"""SmoothQuant against the official implementation, and channel scaling that leaves the function alone."""

from __future__ import annotations

import pytest
import torch
from goldens import cases, golden, hub_name, rope, statistics, tiny
from tiny import ROLES, SITES, Batch

from dqx.models.family import family_of
from dqx.models.plant import plant_outliers
from dqx.models.transformer import shift_logits
from dqx.quant import ActivationBits, BitsConfig, Method, WeightBits, quantize
from dqx.quant.activation import PerToken
from dqx.quant.kv import KeysValues
from dqx.quant.protocols import Context
from dqx.quant.rounding.rtn import RTN
from dqx.quant.transforms.awq import AWQScale
from dqx.quant.transforms.channel_scale import Divide, scale_site
from dqx.quant.transforms.online import HeadRotation, OnlineDown
from dqx.quant.transforms.rotate import FoldNorms, ResidualRotation
from dqx.quant.transforms.smooth import Smooth, smooth_scale

PUBLISHED = Smooth(one_linear=True, grouped_heads="run_time")
FILES = {"llada": "smoothquant", "dream": "smoothquant_dream"}
CASES = [(family, case) for family, file in FILES.items() for case in cases(file)]
THEIR_NAMES = {"attn_in": "qkv", "attn_out": "out", "mlp_in": "fc1", "mlp_out": "down"}
BITS3 = BitsConfig("w3a16", WeightBits(3, 32), ActivationBits(16))
BITS16 = BitsConfig("w16a16", WeightBits(16), ActivationBits(16))


def method(*transforms):
    return Method(
        "smoothquant",
        RTN(include_zero=False),
        PerToken(include_zero=False),
        transforms={str(i): t for i, t in enumerate(transforms)},
        kv=KeysValues(keys="head", values="head", queries=True, include_zero=False),
        quantizes="weights_and_activations",
    )


def case_id(value):
    if isinstance(value, str):
        return value
    return f"w{value['w_bits']}a{value['a_bits']}{'' if value.get('smooth', True) else '_nosmooth'}"


def prefix(family, i):
    return family_of(family).block_prefix.format(i)


def run(model, transform, bits, calibration):
    return quantize(model, method(*transform), bits, [Batch(calibration)], progress=False)


@pytest.mark.parametrize("family", FILES)
def test_scales_and_smoothed_weights_equal_official(family):
    data = golden(FILES[family])
    smoothed = data | (golden("smoothquant_block0_weights") if family == "llada" else {})
    model = tiny(family)
    hidden = torch.cat([model.embed(row) for row in data["calibration_ids"].split(1)])
    for i, block in enumerate(model.blocks):
        stats, hidden = statistics(block, hidden, PUBLISHED.needs)
        for site, roles in SITES.items():
            for role in roles:
                theirs = data[f"act_absmax.{prefix(family, i)}{hub_name(family, role)}"]
                torch.testing.assert_close(stats[site]["absmax"], theirs, rtol=1e-5, atol=1e-6)
            scale = PUBLISHED.channel_scale(block, site, stats[site]["absmax"])
            theirs = data[f"smooth_scale.{i}.{THEIR_NAMES[site]}_smooth_scale"]
            torch.testing.assert_close(scale, theirs, rtol=1e-5, atol=0)

    run(model, [PUBLISHED], BITS16, data["calibration_ids"])
    for name, parameter in model.blocks[0].named_parameters():
        module, kind = name.rsplit(".", 1)
        theirs = smoothed[f"smoothed.0.{hub_name(family, module)}.{kind}"]
        torch.testing.assert_close(parameter, theirs, rtol=1e-5, atol=1e-6)
    assert isinstance(model.blocks[0].inputs["attn_out"], Divide) == (family == "dream")


@pytest.mark.parametrize(("family", "case"), CASES, ids=case_id)
@torch.no_grad()
def test_quantized_model_equals_official(family, case):
    data, model = golden(FILES[family]), tiny(family)
    name = f"w{case['w_bits']}a{case['a_bits']}"
    smooth = case.get("smooth", True)
    bits = BitsConfig(name, WeightBits(case["w_bits"], -1), ActivationBits(case["a_bits"]))
    run(model, [PUBLISHED] if smooth else [], bits, data["calibration_ids"])
    label = name if smooth else f"{name}_nosmooth"

    if smooth and family == "llada":
        block, weights = model.blocks[0], golden("smoothquant_block0_weights")
        for role in ROLES:
            linear, hub = getattr(block, role), hub_name(family, role)
            torch.testing.assert_close(linear.scale, weights[f"{name}.wscale.{hub}"], rtol=1e-5, atol=0)
            assert torch.equal(linear.zero_point, weights[f"{name}.wzero.{hub}"])
            if f"{name}.wcodes.{hub}" in weights:
                assert torch.equal(linear.codes(), weights[f"{name}.wcodes.{hub}"])
        out = block(data["block0.input"], rope(model.arch, data["block0.input"].shape[1]))
        torch.testing.assert_close(out, data[f"block0.output.{name}"], atol=1e-5, rtol=0)

    ours = torch.cat([model(row) for row in data["input_ids"].split(1)])
    theirs = data[f"logits.{label}"]
    if family == "dream":
        theirs = shift_logits(theirs)
    assert (ours - theirs).square().mean() <= 0.02 * case["mse_vs_original"]


TRANSFORMS = {
    "smooth": [Smooth()],
    "smooth_published": [PUBLISHED],
    "smooth_alpha_0": [Smooth(alpha=0.0)],
    "smooth_alpha_1": [Smooth(alpha=1.0)],
    "smooth_mlp": [Smooth(sites=["mlp_in", "mlp_out"])],
    "smooth_twice": [Smooth(), Smooth(alpha=0.3)],
    "awq": [AWQScale(n_grid=3)],
    "awq_judged_by_block": [AWQScale(n_grid=3, judge="block")],
    "awq_then_smooth": [AWQScale(n_grid=3), PUBLISHED],
    "smooth_rotated": [FoldNorms(), ResidualRotation(), HeadRotation(), OnlineDown(), Smooth()],
    "awq_rotated": [FoldNorms(), ResidualRotation(), HeadRotation(), OnlineDown(), AWQScale(n_grid=3)],
}


@pytest.mark.parametrize("planted", [False, True], ids=["plain", "planted_outliers"])
@pytest.mark.parametrize("family", FILES)
@pytest.mark.parametrize("name", TRANSFORMS)
@torch.no_grad()
def test_the_function_stays(name, family, planted):
    """In float64; with biases of v, up and a norm, grouped heads, and rotations that stay active at run time."""
    model = tiny(family, torch.float64)
    if planted:
        plant_outliers(model, gain=64, channels=4)
    ids = torch.randint(0, model.arch.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))
    context = Context(model.arch, BITS3.resolve(model.arch).usual, Method("m", RTN()))
    transforms = TRANSFORMS[name]
    if transforms[0].scope == "block":  # rotations expect the biases that checkpoints have
        for block in model.blocks:
            block.up.bias = torch.nn.Parameter(torch.randn(block.up.out_features, dtype=torch.float64))
            block.mlp_norm.bias = torch.nn.Parameter(torch.randn(model.arch.hidden_size, dtype=torch.float64))
    before, changed = model(ids), 0
    for transform in transforms:
        if transform.scope == "model":
            transform.prepare(context, model.device).apply(model)
            continue
        for index, block in enumerate(model.blocks):
            stats, _ = statistics(block, list(model.hidden_states(ids))[index], transform.needs)
            old = {name: p.clone() for name, p in block.named_parameters()}
            transform.apply(block, stats, context.at(index=index))
            changed += sum(not torch.equal(p, old[name]) for name, p in block.named_parameters())
    assert changed >= 5 * len(model.blocks)
    torch.testing.assert_close(model(ids), before, atol=1e-9, rtol=1e-9)


def smoothed_block(transform, family="llada"):
    """The first block with its statistics, before and after a transform."""
    model = tiny(family, torch.float64)
    hidden = model.embed(torch.arange(60).view(4, 15)).detach()
    block = model.blocks[0]
    before, _ = statistics(block, hidden, Smooth().needs)
    transform.apply(block, before, Context(model.arch, BITS3.resolve(model.arch).usual, Method("m", RTN())))
    return block, statistics(block, hidden, Smooth().needs)[0]


@pytest.mark.parametrize("family", FILES)
def test_alpha_1_levels_the_inputs_and_alpha_0_the_weights(family):
    transform = Smooth(alpha=1.0, floor=1e-9, grouped_heads="run_time")
    block, stats = smoothed_block(transform, family)
    for site in SITES:
        largest = stats[site]["absmax"]
        torch.testing.assert_close(largest, torch.ones_like(largest))
    block, _ = smoothed_block(Smooth(alpha=0.0, floor=1e-9, sites=["attn_in", "mlp_in"]), family)
    for site in ("attn_in", "mlp_in"):
        largest = torch.cat([getattr(block, role).weight for role in SITES[site]]).abs().amax(0)
        torch.testing.assert_close(largest, torch.ones_like(largest))


def test_scale():
    x, w = torch.tensor([4.0, 0.0, 1e-8, 1.0]), torch.tensor([1.0, 1.0, 0.0, 1e6])
    expected = torch.tensor([2.0, 1e-5**0.5, 1.0, 0.01])
    expected[1] = 0.01  # below the floor
    torch.testing.assert_close(smooth_scale(x, w, 0.5, 0.01), expected)
    assert smooth_scale(x, w, 0.5, 1e-9)[1].item() == pytest.approx(1e-5**0.5)


def test_the_maximum_runs_over_all_linears_of_a_site():
    block = tiny("llada").blocks[0]
    with torch.no_grad():
        block.k.weight[:, 5] *= 100
        block.gate.weight[:, 7] *= 100
    x = torch.ones(64)
    for site, channel in (("attn_in", 5), ("mlp_in", 7)):
        ours, single = Smooth().channel_scale(block, site, x), PUBLISHED.channel_scale(block, site, x)
        assert ours[channel] < 0.5 * single[channel]
        assert (ours <= single).all()


def test_grouped_heads():
    shared, _ = smoothed_block(Smooth(), "dream")
    assert isinstance(shared.inputs["attn_out"], torch.nn.Identity)
    divided, _ = smoothed_block(PUBLISHED, "dream")
    assert isinstance(divided.inputs["attn_out"], Divide)
    with pytest.raises(ValueError, match="share a value head"):
        scale_site(shared, "attn_out", torch.arange(1.0, 65))


@pytest.mark.parametrize("transform", [Smooth(), AWQScale()], ids=["smooth", "awq"])
@pytest.mark.parametrize("family", FILES)
@torch.no_grad()
def test_16_bits_leave_the_logits_alone(transform, family):
    model = tiny(family, torch.float64)
    ids = torch.arange(40).view(2, 20)
    before = model(ids)
    report = run(model, [transform], BITS16, ids)
    torch.testing.assert_close(model(ids), before, atol=1e-9, rtol=1e-9)
    assert report.average_bits == 16
    if isinstance(transform, AWQScale):  # nothing is rounded, so there is nothing to search
        assert torch.equal(model(ids), before)


def test_settings_are_checked():
    assert Smooth().problems("method.transforms.smooth", None) == []
    bad = Smooth(alpha=1.5, floor=0.0, sites=["attn"], grouped_heads="split").problems("method.transforms.smooth", None)
    assert len(bad) == 4
    assert all(p.startswith("method.transforms.smooth.") for p in bad)
    assert "attn_in, attn_out, mlp_in, mlp_out" in bad[0]
    assert "is empty" in Smooth(sites=[]).problems("x", None)[0]
