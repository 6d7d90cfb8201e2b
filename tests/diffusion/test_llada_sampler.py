"""LLaDA's sampler: recorded generations of the official implementation, and identities."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dqx.common import accelerator
from dqx.diffusion.noise import SeededNoise
from dqx.diffusion.samplers.llada import LLaDASampler, share
from dqx.models.checkpoint import inspect, load_weights

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = {case["name"]: case for case in json.loads((GOLDEN / "llada_generate.json").read_text())["cases"]}


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "llada_generate.safetensors")


@pytest.fixture(scope="module")
def model():
    return load_weights(inspect(str(GOLDEN / "llada_tiny")))


class Replay:
    """Recorded uniforms [steps, B, P + G, ...]."""

    def __init__(self, uniforms, prompt_length):
        self.uniforms, self.prompt_length = uniforms, prompt_length

    def uniform(self, kind, rows, positions, steps, width=1):
        return self.uniforms[steps, rows, self.prompt_length + positions].double().reshape(len(positions), width)


def run(sampler, model, prompt, **kwargs):
    """Generation, and the states [steps + 1, B, P + G]: before each step, then the result."""
    states = []
    out = sampler.generate(model, prompt, on_step=states.append, **kwargs)
    return out, torch.stack([*states, torch.cat((prompt, out.ids), 1)])


@pytest.mark.parametrize("name", CASES)
def test_tokens_and_states_equal_the_official_ones(name, golden, model):
    case = CASES[name]
    prompt = golden["prompt_batch2" if case.get("batch") == 2 else "prompt"]
    uniforms = golden.get(f"{name}.uniforms")
    sampler = LLaDASampler(case["remasking"], case["temperature"], case["cfg_scale"])
    out, states = run(
        sampler,
        model,
        prompt,
        gen_length=case["gen_length"],
        block_length=case["block_length"],
        steps=case["steps"],
        noise=None if uniforms is None else Replay(uniforms, prompt.shape[1]),
    )
    assert torch.equal(states, golden[f"{name}.states"])
    assert torch.equal(out.ids, golden[f"{name}.output"][:, prompt.shape[1] :])
    assert out.n_forwards == case["steps"] * len(prompt) * (2 if case["cfg_scale"] else 1)


@pytest.mark.parametrize("name", ["two_blocks", "cfg"])
def test_float64_model_writes_the_same_tokens(name, golden):
    model = load_weights(inspect(str(GOLDEN / "llada_tiny")), dtype=torch.float64)
    sampler = LLaDASampler(cfg_scale=CASES[name]["cfg_scale"])
    _, states = run(sampler, model, golden["prompt"], gen_length=16, block_length=8, steps=8)
    assert torch.equal(states, golden[f"{name}.states"])


@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(("block_length", "steps"), [(12, 12), (4, 6), (3, 24), (None, 5)])
def test_schedule_prompt_and_completeness(remasking, temperature, block_length, steps, golden, model):
    sampler = LLaDASampler(remasking, temperature, suppress_mask=True)
    prompt = golden["prompt_batch2"]
    _, states = run(sampler, model, prompt, gen_length=12, block_length=block_length, steps=steps)
    mask = model.arch.mask_token_id
    assert (states[:, :, : prompt.shape[1]] == prompt).all()
    assert not (states[-1] == mask).any()
    length = block_length or 12
    per_block = steps // (12 // length)
    for i in range(steps):
        before, after = states[i], states[i + 1]
        written = before != after
        assert (before[written] == mask).all()  # nothing written is ever changed
        assert written.sum(1).tolist() == [share(length, per_block, i % per_block)] * 2
        block = i // per_block
        columns = written.any(0).nonzero()[:, 0] - prompt.shape[1]
        assert ((columns >= block * length) & (columns < (block + 1) * length)).all()


def test_one_token_per_step_when_steps_equal_tokens(golden, model):
    _, states = run(LLaDASampler(), model, golden["prompt"], gen_length=8, steps=8)
    assert (states == model.arch.mask_token_id).sum((1, 2)).tolist() == list(range(8, -1, -1))


def test_steps_that_write_nothing_cost_no_forward(golden, model):
    prompt = golden["prompt"]
    few, _ = run(LLaDASampler(), model, prompt, gen_length=8, block_length=4, steps=8)
    many, states = run(LLaDASampler(), model, prompt, gen_length=8, block_length=4, steps=20)
    assert torch.equal(few.ids, many.ids)
    assert (few.n_forwards, many.n_forwards, len(states)) == (8, 8, 21)


@pytest.mark.parametrize("sampler", [LLaDASampler(), LLaDASampler("random", 0.7), LLaDASampler(cfg_scale=1.0)])
def test_rows_are_independent(sampler, golden, model):
    prompt = golden["prompt_batch2"]
    settings = {"gen_length": 12, "block_length": 6, "steps": 6}
    both = sampler.generate(model, prompt, noise=SeededNoise(1, ["a", "b"]), **settings)
    swapped = sampler.generate(model, prompt.flip(0), noise=SeededNoise(1, ["b", "a"]), **settings)
    alone = sampler.generate(model, prompt[1:], noise=SeededNoise(1, ["b"]), **settings)
    assert torch.equal(both.ids, swapped.ids.flip(0))
    assert torch.equal(both.ids[1:], alone.ids)
    assert both.n_forwards == 2 * alone.n_forwards


def test_temperature_is_reproducible_by_seed_and_differs_between_documents(golden, model):
    sampler, prompt = LLaDASampler(temperature=1.0), golden["prompt"]

    def ids(seed, document):
        noise = SeededNoise(seed, [document])
        return sampler.generate(model, prompt, gen_length=12, steps=6, noise=noise).ids.tolist()

    assert ids(0, "a") == ids(0, "a")
    assert len({str(ids(*pair)) for pair in [(0, "a"), (1, "a"), (0, "b")]}) == 3


def test_temperature_samples_the_softmax(golden, model):
    """One token at temperature 1 is a draw from the model's distribution."""
    prompt = golden["prompt"][:, :4]
    n = 3000
    out = LLaDASampler(temperature=1.0).generate(
        model, prompt.repeat(n, 1), gen_length=1, steps=1, noise=SeededNoise(0, range(n))
    )
    with torch.no_grad():
        masked = torch.cat((prompt, torch.tensor([[model.arch.mask_token_id]])), 1)
        expected = model(masked)[0, -1].softmax(-1) * n
    observed = torch.bincount(out.ids[:, 0], minlength=len(expected)).float()
    likely = expected > 20
    assert likely.sum() >= 5
    assert ((observed - expected).abs() < 5 * expected.sqrt())[likely].all()


