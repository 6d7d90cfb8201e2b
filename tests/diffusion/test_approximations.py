"""Samplers that reuse keys and values or write what they are sure of: against slow loops that know no cache."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import test_methods_identities as identities
import torch
from torch import Tensor

from dqx.config.compose import build, compose, resolve, run_name
from dqx.diffusion import SeededNoise
from dqx.diffusion.engine import Engine, Prompt, cache_bytes, row_bytes
from dqx.diffusion.samplers import DreamSampler, LLaDASampler
from dqx.diffusion.samplers.llada import share
from dqx.models.checkpoint import inspect, load_weights
from dqx.models.transformer import MaskedDiffusionTransformer, shift_logits
from dqx.record.folder import RunFolder
from dqx.study.experiment import problems
from dqx.study.run import run

GOLDEN = Path(__file__).parents[1] / "golden"
FAMILIES = ("llada", "dream")
LENGTHS = (5, 1, 9, 5, 14, 2, 7)
SCHEDULE = {"gen_length": 12, "block_length": 4, "steps": 12}
COARSE = {"gen_length": 12, "block_length": 6, "steps": 6}
SURE = 0.2  # of the random models' predictions about half are that sure


@dataclass
class Written:
    """An answer [G], the sequences that went through the model for it, and the tokens computed."""

    ids: list[int]
    n_forwards: int = 0
    n_tokens: int = 0


@pytest.fixture(scope="module")
def models() -> dict[str, MaskedDiffusionTransformer]:
    """Random models in float64: no two confidences are so close that rounding could swap them."""
    return {f: load_weights(inspect(str(GOLDEN / f"{f}_tiny")), dtype=torch.float64) for f in FAMILIES}


def prompts(lengths: tuple[int, ...] = LENGTHS) -> list[Prompt]:
    draw = torch.Generator().manual_seed(0)
    return [Prompt(torch.randint(0, 200, (n,), generator=draw).tolist(), ("task", i)) for i, n in enumerate(lengths)]


@torch.no_grad()
def logits_of(
    model: MaskedDiffusionTransformer, ids: Tensor, old: list[Tensor] | None, computed: range
) -> tuple[Tensor, list[Tensor]]:
    """Logits [T, V] and each block's input, the `old` one at all columns but those computed."""
    rope, _ = model.context(ids[None])
    x, inputs = model.embed(ids[None]), []
    for i, block in enumerate(model.blocks):
        if old is not None:
            x = torch.cat(
                (old[i][:, : computed.start], x[:, computed.start : computed.stop], old[i][:, computed.stop :]), 1
            )
        inputs.append(x)
        x = block(x, rope)
    logits = model.head(model.norm(x))
    return (shift_logits(logits) if model.arch.logit_shift else logits)[0], inputs


def slowly(
    model: MaskedDiffusionTransformer,
    prompt: Prompt,
    cache: str | None,
    threshold: float | None,
    *,
    gen_length: int,
    block_length: int,
    steps: int,
) -> Written:
    """What Fast-dLLM's algorithm writes, by a loop over whole sequences."""
    mask, begin = model.arch.mask_token_id, len(prompt.ids)
    ids = torch.tensor([*prompt.ids, *[mask] * gen_length])
    out = Written([])
    per_block = steps // (gen_length // block_length)
    for first in range(begin, len(ids), block_length):
        last = first + block_length
        whole = range(len(ids))
        after = range(first - model.arch.logit_shift, last if cache == "dual" else len(ids))
        old: list[Tensor] | None = None
        for i in range(per_block):
            places = [column for column in range(first, last) if ids[column] == mask]
            if not places or not share(block_length, per_block, i):
                continue
            computed = whole if old is None else after
            logits, inputs = logits_of(model, ids, old, computed)
            old = inputs if cache and old is None else old
            confidence, tokens = logits[places].softmax(-1).max(-1)
            order = confidence.argsort(descending=True, stable=True).tolist()
            for rank, place in enumerate(order):
                if rank < share(block_length, per_block, i) or (threshold and confidence[place] >= threshold):
                    ids[places[place]] = tokens[place]
            out.n_forwards += 1
            out.n_tokens += len(computed)
    out.ids = ids[begin:].tolist()
    return out


