"""Dream's sampler: recorded generations of the official implementation, and identities."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dqx.diffusion.noise import SeededNoise
from dqx.diffusion.samplers.dream import ALGORITHMS, DreamSampler, draw_tokens, filter_logits
from dqx.models.checkpoint import inspect, load_weights

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = {case["name"]: case for case in json.loads((GOLDEN / "dream_generate.json").read_text())["cases"]}


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "dream_generate.safetensors")


@pytest.fixture(scope="module")
def model():
    return load_weights(inspect(str(GOLDEN / "dream_tiny")))


class Replay:
    """Recorded uniforms of `origin`: those of each step's masked positions, one step after the other."""

    def __init__(self, uniforms, counts):
        self.steps = uniforms.split(counts.tolist())

    def uniform(self, kind, rows, positions, steps, width=1):
        assert (kind, rows.any(), width) == ("order", False, 1)
        recorded = [self.steps[step] for step in steps.unique()]  # one, or none where all is written
        assert [len(positions)] == [len(uniforms) for uniforms in recorded] or not len(positions)
        return torch.cat([*recorded, torch.empty(0)]).double()[:, None]


def run(sampler, model, prompt, **kwargs):
    """Generation, and the states [steps + 1, B, P + G]: before each step, then the result."""
    states = []
    out = sampler.generate(model, prompt, on_step=states.append, **kwargs)
    return out, torch.stack([*states, torch.cat((prompt, out.ids), 1)])


@pytest.mark.parametrize("name", CASES)
def test_tokens_and_states_equal_the_official_ones(name, golden, model):
    case = CASES[name]
    batch = case.get("batch") == 2
    sampler = DreamSampler(
        alg=case["alg"], alg_temp=case["alg_temp"], top_p=case["top_p"], top_k=case.get("top_k"), eps=case["eps"]
    )
    uniforms = golden.get(f"{name}.uniforms")
    prompt = golden["prompt_batch2" if batch else "prompt"]
    out, states = run(
        sampler,
        model,
        prompt,
        gen_length=case["max_new_tokens"],
        steps=case["steps"],
        noise=None if uniforms is None else Replay(uniforms, golden[f"{name}.uniform_counts"]),
        attention_mask=golden["attention_mask_batch2"] if batch else None,
    )
    assert torch.equal(states[1:], golden[f"{name}.history"])
    assert torch.equal(states[-1], golden[f"{name}.sequences"])
    changed = (states[1:] != states[:-1]).any(2).any(1)
    assert out.n_forwards == changed.sum() * len(prompt)  # steps that write nothing cost nothing


def test_padding_changes_nothing(golden, model):
    """The left-padded row of a batch writes what it writes alone without padding."""
    prompt, mask = golden["prompt_batch2"], golden["attention_mask_batch2"]
    assert mask[0, 0] == 0
    real = prompt[:1, mask[0].bool()]
    batch = DreamSampler().generate(model, prompt, gen_length=12, steps=6, attention_mask=mask)
    alone = DreamSampler().generate(model, real, gen_length=12, steps=6)
    assert torch.equal(batch.ids[:1], alone.ids)


@pytest.mark.parametrize("alg", ALGORITHMS)
@pytest.mark.parametrize(("temperature", "alg_temp"), [(0.0, None), (0.7, None), (0.7, 0.5)])
@pytest.mark.parametrize("steps", [1, 5, 12, 30])
def test_prompt_stays_and_answer_is_complete(alg, temperature, alg_temp, steps, golden, model):
    sampler = DreamSampler(
        alg, None if alg == "origin" else alg_temp, temperature, top_p=0.9, top_k=50, suppress_mask=True
    )
    prompt = golden["prompt_batch2"]
    out, states = run(sampler, model, prompt, gen_length=12, block_length=12, steps=steps)
    mask = model.arch.mask_token_id
    assert len(states) == steps + 1
    assert (states[:, :, : prompt.shape[1]] == prompt).all()
    assert not (states[-1] == mask).any()
    assert (states[:-1][states[:-1] != states[1:]] == mask).all()  # nothing written is ever changed
    assert out.n_forwards <= 2 * min(steps, 24)
    if alg != "origin":
        times = torch.linspace(1, 1e-3, steps + 1)
        left = (states == mask).sum(2)
        for i in range(steps - 1):
            count = int(left[i, 0].float() * (1 - times[i + 1] / times[i]))
            assert (left[i] - left[i + 1]).tolist() == [count, count]


