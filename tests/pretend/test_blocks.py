"""Block-wise samplers on the pretend device: the CPU's tokens, and one wait for each step of all rows."""

from __future__ import annotations

import pytest
import torch
from goldens import GOLDEN3

from dqx.diffusion.block_engine import BlockEngine
from dqx.diffusion.engine import Prompt
from dqx.diffusion.samplers.blockwise import BlockwiseSampler
from dqx.diffusion.samplers.fast_dllm import FastDLLMSampler
from dqx.diffusion.samplers.nemotron import AutoregressiveSampler, NemotronSampler, SpeculativeSampler
from dqx.diffusion.samplers.sdar import SDARSampler
from dqx.models.checkpoint import inspect, load_weights
from pretend.device import State
from pretend.test_waits import counted

SAMPLERS: dict[str, tuple[str, BlockwiseSampler]] = {
    "sdar": ("sdar", SDARSampler(threshold=0.5)),
    "sdar, drawn": ("sdar", SDARSampler(threshold=0.5, temperature=1.0, top_k=20, top_p=0.9)),
    "nemotron": ("nemotron", NemotronSampler(block=8, threshold=0.5)),
    "autoregressive": ("nemotron", AutoregressiveSampler()),
    "speculative": ("nemotron", SpeculativeSampler(block=8)),
    "fast_dllm": ("fastdllm2", FastDLLMSampler(block=8, sub_block=4, threshold=0.5)),
    "fast_dllm, block cache": ("fastdllm2", FastDLLMSampler(block=8, sub_block=4, threshold=0.5, block_cache=True)),
}
PROMPTS = [Prompt(torch.arange(3, 3 + n), n) for n in (9, 3, 17, 8)]


@pytest.mark.parametrize(("name", "sampler"), SAMPLERS.values(), ids=SAMPLERS)
def test_tokens_are_those_of_the_cpu_and_a_step_waits_once(
    name: str, sampler: BlockwiseSampler, pretend: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = inspect(str(GOLDEN3 / f"{name}_tiny"), mask_token_id=151 if name != "nemotron" else None)
    settings = {"gen_length": 16, "steps": 16, "seed": 3, "batch_size": 3}
    expected = BlockEngine(load_weights(checkpoint), sampler, **settings).generate(PROMPTS)
    engine = BlockEngine(load_weights(checkpoint, device="pretend"), sampler, **settings)
    steps, advance = [], engine.advance
    monkeypatch.setattr(engine, "advance", lambda batch: steps.append(len(batch)) or advance(batch))
    with counted(pretend) as waits:
        answers = engine.generate(PROMPTS)
    assert answers == expected
    assert waits == [len(steps)]
    assert set(steps) >= {3}
