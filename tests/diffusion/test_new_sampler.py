"""A sampler of one's own is one module and one YAML file; a task then runs with it like with the others."""

import sys

import pytest

from dqx.api import load_configured
from dqx.config.compose import compose, resolve
from dqx.diffusion.engine import Engine, Prompt

MODULE = '''
from dataclasses import dataclass

import torch

from dqx.diffusion.samplers import Call, Sampler
from dqx.diffusion.settings import count_problems


@dataclass(frozen=True)
class LeftToRight(Sampler):
    """The first masked token of the answer, step after step: `per_step` of them."""

    per_step: int = 1

    @property
    def name(self):
        return "left_to_right"

    def problems(self, gen_length, block_length, steps):
        problems = count_problems(gen_length=gen_length, steps=steps)
        if not problems and steps * self.per_step != gen_length:
            problems.append(f"steps={steps} times {self.per_step} tokens are not gen_length={gen_length}")
        return problems

    def calls(self, gen_length, block_length, steps, random):
        return [Call(step, 0, gen_length, gen_length - step * self.per_step) for step in range(steps)]

    def due(self, masked, at, *, block_length, steps, noise):
        look = masked & (masked.cumsum(1) <= self.per_step)
        return look, look.sum(1).cpu()

    def candidates(self, logits, where, at, *, noise, arch):
        logits[:, arch.mask_token_id] = -torch.inf
        return logits.argmax(-1), torch.ones(len(logits), device=logits.device)
'''


@pytest.fixture
def lm(tmp_path, monkeypatch):
    (tmp_path / "left_to_right.py").write_text(MODULE)
    (tmp_path / "model" / "sampler").mkdir(parents=True)
    (tmp_path / "model" / "sampler" / "left_to_right.yaml").write_text(
        "_target_: left_to_right.LeftToRight\nper_step: 2\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    overrides = [
        f"hydra.searchpath=[file://{tmp_path}]",
        "model=nano_llada",
        "model.sampler=left_to_right",
        "parts=[left_to_right]",
    ]
    yield load_configured(resolve(compose(overrides)).model)
    sys.modules.pop("left_to_right", None)


def test_a_task_runs_with_a_new_sampler(lm):
    result = lm.evaluate("nano_sums", limit=2, steps=8)["nano_sums"]
    assert (result.n, result.n_forwards + result.n_saved) == (2, 16)
    assert result.notes == []
    with pytest.raises(ValueError, match="steps=4 times 2 tokens are not gen_length=16"):
        lm.evaluate("nano_sums", limit=2, steps=4)


def test_batches_write_what_the_plain_loop_writes(lm):
    prompts = [lm.tokens(text) for text in ("Question: 5-4+2=?\nAnswer:", "def f(x):")]
    engine = Engine(lm.model, lm.sampler, gen_length=8, steps=4)
    answers = engine.generate([Prompt(ids, i) for i, ids in enumerate(prompts)])
    for ids, answer in zip(prompts, answers, strict=True):
        assert answer.ids == lm.sampler.generate(lm.model, ids[None], gen_length=8, steps=4).ids[0].tolist()
