"""Likelihood: recorded estimates of the official implementations under their masks, and identities."""

import json
import math
from itertools import combinations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dqx.common import accelerator
from dqx.diffusion.likelihood import greedy_matches, log_likelihood, log_likelihood_given, mask_states, masked_log_probs
from dqx.diffusion.samplers.llada import LLaDASampler
from dqx.models.checkpoint import inspect, load_weights

GOLDEN = Path(__file__).parents[1] / "golden"
INDEX = {family: json.loads((GOLDEN / f"{family}_loglik.json").read_text()) for family in ("llada", "dream")}
CASES = {family: {case["name"]: case for case in index["cases"]} for family, index in INDEX.items()}
MONTE_CARLO = [name for name in CASES["dream"] if name.startswith("mc")]


@pytest.fixture(scope="module")
def golden():
    return {family: load_file(GOLDEN / f"{family}_loglik.safetensors") for family in CASES}


@pytest.fixture(scope="module")
def models():
    return {family: load_weights(inspect(str(GOLDEN / f"{family}_tiny"))) for family in CASES}


@pytest.mark.parametrize("name", CASES["llada"])
def test_llada_estimate_under_recorded_masks(name, golden, models):
    case, data = CASES["llada"][name], golden["llada"]
    tokens = torch.cat((data["prompt"], data["answer"][: case["answer_len"]]))
    value = log_likelihood_given(
        models["llada"],
        data[f"{name}.perturbed"].flatten(0, 1),
        tokens,
        data[f"{name}.p_mask"].flatten(0, 1),
        prefix_length=len(data["prompt"]),
        cfg_scale=case["cfg_scale"],
        batch_size=5,
    )
    assert value == pytest.approx(case["log_likelihood"], abs=1e-4)


@pytest.mark.parametrize("name", MONTE_CARLO)
def test_dream_estimate_under_recorded_masks(name, golden, models):
    case, data = CASES["dream"][name], golden["dream"]
    tokens = torch.cat((data["prefix"], data["target"]))
    value = log_likelihood_given(
        models["dream"],
        data[f"{name}.perturbed"].flatten(0, 1),
        tokens,
        data[f"{name}.p_mask"][:, :, 0].flatten(),
        prefix_length=len(data["prefix"]),
    )
    if case["log_type"] == "union":
        value /= len(tokens)
    assert value == pytest.approx(case["log_likelihood"], abs=1e-4)


@pytest.mark.parametrize("name", ["ar_ftb", "ar_btf"])
def test_dream_token_by_token_likelihood(name, golden, models):
    """One target token after the other, the later (ftb) or the earlier ones (btf) masked."""
    data, model = golden["dream"], models["dream"]
    start, length = len(data["prefix"]), len(data["target"])
    tokens = torch.cat((data["prefix"], data["target"]))
    masked = torch.ones(length, length).triu() if name == "ar_ftb" else torch.ones(length, length).tril()
    states = tokens.repeat(length, 1)
    states[:, start:].masked_fill_(masked.bool(), model.arch.mask_token_id)
    value = masked_log_probs(model, states, tokens)[:, start:].diagonal().sum().item()
    assert value == pytest.approx(CASES["dream"][name]["log_likelihood"], abs=1e-4)


def test_greedy_decoding_equals_the_official_one(golden, models):
    data, model = golden["llada"], models["llada"]
    states = []
    length = len(data["answer"])
    sampler = LLaDASampler()
    out = sampler.generate(model, data["prompt"][None], gen_length=length, steps=length, on_step=states.append)
    assert torch.equal(torch.stack(states), data["greedy.states"])
    assert torch.equal(out.ids[0], data["greedy.answer"])
    expected = INDEX["llada"]["greedy"]
    assert greedy_matches(model, data["prompt"], data["answer"]) == expected["is_greedy_for_answer"]
    assert greedy_matches(model, data["prompt"], data["greedy.answer"]) == expected["is_greedy_for_greedy_answer"]
    assert greedy_matches(model, data["prompt"], data["answer"][:0])


