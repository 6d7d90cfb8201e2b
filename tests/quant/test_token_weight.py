"""Weights of calibration tokens: equal ones change nothing, 0 leaves a token out, 2 is the token twice; which methods
take them, in memory and from disk."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from goldens import GOLDEN, tiny
from test_on_disk import Killed
from test_saved import assert_same
from tiny import PLAIN, TOY, ids, toy

from dqx.config.compose import build, compose, resolve, select
from dqx.data.calibration import CalibBatch
from dqx.formats.integers import Grid
from dqx.models.checkpoint import inspect, load_weights
from dqx.quant import load_quantized, quantize, quantize_checkpoint
from dqx.quant.checkpoint.on_disk import Loading, OnDisk
from dqx.quant.home import Home
from dqx.quant.rounding.gptq import GPTQ
from dqx.quant.stats import COLLECTORS
from dqx.quant.token_weight import Confidence, Frontier, MaskState, confidences, token_weights
from dqx.quant.transforms.awq import linear_judge
from dqx.study.checks import data_problems

WEIGHTED = ["hessian", "cross", "shift", "absmean", "weighted_tokens"]
PARTS = {"mask_state": MaskState(), "confidence": Confidence(power=2.0), "frontier": Frontier()}
METHODS = [
    ("gptq", "dream"), ("gptaq", "llada"), ("awq", "dream"), ("quarot", "llada"), ("d2quant", "dream"),
    ("quant_dllm", "llada"),
]  # fmt: skip


def masked_ids(arch=TOY, n=6, length=24):
    """Sequences of which every third token is masked, or nearly all of the last one."""
    rows = ids(n, length, arch.vocab_size - 2)
    rows[:, ::3] = arch.mask_token_id
    rows[-1, 1:] = arch.mask_token_id
    return rows


@cache
def configured(name, bits):
    quick = ["method.clip.n_grid=5"] if name in ("quarot", "d2quant", "awq") else []
    quick += ["method.transforms.rotate.tile=32"] if name == "d2quant" else []
    return select(method=name, bits=bits, overrides=["model=nano_llada", "bits.weight.group_size=32", *quick])


def on_the_way(rows, prompt=8):
    """The rows as batches whose tokens behind a prompt are written one after the other, visible ones first."""
    batches = []
    for row in rows:
        masked = row[prompt:] == row.max()  # the mask token, which is the largest
        order = torch.argsort(masked.int(), stable=True).argsort()
        times = torch.cat((torch.full((prompt,), -1.0), order / len(order)))
        batches.append(CalibBatch(row[None], (row == row.max()).float().mean()[None], times[None]))
    return batches


def method_of(name, part=None, **options):
    return replace(build(configured(name, "2").method), token_weight=part, **options)


def bits_of(name, bits="2"):
    return configured(name, bits).bits


@torch.no_grad()
def quantized(name, part=None, family="dream"):
    """A model of 3 blocks in 2 bit, and the report."""
    model = tiny(family)
    batches = on_the_way(masked_ids(model.arch))
    return model, quantize(model, method_of(name, part), bits_of(name), batches, progress=False)


def statistic(name, sequences, weights=None):
    """A statistic of sequences [1, T, I], and for those that compare two models of them and their doubles plus one."""
    collector = COLLECTORS[name](sum(x.shape[1] for x in sequences))
    for i, x in enumerate(sequences):
        collector.see(x, 2 * x + 1, None if weights is None else weights[i])
    return collector.value()


@pytest.fixture
def sequences():
    drawn = torch.Generator().manual_seed(5)
    return [torch.randn(1, length, 40, dtype=torch.float64, generator=drawn) for length in (9, 30, 17)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", WEIGHTED)
def test_weight_1_is_no_weight(name, dtype, sequences):
    sequences = [x.to(dtype) for x in sequences]
    weights = [torch.ones(1, x.shape[1]) for x in sequences]
    assert torch.equal(
        statistic(name, sequences, weights), statistic(name, sequences).to(statistic(name, sequences, weights).dtype)
    )


@pytest.mark.parametrize("name", WEIGHTED[:-1])
def test_weight_0_leaves_tokens_out(name, sequences):
    """A whole sequence too, the first included."""
    drawn = torch.Generator().manual_seed(6)
    kept = [
        torch.rand(1, x.shape[1], generator=drawn) > share for x, share in zip(sequences, (1, 0.4, 0.4), strict=True)
    ]
    mean = torch.cat(kept, dim=1).double().mean()
    weights = [row.double() / mean for row in kept]
    without = [x[row][None] for x, row in zip(sequences, kept, strict=True) if row.any()]
    assert len(without) == 2
    torch.testing.assert_close(statistic(name, sequences, weights), statistic(name, without))


@pytest.mark.parametrize("name", WEIGHTED[:-1])
def test_weight_2_is_a_token_twice(name, sequences):
    twice = [torch.arange(x.shape[1]) % 3 == 0 for x in sequences]
    counts = [1.0 + row.double()[None] for row in twice]
    mean = torch.cat(counts, dim=1).mean()
    doubled = [torch.cat((x, x[:, row]), dim=1) for x, row in zip(sequences, twice, strict=True)]
    torch.testing.assert_close(statistic(name, sequences, [c / mean for c in counts]), statistic(name, doubled))


@pytest.mark.parametrize("tokens", [9, 200], ids=["fewer_tokens_than_inputs", "more_tokens_than_inputs"])
def test_awqs_judge_weighs_squared_errors(tokens):
    drawn = torch.Generator().manual_seed(7)
    x, w = (torch.randn(*shape, dtype=torch.float64, generator=drawn) for shape in ((1, tokens, 64), (16, 64)))
    weight, scale = torch.rand(1, tokens, generator=drawn), torch.rand(64, dtype=torch.float64, generator=drawn) + 0.5
    found = linear_judge(w, Grid(3), 32, [x], [weight])(scale, float("inf"))
    alone = [linear_judge(w, Grid(3), 32, [x[:, i : i + 1]])(scale, float("inf")) for i in range(tokens)]
    assert found == pytest.approx(sum(a * b for a, b in zip(alone, weight[0].tolist(), strict=True)))


@pytest.mark.parametrize("arch", [TOY, PLAIN], ids=["dream", "llada"])
@torch.no_grad()
def test_confidence_is_the_models_probability_of_its_first_choice(arch, monkeypatch):
    model, rows = toy(torch.float64, arch), masked_ids(arch)
    expected = model(rows).softmax(-1).amax(-1)
    monkeypatch.setattr("dqx.quant.token_weight.HEAD_TOKENS", 7)
    found = torch.cat(list(confidences(Home(model, model.device), list(rows.split(1)))))
    torch.testing.assert_close(found, expected.float())
    masked = rows == arch.mask_token_id
    weights = torch.cat(list(token_weights(Confidence(), Home(model, model.device), [rows])))
    wanted = torch.where(masked, 0.5 + expected, 0.5)
    torch.testing.assert_close(weights, (wanted / wanted.mean(1, keepdim=True)).float())
    weights = torch.cat(list(token_weights(Confidence(power=2, per_sequence=False), Home(model, model.device), [rows])))
    wanted = torch.where(masked, 0.5 + expected**2, 0.5)
    torch.testing.assert_close(weights, (wanted / wanted.mean()).float())


def test_weights_have_mean_1_whatever_their_unit():
    model, rows = toy(), masked_ids()
    weights = [
        torch.cat(list(token_weights(MaskState(3 * unit, unit), Home(model, model.device), rows.split(2))))
        for unit in (1.0, 0.1)
    ]
    torch.testing.assert_close(*weights)
    assert weights[0].shape == rows.shape
    assert weights[0].mean().item() == pytest.approx(1)
    assert set((weights[0] / weights[0].min()).round(decimals=5).flatten().tolist()) == {1.0, 3.0}


def test_the_frontier_by_hand():
    """An answer of 4 tokens behind a prompt of 2, written one after the other; the last two are masked."""
    facts = {
        "masked": torch.tensor([[False, True, False, False, True, True]]),
        "committed": torch.tensor([[-1.0, -1, 0, 0.25, 0.5, 0.75]]),
        "confidence": torch.tensor([[0.0, 0.9, 0, 0, 0.6, 0.2]]),
    }
    commit = torch.tensor([2 * 2.0, 2 * 1.75, 2 * 1.5, 2 * 1.25], dtype=torch.float64)
    sure = torch.tensor([0, 0, 0.75, 0.25], dtype=torch.float64) * 4 * 3
    found = Frontier(commit=2, reliability=3, floor=0.5)(facts)[0]
    torch.testing.assert_close(found[2:], commit + sure, atol=1e-6, rtol=0)
    torch.testing.assert_close(found[:2], (0.5 * (commit + sure).mean()).expand(2), atol=1e-6, rtol=0)
    alone = Frontier(reliability=0, early=3)
    assert alone.needs == {"committed"}
    torch.testing.assert_close(alone(facts)[0, 2:], torch.tensor([4.0, 3.25, 2.5, 1.75], dtype=torch.float64))
    visible = facts | {"confidence": torch.zeros(1, 6)}
    assert torch.equal(Frontier()(visible)[0, 2:], Frontier(reliability=0)(facts)[0, 2:])
    flat = Frontier(early=0, reliability=0, floor=1)(facts)
    assert torch.equal(flat, torch.ones_like(flat))


@torch.no_grad()
def test_the_frontier_is_a_mean_over_windows():
    model, batches = toy(), on_the_way(masked_ids())
    home, rows, times = Home(model, model.device), *([getattr(b, n) for b in batches] for n in ("ids", "committed"))
    pooled = list(token_weights(Frontier(), home, rows, times))
    assert all(torch.equal(row, pooled[0]) for row in pooled)
    own = torch.cat(list(token_weights(Frontier(by_position=False), home, rows, times)))
    torch.testing.assert_close(pooled[0][0], own.mean(0))
    assert own.std(0).max() > 0.1
    assert pooled[0].mean().item() == pytest.approx(1)
    assert (pooled[0][0, :8] < pooled[0][0, 8:].min()).all()
    with pytest.raises(ValueError, match=r"position by position, but they differ in length; make them equal, or write"):
        token_weights(Frontier(), home, [rows[0], rows[1][:, :20]], [times[0], times[1][:, :20]])


def test_equal_frontier_weights_change_nothing():
    plain, _ = quantized("gptq")
    equal, _ = quantized("gptq", Frontier(early=0, reliability=0, floor=1))
    assert_same(plain, equal)


@pytest.mark.parametrize(("name", "family"), METHODS)
def test_equal_weights_change_nothing_and_others_do(name, family):
    """To the bit; and a weighted model is another one, with finite numbers."""
    plain, report = quantized(name, None, family)
    equal, same = quantized(name, MaskState(0.3, 0.3), family)
    assert_same(plain, equal)
    assert replace(report, seconds=0, peak_ram=0) == replace(same, seconds=0, peak_ram=0)
    for part in ("confidence", "frontier"):
        weighted, _ = quantized(name, PARTS[part], family)
        before, after = plain.state_dict(), weighted.state_dict()
        assert any(not torch.equal(after[name], before[name]) for name in after)
        assert all(torch.isfinite(tensor).all() for tensor in after.values())


@torch.no_grad()
def test_only_weighted_tokens_are_seen():
    """GPTQ of the first block with weight 0 on visible tokens is GPTQ with the Hessian of the masked ones alone."""
    rows, bits = masked_ids(), bits_of("gptq", "3")
    weighted, model = toy(torch.float64), toy(torch.float64)
    quantize(weighted, method_of("gptq", MaskState(1.0, 0.0)), bits, rows, progress=False)
    block, x = model.blocks[0], model.embed(rows)
    read = block.attn_norm(x)[rows == TOY.mask_token_id]
    w = torch.cat([block.q.weight, block.k.weight, block.v.weight])
    rounding = GPTQ(act_order=True, static_groups=True)  # as method=gptq has it
    expected = rounding(w, bits.weight, {"hessian": read.T @ read / len(read)}).dequantize()
    found = torch.cat([getattr(weighted.blocks[0], role).weight for role in ("q", "k", "v")])
    torch.testing.assert_close(found, expected.to(found.dtype))


def test_16_bits_stay_a_no_op():
    model, rows = toy(), masked_ids()
    before = model(rows)
    quantize(model, method_of("gptq", Confidence()), bits_of("gptq", "w16a16"), rows, progress=False)
    assert torch.equal(model(rows), before)


@pytest.mark.parametrize(
    ("part", "stop_at"),
    [*((part, block) for part in ("mask_state", "confidence") for block in (None, 0, 1)), ("frontier", 0)],
)
@torch.no_grad()
def test_from_disk_is_as_in_memory(part, stop_at, tmp_path, monkeypatch):
    """Also where the first attempt ended after a block, and no activation fits into memory."""
    source = inspect(str(GOLDEN / "dream_tiny"))
    model, bits, method = load_weights(source), bits_of("gptq"), method_of("gptq", PARTS[part])
    rows = on_the_way(masked_ids(source.arch))
    report = quantize(model, method, bits, rows, progress=False)
    loading = Loading(activations_gb=0.0)
    put = OnDisk.put

    def stops(self, index, block):
        put(self, index, block)
        if index == stop_at:
            raise Killed

    if stop_at is not None:
        monkeypatch.setattr(OnDisk, "put", stops)
        with pytest.raises(Killed):
            quantize_checkpoint(source, tmp_path / "out", method, bits, rows, loading=loading, progress=False)
        monkeypatch.undo()
    found = quantize_checkpoint(source, tmp_path / "out", method, bits, rows, loading=loading, progress=False)
    assert found.linears == report.linears
    again, _ = load_quantized(tmp_path / "out")
    assert_same(model, again)
    assert {p.suffix for p in (tmp_path / "out").iterdir()} == {".safetensors", ".json"}


@pytest.mark.parametrize("name", ["rtn", "smoothquant", "duquant"])
def test_methods_without_averages_are_refused(name):
    bits = bits_of(name, "4")
    arch = tiny("llada").arch
    before = method_of(name).problems(bits, arch)
    (problem,) = (told for told in method_of(name, MaskState()).problems(bits, arch) if told not in before)
    assert "method.token_weight=MaskState weighs" in problem
    assert f"but method {name} has no part that looks at one; write method.token_weight=null" in problem
    assert method_of(name, MaskState(), rounding=GPTQ()).problems(bits, arch) == before
    with pytest.raises(ValueError, match="has no part that looks at one"):
        quantize(tiny("llada"), method_of(name, MaskState()), bits, ids(), progress=False)


def test_other_refusals():
    bits = bits_of("gptq", "3")

    def problem(part, **options):
        (found,) = method_of("gptq", part, **options).problems(bits, TOY)
        return found

    assert "method.token_weight.masked=-1 must be a number of at least 0" in problem(MaskState(masked=-1))
    assert "method.token_weight.power=inf must be" in problem(Confidence(power=float("inf")))
    assert "are all 0, so no token would count" in problem(MaskState(0, 0))
    assert "method.token_weight.floor=-1 must be a number" in problem(Frontier(floor=-1))
    assert "commit and reliability are all 0" in problem(Frontier(commit=0, reliability=0))
    with pytest.raises(
        ValueError, match=r"needs the step at which each calibration token is written, which batches of"
    ):
        quantize(toy(), method_of("gptq", Frontier()), bits, masked_ids(), progress=False)
    with pytest.raises(ValueError, match=r"but none is masked; calibrate on masked text \(calib=mcs"):
        quantize(toy(), method_of("gptq", MaskState()), bits, ids(vocab=90), progress=False)


def test_clean_text_is_refused_before_weights_load():
    config = resolve(compose(["model=nano_llada", "method=gptq", "calib=clean", "method.token_weight=mask_state"]))
    method = build(config.method)
    assert method.token_weight == MaskState()
    (found,) = data_problems(config, method, None)
    assert found.startswith("calib=clean masks no token, so method.token_weight")
    config.calib.masking, config.calib.visible = "mcs", 0.25
    assert data_problems(config, method, None) == []


@pytest.mark.parametrize("kind", ["clean", "mcs", "random_t"])
def test_text_without_steps_is_refused_before_weights_load(kind):
    config = resolve(compose(["model=nano_llada", "method=gptq", f"calib={kind}", "method.token_weight=frontier"]))
    (found,) = data_problems(config, build(config.method), None)
    assert found.startswith(f"calib={kind} has no steps of a sampler, but method.token_weight weighs")
    assert found.endswith("write calib=trajectory, or method.token_weight=mask_state or confidence")
    config = resolve(compose(["model=nano_llada", "method=gptq", "calib=trajectory", "method.token_weight=frontier"]))
    assert data_problems(config, build(config.method), build(config.model.sampler)) == []


@pytest.mark.parametrize("part", PARTS)
def test_files_hold_the_defaults(part):
    config = resolve(compose(["model=nano_llada", "method=awq", "calib=mcs", f"method.token_weight={part}"]))
    assert build(config.method).token_weight == type(PARTS[part])()
