"""The batched scorer: equal to the plain estimator whatever the batches, with no more work than needed."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
from conftest import DATA, TinyCheckpoint
from torch import Tensor

from dqx.diffusion.batches import Part, Request, halves
from dqx.diffusion.likelihood import log_likelihood, mask_states, masked_log_probs
from dqx.diffusion.samplers.llada import LLaDASampler
from dqx.diffusion.scorer import Scorer
from dqx.diffusion.states import make_estimate
from dqx.diffusion.stopping import Question, decided, stages
from dqx.evaluate.problems import task_problems
from dqx.evaluate.results import TaskResult
from dqx.evaluate.settings import EvaluationSettings, LikelihoodSettings
from dqx.evaluate.spec import TaskSpec
from dqx.evaluate.tasks import evaluate
from dqx.models.checkpoint import inspect, load_weights
from dqx.models.tokenizer import load_tokenizer
from dqx.models.transformer import MaskedDiffusionTransformer
from dqx.study.cache.artifacts import ArtifactCache
from dqx.study.cache.store import Store
from dqx.study.stages import Results

GOLDEN = Path(__file__).parents[1] / "golden"
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


def test_requests_may_be_lists_or_tensors(models) -> None:
    scorer = Scorer(models["llada"], samples=4, seed=0)
    of_lists, of_tensors = scorer.score([Request([3, 1], [4, 1]), Request(torch.tensor([3, 1]), torch.tensor([4, 1]))])
    assert of_lists == of_tensors
    assert of_lists == pytest.approx(log_likelihood(models["llada"], [3, 1], [4, 1], samples=4, seed=0).value, rel=1e-5)
    with pytest.raises(ValueError, match="token ids are whole numbers in a row; got str"):
        Request("text", [1])


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


# no more work than needed


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_padding_is_seen_by_nobody(family, models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the padding holds, every result is the same to the last bit."""
    model, requests = models[family], ragged()
    results = []
    for pad in (model.arch.eos_token_id, 7, model.arch.mask_token_id):
        monkeypatch.setattr(model, "arch", replace(model.arch, eos_token_id=pad))
        results.append(Scorer(model, samples=SAMPLES, seed=0, batch_tokens=10**6).score(requests))
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("cfg_scale", [0.0, 0.8])
def test_choices_of_one_token_share_a_forward(cfg_scale, models) -> None:
    """Five true tokens of one state, among them the mask itself, which is not scored, and a second prompt."""
    model = models["llada"]
    tokens = [3, 9, 9, 50, model.arch.mask_token_id]
    requests = [Request(ids(8, 1), torch.tensor([t]), ("mmlu", 0, i)) for i, t in enumerate(tokens)]
    requests.append(Request(ids(8, 2), torch.tensor([3]), ("mmlu", 1, 0)))
    scorer = Scorer(model, samples=128, seed=0, cfg_scale=cfg_scale)
    assert scorer.score(requests) == pytest.approx(plain(model, requests, 0, cfg_scale), rel=1e-5)
    assert scorer.n_forwards == (4 if cfg_scale else 2)


def test_each_state_is_computed_once_and_weighted(models) -> None:
    """128 draws of 3 tokens are 7 states; the choices of a question share those that look the same."""
    model, prefix = models["dream"], ids(6, 0)
    first = Request(prefix, torch.tensor([1, 2, 3]), ("task", 0, 0))
    second = Request(prefix, torch.tensor([1, 2, 4]), ("task", 0, 1))
    for requests, forwards in [([first], 7), ([first, second], 7 + 3), ([first, first, second], 10)]:
        # the last token tells them apart: it is visible in 3 of the 7 states
        scorer = Scorer(model, samples=128, seed=0)
        expected = [log_likelihood(model, r.prefix, r.target, samples=128, seed=0, key=r.key).value for r in requests]
        assert scorer.score(requests) == pytest.approx(expected, rel=1e-5)
        assert scorer.n_forwards == forwards


def test_a_batch_that_is_too_large_for_the_gpu_is_halved(models, monkeypatch: pytest.MonkeyPatch) -> None:
    model, requests = models["llada"], ragged()
    expected = plain(model, requests, 0, 0.0)
    forward = model.logits_where
    allowed = 3

    def crowded(ids: Tensor, *others: Tensor) -> Tensor:
        if len(ids) > allowed:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(ids, *others)

    monkeypatch.setattr(model, "logits_where", crowded)
    scorer = Scorer(model, samples=SAMPLES, seed=0, batch_tokens=10**6)
    assert scorer.score(requests) == pytest.approx(expected, rel=1e-5)
    assert scorer.notes == ["likelihood batches were made smaller because the GPU's memory was full"]
    allowed = 0
    with pytest.raises(torch.OutOfMemoryError):
        scorer.score(requests)


