"""AWQ's scale search against the official implementation, a literal transcription of it, and identities."""

from __future__ import annotations

import pytest
import torch
from goldens import awq_dream_block, cases, golden, hub_name, rope, statistics, tiny

from dqx.models.transformer import SITES
from dqx.quant import BitsConfig, Method, WeightBits
from dqx.quant.clip import OutputMSE
from dqx.quant.grid import Grid
from dqx.quant.rounding.rtn import RTN, rtn_round
from dqx.quant.setting import Context
from dqx.quant.transforms.awq import AWQScale

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
    return Context(block.arch, BitsConfig("b", WeightBits(bits, group_size)), METHOD)


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

    for i, (site, group) in enumerate(zip(SITES, case["scale_groups"], strict=True)):
        assert [hub_name(family, role) for role in SITES[site]] == group["layers"]
        grids = {role: context.grid(role) for role in SITES[site]}
        scale, losses = transform.search(block, site, stats[site], grids, context, give_up=False)
        ours, theirs = torch.tensor(losses, dtype=torch.float64), expected[f"scale_losses.{i}"]
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=0)
        assert ours.argmin() == round(group["best_ratio"] * 20)
        torch.testing.assert_close(scale, expected[f"scale.{i}"], rtol=1e-5, atol=0)
        quick, _ = transform.search(block, site, stats[site], grids, context)
        assert torch.equal(quick, scale)

    transform.apply(block, stats, context)
    stats, scaled = statistics(block, hidden, dict.fromkeys(SITES, frozenset({"tokens"})))
    torch.testing.assert_close(scaled, outputs, atol=2e-4, rtol=0)
    assert len(stats["attn_in"]["tokens"]) == 600
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
