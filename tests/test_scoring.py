"""The batched scorer: equal to the plain estimator whatever the batches, with no more work than needed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dqx.diffusion.likelihood import log_likelihood
from dqx.diffusion.scoring import Request, Scorer
from dqx.models import inspect, load_weights
from dqx.models.transformer import MaskedDiffusionTransformer

GOLDEN = Path(__file__).parent / "golden"
SAMPLES = 6


@pytest.fixture(scope="module")
def models() -> dict[str, MaskedDiffusionTransformer]:
    return {family: load_weights(inspect(str(GOLDEN / f"{family}_tiny"))) for family in ("llada", "dream")}


def ids(n: int, seed: int) -> Tensor:
    return torch.randint(0, 200, (n,), generator=torch.Generator().manual_seed(seed))


def ragged(n_questions: int = 3) -> list[Request]:
    """Prefixes of 0 to 9 tokens and targets of 0 to 5; the choices of a question share their prefix."""
    lengths = random.Random(0)
    found = []
    for question in range(n_questions):
        prefix = ids(0 if question == 1 else lengths.randint(1, 9), seed=question)
        for choice in range(4):
            target = ids(choice + question % 2 + (choice == 0 and question == 0), seed=100 * question + choice)
            found.append(Request(prefix, target, ("task", question, choice)))
    return found


def plain(model: MaskedDiffusionTransformer, requests: list[Request], seed: int, cfg_scale: float) -> list[float]:
    return [
        log_likelihood(model, r.prefix, r.target, samples=SAMPLES, seed=seed, key=r.key, cfg_scale=cfg_scale).value
        for r in requests
    ]


@pytest.mark.parametrize("cfg_scale", [0.0, 0.8])
@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize("family", ["llada", "dream"])
def test_likelihoods_are_the_plain_ones_in_any_batches(family, seed, cfg_scale, models) -> None:
    """Ragged prefixes and targets, empty ones too; 1, 2, 3, 7 and 16 rows of the longest request, and all."""
    model, requests = models[family], ragged()
    expected = plain(model, requests, seed, cfg_scale)
    longest = max(r.length for r in requests)
    for batch_tokens in [longest * rows for rows in (1, 2, 3, 7, 16)] + [10**6, 1]:
        scorer = Scorer(model, samples=SAMPLES, seed=seed, cfg_scale=cfg_scale, batch_tokens=batch_tokens)
        assert scorer.score(requests) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_the_order_of_requests_changes_not_a_bit(family, models) -> None:
    requests = ragged()
    shuffled = random.Random(1).sample(range(len(requests)), len(requests))

    def score(order: list[int]) -> dict[int, float]:
        scorer = Scorer(models[family], samples=SAMPLES, seed=0, batch_tokens=40)
        return dict(zip(order, scorer.score([requests[i] for i in order]), strict=True))

    assert score(list(range(len(requests)))) == score(shuffled)