def test_suppressed_end_token_is_never_written(golden, model):
    prompt, settings = golden["prompt"], {"gen_length": 16, "block_length": 8, "steps": 8}
    plain = LLaDASampler().generate(model, prompt, **settings).ids
    end = plain[0, 3].item()
    without = LLaDASampler(suppress_eos_logits=True, eos_token_id=end).generate(model, prompt, **settings).ids
    assert (plain == end).any()
    assert not (without == end).any()


@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
@pytest.mark.parametrize("role", ["eos_token_id", "eot_token_id"])
def test_end_tokens_without_confidence_are_written_last(remasking, role, golden, model):
    """A position that predicts the end token is passed over while others of the block are left."""
    prompt = golden["prompt"]
    _, plain = run(LLaDASampler(remasking), model, prompt, gen_length=8, steps=8)
    first = (plain[0] != plain[1]).nonzero()[0, 1]
    token = plain[1, 0, first].item()
    sampler = LLaDASampler(remasking, suppress_eos_confidence=True, **{role: token})
    _, states = run(sampler, model, prompt, gen_length=8, steps=8)
    assert states[1, 0, first] != token
    assert not (states[-1] == model.arch.mask_token_id).any()


def test_a_prompt_that_holds_masks_is_left_alone(golden, model):
    prompt = golden["prompt"].clone()
    prompt[0, 2] = model.arch.mask_token_id
    _, states = run(LLaDASampler(), model, prompt, gen_length=8, block_length=4, steps=4)
    assert (states[:, :, : prompt.shape[1]] == prompt).all()
    assert not (states[-1, :, prompt.shape[1] :] == model.arch.mask_token_id).any()


