"""Calibration states: densities that can be computed, the sampler's own states, seeds, and what is refused."""

import json
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import dqx
from dqx.config.compose import build, compose, resolve, run_name
from dqx.data.masking import (
    MASKINGS,
    allotted,
    calibration_states,
    commitment_times,
    masking_problems,
    masks,
    rollouts,
    shown_calls,
)
from dqx.diffusion.noise import SeededNoise, generator
from dqx.diffusion.rollout import spread
from dqx.diffusion.samplers.dream import DreamSampler
from dqx.diffusion.samplers.llada import LLaDASampler
from dqx.models.checkpoint import inspect, load_weights
from dqx.quant.loop import Stream
from dqx.record.folder import RunFolder
from dqx.record.words import conditions
from dqx.study.run import run

GOLDEN = Path(__file__).parents[1] / "golden"
KINDS = list(MASKINGS)


@dataclass(frozen=True)
class Calib:
    masking: str
    length: int = 24
    visible: float | None = None
    gen_length: int | None = None
    block_length: int | None = None
    steps: int | None = None
    rollout: bool = False
    buckets: list[float] | None = None


def calib(kind, **changes):
    """Settings of a kind that fit its `length`."""
    own = {
        "mcs": {"visible": 0.25},
        "random_t": {"visible": 0.0},
        "trajectory": {"gen_length": 12, "block_length": 6, "steps": 12},
    }
    return Calib(kind, **(own.get(kind, {}) | changes))


@pytest.fixture(scope="module", params=["llada", "dream"])
def model(request):
    return load_weights(inspect(str(GOLDEN / f"{request.param}_tiny")))


@pytest.fixture(scope="module")
def llada():
    return load_weights(inspect(str(GOLDEN / "llada_tiny")))


@pytest.fixture(scope="module")
def dream():
    return load_weights(inspect(str(GOLDEN / "dream_tiny")))


def text(n=8, length=24):
    return torch.randint(5, 80, (n, length), generator=torch.Generator().manual_seed(0))


def sampler_of(model):
    return LLaDASampler(suppress_mask=True) if model.arch.family == "llada" else DreamSampler(suppress_mask=True)


# ---- densities -----------------------------------------------------------------------------------------------


def test_clean_text_stays_as_it_is(model):
    batches = calibration_states(model, sampler_of(model), text(), calib("clean"), seed=0)
    assert torch.equal(torch.cat([b.ids for b in batches]), text())
    assert all(b.mask_ratio.tolist() == [0.0] for b in batches)


def test_mcs_by_its_definition():
    """The first quarter is visible; behind it window i of N is masked with probability (i + 1) / N, the last fully."""
    n, length = 64, 2000
    masked = masks(calib("mcs"), LLaDASampler(), n, length, seed=0)
    assert not masked[:, :500].any()
    assert masked[-1, 500:].all()
    wanted = (torch.arange(n) + 1) / n
    share = masked[:, 500:].double().mean(1)
    deviation = (wanted * (1 - wanted) / 1500).sqrt()
    assert ((share - wanted).abs() <= 4.5 * deviation + 1e-7).all()
    assert (share - wanted).abs().max() > 0  # drawn token by token, no exact counts
    other = masks(calib("mcs", visible=0.5), LLaDASampler(), n, length, seed=0)
    assert torch.equal(other[:, 1000:], masked[:, 1000:])
    assert not other[:, :1000].any()


def test_mcs_masks_each_token_independently():
    masked = masks(calib("mcs", visible=0.0), LLaDASampler(), 4, 4000, seed=1)[1].double()  # t = 1/2
    assert abs(torch.corrcoef(torch.stack((masked[:-1], masked[1:])))[0, 1]) < 4.5 / 4000**0.5


