"""Denoising states: fixed windows, state by state as the model at full precision writes their second parts.

The first half of each window is a prompt; the run's sampler writes an answer after it, and what it sees before every
step is recorded. The states are made once, by full precision, and both models are shown the same ones (teacher
forcing): what differs on them differs in the models and not in the answers. Noise, if the sampler uses any, is a
function of (seed, window, step, position).

Shapes: N windows of T tokens, P of them given and G new, S steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from dqx.common.halving import in_batches
from dqx.diffusion.noise import SeededNoise
from dqx.diffusion.samplers import Sampler
from dqx.diffusion.samplers.blockwise import BlockwiseSampler, Pass
from dqx.models.transformer import MaskedDiffusionTransformer

#: What a token is to the model at a state: given, generated and unmasked by now, or still masked.
TOKEN_CLASSES = ("prompt", "committed", "masked")
TOGETHER = 8  # windows that go through the model at a time


@dataclass(frozen=True)
class State:
    """The windows at one denoising step."""

    ids: Tensor  # [N, T] as the model sees them, masks included; on the CPU
    step: int  # from 0
    prompt: int  # tokens of each row that were given
    mask_ratio: float  # share of the answers' tokens that are still masked
    mask_token_id: int

    def token_class(self, name: str) -> Tensor:
        """The tokens [N, T] that are of a class. Raises ValueError for a name that is none of TOKEN_CLASSES."""
        if name not in TOKEN_CLASSES:
            raise ValueError(f"{name} is no class of tokens; they are {', '.join(TOKEN_CLASSES)}")
        given = torch.arange(self.ids.shape[1], device=self.ids.device) < self.prompt
        if name == "prompt":
            return given.expand_as(self.ids)
        masked = self.ids == self.mask_token_id
        return ~given & (masked if name == "masked" else ~masked)


@dataclass(frozen=True)
class Rollout:
    """Answers as one model wrote them, in all their states."""

    ids: Tensor  # [S + 1, N, T]: the windows before each step and in the end; on the CPU
    prompt: int
    mask_token_id: int

    @property
    def steps(self) -> int:
        return len(self.ids) - 1

    @property
    def prompts(self) -> Tensor:
        """What was given [N, P]."""
        return self.ids[0, :, : self.prompt]

    @property
    def answers(self) -> Tensor:
        """The new tokens [S + 1, N, G]."""
        return self.ids[:, :, self.prompt :]

    def lasting(self, steps: int) -> Rollout:
        """The same with at least so many steps, the last of which write nothing."""
        return replace(self, ids=lasting(self.ids, steps + 1))

    def state(self, step: int) -> State:
        """The windows before a step, from 0."""
        share = (self.answers[step] == self.mask_token_id).double().mean().item()
        return State(self.ids[step], step, self.prompt, share, self.mask_token_id)

    def states(self, count: int) -> list[State]:
        """At most `count` states, spread evenly over the steps that write something."""
        writing = [step for step in range(self.steps) if not self.ids[step].equal(self.ids[step + 1])]
        return [self.state(writing[i]) for i in spread(min(count, len(writing)), len(writing))]


def spread(count: int, total: int) -> list[int]:
    """`count` indices spread evenly over range(total), in ascending order: each equally often, up to one."""
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


def ignored(row: int, one: Pass) -> None:
    """Nothing is done with a pass."""


def lasting(ids: Tensor, states: int) -> Tensor:
    """States [S, N, T] with the last one repeated, so that they are at least so many."""
    return torch.cat((ids, ids[-1:].expand(max(0, states - len(ids)), -1, -1)))


def schedule(gen_length: int, steps: int | None) -> int:
    """The steps of answers of `gen_length` tokens: the run's, at most (and, where it sets none) one per token."""
    return min(steps or gen_length, gen_length)


def noise(seed: int, rows: range) -> SeededNoise:
    """The sampler's noise for some of the windows."""
    return SeededNoise(seed, [("fidelity", i) for i in rows])


def write(
    model: MaskedDiffusionTransformer,
    sampler: Sampler,
    prompts: Tensor,
    *,
    gen_length: int,
    steps: int,
    seed: int = 0,
    together: int = TOGETHER,
    on_pass: Callable[[int, Pass], None] | None = None,
) -> Rollout:
    """Let `model` write `gen_length` tokens after each row of `prompts` [N, P], `together` rows at a time.

    Samplers that write by passes write row after row, each in passes of its own: a state is what a pass looks at, and
    shorter rows repeat their last one. `on_pass` gets a row's number and each of its passes.
    """

    def written(rows: range) -> Tensor:
        given, seen = prompts[rows.start : rows.stop], list[Tensor]()
        answer = sampler.generate(
            model,
            given,
            gen_length=gen_length,
            steps=steps,
            noise=noise(seed, rows),
            on_step=lambda ids: seen.append(ids.cpu()),
        )
        return torch.stack([*seen, torch.cat((given, answer.ids.cpu()), dim=1)])

    def passed(row: int) -> Tensor:
        assert isinstance(sampler, BlockwiseSampler)
        given, seen = prompts[row : row + 1], list[Tensor]()
        answer = sampler.generate(
            model,
            given,
            gen_length=gen_length,
            steps=steps,
            noise=noise(seed, range(row, row + 1)),
            on_step=seen.append,
            on_pass=partial(on_pass or ignored, row),
        )
        return torch.stack([*seen, torch.cat((given, answer.ids.cpu()), dim=1)])

    if isinstance(sampler, BlockwiseSampler):
        rows = [passed(row) for row in range(len(prompts))]
        longest = max(map(len, rows))
        ids = torch.cat([lasting(row, longest) for row in rows], dim=1)
        return Rollout(ids, prompts.shape[1], model.arch.mask_token_id)
    parts = list(in_batches(len(prompts), together, written, model.device))
    return Rollout(torch.cat(parts, dim=1), prompts.shape[1], model.arch.mask_token_id)