def alone(model: MaskedDiffusionTransformer, sampler: LLaDASampler, prompt: Prompt, **schedule: int) -> Written:
    """The plain sampler."""
    out = sampler.generate(model, torch.tensor([prompt.ids]), noise=SeededNoise(0, [prompt.document]), **schedule)
    return Written(out.ids[0].tolist(), out.n_forwards, out.n_tokens)


def together(
    model: MaskedDiffusionTransformer, sampler: LLaDASampler, asked: list[Prompt], size: int, **schedule: int
) -> list[Written]:
    """In batches."""
    answers = Engine(model, sampler, batch_size=size, **schedule).generate(asked)
    return [Written(answer.ids, answer.n_forwards, answer.n_tokens) for answer in answers]


@pytest.mark.parametrize("threshold", [None, SURE])
@pytest.mark.parametrize("cache", [None, "prefix", "dual"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_batch_size_and_order_writes_what_the_slow_loop_writes(
    models, family: str, cache: str | None, threshold: float | None
) -> None:
    model, asked = models[family], prompts()
    sampler = LLaDASampler(threshold=threshold, cache=cache)
    for schedule, sizes in ((SCHEDULE, (1, 3, 16)), (COARSE, (2, 7))):
        expected = [slowly(model, prompt, cache, threshold, **schedule) for prompt in asked]
        assert [alone(model, sampler, prompt, **schedule) for prompt in asked] == expected
        for turn, size in enumerate(sizes):
            order = [(i * 3 + turn) % len(asked) for i in range(len(asked))]
            assert together(model, sampler, [asked[i] for i in order], size, **schedule) == [expected[i] for i in order]
        if threshold:  # rows of a batch come to be at different blocks
            assert len({written.n_forwards for written in expected}) > 1
    if cache or threshold:
        exact = [alone(model, LLaDASampler(), prompt, **COARSE) for prompt in asked]
        assert [written.ids for written in expected] != [written.ids for written in exact]
        assert sum(written.n_tokens for written in expected) < 0.75 * sum(written.n_tokens for written in exact)


# ---- where nothing is approximate ----------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("schedule", [SCHEDULE | {"block_length": 1}, SCHEDULE | {"steps": 3}], ids=["tokens", "steps"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_of_one_step_reuses_nothing(models, family: str, cache: str, schedule: dict[str, int]) -> None:
    model, asked = models[family], prompts()
    expected = [alone(model, LLaDASampler(), prompt, **schedule) for prompt in asked]
    assert together(model, LLaDASampler(cache=cache), asked, 3, **schedule) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_a_threshold_that_nothing_reaches_writes_what_is_due(models, family: str) -> None:
    model, asked = models[family], prompts()
    for sampler, schedule in ((LLaDASampler(temperature=0.7), COARSE), (LLaDASampler(cache="dual"), SCHEDULE)):
        expected = [alone(model, sampler, prompt, **schedule) for prompt in asked]
        assert together(model, replace(sampler, threshold=1.0), asked, 4, **schedule) == expected


def test_a_threshold_that_all_reach_writes_a_block_at_a_time(models) -> None:
    for prompt in prompts():
        one_step = alone(models["llada"], LLaDASampler(), prompt, **SCHEDULE | {"steps": 3})
        assert alone(models["llada"], LLaDASampler(threshold=1e-9), prompt, **SCHEDULE) == one_step


@pytest.mark.parametrize("family", FAMILIES)
def test_a_window_of_all_columns_is_the_whole_forward(models, family: str) -> None:
    model = models[family]
    ids = torch.randint(0, 200, (3, 9), generator=torch.Generator().manual_seed(0))
    real = torch.arange(9) >= torch.tensor([0, 2, 5])[:, None]
    where = real & (torch.arange(9) > 6)
    expected = model.logits_where(ids, where, real)
    cache = model.empty_cache(3, 9)
    torch.testing.assert_close(model.logits_where(ids, where, real, cache), expected, atol=0, rtol=0)
    kept = cache.store.clone()
    for first in ([6, 6, 6], [0, 2, 5], [6, 3, 5]):  # narrower ones are padded
        found = model.logits_where(ids, where, real, cache.window(first, 9))
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
        torch.testing.assert_close(cache.store, kept, atol=1e-12, rtol=0)


# ---- in batches ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampler",
    [
        LLaDASampler(temperature=0.7, threshold=SURE),
        LLaDASampler(temperature=0.7, threshold=SURE, cache="prefix", suppress_eos_confidence=True),
        LLaDASampler("random", 0.7, cache="dual"),
        LLaDASampler(cfg_scale=0.5, threshold=SURE),
    ],
    ids=lambda sampler: sampler.name,
)
@pytest.mark.parametrize("family", FAMILIES)
def test_noise_and_guidance(models, family: str, sampler: LLaDASampler) -> None:
    model, asked = models[family], prompts()
    expected = [alone(model, sampler, prompt, **SCHEDULE) for prompt in asked]
    for size in (2, 5):
        assert together(model, sampler, asked[::-1], size, **SCHEDULE) == expected[::-1]


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("most", [3, 1])
def test_rows_that_do_not_fit_begin_their_block_again(models, cache: str, most: int) -> None:
    """Memory runs out in the middle of blocks, in either of a step's two forwards."""
    model, asked = models["dream"], prompts()
    sampler = LLaDASampler(threshold=SURE, cache=cache)
    expected = [alone(model, sampler, prompt, **SCHEDULE) for prompt in asked]
    whole = model.logits_where
    for begin in (2, 5, 6, 9):
        calls: list[int] = []

        def shrinking(ids, *rest, begin=begin, calls=calls):
            calls.append(len(ids))
            if len(calls) > begin and len(ids) > most:
                raise torch.OutOfMemoryError
            return whole(ids, *rest)

        model.logits_where = shrinking
        try:
            engine = Engine(model, sampler, batch_size=7, **SCHEDULE)
            answers = engine.generate(asked)
        finally:
            del model.logits_where
        assert [Written(a.ids, a.n_forwards, a.n_tokens) for a in answers] == expected
        assert engine.notes


def test_a_settled_row_stops(models) -> None:
    model, sampler = models["llada"], LLaDASampler(threshold=SURE, cache="dual")
    expected = [alone(model, sampler, prompt, **SCHEDULE) for prompt in prompts()]
    ends = {written.ids[4] for written in expected[:4]}
    engine = Engine(model, sampler, settled=lambda ids: not ends.isdisjoint(ids), batch_size=3, **SCHEDULE)
    answers = engine.generate(prompts())
    for answer, written in zip(answers, expected, strict=True):
        assert answer.ids == written.ids[: len(answer.ids)]
        assert len(answer.ids) == 12 or not ends.isdisjoint(answer.ids)
        assert answer.n_forwards + answer.n_saved >= written.n_forwards
    assert sum(answer.n_saved for answer in answers) > 0


def test_a_model_that_predicts_masks() -> None:
    """What a block leaves masked stays: with a cache nobody looks there again."""
    model = load_weights(inspect(str(GOLDEN / "llada_tiny")), dtype=torch.float64)
    with torch.no_grad():
        model.head.weight[model.arch.mask_token_id] *= 3
    sampler = LLaDASampler(threshold=SURE, cache="prefix")
    expected = [alone(model, sampler, prompt, **SCHEDULE) for prompt in prompts()]
    assert together(model, sampler, prompts(), 3, **SCHEDULE) == expected
    assert any(model.arch.mask_token_id in written.ids for written in expected)


def test_memory_of_the_cache_bounds_the_batch(models) -> None:
    model = models["llada"]
    engine = Engine(model, LLaDASampler(cache="dual"), **SCHEDULE)
    rows = [engine.begin(i, prompt) for i, prompt in enumerate(prompts())]
    one = row_bytes(model.arch, 26, 4) + cache_bytes(model.arch, 26, 8)
    assert model.empty_cache(1, 26).store.nbytes * 2 == cache_bytes(model.arch, 26, 8)
    assert [engine.room(rows, free) for free in (0.0, one, 4 * one, float("inf"))] == [1, 1, 3, 512 // 4]


# ---- with quantization ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "bits"),
    [("gptq", "w3a16"), ("smoothquant", "w8a8"), ("quarot", "w4a4"), ("duquant", "w4a4"), ("rtn", "nvfp4")],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_models(family: str, method: str, bits: str) -> None:
    """Rounded inputs, keys and values, rotations, low-bit weights: all of them act on each token by itself."""
    model = identities.fresh(family, torch.float64)
    identities.run(model, identities.built(method, family), identities.bits_of(method, family, bits))
    asked = [Prompt([token % 62 for token in prompt.ids], prompt.document) for prompt in prompts((5, 1, 9))]
    cache = "dual" if family == "llada" else "prefix"
    expected = [slowly(model, prompt, cache, 0.5, **SCHEDULE) for prompt in asked]
    assert together(model, LLaDASampler(threshold=0.5, cache=cache), asked, 2, **SCHEDULE) == expected


# ---- as a setting --------------------------------------------------------------------------------------------


def test_names() -> None:
    assert LLaDASampler().name == "low_confidence"
    assert LLaDASampler("random", cache="prefix").name == "random+prefix_cache"
    assert LLaDASampler(threshold=0.9, cache="dual").name == "low_confidence+threshold0.9+dual_cache"
    assert LLaDASampler().approximations == DreamSampler().approximations == ()
    assert DreamSampler("maskgit_plus").name == "maskgit_plus"


def test_what_cannot_work_is_told_before_weights_load() -> None:
    def told(*overrides: str) -> list[str]:
        return problems(resolve(compose(["task=nano_sums", *(f"model.sampler.{o}" for o in overrides)])))

    assert told() == told("threshold=0.9", "cache=dual") == told("threshold=1", "cfg_scale=0.5") == []
    assert told("threshold=0") == ["model.sampler.threshold=0 is not a number above 0 and at most 1"]
    assert told("threshold=high") == ["model.sampler.threshold='high' is not of type float or null"]
    assert told("cache=both") == ["model.sampler.cache='both' is not one of prefix, dual"]
    random, guided = told("threshold=0.9", "remasking=random", "cache=prefix", "cfg_scale=0.5")
    assert "threshold=0.9 has no meaning with sampler.remasking=random" in random
    assert "cache='prefix' cannot be used with sampler.cfg_scale=0.5" in guided


@pytest.mark.parametrize("model", ["nano_llada", "nano_dream"])
def test_a_model_takes_either_sampler(model: str) -> None:
    block = resolve(compose([f"model={model}", "model.sampler=llada", "model.sampler.cache=dual"]))
    assert build(block.model.sampler) == LLaDASampler(cache="dual")
    assert build(resolve(compose([f"model={model}", "model.sampler=dream"])).model.sampler) == DreamSampler(top_p=0.95)
    assert run_name(_root_=compose([f"model={model}"])) == f"{model}-gptq-w3a16"
    swept = compose([f"model={model}", "model.sampler=llada", "model.sampler.threshold=0.9", "steps=64"])
    assert run_name(_root_=swept) == f"{model}-gptq-w3a16-threshold0.9-64steps"


def test_calls_say_what_is_computed() -> None:
    """For plans: the first call of a block computes all, the others a window."""
    sampler, random = LLaDASampler(cache="dual"), torch.Generator()
    assert [call.window for call in sampler.calls(4, 2, 4, random)] == [None, (0, 2), None, (2, 4)]
    assert [call.window for call in replace(sampler, cache="prefix").calls(4, 2, 4, random)] == [
        None,
        (0, 4),
        None,
        (2, 4),
    ]
    assert [call.window for call in LLaDASampler(threshold=0.9).calls(4, 2, 4, random)] == [None] * 4


def test_the_record_says_that_answers_are_approximate(tmp_path, capsys) -> None:
    small = ["method=fp16", "task=nano_sums", "task.limit=2", "fidelity.samples=0", "outliers.samples=0"]
    config = [*small, "wandb.mode=disabled", f"cache_dir={tmp_path / 'cache'}"]
    approximate = ["model.sampler.threshold=0.9", "model.sampler.cache=dual"]
    exact, fast = (
        run(resolve(compose([*config, *more])), tmp_path / name)
        for name, more in (("exact", []), ("fast", approximate))
    )
    assert (exact.model["sampler"], exact.settings.approximations) == ("low_confidence", ())
    assert (fast.model["sampler"], fast.settings.approximations) == (
        "low_confidence+threshold0.9+dual_cache",
        ("threshold0.9", "dual_cache"),
    )
    assert fast.sources["full_precision"] == {"nano_sums": "computed"}  # exact results are not reused
    before, after = exact.quantized["nano_sums"], fast.quantized["nano_sums"]
    assert (before.notes, after.notes) == (
        [],
        ["approximate: answers written by low_confidence+threshold0.9+dual_cache"],
    )
    assert before.n_forwards > after.n_forwards > 0
    assert after.n_tokens / after.n_forwards < before.n_tokens / before.n_forwards
    assert RunFolder(tmp_path / "fast").read().results() == fast.results()
    assert "approximate: threshold0.9, dual_cache" in capsys.readouterr().out
