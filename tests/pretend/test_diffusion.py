"""Answers and likelihoods on the pretend device: the CPU's tokens and numbers, by every sampler and way to score."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import PLAIN, TOY, random_model

from dqx.diffusion import SeededNoise
from dqx.diffusion.batches import Request
from dqx.diffusion.engine import Engine, Prompt
from dqx.diffusion.likelihood import greedy_matches, log_likelihood
from dqx.diffusion.samplers import DreamSampler, LLaDASampler, Sampler
from dqx.diffusion.scorer import Scorer
from dqx.diffusion.stopping import Question
from dqx.models.transformer import MaskedDiffusionTransformer

SMALL = {"vocab_size": 40, "hidden_size": 32, "mlp_size": 48, "n_blocks": 2, "mask_token_id": 39}
ARCHS = {
    "llada": replace(PLAIN, **SMALL, eos_token_id=0),
    "dream": replace(TOY, **SMALL, eos_token_id=38),
}
SURE = 0.1  # some of the random models' predictions are that sure

SAMPLERS: dict[str, Sampler] = {
    "llada": LLaDASampler(),
    "warm": LLaDASampler(temperature=0.8, suppress_eos_logits=True),
    "random order": LLaDASampler("random", 0.8, suppress_eos_confidence=True),
    "guidance": LLaDASampler(temperature=0.5, cfg_scale=1.5, suppress_mask=True),
    "threshold": LLaDASampler(threshold=SURE),
    "threshold and guidance": LLaDASampler(threshold=SURE, cfg_scale=0.5),
    "prefix cache": LLaDASampler(cache="prefix"),
    "dual cache, warm": LLaDASampler(cache="dual", temperature=0.5),
    "dual cache and threshold": LLaDASampler(cache="dual", threshold=SURE),
    "origin": DreamSampler("origin", temperature=0.7),
    "maskgit_plus": DreamSampler("maskgit_plus", top_k=5),
    "topk_margin": DreamSampler("topk_margin", temperature=0.6, top_p=0.9),
    "entropy": DreamSampler("entropy", suppress_mask=True),
    "drawn order": DreamSampler("entropy", alg_temp=0.5, temperature=0.3),
}
families = pytest.mark.parametrize("family", ["llada", "dream"])


def on(device: str, family: str) -> MaskedDiffusionTransformer:
    return random_model(ARCHS[family]).to(device)


def schedule(sampler: Sampler) -> dict[str, int]:
    return (
        {"gen_length": 8, "block_length": 4, "steps": 6}
        if isinstance(sampler, LLaDASampler)
        else {"gen_length": 8, "steps": 9}
    )


def ids(n: int, seed: int) -> list[int]:
    return torch.randint(0, 38, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [Prompt(ids(n, i), ("task", i)) for i, n in enumerate((5, 1, 9, 4, 2))]


@families
@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.usefixtures("pretend")
def test_every_sampler(sampler: Sampler, family: str) -> None:
    """One prompt after the other, two of one length together behind padding, and all in the engine's batches."""
    ours, expected = on("pretend", family), on("cpu", family)
    how = schedule(sampler)
    prompt = torch.tensor([[39, 39, 3], [7, 5, 3]])
    real = torch.tensor([[0, 0, 1], [1, 1, 1]])

    def plain(model: MaskedDiffusionTransformer):
        seen = []
        written = sampler.generate(
            model, prompt, noise=SeededNoise(3, ["a", "b"]), attention_mask=real, on_step=seen.append, **how
        )
        assert {x.device for x in (*seen, written.ids)} == {model.device}
        return written.ids.tolist(), written.n_forwards, written.n_tokens, [x.tolist() for x in seen]

    assert plain(ours) == plain(expected)
    for batch_size in (2, None):
        there, here = (Engine(model, sampler, seed=4, batch_size=batch_size, **how) for model in (ours, expected))
        assert there.generate(PROMPTS) == here.generate(PROMPTS)
        assert there.notes == here.notes == []


def requests() -> list[Request]:
    """Three questions of four choices, of one to four tokens."""
    return [Request(ids(5 - q, q), ids(1 + c, 10 * q + c + 50), ("task", q, c)) for q in range(3) for c in range(4)]


SCORED = {
    "drawn": {"samples": 6},
    "guidance": {"samples": 6, "cfg_scale": 0.8},
    "exact": {"samples": 32, "exact": True},
    "adaptive": {"samples": 16, "error_level": 0.2},
    "small batches": {"samples": 6, "batch_tokens": 20},
}


@families
@pytest.mark.parametrize("how", SCORED.values(), ids=SCORED)
@pytest.mark.usefixtures("pretend")
def test_every_way_to_score(how: dict[str, float], family: str) -> None:
    asked = requests()
    questions = [Question(list(range(i, i + 4)), [1.0] * 4) for i in range(0, 12, 4)]
    there, here = (Scorer(on(device, family), seed=1, **{"batch_tokens": 100} | how) for device in ("pretend", "cpu"))
    assert there.score(asked, questions) == here.score(asked, questions)
    assert (there.n_forwards, there.n_tokens, there.draws) == (here.n_forwards, here.n_tokens, here.draws)


@families
@pytest.mark.usefixtures("pretend")
def test_batches_by_free_memory(family: str) -> None:
    """Without a number of tokens the device's memory decides: other batches than the CPU's."""
    there, here = (Scorer(on(device, family), seed=1, samples=6).score(requests()) for device in ("pretend", "cpu"))
    assert there == pytest.approx(here, rel=1e-5)


@families
@pytest.mark.usefixtures("pretend")
def test_the_plain_estimate(family: str) -> None:
    ours, expected = on("pretend", family), on("cpu", family)
    for prefix, target in ((ids(4, 1), ids(3, 2)), (torch.tensor(ids(4, 1), device="pretend"), ids(1, 2))):
        there, here = (log_likelihood(model, prefix, target, samples=5, seed=0) for model in (ours, expected))
        assert there == here
    written = Engine(expected, LLaDASampler(), gen_length=3, steps=3).generate([Prompt(ids(4, 1), 0)])[0].ids
    for target, matches in ((written, True), (ids(3, 2), False)):
        assert greedy_matches(ours, ids(4, 1), target) is matches
