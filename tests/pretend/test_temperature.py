"""Answers that are drawn: on the pretend device the CPU's tokens, in batches of any size, and no noise crosses over."""

from __future__ import annotations

import pytest
import torch
from goldens import tiny

from dqx.diffusion import SeededNoise
from dqx.diffusion.engine import Engine, Prompt
from dqx.diffusion.samplers import DreamSampler, LLaDASampler, Sampler
from dqx.models.transformer import MaskedDiffusionTransformer
from pretend import device as machine

SAMPLERS = [
    LLaDASampler(temperature=0.8),
    LLaDASampler("random", 1.2, suppress_eos_confidence=True),
    LLaDASampler(temperature=0.5, threshold=0.02, cache="dual"),
    DreamSampler("origin", temperature=0.7),
    DreamSampler("entropy", temperature=0.3, alg_temp=0.5, top_p=0.9),
]
PROMPTS = [Prompt(list(range(3, 3 + n)), ("task", i)) for i, n in enumerate((5, 1, 9, 5, 14, 2, 7, 3))]


def asked_of(sampler: Sampler) -> tuple[MaskedDiffusionTransformer, dict[str, int]]:
    if isinstance(sampler, LLaDASampler):
        return tiny("llada"), {"gen_length": 8, "block_length": 4, "steps": 4}
    return tiny("dream"), {"gen_length": 8, "steps": 4}


def ids_of(engine: Engine) -> list[list[int]]:
    return [answer.ids for answer in engine.generate(PROMPTS)]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
@pytest.mark.usefixtures("pretend")
def test_tokens_are_those_of_the_cpu_in_batches_of_any_size(sampler: Sampler) -> None:
    model, schedule = asked_of(sampler)
    expected = ids_of(Engine(model, sampler, batch_size=1, **schedule))
    assert len({str(ids) for ids in expected}) == len(PROMPTS)
    model = model.to("pretend:0")
    for size in (1, 3, 8):
        assert ids_of(Engine(model, sampler, batch_size=size, **schedule)) == expected
    for prompt, ids in zip(PROMPTS[:2], expected, strict=False):
        noise = SeededNoise(0, [prompt.document])
        alone = sampler.generate(model, torch.tensor([prompt.ids]), noise=noise, **schedule)
        assert alone.ids.tolist() == [ids]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
@pytest.mark.usefixtures("pretend")
def test_what_travels_to_the_device_has_the_size_of_the_tokens(
    sampler: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token ids and masks [B, T], and of the noise what it is for: a few whole numbers of each position and row."""
    model, schedule = asked_of(sampler)
    model = model.to("pretend:0")
    engine, crossed, sent = Engine(model, sampler, batch_size=8, **schedule), machine.crossed, []

    def watched(op, args, kwargs, state, asked):
        source = args[1] if op.overloadpacket is torch.ops.aten.copy_ else args[0]
        if not machine.on_device(source):
            sent.append(source)
        return crossed(op, args, kwargs, state, asked)

    monkeypatch.setattr(machine, "crossed", watched)
    engine.generate(PROMPTS)
    assert len(sent) > schedule["steps"]
    assert not any(tensor.is_floating_point() for tensor in sent)
    assert max(tensor.numel() for tensor in sent) < model.arch.vocab_size  # what one position would take