@pytest.mark.parametrize(
    "sampler", [DreamSampler(), DreamSampler("origin", temperature=0.5), DreamSampler(alg_temp=0.3)]
)
def test_rows_are_independent(sampler, golden, model):
    prompt = golden["prompt_batch2"]
    both = sampler.generate(model, prompt, gen_length=12, steps=6, noise=SeededNoise(1, ["a", "b"]))
    alone = sampler.generate(model, prompt[1:], gen_length=12, steps=6, noise=SeededNoise(1, ["b"]))
    assert torch.equal(both.ids[1:], alone.ids)


def test_rows_with_unequal_mask_counts_write_their_mean(golden):
    """Only where a model predicts the mask token; against the formula, one row after the other."""
    model = load_weights(inspect(str(GOLDEN / "dream_tiny")))
    mask, prompt, steps = model.arch.mask_token_id, golden["prompt_batch2"], 6
    model.head.weight[mask] *= 1.6
    _, states = run(DreamSampler("maskgit_plus"), model, prompt, gen_length=12, steps=steps)
    times = torch.linspace(1, 1e-3, steps + 1)
    ids, uneven = states[0].clone(), 0
    for i in range(steps):
        counts = [(row == mask).sum().item() for row in ids]
        uneven += counts[0] != counts[1]
        fraction = 1 if i == steps - 1 else 1 - times[i + 1] / times[i]
        number = int(torch.tensor(sum(counts) / 2) * fraction)
        with torch.no_grad():
            confidence, tokens = model(ids).softmax(-1).max(-1)
        for row in range(2):
            confidence[row, ids[row] != mask] = -1
            for position in confidence[row].topk(min(number, counts[row])).indices:
                ids[row, position] = tokens[row, position]
        assert torch.equal(ids, states[i + 1])
    assert uneven > 0


@pytest.mark.parametrize("sampler", [DreamSampler(temperature=1.0), DreamSampler("origin"), DreamSampler(alg_temp=0.5)])
def test_noise_is_reproducible_by_seed_and_differs_between_documents(sampler, golden, model):
    def states(seed, document):
        noise = SeededNoise(seed, [document])
        return str(run(sampler, model, golden["prompt"], gen_length=12, steps=6, noise=noise)[1].tolist())

    assert states(0, "a") == states(0, "a")
    assert len({states(0, "a"), states(1, "a"), states(0, "b")}) == 3


def test_alg_temp_near_zero_is_the_ranking(golden, model):
    settings = {"gen_length": 12, "steps": 6}
    ranked = DreamSampler("maskgit_plus").generate(model, golden["prompt"], **settings)
    drawn = DreamSampler("maskgit_plus", alg_temp=1e-9).generate(model, golden["prompt"], **settings)
    assert torch.equal(ranked.ids, drawn.ids)


def test_temperature_samples_the_sharpened_softmax(golden, model):
    """One token at temperature 1/2 is a draw from the squared and normalised distribution."""
    prompt, n = golden["prompt"][:, :4], 3000
    sampler = DreamSampler("maskgit_plus", temperature=0.5)
    out = sampler.generate(model, prompt.repeat(n, 1), gen_length=1, steps=1, noise=SeededNoise(0, range(n)))
    with torch.no_grad():
        masked = torch.cat((prompt, torch.tensor([[model.arch.mask_token_id]])), 1)
        expected = (2 * model(masked)[0, -1]).softmax(-1) * n
    observed = torch.bincount(out.ids[:, 0], minlength=len(expected)).float()
    likely = expected > 20
    assert likely.sum() >= 3
    assert ((observed - expected).abs() < 5 * expected.sqrt())[likely].all()


