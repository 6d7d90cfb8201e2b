"""Calibration of models that write by passes: linears read in one forward what they read at work, pass by pass."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from goldens import GOLDEN3
from tiny import PLAIN, toy
from torch import Tensor

from dqx.config.compose import build, compose, resolve
from dqx.config.schema import CalibConfig
from dqx.data.calibration import CalibBatch
from dqx.data.masking import masking_problems, window_tokens
from dqx.data.passes import laid_out, pass_batches, text_passes
from dqx.diagnostics.activations.measure import watched
from dqx.diffusion.samplers.blockwise import BlockwiseSampler, Cached, Pass
from dqx.diffusion.samplers.fast_dllm import FastDLLMSampler
from dqx.diffusion.samplers.nemotron import AutoregressiveSampler, NemotronSampler, SpeculativeSampler
from dqx.diffusion.samplers.sdar import SDARSampler
from dqx.formats.bits import ActivationBits, BitsConfig, KVBits, WeightBits
from dqx.models.architecture import CAUSAL, FULL, Architecture, Attention, Yarn
from dqx.models.checkpoint import inspect, load_weights
from dqx.models.layout import Passes
from dqx.models.transformer import MaskedDiffusionTransformer
from dqx.quant import Method, quantize, quantize_checkpoint
from dqx.quant.activation import PerToken
from dqx.quant.checkpoint.folder import load_quantized
from dqx.quant.home import Home
from dqx.quant.kv import KeysValues
from dqx.quant.rounding.gptq import GPTQ
from dqx.quant.rounding.rtn import RTN
from dqx.quant.stream import Stream, passes_of
from dqx.quant.token_weight import confidences
from dqx.quant.value_clip import attention_received
from dqx.study.checks import data_problems
from dqx.study.facts import rows_digest

ARCHITECTURES = {
    "sdar": replace(PLAIN, family="sdar", n_kv_heads=2, head_dim=20, head_norm=True, attention=Attention(4)),
    "nemotron": replace(PLAIN, family="nemotron", head_dim=12, attention=CAUSAL, yarn=Yarn(4.0, 16, query_scale=0.1)),
    "fast_dllm": replace(
        PLAIN, family="fast_dllm", n_kv_heads=2, qkv_bias=True, logit_shift=True, attention=Attention(8)
    ),
}
SAMPLERS: dict[str, tuple[str, BlockwiseSampler]] = {
    "sdar": ("sdar", SDARSampler(block=4, remasking="low_confidence_static")),
    "sdar, threshold": ("sdar", SDARSampler(block=4, threshold=0.02)),
    "nemotron": ("nemotron", NemotronSampler(block=8)),
    "nemotron, full context": ("nemotron", NemotronSampler(block=8, causal_context=False)),
    "autoregressive": ("nemotron", AutoregressiveSampler()),
    "speculative": ("nemotron", SpeculativeSampler(block=4)),
    "fast_dllm": ("fast_dllm", FastDLLMSampler(block=8, sub_block=4, threshold=0.02)),
    "fast_dllm, block cache": ("fast_dllm", FastDLLMSampler(block=8, sub_block=4, block_cache=True)),
}
PROMPT, NEW = 10, 16


def arch_of(family: str) -> Architecture:
    return replace(ARCHITECTURES[family], eos_token_id=93)


def windows(n: int = 1) -> Tensor:
    return torch.randint(0, 90, (n, PROMPT + NEW), generator=torch.Generator().manual_seed(4))


def batches(case: str, n: int = 1, rollout: bool = False, seed: int = 0) -> tuple[MaskedDiffusionTransformer, list]:
    family, sampler = SAMPLERS[case]
    model = toy(torch.float64, arch_of(family))
    schedule = {"gen_length": NEW, "steps": NEW, "seed": seed}
    return model, pass_batches(model, sampler, windows(n), rollout=rollout, progress=False, **schedule)


def passes_in(case: str, rollout: bool) -> tuple[MaskedDiffusionTransformer, list[Pass], CalibBatch]:
    """Those of one window, as they are run, and as calibration has them."""
    sampler = SAMPLERS[case][1]
    model, (batch,) = batches(case, rollout=rollout)
    passes: list[Pass] = []
    if rollout:
        prompt = windows()[:, :PROMPT]
        sampler.generate(model, prompt, gen_length=NEW, steps=NEW, on_pass=passes.append)
    else:
        random = torch.Generator()
        passes = text_passes(sampler, windows()[0], model.arch, gen_length=NEW, steps=NEW, random=random)
        ids, table = laid_out(passes)
        batch = replace(batch, ids=ids, passes=table)
    return model, passes, batch


@torch.no_grad()
def at_work(model: MaskedDiffusionTransformer, passes: list[Pass]) -> tuple[dict, list[Tensor]]:
    """What the linears read when the passes run over a store, and the logits where they look."""
    seen: dict[tuple[int, str], list[Tensor]] = {}
    runner = Cached(model, 64)
    with watched(model.arch, dict(enumerate(model.blocks)), lambda place, x: seen.setdefault(place, []).append(x[0])):
        logits = [runner.run(due)[0] for due in passes]
    return {place: torch.cat(rows) for place, rows in seen.items()}, logits


@torch.no_grad()
def in_calibration(model: MaskedDiffusionTransformer, batch: CalibBatch) -> tuple[dict, Tensor]:
    """What they read in a stream, and the hidden states behind the last block."""
    stream, seen = Stream(model, [batch.ids], passes=[batch.passes]), {}
    for i, block in enumerate(model.blocks):
        for site in model.arch.sites:
            seen[i, site] = stream.input_at(block, 0, site)[0]
        stream.advance(block)
    return seen, stream.inputs[0]


def compare(model: MaskedDiffusionTransformer, passes: list[Pass], batch: CalibBatch) -> None:
    (wanted, logits), (found, last) = at_work(model, passes), in_calibration(model, batch)
    for place, x in wanted.items():
        if place[0] < model.arch.n_blocks - 1:  # at work the last block computes what is looked at alone
            torch.testing.assert_close(found[place], x, atol=1e-9, rtol=0)
    looked = torch.cat([torch.zeros(len(p.ids), dtype=torch.bool) if p.look is None else p.look for p in passes])
    torch.testing.assert_close(model.head(model.norm(last[0, looked])), torch.cat(logits), atol=1e-9, rtol=0)


@pytest.mark.parametrize("rollout", [False, True], ids=["text", "rollout"])
@pytest.mark.parametrize("case", SAMPLERS)
def test_linears_read_what_they_read_at_work(case, rollout):
    model, passes, batch = passes_in(case, rollout)
    compare(model, passes, batch)
    plain, found = (in_calibration(model, each)[0][1, "attn_in"] for each in (replace(batch, passes=None), batch))
    if case != "autoregressive":  # whose passes are the text, and attention causal
        assert (plain - found).abs().max() > 1e-3  # another attention would be noticed


KV = {
    "always": KeysValues(keys="head", values="head"),
    "commit": KeysValues(keys="head", values="token", when="commit"),
    "commit, by what is stored together": KeysValues(keys="channel", center="mean", token_group=3, when="commit"),
}


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("case", ["sdar", "nemotron", "fast_dllm, block cache"])
def test_quantized_models_too(case, kv):
    """Rounded inputs, and keys and values rounded always or where they are stored."""
    model, passes, batch = passes_in(case, False)
    method = Method("m", rounding=RTN(), activation=PerToken(), kv=KV[kv], quantizes="weights_and_activations")
    bits = BitsConfig("b", WeightBits(4, group_size=-1), ActivationBits(8), kv=KVBits(3))
    quantize(model, method, bits, progress=False)
    compare(model, passes, batch)


def test_a_window_by_hand():
    """Prompt 3, two new tokens, blocks of 2, one token per pass."""
    sampler = SDARSampler(block=2, remasking="sequential")
    arch = replace(arch_of("sdar"), attention=Attention(2))
    random = torch.Generator().manual_seed(0)
    passes = text_passes(sampler, torch.tensor([1, 2, 3, 4, 5]), arch, gen_length=2, steps=2, random=random)
    ids, table = laid_out(passes)
    mask, end = arch.mask_token_id, arch.eos_token_id
    assert ids.tolist() == [[1, 2, 3, mask, 3, 4, mask, mask, 5, mask, 5, end]]
    assert table[0, 0].tolist() == [0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 4, 5]
    assert table[0, 1].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    seen = Passes(table).layout.mask[0, 0].long()
    assert seen[3].tolist() == [1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0]
    assert seen[6].tolist() == [1, 1, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0]
    assert seen[10].tolist() == [1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("case", SAMPLERS)
def test_passes_on_text_are_as_many_as_the_sampler_makes(case):
    """Each token of a block as often as the block has passes, and what is final is the text."""
    _, found = batches(case, n=2)
    for window, batch in zip(windows(2), found, strict=True):
        position, _, until, _ = batch.passes[0]
        kept = until > len(batch.ids[0])
        text = torch.full((64,), -1).scatter(0, position[kept], batch.ids[0][kept])
        final = text[: PROMPT + NEW]
        assert final[final >= 0].equal(window[: len(final)][final >= 0])
        assert (final >= 0).sum() >= PROMPT + NEW - 8
    if case == "nemotron":  # blocks of 8 of which 7 are denoised, one a pass, and a pass that stores them
        assert len(found[0].ids[0]) == PROMPT + 2 * 8 * (7 + 1)
    if case == "autoregressive":
        assert found[0].ids[0].equal(windows(2)[0, :-1])


@pytest.mark.parametrize("case", SAMPLERS)
def test_estimates_know_the_tokens_of_a_window(case):
    family, sampler = SAMPLERS[case]
    calib = CalibConfig(masking="trajectory", length=PROMPT + NEW, gen_length=NEW, block_length=32)
    made = batches(case)[1][0].ids.shape[1]
    estimated = window_tokens(calib, sampler, arch_of(family))
    assert estimated == made if not getattr(sampler, "block_cache", False) else abs(estimated - made) <= 8
    assert window_tokens(CalibConfig(masking="clean", length=PROMPT + NEW), sampler, arch_of(family)) == PROMPT + NEW


def test_what_passes_cannot_have_is_told():
    passes = ["model=sdar_4b", "calib=trajectory", "calib.text=nano"]
    config = resolve(compose([*passes, "calib.buckets=[0.5,0.5]"]))
    sampler = build(config.model.sampler)
    assert "write calib.buckets=null" in masking_problems(config.calib, sampler)[0]
    config = resolve(compose([*passes, "method=duquant", "bits=w4a4", "calib.rollout=true", "task=nano"]))
    told = data_problems(config, build(config.method), sampler)
    assert ["write calib.rollout=false, or stream=quantized" in problem for problem in told] == [True]
    passes = ["model=fast_dllm_7b", "calib=trajectory", "calib.text=nano", "model.sampler.block_cache=true"]
    config = resolve(compose([*passes, "method=duquant", "bits=w4a4", "task=nano"]))
    told = data_problems(config, build(config.method), build(config.model.sampler))
    assert ["write model.sampler.block_cache=false" in problem for problem in told] == [True]


def test_rollouts_are_the_passes_of_the_generation():
    sampler = SAMPLERS["sdar, threshold"][1]
    model, found = batches("sdar, threshold", n=2, rollout=True)
    for window, batch in zip(windows(2), found, strict=True):
        made = sampler.generate(model, window[None, :PROMPT], gen_length=NEW, steps=NEW)
        assert batch.ids.shape[1] == made.n_tokens
        assert batch.passes[0, 1].max() + 1 == made.n_forwards


def test_a_function_of_seed_and_window():
    _, two = batches("sdar", n=2)
    _, one = batches("sdar", n=1)
    _, other = batches("sdar", n=1, seed=1)
    assert two[0].ids.equal(one[0].ids)
    assert not other[0].ids.equal(one[0].ids)
    assert two[0].passes.equal(two[1].passes)


def test_times_of_writing():
    _, (batch,) = batches("sdar")
    position, mask = batch.passes[0, 0], arch_of("sdar").mask_token_id
    assert (batch.committed[0][position < PROMPT] == -1).all()
    for new in range(NEW):
        times = batch.committed[0][position == PROMPT + new]
        assert len(times.unique()) == 1
        assert times[0] >= 0
    assert batch.mask_ratio.item() == (batch.ids == mask).float().mean().item()


@pytest.mark.parametrize("case", ["sdar", "fast_dllm", "fast_dllm, block cache"])
def test_confidence_is_that_of_the_pass(case):
    model, passes, batch = passes_in(case, False)
    (found,) = confidences(Home(model, model.device), [batch.ids], passes_of([batch.ids], [batch.passes]))
    runner, start = Cached(model, 64), 0
    for due in passes:
        logits, _ = runner.run(due)
        wanted = logits.softmax(-1).amax(-1).float()
        masked = (due.ids == model.arch.mask_token_id).nonzero()[:, 0]
        if due.predicts is not None and len(masked):
            rows = due.look.nonzero()[:, 0].tolist()
            columns = (masked - int(model.arch.logit_shift)).clamp(min=0).tolist()
            for column, row in zip(masked.tolist(), columns, strict=True):
                if row in rows:  # sub-blocks look at their own masks alone
                    torch.testing.assert_close(found[0, start + column], wanted[rows.index(row)])
        start += len(due.ids)


def test_attention_received_follows_the_mask():
    q, k = (torch.randn(1, n, 6, 8, generator=torch.Generator().manual_seed(n)) for n in (4, 2))
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    scores = (q @ k.repeat_interleave(2, dim=1).transpose(2, 3) * 8**-0.5).masked_fill(~mask, -torch.inf)
    wanted = scores.softmax(-1).sum(2)[0].view(2, 2, 6).mean(1)
    torch.testing.assert_close(attention_received(q, k, None, mask[None, None]), wanted)


def test_from_disk_as_in_memory_and_what_it_depends_on(tmp_path):
    source = inspect(str(GOLDEN3 / "sdar_tiny"), mask_token_id=151)
    model = load_weights(source)
    schedule = {"gen_length": NEW, "steps": NEW, "seed": 0, "rollout": False}
    found = pass_batches(model, SDARSampler(remasking="low_confidence_static"), windows(2), **schedule)
    method, bits = Method("m", rounding=GPTQ()), BitsConfig("b", WeightBits(3, group_size=-1))
    report = quantize(model, method, bits, found, progress=False)
    on_disk = quantize_checkpoint(source, tmp_path / "q", method, bits, found, progress=False)
    assert [row.weight_error for row in on_disk.linears] == [row.weight_error for row in report.linears]
    again, *_ = load_quantized(tmp_path / "q")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    text = load_weights(source)
    other = quantize(text, method, bits, [replace(each, passes=None) for each in found], progress=False)
    assert [row.weight_error for row in other.linears] != [row.weight_error for row in report.linears]
    digests = {rows_digest(each, "ids", "passes") for each in (found, [replace(b, passes=None) for b in found])}
    assert len(digests) == 2


def test_means_need_equal_passes():
    model, found = batches("sdar, threshold", n=2, rollout=True)
    same = [replace(batch, ids=batch.ids[:, :12], passes=batch.passes[..., :12]) for batch in found]
    Stream(model, [batch.ids for batch in same], passes=[batch.passes for batch in same], mean=True)
    odd = replace(same[1], passes=same[1].passes + torch.tensor([0, 1, 0, 0])[:, None])
    with pytest.raises(ValueError, match="in the same passes; set stream=quantized"):
        Stream(model, [b.ids for b in (same[0], odd)], passes=[b.passes for b in (same[0], odd)], mean=True)


def test_what_takes_a_place_is_stored():
    with pytest.raises(ValueError, match="without being stored"):
        laid_out([Pass(torch.arange(4), FULL, True), Pass(torch.arange(2), FULL, False, at=0)])
