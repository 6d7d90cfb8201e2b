"""Dream's sampler `diffusion_generate`: the whole answer at once, on a grid of times from 1 to eps.

Ye et al. 2025, arXiv:2508.15487, and the generation_utils.py of the hub checkpoints, whose tokens it reproduces at
temperature 0. Where random numbers are used (temperature, alg_temp, origin) the distributions are theirs,
the streams ours.

Between times t and s, each masked position would be revealed with probability 1 - s/t. `origin` does just
that; the others write n = `int(M * (1 - s/t))` of a row's M masked positions, the most confident first, and all M
at the last step. Truncation makes the first steps of a fine grid write nothing (with steps >= new
tokens several at the end): the result is as published, and a step that writes nothing costs no forward.

**Temperature 0 can collapse.** Dream's entropy order at temperature 0 is reported to lose most of GSM8K
(81.8 to 35.0), and at 0.1 many confidences tie at 1.0. The study nevertheless ran temperature 0 with top_p 0.95.

For the approximations of `llada.py`, run Dream's models with that sampler (`model.sampler=llada`). There is no
cfg_scale: `diffusion_generate` has no guidance. The study's `cfg_scale: 1.0` belongs to the likelihood of Dream's
harness, where `u + cfg * (l - u)` applies only above 1: it means no guidance.

In `generate`, M is the mean over the batch (`due_together`), which is each row's own count unless a model predicts the
mask token; only then do rows of a batch influence each other, and `suppress_mask` rules it out. In `due`, and so in the
batches of `engine.py`, M is the row's own count. We differ in three more things:
- a row with fewer masks than n writes those it has (theirs also puts masks back over tokens);
- masks inside the prompt are part of the prompt and stay (theirs get filled in, and count in M);
- equal confidences go to the leftmost position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from dqx.common.problems import raise_if
from dqx.diffusion.noise import Noise
from dqx.diffusion.samplers.base import Call, draw, gumbel
from dqx.diffusion.samplers.generate import Sampler
from dqx.diffusion.settings import choice_problems, count_problems, number_problems
from dqx.models.transformer import Architecture

ALGORITHMS = ("origin", "maskgit_plus", "topk_margin", "entropy")


@dataclass(frozen=True)
class DreamSampler(Sampler):
    """Settings of the sampler.

    The order `alg` is random for `origin`, else by the probability of the candidate (`maskgit_plus`), the difference of
    the two highest probabilities (`topk_margin`), or the negative entropy (`entropy`). `suppress_mask` is off as in the
    authors' code, where a model that predicts the mask token (trained ones do not) leaves a mask in the answer.
    """

    alg: str = "entropy"
    alg_temp: float | None = None  # above 0, positions are drawn with weights exp(confidence / alg_temp), not ranked
    temperature: float = 0.0  # 0 takes the argmax, above 0 tokens are drawn from softmax(logits / temperature)
    top_p: float | None = None  # the smallest set of tokens whose probability exceeds it is kept; None is off
    top_k: int | None = None  # so many likeliest tokens are kept; both act on candidate and confidence. None is off
    eps: float = 1e-3  # the last time of the grid
    suppress_mask: bool = False  # the mask token is never predicted

    @property
    def name(self) -> str:
        """The order, `entropy`."""
        return self.alg

    def block_length(self, wanted: int | None) -> None:
        """None: the whole answer is written at once."""

    def notes(self, gen_length: int | None, block_length: int | None) -> list[str]:
        if block_length in (None, gen_length):
            return []
        return [f"block_length={block_length} is not used: Dream's sampler writes the whole answer at once"]

    def problems(self, gen_length: int, block_length: int | None, steps: int) -> list[str]:
        problems = choice_problems("sampler.alg", self.alg, ALGORITHMS)
        problems += number_problems("sampler.temperature", self.temperature, 0)
        problems += number_problems("sampler.eps", self.eps, 0, 1, above=True)
        if self.alg_temp is not None:
            problems += number_problems("sampler.alg_temp", self.alg_temp, 0)
            if self.alg == "origin" and self.alg_temp:
                problems.append(
                    f"sampler.alg_temp={self.alg_temp!r} does nothing with sampler.alg=origin, whose order is "
                    "random already; set alg_temp to null or choose another alg"
                )
        if self.top_p is not None:
            problems += number_problems("sampler.top_p", self.top_p, 0, 1, above=True)
        if self.top_k is not None:
            problems += count_problems(**{"sampler.top_k": self.top_k})
        problems += count_problems(gen_length=gen_length, steps=steps)
        if block_length is not None and block_length != gen_length:
            problems.append(
                f"block_length={block_length!r} is set, but Dream's sampler writes the whole answer at once; "
                f"set it to null or to gen_length={gen_length!r}"
            )
        return problems

    def calls(self, gen_length: int, block_length: int | None, steps: int, random: torch.Generator) -> list[Call]:
        """The calls of the model for one answer. Only the schedule of `origin` draws from `random`."""
        raise_if(self.problems(gen_length, block_length, steps))
        masked, calls = gen_length, []
        for step, fraction in enumerate(fractions(steps, self.eps)):
            if self.alg == "origin":
                count = int((torch.rand(masked, generator=random) < fraction).sum())
            else:
                count = n_written(torch.tensor([masked]), fraction)
            if count:
                calls.append(Call(step, 0, gen_length, masked))
            masked -= count
        return calls

    def due(
        self, masked: Tensor, at: Sequence[int], *, block_length: int | None, steps: int, noise: Noise
    ) -> tuple[Tensor, Tensor]:
        """A step looks at all masks; with `origin` at those that it reveals, which are drawn from `noise`."""
        shares = fractions(steps, self.eps)[list(at)]
        if self.alg != "origin":
            pairs = zip(masked.sum(1).cpu(), shares, strict=True)
            return masked, torch.tensor([n_written(count[None], share) for count, share in pairs])
        share_of_each = shares.to(masked.device)[:, None].expand_as(masked)[masked]
        revealed = draw(noise, "order", at, masked)[:, 0] < share_of_each
        look = masked.masked_scatter(masked, revealed)
        return look, look.sum(1).cpu()

    def due_together(
        self, masked: Tensor, step: int, *, block_length: int | None, steps: int, noise: Noise
    ) -> tuple[Tensor, Tensor]:
        """M is the mean over the batch, as in the authors' code; a row with fewer masks writes what it has."""
        if self.alg == "origin":
            return super().due_together(masked, step, block_length=block_length, steps=steps, noise=noise)
        count = n_written(masked.sum(1).cpu(), fractions(steps, self.eps)[step])
        return masked, torch.full((len(masked),), count)

    def candidates(
        self, logits: Tensor, where: Tensor, at: Sequence[int], *, noise: Noise, arch: Architecture
    ) -> tuple[Tensor, Tensor]:
        if self.suppress_mask:
            logits[:, arch.mask_token_id] = -torch.inf
        if self.temperature > 0:
            logits = logits / self.temperature
        probs = filter_logits(logits, self.top_p, self.top_k).softmax(-1)
        if self.temperature > 0:
            tokens = draw_tokens(probs, draw(noise, "token", at, where, device=probs.device))
        else:
            tokens = probs.argmax(-1)
        if self.alg == "topk_margin":
            top = probs.topk(2, dim=-1).values
            confidence = top[:, 0] - top[:, 1]
        elif self.alg == "entropy":
            confidence = (probs * (probs + 1e-10).log()).sum(-1)
        else:
            confidence = probs.gather(-1, tokens[:, None])[:, 0]
        if self.alg_temp:  # Gumbel noise turns a ranking into draws without replacement
            uniforms = draw(noise, "order", at, where, device=confidence.device)[:, 0]
            confidence = confidence.double() / self.alg_temp + gumbel(uniforms)
        return tokens, confidence


