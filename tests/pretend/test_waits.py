"""How often the host waits for the device: once a denoising step, once a batch of likelihoods."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from dqx.diffusion import SeededNoise
from dqx.diffusion.engine import Engine
from dqx.diffusion.samplers import DreamSampler, LLaDASampler, Sampler
from dqx.diffusion.scorer import Scorer
from pretend.device import State
from pretend.test_diffusion import PROMPTS, SAMPLERS, on, requests, schedule


@contextmanager
def counted(state: State) -> Iterator[list[int]]:
    """How often the host waited inside."""
    before, found = sum(state.waits.values()), []
    yield found
    found.append(sum(state.waits.values()) - before)


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_a_step_of_the_engine_waits_once(sampler: Sampler, pretend: State, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows are in it, and where rows that reuse keys and values go through the model by themselves."""
    steps = []
    take = Engine._step

    def step(self: Engine, batch: list) -> bool:
        with counted(pretend) as waits:
            done = take(self, batch)
        steps.append((len(batch), *waits))
        return done

    monkeypatch.setattr(Engine, "_step", step)
    engine = Engine(on("pretend", "llada"), sampler, batch_size=3, **schedule(sampler))
    with counted(pretend) as waits:
        engine.generate(PROMPTS)
    assert {waited for _, waited in steps} == {1}
    assert {rows for rows, _ in steps} == {2, 3}
    assert waits == [len(steps)]  # and nothing between steps


def test_a_batch_of_likelihoods_waits_once(pretend: State, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = Scorer(on("pretend", "dream"), samples=6, seed=1, batch_tokens=100)
    forwards = []
    whole = scorer.model.logits_where
    monkeypatch.setattr(scorer.model, "logits_where", lambda *args: forwards.append(1) or whole(*args))
    with counted(pretend) as waits:
        scorer.score(requests())
    assert waits == [len(forwards)]
    assert len(forwards) > 3


@pytest.mark.parametrize(
    ("sampler", "waits"),
    [
        (LLaDASampler(), 3),  # how many masks a row has, where they are, NaN
        (LLaDASampler(temperature=0.8), 4),  # where noise is wanted
        (DreamSampler(), 3),
        (DreamSampler("entropy", alg_temp=0.5, temperature=0.3), 5),
    ],
    ids=str,
)
def test_a_step_of_the_plain_loop(sampler: Sampler, waits: int, pretend: State) -> None:
    """It keeps all on the device, and is the reference, not what evaluates."""
    prompt, how = torch.tensor([[1, 39, 3], [7, 5, 3]]), {"gen_length": 4, "steps": 1}
    noise = SeededNoise(0, ["a", "b"])
    model = on("pretend", "llada")
    with counted(pretend) as waited:
        out = sampler.generate(model, prompt, noise=noise, **how)
    assert out.n_forwards == len(prompt)
    assert waited == [waits]
