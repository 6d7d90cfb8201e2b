"""AWQ's scale search against the official implementation, a literal transcription of it, and identities."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from goldens import awq_dream_block, cases, golden, hub_name, rope, statistics, tiny
from tiny import SITES, Batch

from dqx.formats.integers import Grid
from dqx.quant import BitsConfig, Method, WeightBits, quantize
from dqx.quant.clip import OutputMSE
from dqx.quant.protocols import Context
from dqx.quant.rounding.gptq import GPTQ
from dqx.quant.rounding.rtn import RTN, rtn_round
from dqx.quant.transforms import awq
from dqx.quant.transforms.awq import AWQScale, channel_scales
from dqx.quant.transforms.channel_scale import scale_site

METHOD = Method("awq", RTN(include_zero=False), transforms={"scale": AWQScale()}, clip=OutputMSE())
SETS = {
    "llada_block": ("llada", "awq_llada", "block"),
    "llada_sublayer": ("llada", "awq_llada_submodule_search", "sublayer"),
    "dream_sublayer": ("dream", "awq_dream", "sublayer"),
}
CASES = [(name, case) for name, (_, file, _) in SETS.items() for case in cases(file)]


def set_up(family):
    if family == "dream":
        return awq_dream_block(), golden("awq_dream_inputs")
    return tiny("llada").blocks[1], golden("awq_llada_inputs")


def context_of(block, bits, group_size=32):
    return Context(block.arch, BitsConfig("b", WeightBits(bits, group_size)).resolve(block.arch).usual, METHOD)


@pytest.mark.parametrize(("name", "case"), CASES, ids=lambda v: f"w{v['w_bit']}" if isinstance(v, dict) else v)
def test_equals_official(name, case):
    """Losses, scales, clips, codes and the output of the quantized block."""
    family, file, judge = SETS[name]
    block, data = set_up(family)
    expected = golden(f"{file}_w{case['w_bit']}")
    transform, context = AWQScale(judge=judge), context_of(block, case["w_bit"])
    hidden = data["hidden_states"]
    stats, outputs = statistics(block, hidden, transform.needs)
    torch.testing.assert_close(outputs[:1], data["block_output"], atol=2e-4, rtol=0)

    scales = []
    for i, (site, group) in enumerate(zip(SITES, case["scale_groups"], strict=True)):
        assert [hub_name(family, role) for role in SITES[site]] == group["layers"]
        grids = {role: context.grid(role) for role in SITES[site]}
        scale, losses = transform.search(block, site, stats[site], grids, context, give_up=False)
        ours, theirs = torch.tensor(losses, dtype=torch.float64), expected[f"scale_losses.{i}"]
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=0)
        assert ours.argmin() == round(group["best_ratio"] * 20)
        torch.testing.assert_close(scale, expected[f"scale.{i}"], rtol=1e-5, atol=0)
        scales.append(scale)

    gains = [block.attn_norm.weight / scales[0], block.mlp_norm.weight / scales[2]]
    applied = deepcopy(block)
    transform.apply(applied, stats, context)  # searches again, and gives up hopeless candidates
    assert torch.equal(applied.attn_norm.weight, gains[0])
    assert torch.equal(applied.mlp_norm.weight, gains[1])
    for i, site in enumerate(SITES):  # the recorded scales: ties of the clip search depend on the weights' last bits
        scale_site(block, site, expected[f"scale.{i}"])
    stats, scaled = statistics(block, hidden, dict.fromkeys(SITES, frozenset({"weighted_tokens"})))
    torch.testing.assert_close(scaled, outputs, atol=2e-4, rtol=0)
    assert len(stats["attn_in"]["weighted_tokens"]) == 600
    clip, grid = OutputMSE(), Grid(case["w_bit"], include_zero=False)
    for site, roles in SITES.items():
        for role in roles:
            hub, weight = hub_name(family, role), getattr(block, role).weight
            bound, tied = None, torch.zeros(weight.shape[0], weight.shape[1] // 32, dtype=torch.bool)
            if role not in clip.skip_roles:
                bound = Bound(clip, stats[site])
                columns = torch.arange(weight.shape[1]).view(-1, 32)
                lo, hi = clip(weight.unflatten(1, (-1, 32)), grid, stats[site], columns)
                m, theirs = torch.maximum(-lo, hi)[..., 0], expected[f"clip.{hub}"]
                tied = (m - theirs).abs() > 1e-4 * theirs
                assert tied.float().mean() <= 0.04, hub
            rounded = rtn_round(weight, grid, 32, bound)
            if f"codes.{hub}" in expected:
                tied = tied | (rounded.zero_point != expected[f"qzero.{hub}"])
                assert tied.float().mean() <= 0.04, hub
                same = ~tied[:, rounded.group_index]
                assert torch.equal(rounded.codes[same], expected[f"codes.{hub}"][same]), hub
            getattr(block, role).weight.copy_(rounded.dequantize())
    if "block_output" in expected:
        with torch.no_grad():
            final = block(hidden[:1], rope(block.arch, hidden.shape[1]))
        error = (final - expected["block_output"]).square().mean()
        assert error < 0.02 * (final - data["block_output"]).square().mean()
        for norm in ("attn_norm", "mlp_norm"):
            ours = getattr(block, norm).weight
            torch.testing.assert_close(ours, expected[f"norm.{hub_name(family, norm)}.weight"], rtol=1e-5, atol=0)


class Bound:
    """A clip with the statistics of its site."""

    clamps = True

    def __init__(self, clip, stats):
        self.clip, self.stats = clip, stats

    def __call__(self, w_OGW, grid, columns_GW):
        return self.clip(w_OGW, grid, self.stats, columns_GW)


def literal_search(block, site, inputs, bits, group_size, n_grid=20):
    """The search as the paper has it: every candidate through the judge on all tokens."""
    roles = SITES[site]
    tables = rope(block.arch, inputs.shape[1], inputs.dtype)
    judge = {
        "attn_in": lambda: block.attention(inputs, tables, None),
        "attn_out": lambda: block.o(inputs),
        "mlp_in": lambda: block.mlp(inputs),
        "mlp_out": lambda: block.down(inputs),
    }[site]
    target, losses, scales = judge(), [], []
    original = {role: getattr(block, role).weight.clone() for role in roles}
    for r in range(n_grid):
        s = inputs.abs().flatten(0, 1).mean(0).pow(r / n_grid).clamp(min=1e-4)
        s = s / (s.max() * s.min()).sqrt()
        for role in roles:
            w = (original[role] * s).view(-1, group_size)
            lo, hi = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
            step = (hi - lo).clamp(min=1e-5) / (2**bits - 1)
            zero = (-torch.round(lo / step)).clamp(0, 2**bits - 1)
            q = (torch.clamp(torch.round(w / step) + zero, 0, 2**bits - 1) - zero) * step
            getattr(block, role).weight.copy_(q.view_as(original[role]) / s)
        losses.append((judge() - target).pow(2).mean().item())
        scales.append(s)
        for role in roles:
            getattr(block, role).weight.copy_(original[role])
    return scales[losses.index(min(losses))], losses


@pytest.mark.parametrize("tokens", [(1, 9), (9, 40)], ids=["fewer_tokens_than_inputs", "more_tokens_than_inputs"])
@pytest.mark.parametrize("tile", [512, 24], ids=["one_tile", "tiles"])
@torch.no_grad()
def test_search_is_the_search_written_out(tokens, tile, monkeypatch):
    """In float64, with grouped heads and biases, whichever way the error of a linear is computed."""
    monkeypatch.setattr(awq, "TILE", tile)
    monkeypatch.setattr(awq, "JUDGED_ROWS", tile)
    monkeypatch.setattr(awq, "MLP_TOKENS", tile)
    model = tiny("dream", torch.float64)
    block, context = model.blocks[1], context_of(model.blocks[1], 3, 16)
    hidden = torch.randn(*tokens, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    transform = AWQScale()
    stats, _ = statistics(block, hidden, transform.needs)
    for site in SITES:
        grids = {role: context.grid(role) for role in SITES[site]}
        expected, expected_losses = literal_search(block, site, torch.cat(stats[site]["inputs"]), 3, 16)
        scale, losses = transform.search(block, site, stats[site], grids, context, give_up=False)
        torch.testing.assert_close(losses, expected_losses, rtol=1e-6, atol=0)
        torch.testing.assert_close(scale, expected)
        assert torch.equal(transform.search(block, site, stats[site], grids, context)[0], scale)


@torch.no_grad()
def test_grouped_heads_leave_attn_out_alone():
    block = tiny("dream").blocks[0]
    hidden = torch.randn(2, 20, 64, generator=torch.Generator().manual_seed(0))
    stats, _ = statistics(block, hidden, AWQScale().needs)
    columns = {role: getattr(block, role).weight.clone() for role in ("o", "down")}
    AWQScale().apply(block, stats, context_of(block, 3))
    assert torch.equal(block.o.weight, columns["o"])
    assert not torch.equal(block.down.weight, columns["down"])


@torch.no_grad()
def test_a_site_is_scaled_for_the_roles_that_are_rounded():
    """q stays in 16 bit: k and v are searched for alone; a site of which nothing is rounded is not scaled."""
    block = tiny("llada").blocks[0]
    hidden = torch.randn(2, 20, 64, generator=torch.Generator().manual_seed(0))
    stats, _ = statistics(block, hidden, AWQScale().needs)
    method = replace(METHOD, rounding_by_role={"q": None, "gate": None, "up": None})
    context = Context(block.arch, BitsConfig("b", WeightBits(3, 32)).resolve(block.arch).usual, method)
    norm = block.mlp_norm.weight.clone()
    AWQScale(sites=["attn_in", "mlp_in"]).apply(block, stats, context)
    assert torch.equal(block.mlp_norm.weight, norm)
    grids = {role: context.grid(role) for role in ("k", "v")}
    assert context.grid("q") is None
    intact = tiny("llada").blocks[0]
    scale, _ = AWQScale().search(intact, "attn_in", stats["attn_in"], grids, context)
    torch.testing.assert_close(block.attn_norm.weight, intact.attn_norm.weight / scale)


def test_one_candidate_is_rounding_as_it_is():
    absmean = torch.tensor([0.5, 2.0, 0.0])
    assert torch.equal(channel_scales(absmean, 1), torch.ones(1, 3))
    scales = channel_scales(absmean, 20)
    assert torch.equal(scales[0], torch.ones(3))
    torch.testing.assert_close(scales.amax(1) * scales.amin(1), torch.ones(20))
    assert torch.isfinite(scales).all()


@pytest.mark.parametrize("rounding", [RTN(include_zero=False), GPTQ(act_order=True)], ids=["rtn", "gptq"])
@torch.no_grad()
def test_whole_models(rounding):
    """Scales and clips under either rounding: less error of the first block than plain rounding, on other tokens."""
    model = {name: tiny("llada") for name in ("intact", "plain", "awq")}
    g = torch.Generator().manual_seed(0)
    calibration, held_out = torch.randint(0, 300, (12, 32), generator=g), torch.randint(0, 300, (4, 32), generator=g)
    setting = BitsConfig("w3a16", WeightBits(3, 32))
    methods = {"plain": replace(METHOD, transforms={}, clip=None), "awq": replace(METHOD, rounding=rounding)}
    for name, method in methods.items():
        report = quantize(model[name], method, setting, [Batch(calibration)], progress=False)
        assert len(report.linears) == 7 * 3
        assert all(row.bits == 3 for row in report.linears)
    outputs = {name: list(m.hidden_states(held_out))[1] for name, m in model.items()}
    error = {name: (outputs[name] - outputs["intact"]).square().mean().item() for name in outputs}
    assert 0 < error["awq"] < error["plain"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_models_of_16_bit_numbers(dtype):
    model = tiny("dream", dtype)
    report = quantize(
        model, METHOD, BitsConfig("w4a16", WeightBits(4, 32)), [Batch(torch.arange(64).view(2, 32))], progress=False
    )
    assert all(p.dtype == dtype for p in model.parameters())
    assert all(0 < row.weight_error < 0.02 for row in report.linears)


def test_settings_are_checked():
    arch = tiny("llada").arch
    widths = BitsConfig().resolve(arch).usual
    setting = Context(arch, widths, METHOD)
    assert AWQScale().problems("method.transforms.scale", setting) == []
    bad = AWQScale(n_grid=0, judge="model", sites=["attn"]).problems("method.transforms.scale", setting)
    assert len(bad) == 3
    assert all(p.startswith("method.transforms.scale.") for p in bad)
    (problem,) = AWQScale().problems("method.transforms.scale", Context(arch, widths, Method("m")))
    assert "method.rounding is null" in problem
