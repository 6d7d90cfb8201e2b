"""Frames of an answer as it is written: they add up to the answer, and whoever looks at them changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from goldens import TINY, tiny

import dqx
from dqx.diffusion.block_engine import engine_for
from dqx.diffusion.engine import Answer, Prompt
from dqx.diffusion.frames import Frame
from dqx.diffusion.samplers import DreamSampler, LLaDASampler, Sampler
from dqx.diffusion.samplers.fast_dllm import FastDLLMSampler
from dqx.diffusion.samplers.nemotron import AutoregressiveSampler, NemotronSampler, SpeculativeSampler
from dqx.diffusion.samplers.sdar import SDARSampler
from dqx.models.checkpoint import inspect, load_weights
from dqx.models.transformer import MaskedDiffusionTransformer

MASKS = {"sdar": 151, "fast_dllm": 151}  # of families whose tiny checkpoints name none
IN_BLOCKS = {"gen_length": 8, "block_length": 4, "steps": 6}
CASES: list[tuple[str, Sampler, dict[str, int]]] = [
    ("llada", LLaDASampler(), IN_BLOCKS),
    ("llada", LLaDASampler("random", 0.8), IN_BLOCKS),
    ("llada", LLaDASampler(temperature=0.5, cfg_scale=0.5, suppress_eos_logits=True), IN_BLOCKS),
    ("llada", LLaDASampler(threshold=0.01, cache="dual"), IN_BLOCKS),
    ("dream", LLaDASampler(cache="prefix", suppress_mask=True), IN_BLOCKS),
    ("dream", DreamSampler("origin", temperature=0.7), {"gen_length": 8, "steps": 9}),
    ("dream", DreamSampler("entropy", alg_temp=0.5, top_p=0.9), {"gen_length": 8, "steps": 9}),
    ("sdar", SDARSampler(block=4, threshold=0.02), {"gen_length": 10, "steps": 12}),
    ("sdar", SDARSampler(block=4, remasking="entropy_bound", temperature=0.9), {"gen_length": 10, "steps": 12}),
    ("nemotron", NemotronSampler(block=4, threshold=None), {"gen_length": 12, "steps": 6}),
    ("nemotron", NemotronSampler(block=4, causal_context=False), {"gen_length": 12, "steps": 12}),
    ("nemotron", AutoregressiveSampler(), {"gen_length": 9, "steps": 9}),
    ("nemotron", SpeculativeSampler(block=4), {"gen_length": 9, "steps": 9}),
    ("fast_dllm", FastDLLMSampler(block=8, sub_block=4, threshold=0.02), {"gen_length": 12, "steps": 12}),
    ("fast_dllm", FastDLLMSampler(block=8, sub_block=4, block_cache=True), {"gen_length": 12, "steps": 12}),
]


def model_of(family: str) -> MaskedDiffusionTransformer:
    if family not in TINY:
        return tiny(family, torch.float64)
    checkpoint = inspect(str(TINY[family]), mask_token_id=MASKS.get(family))
    return load_weights(checkpoint, dtype=torch.float64).eval()


def prompts(lengths: tuple[int, ...] = (5, 1, 9, 14)) -> list[Prompt]:
    draw = torch.Generator().manual_seed(0)
    return [Prompt(torch.randint(0, 100, (n,), generator=draw).tolist(), ("task", i)) for i, n in enumerate(lengths)]


def watched(
    model: MaskedDiffusionTransformer, sampler: Sampler, schedule: dict[str, int], batch_size: int = 2, **more: Any
) -> tuple[list[Answer], list[list[Frame]]]:
    """The answers, and the frames of each."""
    frames: list[list[Frame]] = [[] for _ in prompts()]
    engine = engine_for(sampler)(
        model, sampler, batch_size=batch_size, on_frame=lambda frame: frames[frame.index].append(frame), **schedule
    )
    return engine.generate(prompts()), frames


@pytest.mark.parametrize(("family", "sampler", "schedule"), CASES, ids=str)
def test_frames_add_up_to_the_answer_that_is_written_without_them(family, sampler, schedule) -> None:
    model = model_of(family)
    mask, length = model.arch.mask_token_id, schedule["gen_length"]
    answers, frames = watched(model, sampler, schedule)
    assert answers == engine_for(sampler)(model, sampler, batch_size=2, **schedule).generate(prompts())
    for answer, own in zip(answers, frames, strict=True):
        assert own[-1].ids[: len(answer.ids)] == answer.ids
        assert own[-1].ids[len(answer.ids) :][:1] in ([], [mask])  # a block sampler's answer ends at the first mask
        assert own[-1].forwards == answer.n_forwards
        before, forwards = [mask] * length, 0
        for frame in own:
            changed = [i for i in range(length) if frame.ids[i] != before[i]]
            assert sorted(frame.committed + frame.remasked) == changed
            assert all(frame.ids[i] != mask for i in frame.committed)
            assert all(frame.ids[i] == mask and frame.probability[i] is None for i in frame.remasked)
            assert all(0 < (frame.probability[i] or 0) <= 1 for i in frame.committed)
            assert frame.forwards > forwards
            before, forwards = frame.ids, frame.forwards
        written = [i for frame in own for i in frame.committed]
        assert len(written) == len(set(written))
        last = own[-1].ids
        assert {i for i in range(length) if last[i] != mask} <= set(written)


@pytest.mark.parametrize(("family", "sampler", "schedule"), CASES[:3] + CASES[5:7], ids=str)
def test_the_probability_is_that_of_the_model_where_the_token_was_written(family, sampler, schedule) -> None:
    """Whatever temperature, guidance aside, filters and order made of it: of one forward of the frame before."""
    model, (prompt, *_) = model_of(family), prompts()
    mask = model.arch.mask_token_id
    _, (frames, *_) = watched(model, sampler, schedule)
    answer = [mask] * schedule["gen_length"]
    for frame in frames:
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt.ids, *answer]]))
            if sampler.cfg_scale:
                without = model(torch.tensor([[mask] * len(prompt.ids) + answer]))
                logits = without + (sampler.cfg_scale + 1) * (logits - without)
        given = logits.softmax(-1)[0, len(prompt.ids) :]
        assert frame.committed
        for i in frame.committed:
            assert frame.probability[i] == pytest.approx(float(given[i, frame.ids[i]]), rel=1e-10)
        answer = frame.ids


def test_frames_name_the_block_and_the_step() -> None:
    _, (frames, *_) = watched(model_of("llada"), LLaDASampler(), IN_BLOCKS)
    assert [frame.step for frame in frames] == list(range(6))
    assert [frame.block for frame in frames] == [(0, 4)] * 3 + [(4, 8)] * 3
    assert [len(frame.committed) for frame in frames] == [2, 1, 1] * 2
    _, (frames, *_) = watched(model_of("dream"), DreamSampler(), {"gen_length": 8, "steps": 4})
    assert {frame.block for frame in frames} == {(0, 8)}
    sampler = SDARSampler(block=4, remasking="sequential")
    _, (frames, *_) = watched(model_of("sdar"), sampler, {"gen_length": 10, "steps": 12})
    assert frames[0].block == (0, 0)  # the first of the prompt's 5 tokens are a block of their own
    assert list(dict.fromkeys(frame.block for frame in frames[1:])) == [(0, 3), (3, 7), (7, 10)]
    assert all(first <= i < stop for frame in frames for first, stop in [frame.block] for i in frame.committed)


def test_a_token_that_the_sampler_itself_writes_has_no_probability() -> None:
    sampler = NemotronSampler(block=4, max_thinking_tokens=6, end_think_token_id=7)
    model = model_of("nemotron")
    _, frames = watched(model, sampler, {"gen_length": 12, "steps": 12})
    for own in frames:
        pairs = list(zip(own[-1].ids, own[-1].probability, strict=True))
        assert [i for i, (token, p) in enumerate(pairs) if p is None and token != model.arch.mask_token_id] == [6]
        assert own[-1].ids[6] == 7


def test_what_is_given_up_for_memory_is_masked_again() -> None:
    """With a cache, rows begin their block again: the same tokens, written a second time."""
    model, sampler = model_of("llada"), LLaDASampler(cache="dual")
    expected, plain = watched(model, sampler, IN_BLOCKS)
    whole, calls = model.logits_where, []

    def shrinking(ids, *rest):
        calls.append(len(ids))
        if len(calls) > 2 and len(ids) > 1:
            raise torch.OutOfMemoryError
        return whole(ids, *rest)

    model.logits_where = shrinking
    answers, frames = watched(model, sampler, IN_BLOCKS)
    assert [answer.ids for answer in answers] == [answer.ids for answer in expected]
    assert any(frame.remasked for own in frames for frame in own)
    assert not any(frame.remasked for own in plain for frame in own)
    assert [own[-1].ids for own in frames] == [own[-1].ids for own in plain]


def test_frames_of_several_texts_from_python() -> None:
    lm = dqx.load("nano_block", device="cpu")
    texts = ["Question: 5-4+2+4+2-6+6=?\nAnswer:", "def convert(xs):\n"]
    frames: list[Frame] = []
    written = lm.generate(texts, gen_length=16, on_frame=frames.append)
    assert written == lm.generate(texts, gen_length=16)
    last = {frame.index: frame.ids for frame in frames}
    assert [lm.tokenizer.decode(last[i], skip_special_tokens=True) for i in range(2)] == written
