"""Memory that ends where it really does: work goes on with less at a time, or stops with what to change."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import Batch
from torch import Tensor

from dqx.diagnostics.activations import measure_activations
from dqx.diagnostics.fidelity import predict, questions, to_tensors
from dqx.diffusion.engine import Answer, Engine, Prompt, Row
from dqx.diffusion.likelihood import log_likelihood
from dqx.diffusion.rollout import TOGETHER, Rollout, write
from dqx.diffusion.samplers import LLaDASampler
from dqx.diffusion.scorer import Scorer
from dqx.diffusion.stopping import Question
from dqx.models.transformer import MaskedDiffusionTransformer
from pretend.device import State
from pretend.test_diffusion import PROMPTS, SAMPLERS, SCORED, ids, on, requests, schedule

families = pytest.mark.parametrize("family", ["llada", "dream"])


def taken_by(state: State, work: Callable[[], Any]) -> int:
    """The bytes that work takes at most, besides what is there already."""
    gc.collect()
    state.peak = before = state.taken
    work()
    return state.peak - before


def limited(state: State, size: float) -> int:
    """Let so many bytes be taken besides what is there already; gives the latter."""
    gc.collect()
    state.limit = state.taken + size
    return state.taken


@pytest.mark.parametrize("family", ["dream"])
@pytest.mark.parametrize("name", ["guidance", "dual cache and threshold", "entropy"])
def test_answers_where_one_sequence_fits(name: str, family: str, pretend: State) -> None:
    """Whatever memory there is, from what one sequence takes alone: the same answers, and nothing is left behind."""
    sampler = SAMPLERS[name]
    model, expected = on("pretend", family), on("cpu", family)
    answers = Engine(expected, sampler, seed=4, **schedule(sampler)).generate(PROMPTS)

    def engine(size: int) -> Engine:
        return Engine(model, sampler, seed=4, batch_size=size, **schedule(sampler))

    alone, together = (taken_by(pretend, lambda n=n: engine(n).generate(PROMPTS)) for n in (1, 5))
    assert together > 2 * alone
    for size in (alone, (alone + together) / 2):
        before = limited(pretend, size)
        ours = engine(5)
        assert ours.generate(PROMPTS) == answers
        assert ours.notes[0].startswith("out of memory with ")
        del ours
        gc.collect()
        assert pretend.taken == before


@pytest.mark.parametrize("family", ["llada"])
@pytest.mark.parametrize("step", [2, 4, 6])
@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_memory_that_becomes_short_in_the_middle_of_a_block(
    cache: str, step: int, family: str, pretend: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a step on there is what one sequence takes, while the keys and values of eight are kept."""
    sampler, how = LLaDASampler(cache=cache), {"gen_length": 8, "block_length": 4, "steps": 8}
    model, take = on("pretend", family), Engine._step
    asked = [Prompt(ids(30, i), ("task", i)) for i in range(8)]
    answers: list[Answer] = []
    alone = taken_by(pretend, lambda: answers.extend(Engine(model, sampler, batch_size=1, **how).generate(asked)))
    before = limited(pretend, 10**8)
    steps = []

    def squeezed(engine: Engine, rows: list[Row]) -> bool:
        steps.append(len(rows))
        if len(steps) == step:
            pretend.limit = before + alone
        return take(engine, rows)

    monkeypatch.setattr(Engine, "_step", squeezed)
    assert Engine(model, sampler, batch_size=8, **how).generate(asked) == answers
    assert steps[:step] == [8] * step


@families
@pytest.mark.parametrize("how", [SCORED["guidance"], SCORED["adaptive"]], ids=["guidance", "adaptive"])
def test_likelihoods_where_one_sequence_fits(how: dict[str, Any], family: str, pretend: State) -> None:
    model, asked = on("pretend", family), requests()
    groups = [Question(list(range(i, i + 4)), [1.0] * 4) for i in range(0, 12, 4)]

    def scorer(tokens: int) -> Scorer:
        return Scorer(model, seed=1, batch_tokens=tokens, **how)

    expected = scorer(1).score(asked, groups)
    alone, together = (taken_by(pretend, lambda n=n: scorer(n).score(asked, groups)) for n in (1, 400))
    for size in (alone, (alone + together) / 2):
        before = limited(pretend, size)
        ours = scorer(400)
        assert ours.score(asked, groups) == pytest.approx(expected, rel=1e-5)
        assert ours.notes == ["likelihood batches were made smaller because the GPU's memory was full"]
        del ours
        gc.collect()
        assert pretend.taken == before


TOKENS = torch.randint(0, 38, (6, 16), generator=torch.Generator().manual_seed(0))


def answers_of(model: MaskedDiffusionTransformer, together: int = TOGETHER) -> Rollout:
    """What a model writes after the first halves of six windows, by a sampler that keeps keys and values."""
    sampler = LLaDASampler(cache="dual")
    return write(model, sampler, TOKENS[:, :8], gen_length=8, steps=4, seed=1, together=together)


def predictions_of(model: MaskedDiffusionTransformer) -> dict[str, Tensor]:
    rollout = answers_of(on("cpu", model.arch.family))
    asked = questions(TOKENS, rollout.states(2), rollout.mask_token_id)
    return to_tensors(predict(model, LLaDASampler(cfg_scale=0.5), asked, steps=4))


def likelihood_of(model: MaskedDiffusionTransformer) -> float:
    return log_likelihood(model, ids(9, 1), ids(6, 2), samples=8, seed=0).value


WINDOWS = {
    "answers": lambda model: answers_of(model).ids.tolist(),
    "predictions": lambda model: {name: tensor.tolist() for name, tensor in predictions_of(model).items()},
    "a likelihood": likelihood_of,
}


@pytest.mark.parametrize("family", ["dream"])
@pytest.mark.parametrize("measure", WINDOWS.values(), ids=WINDOWS)
def test_windows_that_run_together(measure: Callable[[Any], Any], family: str, pretend: State) -> None:
    """Six windows of text, or eight draws: less and less memory gives the same, until one alone does not fit."""
    model, expected = on("pretend", family), measure(on("cpu", family))
    size = taken_by(pretend, lambda: measure(model))
    tried = 0
    while True:
        size *= 0.7
        before = limited(pretend, size)
        try:
            found = measure(model)
        except torch.OutOfMemoryError:
            break
        assert close(found, expected)
        assert pretend.taken == before
        tried += 1
    assert tried >= 2


@pytest.mark.parametrize("family", ["dream"])
@pytest.mark.parametrize("call", [3, 4])  # of attention: after the two of the text come those of the first state
def test_outliers_of_windows_that_did_not_fit_are_counted_once(call: int, family: str, pretend: State) -> None:
    """In the second block the first one's have been counted already."""

    def measured(device: str) -> dict[str, Any]:
        states = answers_of(on("cpu", family)).states(2)
        return measure_activations(on(device, family), [Batch(TOKENS[:1])], states=states).to_dict()

    pretend.failing["scaled_dot_product_attention"] = call
    assert close(measured("pretend"), measured("cpu"))
    assert not pretend.failing


def close(found: Any, expected: Any) -> bool:
    """Equal but for rounding."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(close(found[key], value) for key, value in expected.items())
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(map(close, found, expected))
    return found == pytest.approx(expected, rel=1e-4, abs=1e-5) if isinstance(expected, float) else found == expected