def test_batches_are_halved_by_rows() -> None:
    batch = [Part("a", 2, 5), Part("b", 0, 1), Part("c", 4, 9)]
    left, right = halves(batch)
    assert left == [Part("a", 2, 5), Part("b", 0, 1)]
    assert right == [Part("c", 4, 9)]
    assert halves([Part("a", 0, 2)]) == ([Part("a", 0, 1)], [Part("a", 1, 2)])


def test_progress_ends_at_the_announced_work(models) -> None:
    requests, told = ragged(), []
    for error_level in (None, 0.05):
        scorer = Scorer(models["llada"], samples=SAMPLES, seed=0, error_level=error_level)
        told.clear()
        scorer.score(requests, [Question(range(4), [1.0] * 4)], progress=told.append)
        assert sum(told) == sum(map(scorer.work, requests))
        assert min(told) > 0


# continued after an interruption


class Killed(Exception):
    pass


def killed(scorer: Scorer, requests: list[Request], questions: list[Question], after: int) -> dict[int, float]:
    """The values that were handed over until the scorer was stopped, after so many portions."""
    known: dict[int, float] = {}
    portions = iter(range(after))

    def finished(values: dict[int, float]) -> None:
        if next(portions, None) is None:
            raise Killed
        assert not known.keys() & values.keys()
        known.update(values)

    with pytest.raises(Killed):
        scorer.score(requests, questions, finished=finished)
    return known


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_a_continued_run_has_the_same_bits_and_repeats_no_finished_batch(
    family, models, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, requests = models[family], ragged()
    ran: list[bytes] = []
    forward = model.logits_where

    def recorded(ids: Tensor, *others: Tensor) -> Tensor:
        ran.append(ids.numpy().tobytes())
        return forward(ids, *others)

    monkeypatch.setattr(model, "logits_where", recorded)

    def scorer() -> Scorer:
        ran.clear()
        return Scorer(model, samples=SAMPLES, seed=0, batch_tokens=40)

    portions: list[dict[int, float]] = []
    expected = scorer().score(requests, finished=portions.append)
    planned = list(ran)
    assert sorted(i for portion in portions for i in portion) == list(range(len(requests)))
    assert {i: value for portion in portions for i, value in portion.items()} == dict(enumerate(expected))
    for after in range(len(portions)):
        known = killed(scorer(), requests, [], after)
        told: dict[int, float] = {}
        assert scorer().score(requests, known=known, finished=told.update) == expected
        assert told == {i: value for i, value in enumerate(expected) if i not in known}
        assert ran == planned[len(planned) - len(ran) :]  # the rest of the plan, batch by batch
        assert len(ran) <= len(planned) - after + 2  # again: what held a part of an unfinished request
    assert scorer().score(requests, known=dict(enumerate(expected))) == expected
    assert ran == []


def test_a_continued_adaptive_run_scores_what_is_missing(models) -> None:
    model = models["llada"]
    clear = question(model)
    requests = [*clear, *(replace(r, key=("task", 1, i)) for i, r in enumerate(clear)), Request(ids(3, 5), ids(7, 6))]
    questions = [Question([0, 1, 2], [1.0] * 3), Question([3, 4, 5], [1.0] * 3)]

    def scorer() -> Scorer:
        return Scorer(model, samples=64, seed=0, error_level=0.01)

    whole = scorer()
    expected = whole.score(requests, questions)
    known = {i: expected[i] for i in (0, 1, 2, 6)}
    rest = scorer()
    assert rest.score(requests, questions, known=known) == pytest.approx(expected, rel=1e-5)
    assert rest.draws == {16: 1}
    assert 0 < rest.n_forwards < whole.n_forwards / 2
    first = killed(scorer(), requests, questions, 1)
    assert first == pytest.approx({6: expected[6]})
    assert scorer().score(requests, questions, known=first) == pytest.approx(expected, rel=1e-5)


def test_nan_and_bad_settings_are_errors(models, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models["llada"]
    with pytest.raises(ValueError, match=r"(?s)samples=0 .*batch_tokens=0 .*error_level=2 is not a number above 0"):
        Scorer(model, samples=0, seed=0, batch_tokens=0, error_level=2)
    nothing = torch.full((1, model.arch.vocab_size), math.nan)
    monkeypatch.setattr(model, "logits_where", lambda ids, where, mask: nothing.expand(int(where.sum()), -1))
    with pytest.raises(FloatingPointError, match="NaN"):
        Scorer(model, samples=1, seed=0).score(ragged())


# the exact expectation


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_enumeration_is_the_mean_over_all_states_and_the_limit_of_draws(family, models) -> None:
    """By brute force: each subset S of L tokens comes with probability 1 / (L * C(L, |S|)) and weight L / |S|."""
    model, length = models[family], 4
    request = Request(ids(5, 0), ids(length, 1), ("doc",))
    subsets = [s for c in range(1, length + 1) for s in combinations(range(5, 5 + length), c)]
    tokens = torch.cat((request.prefix, request.target))
    states = tokens.repeat(len(subsets), 1)
    for state, subset in zip(states, subsets, strict=True):
        state[list(subset)] = model.arch.mask_token_id
    values = [
        length / len(s) * total
        for s, total in zip(subsets, masked_log_probs(model, states, tokens).sum(1).tolist(), strict=True)
    ]
    exact = sum(v / (length * math.comb(length, len(s))) for s, v in zip(subsets, values, strict=True))

    scorer = Scorer(model, samples=15, seed=0, exact=True)
    assert scorer.score([request]) == pytest.approx([exact], rel=1e-5)
    assert scorer.n_forwards == 15
    squares = [(v - exact) ** 2 / (length * math.comb(length, len(s))) for s, v in zip(subsets, values, strict=True)]
    for samples in (300, 2000):
        (estimate,) = Scorer(model, samples=samples, seed=1).score([request])
        assert abs(estimate - exact) < 4 * math.sqrt(sum(squares) / samples)


def test_enumeration_only_where_it_is_no_dearer_than_the_draws() -> None:
    for length, samples, exact in [(3, 7, True), (3, 6, False), (7, 128, True), (8, 128, False), (200, 128, False)]:
        estimate = make_estimate(length, samples=samples, seed=0, key=(), exact=True)
        assert (estimate.probabilities is not None) == exact
        assert len(estimate.masks) <= samples
    assert make_estimate(3, samples=128, seed=0, key=(), exact=False).probabilities is None


# adaptive draws


def question(model: MaskedDiffusionTransformer, n_choices: int = 3, length: int = 9) -> list[Request]:
    """A prompt whose choices have different likelihoods: more and more of their tokens are what the model expects."""
    prefix = ids(6, 0)
    masks = torch.full((length,), model.arch.mask_token_id)
    with torch.no_grad():
        likely = model(torch.cat((prefix, masks))[None])[0, len(prefix) :].argmax(-1)
    requests = []
    for choice in range(n_choices):
        target = ids(length, 10 + choice)
        target[: choice * length // (n_choices - 1)] = likely[: choice * length // (n_choices - 1)]
        requests.append(Request(prefix, target, ("task", 0, choice)))
    return requests


def test_clear_questions_are_decided_the_same_with_fewer_forwards(models) -> None:
    model = models["llada"]
    clear = question(model)
    other = Request(ids(3, 5), ids(7, 6), ("elsewhere",))
    unclear = [replace(clear[0], key=("task", 1, choice)) for choice in range(2)]  # equal in expectation
    requests = [*clear, other, *unclear]
    questions = [Question([0, 1, 2], [1.0] * 3), Question([4, 5], [1.0] * 2)]
    full = Scorer(model, samples=64, seed=0)
    expected = full.score(requests)
    adaptive = Scorer(model, samples=64, seed=0, error_level=0.01)
    found = adaptive.score(requests, questions)
    assert found[:3].index(max(found[:3])) == expected[:3].index(max(expected[:3])) == 2
    assert found[:3] != expected[:3]
    assert found[3:] == pytest.approx(expected[3:], rel=1e-6)  # nothing decides these
    assert adaptive.n_forwards < 0.7 * full.n_forwards
    assert adaptive.draws == {16: 1, 64: 1}


def test_scales_decide_by_length(models) -> None:
    """Divided by a large enough number, the worst choice becomes the best one."""
    requests = question(models["llada"], n_choices=2)
    scorer = Scorer(models["llada"], samples=32, seed=0, error_level=0.05)
    worst, best = scorer.score(requests, [Question([0, 1], [1.0, 1.0])])
    assert worst < best
    assert scorer.draws == {16: 1}
    scorer = Scorer(models["llada"], samples=32, seed=0, error_level=0.05)
    scorer.score(requests, [Question([0, 1], [worst / best, 1.0])])
    assert scorer.draws == {32: 1}


def test_a_stage_takes_evenly_spread_counts_of_the_same_draws() -> None:
    assert stages(128) == [8, 4, 2, 1]
    assert stages(100) == [4, 2, 1]
    assert stages(16) == [1]
    masks = mask_states(5, samples=128, seed=0, key=("doc",))
    estimate = make_estimate(5, samples=128, seed=0, key=("doc",), exact=False)
    estimate.enter(estimate.missing(), torch.arange(len(estimate.masks)).double())
    for stride in stages(128):
        assert torch.equal(estimate.masks[estimate.of_draw[::stride]], masks[::stride])
        often = torch.bincount(masks[::stride].sum(1), minlength=6)[1:]
        assert often.max() - often.min() <= 1
        assert estimate.value(stride) == pytest.approx(estimate.draws(stride).mean().item())


@pytest.mark.parametrize("n_choices", [2, 4])
def test_the_error_level_holds(n_choices: int) -> None:
    """The first choice is the best by a hair: deciding early for another one is an error, and never more likely.

    Draws are spread as the estimator spreads them; most tokens' log-probabilities are near 0, some are far below, and
    they fall with the masked share.
    """
    random = torch.Generator().manual_seed(0)
    n, samples, length, level = 400, 128, 12, 0.1
    log_probs = -torch.rand(n, n_choices, 1, length, generator=random, dtype=torch.float64).pow(4) * 8
    start = torch.rand(n, n_choices, 1, generator=random, dtype=torch.float64)
    counts = ((start + torch.arange(samples) / samples) % 1 * length).floor() + 1
    masked = torch.rand(n, n_choices, samples, length, generator=random).argsort(-1).argsort(-1) < counts[..., None]
    draws = (log_probs * masked).sum(-1) * length / counts * (0.75 + counts / length / 2)
    expectation = log_probs.sum(-1) * (0.75 + (length + 1) / length / 4)

    def choice(draws_CN: Tensor) -> int | None:
        """The choice that a look decides for, if one does."""
        looks = stages(samples)[:-1]
        found = (draws_CN[:, ::s] for s in looks if decided(draws_CN[:, ::s], looks=len(looks), error_level=level))
        return next((int(at.mean(1).argmax()) for at in found), None)

    centred = draws - expectation
    assert sum(choice(one) not in (None, 0) for one in centred) <= level * n
    centred[:, 0] -= 0.5 * expectation[:, 0]  # better by half of its own size
    assert sum(choice(one) == 0 for one in centred) > 0.5 * n


def test_exact_likelihoods_need_no_test() -> None:
    level = {"looks": 3, "error_level": 1e-6}
    assert decided(torch.tensor([[-1.0] * 16, [-2.0] * 16]).double(), **level)
    assert decided(torch.tensor([[-1.0] * 16]).double(), **level)
    assert not decided(torch.tensor([[-1.0] * 15 + [-3.0], [-1.2] * 16]).double(), **level)


# through the evaluation


def test_settings_reach_the_result_and_its_baseline(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    """A document of ARC with all draws and decided early; each way has its own place in the cache."""
    checkpoint = inspect(str(tiny_checkpoint("llada", n_layers=1)))
    model, tokenizer = load_weights(checkpoint), load_tokenizer(checkpoint)
    spec = TaskSpec("arc_easy", "general", "likelihood", "acc_norm", mc_samples=32)

    def run(**settings: bool | float) -> tuple[TaskResult, Path]:
        likelihood = LikelihoodSettings(**settings)
        common = EvaluationSettings(limit=1, data_root=str(DATA), progress=False, likelihood=likelihood)
        found = evaluate(model, tokenizer, {"arc": spec}, sampler=LLaDASampler(), settings=common)
        return found["arc"], Results(ArtifactCache(Store(tmp_path)), {}, likelihood=likelihood).key("arc", spec).path

    (plain, place), (hasty, of_hasty), (fast, of_fast) = (
        run(),
        run(adaptive=True, error_level=0.6),
        run(batch_tokens=100),
    )
    exact = Results(ArtifactCache(Store(tmp_path)), {}, likelihood=LikelihoodSettings(exact=True))
    of_exact = exact.key("arc", spec).path
    assert fast.documents[0].log_likelihoods == pytest.approx(plain.documents[0].log_likelihoods, rel=1e-5)
    assert place == of_fast
    assert len({place, of_exact, of_hasty}) == 3
    assert hasty.n_forwards < plain.n_forwards
    assert plain.notes == []
    assert [note.split(": of ")[0] for note in hasty.notes] == ["draws until a question was decided at level 0.6"]


def test_adaptive_needs_a_metric_that_decides() -> None:
    on = LikelihoodSettings(adaptive=True)
    arc = TaskSpec("arc_easy", "general", "likelihood", "acc_norm", mc_samples=32)
    sums = TaskSpec("nano_sums", "math", "generation", "exact_match", filter="none", gen_length=4)
    assert task_problems({"arc": arc}, likelihood=on) == []
    assert not any("adaptive" in p for p in task_problems({"sums": sums}, likelihood=on))
    assert any(
        "task.suite.arc is scored otherwise" in p
        for p in task_problems({"arc": replace(arc, metric="f1")}, likelihood=on)
    )
    wrong = LikelihoodSettings(error_level=1.0, batch_tokens=0)
    assert [p.split(" must")[0] for p in task_problems({"arc": arc}, likelihood=wrong)] == [
        "likelihood.error_level=1.0",
        "likelihood.batch_tokens=0",
    ]
