"""Predictions of models that write block by block, on the states that they visit and at mask ratios."""

from __future__ import annotations

import pytest
import torch
from goldens import tiny_config
from tiny import random_model

from dqx.diagnostics import fidelity, passes
from dqx.diffusion.rollout import Rollout, write
from dqx.diffusion.samplers.blockwise import Recomputed
from dqx.diffusion.samplers.fast_dllm import FastDLLMSampler
from dqx.diffusion.samplers.nemotron import AutoregressiveSampler, NemotronSampler, SpeculativeSampler
from dqx.diffusion.samplers.sdar import SDARSampler
from dqx.models.architecture import Attention
from dqx.models.family import family_of
from dqx.models.layout import Passes, copies

SAMPLERS = {
    "sdar": ("sdar", SDARSampler(threshold=0.02, suppress_mask=True)),
    "nemotron": ("nemotron", NemotronSampler(block=8, threshold=0.02)),
    "speculative": ("nemotron", SpeculativeSampler(block=8)),
    "autoregressive": ("nemotron", AutoregressiveSampler()),
    "fast_dllm": ("fast_dllm", FastDLLMSampler(block=8, sub_block=4, threshold=0.9)),
    "block cache": ("fast_dllm", FastDLLMSampler(block=8, sub_block=4, threshold=0.9, block_cache=True)),
}
GEN_LENGTH = 12


def model_of(family):
    ids = {"mask_token_id": 151, "eos_token_id": 150}
    return random_model(family_of(family).architecture(tiny_config(family) | ids)).double()


def windows(n=3, length=26):
    return torch.randint(3, 150, (n, length), generator=torch.Generator().manual_seed(0))


def written(name):
    """A model, its sampler, and the answers that it has written after three windows, with their passes."""
    family, sampler = SAMPLERS[name]
    model, steps = model_of(family), sampler.steps_for(GEN_LENGTH, None)
    kept = passes.written(model, sampler, windows()[:, :13], gen_length=GEN_LENGTH, steps=steps, seed=0)
    return model, sampler, kept, Rollout(kept["ids"], 13, model.arch.mask_token_id)


@torch.no_grad()
def of_layout(model, tokens, table):
    *_, last = model.hidden_states(tokens[None], layout=Passes(table[None]).layout)
    return model.head(last[0])


@pytest.mark.parametrize("name", SAMPLERS)
@torch.no_grad()
def test_a_state_is_what_its_pass_sees(name):
    """Against the program run anew without a store, pass by pass."""
    model, sampler, kept, rollout = written(name)
    for i, prompt in enumerate(windows()[:, :13]):
        steps = sampler.steps_for(GEN_LENGTH, None)
        writing, runner, step = (
            sampler.begin(prompt, gen_length=GEN_LENGTH, steps=steps, arch=model.arch),
            Recomputed(model),
            0,
        )
        while (due := writing.due) is not None:
            if due.look is not None:
                assert rollout.ids[step, i].equal(writing.canvas[: 13 + GEN_LENGTH])
            if due.at is not None:  # takes the place of stored tokens, which `Recomputed` does not do
                break
            logits, _ = runner.run(due)
            if due.look is not None:
                tokens, table, look = passes.at_pass([kept[f"{key}.{i}"] for key in ("tokens", "table", "look")], step)
                torch.testing.assert_close(of_layout(model, tokens, table)[look], logits, atol=1e-10, rtol=0)
                step += 1
            if getattr(sampler, "suppress_mask", False):
                logits[:, model.arch.mask_token_id] = -torch.inf
            best, found = logits.softmax(-1).max(-1) if len(logits) else (logits.sum(-1), logits.sum(-1).long())
            writing.send((found, best))
        assert step


@torch.no_grad()
def test_blocks_at_a_mask_ratio_are_those_of_training():
    """The masked tokens of a text as one forward of the text and its noisy copy predicts them."""
    model, text = model_of("sdar"), windows(1)[0]
    masked = torch.rand(len(text), generator=torch.Generator().manual_seed(1)) < 0.5
    sampler = SDARSampler()
    tokens, table, look = passes.shown(passes.denoised(text, masked, sampler.factorization(), model.arch.mask_token_id))
    noisy = text.masked_fill(masked, model.arch.mask_token_id)
    both = model(torch.cat((text, noisy))[None], layout=copies(len(text), 4, Attention(4), 1))[0]
    torch.testing.assert_close(of_layout(model, tokens, table)[look], both[len(text) :][masked], atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", ["sdar", "nemotron", "autoregressive", "fast_dllm"])
def test_the_same_model_has_not_moved_and_another_one_has(name):
    model, sampler, kept, rollout = written(name)
    asked = passes.ratio_questions(windows(), sampler.factorization(), model.arch.mask_token_id, seed=0)
    assert len(asked) == (0 if name == "autoregressive" else 5)
    asked += passes.state_questions(kept, rollout, 4, seed=0)
    steps = sampler.steps_for(GEN_LENGTH, None)
    said = list(fidelity.predict(model, sampler, asked, steps=steps))
    reference = fidelity.Reference(rollout, asked, said, steps)
    same = fidelity.measure_fidelity(model, sampler, reference)
    rows = same["by_mask_ratio"] + same["by_step"]
    assert {(row["divergence"], row["agreement"]) for row in rows} == {(0.0, 1.0)}
    assert same["answers"]["agreement"] == 1
    assert set(same["answers"]["first_diverging_step"]) == {None}
    with torch.no_grad():
        model.blocks[0].down.weight.add_(torch.randn(model.blocks[0].down.weight.shape) * 0.3)
    other = fidelity.measure_fidelity(model, sampler, reference)
    assert all(row["divergence"] > 0 for row in other["by_mask_ratio"] + other["by_step"])


def test_rows_of_a_rollout_last_as_long_as_the_longest():
    """A row's states are those it has alone, the last one repeated."""
    model, sampler, _, rollout = written("sdar")
    how = {"gen_length": GEN_LENGTH, "steps": sampler.steps_for(GEN_LENGTH, None), "seed": 0}
    alone = write(model, sampler, windows()[:1, :13], **how)
    assert rollout.ids[: len(alone.ids), :1].equal(alone.ids)
    assert all(state.equal(alone.ids[-1]) for state in rollout.ids[len(alone.ids) :, :1])