def test_tokens_are_drawn_from_their_probabilities():
    probs = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0])
    n = 2000
    uniforms = (torch.arange(n, dtype=torch.float64)[:, None] + 0.5) / n
    drawn = draw_tokens(probs.expand(n, -1), uniforms)
    assert torch.bincount(drawn, minlength=6).tolist() == [0, 1000, 0, 400, 600, 0]
    edges = torch.tensor([[0.0], [1 - 2**-53]], dtype=torch.float64)
    assert draw_tokens(probs.expand(2, -1), edges).tolist() == [1, 4]


def test_filters_keep_the_nucleus_and_the_top():
    probs = torch.tensor([[0.1, 0.5, 0.3, 0.1 - 1e-3, 1e-3]])

    def kept(**settings):
        settings = {"top_p": None, "top_k": None} | settings
        return (filter_logits(probs.log(), **settings).softmax(-1) > 0)[0].nonzero()[:, 0].tolist()

    assert kept() == kept(top_p=1.0) == kept(top_k=9) == [0, 1, 2, 3, 4]
    assert kept(top_p=0.4) == [1]
    assert kept(top_p=0.6) == [1, 2]  # the token that crosses the threshold stays
    assert kept(top_p=0.805) == [0, 1, 2]
    assert kept(top_k=2) == [1, 2]
    assert kept(top_p=0.85, top_k=1) == [1]


@pytest.mark.parametrize(
    ("sampler", "schedule", "message"),
    [
        ({"alg": "best"}, (16, None, 8), "sampler.alg='best' is not one of origin, maskgit_plus, topk_margin, entropy"),
        ({"temperature": -0.1}, (16, None, 8), "sampler.temperature=-0.1 is not a number at least 0"),
        ({"alg_temp": -1}, (16, None, 8), "sampler.alg_temp=-1 is not a number at least 0"),
        ({"alg_temp": "x"}, (16, None, 8), "sampler.alg_temp='x' is not a number at least 0"),
        (
            {"alg": "origin", "alg_temp": 0.5},
            (16, None, 8),
            "sampler.alg_temp=0.5 does nothing with sampler.alg=origin, whose order is random already; "
            "set alg_temp to null or choose another alg",
        ),
        ({"top_p": 1.5}, (16, None, 8), "sampler.top_p=1.5 is not a number above 0 and at most 1"),
        ({"top_p": 0}, (16, None, 8), "sampler.top_p=0 is not a number above 0 and at most 1"),
        ({"top_k": 0}, (16, None, 8), "sampler.top_k=0 is not a positive integer"),
        ({"eps": 0.0}, (16, None, 8), "sampler.eps=0.0 is not a number above 0 and at most 1"),
        ({}, (16, None, 0), "steps=0 is not a positive integer"),
        (
            {},
            (16, 8, 8),
            "block_length=8 is set, but Dream's sampler writes the whole answer at once; "
            "set it to null or to gen_length=16",
        ),
    ],
)
def test_problems_in_plain_words(sampler, schedule, message, golden, model):
    assert DreamSampler(**sampler).problems(*schedule) == [message]
    gen_length, block_length, steps = schedule
    with pytest.raises(ValueError, match=re.escape(message)):
        DreamSampler(**sampler).generate(
            model, golden["prompt"], gen_length=gen_length, block_length=block_length, steps=steps
        )


def test_settings_of_the_study_have_no_problems():
    assert DreamSampler(top_p=0.95).problems(128, None, 128) == []
    assert DreamSampler(alg_temp="x", eps=2).problems(0, 8, 0) != []