def test_suppress_mask_completes_the_answer_of_a_model_that_predicts_masks(golden):
    model = load_weights(inspect(str(GOLDEN / "llada_tiny")))
    with torch.no_grad():  # the mask token wins everywhere
        model.head.weight[model.arch.mask_token_id] = (
            3 * model.head.weight[model(golden["prompt"]).argmax(-1).mode().values]
        )
    settings = {"gen_length": 8, "steps": 4}
    stuck = LLaDASampler().generate(model, golden["prompt"], **settings).ids
    done = LLaDASampler(suppress_mask=True).generate(model, golden["prompt"], **settings).ids
    assert (stuck == model.arch.mask_token_id).any()
    assert not (done == model.arch.mask_token_id).any()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "sampler", [LLaDASampler(cfg_scale=0.5), LLaDASampler("random", 0.8, suppress_eos_confidence=True)]
)
def test_tokens_are_the_same_on_the_gpu(sampler, golden):
    ids = []
    for device in ("cpu", accelerator.kind()):
        model = load_weights(inspect(str(GOLDEN / "llada_tiny")), dtype=torch.float64, device=device)
        ids.append(sampler.generate(model, golden["prompt_batch2"], gen_length=12, block_length=6, steps=6).ids.cpu())
    assert torch.equal(*ids)


def test_nan_logits_are_an_error(golden):
    model = load_weights(inspect(str(GOLDEN / "llada_tiny")))
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="NaN"):
        LLaDASampler().generate(model, golden["prompt"], gen_length=4, steps=4)


@pytest.mark.parametrize(
    ("sampler", "schedule", "message"),
    [
        ({"remasking": "high"}, (16, 8, 8), "sampler.remasking='high' is not one of low_confidence, random"),
        ({"temperature": -1}, (16, 8, 8), "sampler.temperature=-1 is not a number at least 0"),
        ({"temperature": "hot"}, (16, 8, 8), "sampler.temperature='hot' is not a number at least 0"),
        ({"temperature": float("nan")}, (16, 8, 8), "sampler.temperature=nan is not a number at least 0"),
        ({"cfg_scale": -0.5}, (16, 8, 8), "sampler.cfg_scale=-0.5 is not a number at least 0"),
        ({}, (16, 5, 8), "block_length=5 does not divide gen_length=16; 1, 2, 4, 8, 16 do"),
        (
            {},
            (16, 4, 6),
            "steps=6 cannot be shared equally by 4 blocks (gen_length=16, block_length=4); 4 or 8 can",
        ),
        ({}, (16, 4, 3), "steps=3 cannot be shared equally by 4 blocks (gen_length=16, block_length=4); 4 can"),
        ({}, (16, 8, 0), "steps=0 is not a positive integer"),
        ({}, (0, 8, 8), "gen_length=0 is not a positive integer"),
        ({}, (16, 8.0, 8), "block_length=8.0 is not a positive integer"),
    ],
)
def test_problems_in_plain_words(sampler, schedule, message, golden, model):
    assert LLaDASampler(**sampler).problems(*schedule) == [message]
    gen_length, block_length, steps = schedule
    with pytest.raises(ValueError, match=re.escape(message)):
        LLaDASampler(**sampler).generate(
            model, golden["prompt"], gen_length=gen_length, block_length=block_length, steps=steps
        )


def test_all_problems_at_once():
    assert len(LLaDASampler("no", -1.0, -1.0).problems(16, 5, 8)) == 4
    assert LLaDASampler().problems(256, 32, 256) == []
    assert LLaDASampler().problems(256, None, 7) == []


def test_end_token_outside_the_vocabulary(golden, model):
    sampler = LLaDASampler(eot_token_id=126348, suppress_eos_confidence=True)
    with pytest.raises(
        ValueError, match=r"sampler.eot_token_id=126348 is not a token of the model; ids go from 0 to 319"
    ):
        sampler.generate(model, golden["prompt"], gen_length=4, steps=4)