@lru_cache
def fractions(steps: int, eps: float) -> Tensor:
    """The share of the masked positions that each step writes [steps], float32: 1 - s/t, and 1 at the last."""
    times = torch.linspace(1, eps, steps + 1, dtype=torch.float32)
    return torch.cat((1 - times[1:-1] / times[:-2], torch.ones(1)))


def n_written(masks: Tensor, fraction: Tensor) -> int:
    """`int(M * fraction)`, M the mean of `masks` [B]; in float32, because truncation hangs on the last bit."""
    return int(masks.sum() / len(masks) * fraction)


def filter_logits(logits: Tensor, top_p: float | None, top_k: int | None) -> Tensor:
    """Logits [n, V] with the smallest finite number at tokens outside the nucleus, then outside the top k.

    The likeliest token always stays, and so do tokens that tie with the k-th.
    """
    lowest = torch.finfo(logits.dtype).min
    if top_p is not None and top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True, stable=True)
        drop = ordered.softmax(-1).cumsum(-1) > top_p
        drop = torch.cat((torch.zeros_like(drop[:, :1]), drop[:, :-1]), dim=-1)  # what came before exceeds top_p
        logits = logits.masked_fill(torch.zeros_like(drop).scatter(-1, index, drop), lowest)
    if top_k is not None and top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, lowest)
    return logits


def draw_tokens(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens [n] distributed as `probs` [n, V], by inverting the cumulative sum at `uniforms` [n, 1], in float64."""
    cumulative = probs.double().cumsum(-1)
    total = cumulative[:, -1:]
    below = torch.nextafter(total, torch.zeros_like(total))  # so that a token of probability 0 is never drawn
    return torch.searchsorted(cumulative, torch.minimum(uniforms * total, below), right=True)[:, 0]