def request(family, golden):
    data = golden[family]
    return (data["prompt"], data["answer"]) if family == "llada" else (data["prefix"], data["target"])


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("cfg_scale", [0.0, 0.8])
def test_batch_size_changes_nothing(family, cfg_scale, golden, models):
    prefix, target = request(family, golden)
    settings = {"samples": 7, "seed": 0, "key": ("task", 3, 1), "cfg_scale": cfg_scale}
    results = [log_likelihood(models[family], prefix, target, batch_size=b, **settings) for b in (1, 2, 7, 64)]
    assert [r.value for r in results] == pytest.approx([results[0].value] * 4, rel=1e-5)
    assert {r.n_forwards for r in results} == {14 if cfg_scale else 7}


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("cfg_scale", [0.0, 0.8])
def test_one_token_is_exact_in_one_forward(family, cfg_scale, golden, models):
    model = models[family]
    prefix, target = request(family, golden)
    result = log_likelihood(model, prefix, target[-1:], samples=128, seed=0, cfg_scale=cfg_scale)
    mask = torch.tensor([model.arch.mask_token_id])
    with torch.no_grad():
        logits = model(torch.cat((prefix, mask))[None])[0, -1]
        if cfg_scale:
            blind = model(mask.repeat(1, len(prefix) + 1))[0, -1]
            logits = blind + (cfg_scale + 1) * (logits - blind)
    assert result.value == pytest.approx(logits.log_softmax(-1)[target[-1]].item(), abs=1e-5)
    assert result.n_forwards == (2 if cfg_scale else 1)


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_estimate_converges_to_the_expectation_over_all_mask_states(family, golden, models):
    """Each subset S of the L target tokens comes with probability 1 / (L * C(L, |S|)) and weight L / |S|."""
    model = models[family]
    prefix, target = request(family, golden)
    target = target[-3:]
    start, length = len(prefix), len(target)
    tokens = torch.cat((prefix, target))
    subsets = [s for c in range(1, length + 1) for s in combinations(range(start, start + length), c)]
    states = tokens.repeat(len(subsets), 1)
    for state, subset in zip(states, subsets, strict=True):
        state[list(subset)] = model.arch.mask_token_id
    log_probs = masked_log_probs(model, states, tokens).sum(1)
    values = torch.tensor([length / len(s) for s in subsets]).double() * log_probs
    probs = torch.tensor([1 / (length * math.comb(length, len(s))) for s in subsets]).double()
    assert probs.sum() == pytest.approx(1)
    exact = (probs * values).sum().item()

    samples = 900
    drawn = mask_states(length, samples=samples, seed=0, key=("doc",))
    assert len(drawn.unique(dim=0)) == len(subsets)
    estimate = log_likelihood(model, prefix, target, samples=samples, seed=0, key=("doc",), batch_size=300).value
    spread = (probs * (values - exact).square()).sum().sqrt().item()
    assert abs(estimate - exact) < 4 * spread / math.sqrt(samples)


def test_masks_are_a_pure_function_of_seed_key_and_draw():
    def states(seed=0, key=("mmlu", 3, 1)):
        return mask_states(6, samples=16, seed=seed, key=key).tolist()

    first = states()
    torch.rand(7)
    assert first == states()
    assert first != states(seed=1)
    assert first != states(key=("mmlu", 3, 2))
    assert first != states(key=("mmlu", 4, 1))


@pytest.mark.parametrize(("length", "samples"), [(5, 20), (3, 128), (7, 4), (2, 1)])
def test_mask_counts_are_spread_evenly_over_the_draws(length, samples):
    for document in range(20):
        counts = mask_states(length, samples=samples, seed=0, key=(document,)).sum(1)
        assert ((counts >= 1) & (counts <= length)).all()
        often = torch.bincount(counts, minlength=length + 1)[1:]
        assert often.max() - often.min() <= (0 if samples % length == 0 else 1)


def test_each_single_draw_is_uniform_over_counts_and_positions():
    n, length = 3000, 4
    states = torch.cat([mask_states(length, samples=1, seed=0, key=(d,)) for d in range(n)])
    often = torch.bincount(states.sum(1), minlength=length + 1)[1:]
    assert (often - n / length).abs().max() < 5 * math.sqrt(n / length)
    assert (states.double().mean(0) - 0.625).abs().max() < 5 * math.sqrt(0.25 / n)  # (1+2+3+4)/4/4


def test_half_precision_models_get_float32_probabilities(golden):
    model = load_weights(inspect(str(GOLDEN / "llada_tiny")), dtype=torch.bfloat16)
    prefix, target = request("llada", golden)
    value = log_likelihood(model, prefix, target[:1], samples=1, seed=0).value
    with torch.no_grad():
        logits = model(torch.cat((prefix, torch.tensor([model.arch.mask_token_id])))[None])[0, -1]
    assert logits.dtype == torch.bfloat16
    assert value == pytest.approx(logits.double().log_softmax(-1)[target[0]].item(), abs=1e-5)


def test_a_mask_in_the_prefix_is_not_scored(golden, models):
    prefix, target = request("llada", golden)
    prefix = prefix.clone()
    prefix[3] = models["llada"].arch.mask_token_id
    tokens = torch.cat((prefix, target[:1]))
    state = torch.cat((prefix, prefix[3:4]))
    scored = masked_log_probs(models["llada"], state[None], tokens)[0].nonzero()[:, 0].tolist()
    assert scored == [len(prefix)]


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llada", "dream"])
def test_likelihood_is_the_same_on_the_gpu(family, golden):
    prefix, target = request(family, golden)
    values = [
        log_likelihood(
            load_weights(inspect(str(GOLDEN / f"{family}_tiny")), dtype=torch.float64, device=device),
            prefix.to(device),
            target.to(device),
            samples=9,
            seed=0,
            cfg_scale=0.5,
        ).value
        for device in ("cpu", accelerator.kind())
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-9)


def test_empty_target_and_bad_arguments(golden, models):
    prefix, target = request("llada", golden)
    model = models["llada"]
    empty = log_likelihood(model, prefix, target[:0], samples=4, seed=0)
    assert (empty.value, empty.n_forwards) == (0.0, 0)
    with pytest.raises(ValueError, match="samples=0 is not a positive integer"):
        log_likelihood(model, prefix, target, samples=0, seed=0)
    with pytest.raises(ValueError, match="batch_size=0 is not a positive integer"):
        log_likelihood(model, prefix, target, samples=1, seed=0, batch_size=0)
    with pytest.raises(ValueError, match="neither masks nor the true ones"):
        masked_log_probs(model, (prefix + 1)[None], prefix)


def test_nan_logits_are_an_error(golden):
    model = load_weights(inspect(str(GOLDEN / "llada_tiny")))
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="NaN"):
        log_likelihood(model, *request("llada", golden), samples=2, seed=0)