def test_random_t_is_stratified():
    """One t per window, the i-th in ((i - 1) / N, i / N), uniform within; seeds hardly change the share of masks."""
    n, length = 50, 4000
    share = masks(calib("random_t"), LLaDASampler(), n, length, seed=0).double().mean(1)
    low = torch.arange(n) / n
    assert ((share > low - 0.04) & (share < low + 1 / n + 0.04)).all()
    within = share * n - torch.arange(n)  # u, and noise of the draws
    assert within.std() > 0.2  # no constant
    totals = [masks(calib("random_t"), LLaDASampler(), 32, 256, seed=s).double().mean() for s in range(20)]
    assert abs(torch.stack(totals).mean() - 0.5) < 0.005
    assert torch.stack(totals).std() < 0.01  # independent draws of t: 0.05
    assert not masks(calib("random_t", visible=0.5), LLaDASampler(), n, 100, seed=0)[:, :50].any()


def test_spread():
    assert spread(4, 4) == [0, 1, 2, 3]
    assert spread(4, 2) == [0, 0, 1, 1]
    assert spread(2, 8) == [2, 6]
    assert spread(0, 5) == []
    for count, total in [(5, 3), (7, 3), (128, 96), (3, 100)]:
        times = Counter(spread(count, total))
        assert set(times.values()) <= {count // total, count // total + 1}
        assert spread(count, total) == sorted(spread(count, total))


# ---- the sampler's states ------------------------------------------------------------------------------------


def visited(sampler, model, *, gen_length, block_length, steps, prompt=5):
    """Answers [n, G] before each call of the model in a real generation, True where masked; guidance is one call."""
    ids = torch.arange(5, 5 + prompt)[None]
    states, calls = [], []
    forward = model.forward

    def count(*args):
        calls.append(len(states) - 1)
        return forward(*args)

    model.forward = count
    try:
        sampler.generate(
            model,
            ids,
            gen_length=gen_length,
            block_length=block_length,
            steps=steps,
            noise=SeededNoise(3, ["a"]),
            on_step=lambda x: states.append(x[0, prompt:] == model.arch.mask_token_id),
        )
    finally:
        del model.forward
    return [states[i] for i in calls]


LLADA_SCHEDULES = [(12, 12, 12), (12, 4, 6), (12, 6, 10), (12, 6, 4), (12, 3, 24), (12, None, 5), (10, 5, 8)]
LLADA_SAMPLERS = [LLaDASampler(suppress_mask=True), LLaDASampler("random", 0.7, suppress_mask=True)]


@pytest.mark.parametrize(("gen_length", "block_length", "steps"), LLADA_SCHEDULES)
@pytest.mark.parametrize("sampler", LLADA_SAMPLERS, ids=["low_confidence", "random"])
def test_llada_states_are_those_of_real_generations(sampler, gen_length, block_length, steps, llada):
    check(sampler, llada, gen_length, block_length, steps)


@pytest.mark.parametrize("cfg_scale", [0.5, 2.0])
def test_guidance_hides_the_prompt_in_every_second_call(cfg_scale, llada):
    sampler = LLaDASampler(cfg_scale=cfg_scale, suppress_mask=True)
    check(sampler, llada, 12, 4, 6)
    settings = calib("trajectory", block_length=4, steps=6)
    states = masks(settings, sampler, 12, 24, seed=0)
    assert states[:, :12].all(1).tolist() == [False, True] * 6
    assert torch.equal(states[::2, 12:].sum(1), states[1::2, 12:].sum(1))


@pytest.mark.parametrize(("gen_length", "steps"), [(12, 12), (12, 5), (16, 16), (16, 32), (9, 1), (12, 40)])
@pytest.mark.parametrize("alg", ["entropy", "maskgit_plus", "topk_margin"])
def test_dream_states_are_those_of_real_generations(alg, gen_length, steps, dream):
    check(DreamSampler(alg, suppress_mask=True), dream, gen_length, None, steps)


def check(sampler, model, gen_length, block_length, steps):
    """One window per call: the same number of masks in each block as in a real generation, call by call."""
    real = visited(sampler, model, gen_length=gen_length, block_length=block_length, steps=steps)
    settings = calib("trajectory", gen_length=gen_length, block_length=block_length, steps=steps)
    assert masking_problems(settings, sampler) == []
    made = masks(settings, sampler, len(real), 24, seed=0)[:, -gen_length:]
    assert Counter(int(m.sum()) for m in made) == Counter(int(m.sum()) for m in real)
    width = block_length or gen_length
    for a, b in zip(made, real, strict=True):
        assert torch.equal(a.view(-1, width).sum(1), b.view(-1, width).sum(1))
    twice = masks(settings, sampler, 2 * len(real), 24, seed=0)[:, -gen_length:]
    assert twice.sum(1).tolist() == [int(m.sum()) for m in real for _ in range(2)]  # equal weight per call


def test_dream_truncation_shows_as_steps_without_a_call():
    calls = DreamSampler().calls(16, None, 32, generator(0))
    assert len(calls) <= 16
    assert calls[0].step > 0, "the first steps of a fine grid write nothing, so they are no calls"
    assert calls[0].masked == 16


def test_origin_has_the_distribution_of_its_counts(dream):
    """Each step of `origin` leaves a random number of masks; means over many generations agree."""
    sampler, steps, draws = DreamSampler("origin", suppress_mask=True), 4, 80

    def counts_of(real):
        table = torch.zeros(steps)
        for i in range(draws):
            for step, masked in real(i):
                table[step] += masked / draws
        return table

    def generated(i):
        states = []
        prompt = torch.tensor([[7, 8]])
        sampler.generate(dream, prompt, gen_length=8, steps=steps, noise=SeededNoise(i, ["a"]), on_step=states.append)
        left = [int((s == dream.arch.mask_token_id).sum()) for s in states] + [0]
        return [(step, left[step]) for step in range(steps) if left[step] > left[step + 1]]

    def planned(i):
        return [(c.step, c.masked) for c in sampler.calls(8, None, steps, generator(i))]

    assert (counts_of(generated) - counts_of(planned)).abs().max() < 4 * (2 * 2.5 / draws) ** 0.5  # 2.5 > any variance


def test_open_positions_are_uniform_within_the_block():
    settings = calib("trajectory", gen_length=8, block_length=4, steps=8)
    total = torch.zeros(8)
    for seed in range(400):
        total += masks(settings, LLaDASampler(), 8, 24, seed=seed)[1, -8:]  # second call: 3 of 4 masked
    assert (total[:4] / 400 - 0.75).abs().max() < 0.09
    assert (total[4:] == 400).all()


def test_few_windows_are_spread_over_the_generation():
    settings = calib("trajectory", gen_length=12, block_length=12, steps=12)
    assert masks(settings, LLaDASampler(), 4, 24, seed=0).sum(1).tolist() == [11, 8, 5, 2]


def test_the_prompt_is_visible_and_the_text_stays_where_it_is_not_masked(model):
    batches = calibration_states(model, sampler_of(model), text(), calib("trajectory"), seed=0)
    ids, mask_id = torch.cat([b.ids for b in batches]), model.arch.mask_token_id
    assert torch.equal(ids[:, :12], text()[:, :12])
    assert torch.equal(ids[ids != mask_id], text()[ids != mask_id])
    assert [b.ids.shape for b in batches] == [(1, 24)] * 8
    ratios = torch.cat([b.mask_ratio for b in batches])
    assert torch.equal(ratios, (ids == mask_id).float().mean(1))
    assert 0.2 < ratios.mean() < 0.35  # half of the tokens are the answer, half of those masked on average


# ---- buckets -------------------------------------------------------------------------------------------------

PAPER = [0.3, 0.2, 0.2, 0.3]  # DLLMQuant's


def test_shares_are_rounded_to_windows():
    assert allotted(10, PAPER) == [3, 2, 2, 3]
    assert allotted(128, PAPER) == [38, 26, 26, 38]  # 38.4, 25.6
    assert allotted(3, [0.5, 0.5]) == [2, 1]
    assert allotted(2, [0.2] * 5) == [1, 1, 0, 0, 0]
    assert allotted(0, PAPER) == [0, 0, 0, 0]


def test_buckets_by_hand():
    """An answer of 8 tokens, one per call: two calls in each quarter of the way."""
    settings = calib("trajectory", gen_length=8, block_length=4, steps=8, buckets=PAPER)
    left = masks(settings, LLaDASampler(), 10, 24, seed=0).sum(1)
    assert left.tolist() == [8, 7, 7, 6, 5, 4, 3, 2, 1, 1]
    assert [c.step for c in shown_calls(settings, LLaDASampler(), 10, seed=0)] == [0, 1, 1, 2, 3, 4, 5, 6, 7, 7]
    only_last = calib("trajectory", gen_length=8, block_length=4, steps=8, buckets=[0, 0, 0, 1])
    assert masks(only_last, LLaDASampler(), 4, 24, seed=0).sum(1).tolist() == [2, 2, 1, 1]


def test_equal_buckets_are_no_buckets_where_calls_are_equally_many(llada):
    for plain in (calib("trajectory"), calib("trajectory", rollout=True)):
        pair = (plain, replace(plain, buckets=[0.25] * 4))
        shown = [calibration_states(llada, sampler_of(llada), text(), c, seed=3, progress=False) for c in pair]
        for before, after in zip(*shown, strict=True):
            assert torch.equal(before.ids, after.ids)


def test_every_bucket_has_its_share_of_the_windows(model):
    settings = calib("trajectory", gen_length=16, block_length=8, steps=16, buckets=PAPER)
    left = masks(settings, sampler_of(model), 64, 24, seed=1).sum(1)
    buckets = Counter(((16 - left) * 4 // 16).tolist())
    assert [buckets[i] for i in range(4)] == [19, 13, 13, 19]


def test_buckets_with_guidance_show_both_passes():
    sampler = LLaDASampler(cfg_scale=1.0)
    settings = calib("trajectory", buckets=PAPER)
    blind = masks(settings, sampler, 40, 24, seed=0)[:, :12].all(1)
    assert blind.sum() == 20


# ---- rollouts ------------------------------------------------------------------------------------------------


def test_rollouts_are_states_of_the_generation_that_continues_the_prompt(model):
    sampler, windows = sampler_of(model), text(n=6)
    settings = calib("trajectory", rollout=True)
    batches = calibration_states(model, sampler, windows, settings, seed=2, progress=False)
    shown = shown_calls(settings, sampler, 6, seed=2)
    for i, (batch, call) in enumerate(zip(batches, shown, strict=True)):
        states = []
        sampler.generate(
            model,
            windows[i : i + 1, :12],
            gen_length=12,
            block_length=6 if model.arch.family == "llada" else None,
            steps=12,
            noise=SeededNoise(2, [("calib", i)]),
            on_step=states.append,
        )
        assert torch.equal(batch.ids, states[call.step])
        assert (batch.ids == model.arch.mask_token_id).sum() == 12 - call.start - (call.stop - call.start - call.masked)
    synthesised = calibration_states(model, sampler, windows, replace(settings, rollout=False), seed=2)
    ratios = [torch.cat([b.mask_ratio for b in some]) for some in (batches, synthesised)]
    assert torch.equal(*ratios)


def test_rollouts_stop_at_the_state_they_are_after(llada):
    calls = []
    handle = llada.head.register_forward_hook(lambda *_: calls.append(1))
    rollouts(llada, LLaDASampler(suppress_mask=True), text(n=4), calib("trajectory"), seed=0, progress=False)
    handle.remove()
    assert len(calls) == sum(spread(4, 12))  # not 4 * 12


def test_rollouts_with_guidance_hide_the_prompt(llada):
    sampler = LLaDASampler(cfg_scale=1.0, suppress_mask=True)
    states, _ = rollouts(llada, sampler, text(n=4), calib("trajectory"), seed=0, progress=False)
    blind = [call.blind for call in shown_calls(calib("trajectory"), sampler, 4, seed=0)]
    assert ((states[:, :12] == llada.arch.mask_token_id).all(1)).tolist() == blind
    assert any(blind) or len(set(blind)) == 1


# ---- when tokens are written ---------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"steps": 6}, {"buckets": PAPER}])
def test_times_are_those_of_the_masks(changes, model):
    """A token of a window's answer is masked exactly if it is written at the step of the state or later."""
    settings, sampler = calib("trajectory", **changes), sampler_of(model)
    batches = calibration_states(model, sampler, text(), settings, seed=4, commitments=True)
    shown = shown_calls(settings, sampler, 8, seed=4)
    for batch, call in zip(batches, shown, strict=True):
        assert batch.committed.shape == batch.ids.shape
        assert (batch.committed[:, :12] == -1).all()
        masked = batch.ids[:, 12:] == model.arch.mask_token_id
        assert torch.equal(masked, batch.committed[:, 12:] >= call.step / settings.steps - 1e-6)


def test_times_by_hand():
    """Two blocks of two tokens, three steps each (the third writes nothing): one token in each of two steps."""
    settings = calib("trajectory", gen_length=4, block_length=2, steps=6)
    times = commitment_times(settings, LLaDASampler(), 3, 24, seed=0)
    assert (times[:, :20] == -1).all()
    for row in times:
        assert sorted((row[20:22] * 6).round().tolist()) == [0, 1]
        assert sorted((row[22:24] * 6).round().tolist()) == [3, 4]


def test_times_of_rollouts_are_those_of_the_generation(model):
    sampler, windows, settings = sampler_of(model), text(n=3), calib("trajectory", rollout=True)
    batches = calibration_states(model, sampler, windows, settings, seed=2, progress=False, commitments=True)
    plain = calibration_states(model, sampler, windows, settings, seed=2, progress=False)
    for i, (batch, before) in enumerate(zip(batches, plain, strict=True)):
        assert torch.equal(batch.ids, before.ids)
        assert before.committed is None
        states = []
        block = 6 if model.arch.family == "llada" else None
        noise = SeededNoise(2, [("calib", i)])
        how = {"gen_length": 12, "block_length": block, "steps": 12, "noise": noise, "on_step": states.append}
        answer = sampler.generate(model, windows[i : i + 1, :12], **how).ids
        states = [*(state[0, 12:] for state in states), answer[0]]
        for j, time in enumerate((batch.committed[0, 12:] * 12).round().int().tolist()):
            assert states[time][j] == model.arch.mask_token_id != states[time + 1][j]


@pytest.mark.parametrize("kind", ["clean", "mcs", "random_t"])
def test_other_kinds_have_no_times(kind, llada):
    batches = calibration_states(llada, LLaDASampler(), text(), calib(kind), seed=0, commitments=True)
    assert all(batch.committed is None for batch in batches)


# ---- seeds, text, mask token ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS[1:])
def test_masks_are_a_function_of_seed_and_window(kind):
    first, again, other = (masks(calib(kind), LLaDASampler(), 8, 24, seed=s) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_shows_the_same_text(kind, tiny_checkpoint):
    """Only the masks differ: what is visible is the text of `clean`."""
    lm = dqx.load(str(tiny_checkpoint("llada")), device="cpu")
    overrides = ["calib.text=nano", "calib.samples=5", "calib.length=64"]
    clean, shown = (
        torch.cat([b.ids for b in lm.calibration(resolve(compose([*overrides, f"calib={k}"])).calib, seed=4)])
        for k in ("clean", kind)
    )
    visible = shown != lm.model.arch.mask_token_id
    assert torch.equal(shown[visible], clean[visible])
    assert bool(visible.all()) == (kind == "clean")


def test_the_mask_token_is_the_models(llada):
    arch = replace(llada.arch, mask_token_id=3)
    llada.arch, own = arch, llada.arch
    try:
        batches = calibration_states(llada, LLaDASampler(), text(), calib("mcs"), seed=0)
    finally:
        llada.arch = own
    ids = torch.cat([b.ids for b in batches])
    assert (ids == 3).any()
    assert not (ids == own.mask_token_id).any()


# ---- attention -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_attention_is_bidirectional_while_statistics_are_taken(kind, model):
    """Another last token changes what the first position's linears read, from the first block's `o` on."""
    ids = torch.cat([b.ids for b in calibration_states(model, sampler_of(model), text(n=2), calib(kind), seed=0)])
    other = ids.clone()
    other[:, -1] = (ids[:, -1] + 1) % 80
    streams = [Stream(model, [x]) for x in (ids, other)]
    needs = {site: frozenset({"inputs"}) for site in ("attn_in", "attn_out")}
    with torch.no_grad():
        before, after = (s.collect(model.blocks[0], needs, keep_outputs=True) for s in streams)
        for stream in streams:
            stream.advance(model.blocks[0])
    for row in range(2):
        first = {site: [stats[site]["inputs"][row][0, 0] for stats in (before, after)] for site in needs}
        assert torch.equal(*first["attn_in"])  # no attention has acted yet
        assert not torch.equal(*first["attn_out"])
        assert not torch.equal(streams[0].inputs[row][0, 0], streams[1].inputs[row][0, 0])


# ---- configuration -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["nano_llada", "dream_7b_base"])
def test_every_choice_composes_and_fits_its_windows(kind, name):
    """With each model's own windows, 256 tokens or 2048."""
    config = resolve(compose([f"model={name}", f"calib={kind}"]))
    assert config.calib.masking == kind
    assert masking_problems(config.calib, build(config.model.sampler)) == []
    if kind == "trajectory":
        assert config.calib.steps == config.calib.gen_length == config.calib.length // 2


def test_a_trajectory_follows_the_length_of_the_windows():
    config = resolve(compose(["calib=trajectory", "calib.length=512"])).calib
    assert (config.gen_length, config.block_length, config.steps) == (256, 32, 256)


def test_the_record_tells_the_masking(tmp_path):
    overrides = ["calib=trajectory", "calib.rollout=true", "calib.samples=2", "calib.length=64", "calib.block_length=8"]
    quick = [
        "task=nano_facts",
        "task.limit=1",
        "outliers.samples=1",
        "outliers.steps=2",
        "wandb.mode=disabled",
        f"cache_dir={tmp_path}/c",
    ]
    record = run(resolve(compose([*overrides, *quick])), tmp_path / "run")
    said = json.loads((tmp_path / "run" / "results.json").read_text())["calibration"]
    assert (said["masking"], said["rollout"], said["gen_length"], said["steps"]) == ("trajectory", True, 32, 32)
    assert said["mask_ratio"] == record.mask_ratio == RunFolder(tmp_path / "run").read().mask_ratio == 32 / 128
    assert "trajectory, 25% masked, 2 x 64 tokens" in conditions(record)


def test_rollouts_with_times_are_kept(tmp_path):
    """A run whose tokens are weighed by when they are written, and the same again: the states come from the cache."""
    overrides = ["calib=trajectory", "calib.rollout=true", "calib.samples=2", "calib.length=32", "calib.block_length=8"]
    quick = ["task=nano_facts", "task.limit=1", "outliers.samples=0", "fidelity.samples=0", "wandb.mode=disabled"]
    weights = ["bits=w3a16", "method.token_weight=frontier", f"cache_dir={tmp_path}/c"]
    config = resolve(compose([*overrides, *quick, *weights]))
    first = run(config, tmp_path / "first")
    kept = list((tmp_path / "c" / "calibration").glob("*.safetensors"))
    assert len(kept) == 1
    with safe_open(kept[0], "pt") as file:
        times = torch.cat([file.get_tensor(f"committed.{i}") for i in range(2)])
    assert (times[:, :16] == -1).all()
    assert sorted((times[0, 16:] * 16).round().int().tolist()) == list(range(16))
    again = run(replace(config, bits=replace(config.bits, name="other")), tmp_path / "again")  # quantized once more
    assert first.quantization["linears"] == again.quantization["linears"]


def test_a_sweep_over_the_kinds_has_a_name_for_each():
    names = [run_name(_root_=compose([f"calib={kind}"])) for kind in KINDS]
    assert names == [f"nano_llada-gptq-w3a16{'' if kind == 'clean' else '-' + kind}" for kind in KINDS]


@pytest.mark.parametrize(
    ("settings", "messages"),
    [
        (calib("mcs", visible=1.0), ["calib.visible=1.0 must be the share"]),
        (calib("mcs", visible=None), ["calib.visible=null must be the share"]),
        (calib("mcs", steps=8), ["calib.steps=8 does nothing with calib.masking=mcs; it belongs to calib=trajectory"]),
        (calib("clean", rollout=True), ["calib.rollout=True does nothing with calib.masking=clean"]),
        (calib("trajectory", visible=0.5), ["calib.visible=0.5 does nothing .* belongs to calib=mcs and calib=random"]),
        (calib("trajectory", gen_length=None), ["calib.gen_length is not set; calib=trajectory sets it"]),
        (calib("trajectory", gen_length=24, steps=24), ["calib.gen_length=24 leaves no room .*calib.length=24 tokens"]),
        (
            calib("trajectory", gen_length=30, block_length=7, visible=0.5),
            ["calib.visible=0.5 does nothing", "calib.gen_length=30 leaves no room", "calib.block_length=7 does not d"],
        ),
        (calib("trajectory", steps=13), ["calib.steps=13 cannot be shared equally by 2 blocks.*; 12 or 14 can"]),
        (calib("trajectory", gen_length=0), ["calib.gen_length=0 is not a positive integer"]),
        (calib("mcs", buckets=PAPER), ["calib.buckets=.* does nothing .* it belongs to calib=trajectory"]),
        (calib("trajectory", buckets=[0.5, 0.4]), [r"calib.buckets=\[0.5,0.4\] must be the shares .* sum up to 1"]),
        (calib("trajectory", buckets=[]), [r"calib.buckets=\[\] must be the shares"]),
        (calib("trajectory", buckets=[1.5, -0.5]), ["must be the shares"]),
        (
            calib("trajectory", steps=2, buckets=PAPER),
            ["no call of the sampler leaves 50% to 75% of the answer masked, which is bucket 2; write more steps"],
        ),
        (Calib("masked"), ["calib.masking=masked is unknown; there are clean, mcs"]),
    ],
)
def test_problems_are_told_at_once(settings, messages, llada):
    found = masking_problems(settings, LLaDASampler())
    assert len(found) >= len(messages)
    for message in messages:
        assert any(re.search(message, problem) for problem in found), found
    with pytest.raises(ValueError, match="calib"):
        calibration_states(llada, LLaDASampler(), text(), settings, seed=0)


def test_buckets_need_a_schedule_that_is_not_drawn():
    settings = calib("trajectory", block_length=None, buckets=PAPER)
    assert masking_problems(settings, DreamSampler()) == []
    (problem,) = masking_problems(settings, DreamSampler("origin"))
    assert "drawn anew for every window" in problem
    assert "write model.sampler.alg=entropy, or calib.buckets=null" in problem


def test_buckets_from_the_command_line():
    config = resolve(compose(["model=nano_llada", "calib=trajectory", "calib.buckets=[0.3,0.2,0.2,0.3]"]))
    assert config.calib.buckets == PAPER
    assert masking_problems(config.calib, build(config.model.sampler)) == []


def test_dreams_sampler_takes_no_blocks():
    assert masking_problems(calib("trajectory", block_length=5), DreamSampler()) == []
