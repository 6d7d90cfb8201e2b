"""LLaDA's sampler: semi-autoregressive denoising with low-confidence remasking.

Nie et al. 2025, arXiv:2502.09992, Algorithms 4 and 5, and the authors' generate.py, whose tokens it reproduces. We
differ in four things that the published settings never show:
- masks inside the prompt are part of the prompt and stay (theirs get filled in);
- equal confidences go to the leftmost position (theirs: whatever topk returns);
- a step in which nothing is written costs no forward;
- `suppress_eos_confidence` acts at every temperature (theirs, EOS: only at 0) and under random remasking.

It runs with models of every family: row i of the logits predicts token i in all of them.

**Approximations**, off by default, are those of Fast-dLLM (Wu et al. 2025, arXiv:2505.22618):
- `threshold`: a step writes what is due and, besides, every token of the block whose confidence is at least that, so
  that a block may need fewer steps than it has. With one step per token this is theirs; with fewer, the schedule still
  bounds the number of steps.
- `cache`: in the first step of a block everything is computed and keys and values are kept. In the block's other steps
  those before the block are reused (`prefix`), or those behind it too (`dual`), and only the rest is computed.
We differ in two things. A block's steps look at that block only, so a mask that the model wrote into an earlier one
stays (theirs wait for it). In models whose row i-1 predicts token i, the column before the block is computed with it;
theirs writes the block's first token in its first step, whatever its confidence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dqx.common.names import approximations
from dqx.common.problems import raise_if
from dqx.diffusion.noise import Noise
from dqx.diffusion.samplers.base import Call, draw, gumbel
from dqx.diffusion.samplers.generate import Sampler
from dqx.diffusion.settings import choice_problems, count_problems, number_problems
from dqx.models.transformer import Architecture

REMASKING = ("low_confidence", "random")
CACHES = ("prefix", "dual")


@dataclass(frozen=True)
class LLaDASampler(Sampler):
    """Settings of the sampler.

    `suppress_mask` is off as in the authors' code, where a model that predicts the mask token (trained ones do not)
    writes a mask, which later steps may fill, or which stays.
    """

    remasking: str = "low_confidence"  # masked tokens of the block to write first: the most probable, or `random` ones
    temperature: float = 0.0  # 0 takes the argmax; above 0, Gumbel noise of that strength is added in float64
    cfg_scale: float = 0.0  # classifier-free guidance w, 0 is off; above 0 doubles the forwards
    suppress_eos_logits: bool = False  # the end token is never predicted
    suppress_eos_confidence: bool = False  # positions that predict the end token (or end of turn) are written last
    eos_token_id: int | None = None  # the end token; None takes the model's own
    eot_token_id: int | None = None  # end of turn (LLaDA-8B: 126348)
    suppress_mask: bool = False  # the mask token is never predicted
    threshold: float | None = None  # approximate; tokens of this confidence are written at once. None is off
    cache: str | None = None  # approximate; `prefix` or `dual`: keys and values reused within a block. None is off

    @property
    def name(self) -> str:
        """`low_confidence`, or `low_confidence+threshold0.9+dual_cache`."""
        return "+".join((self.remasking, *self.approximations))

    @property
    def approximations(self) -> tuple[str, ...]:
        """What makes the sampler another one than the authors', in short names; empty by default."""
        return approximations(self.threshold, self.cache)

    @property
    def has_cache(self) -> bool:
        return self.cache is not None

    def exact(self) -> LLaDASampler:
        return replace(self, threshold=None, cache=None)

    def problems(self, gen_length: int, block_length: int | None, steps: int) -> list[str]:
        problems = choice_problems("sampler.remasking", self.remasking, REMASKING)
        problems += number_problems("sampler.temperature", self.temperature, 0)
        problems += number_problems("sampler.cfg_scale", self.cfg_scale, 0)
        if self.threshold is not None:
            problems += number_problems("sampler.threshold", self.threshold, 0, 1, above=True)
            if self.remasking == "random":
                problems.append(
                    f"sampler.threshold={self.threshold!r} has no meaning with sampler.remasking=random, whose order "
                    "does not look at confidences; write sampler.remasking=low_confidence, or sampler.threshold=null"
                )
        if self.cache is not None:
            problems += choice_problems("sampler.cache", self.cache, CACHES)
            if isinstance(self.cfg_scale, int | float) and self.cfg_scale > 0:
                problems.append(
                    f"sampler.cache={self.cache!r} cannot be used with sampler.cfg_scale={self.cfg_scale!r}: the "
                    "second pass of guidance sees another prompt; write sampler.cache=null, or sampler.cfg_scale=0"
                )
        block_length = gen_length if block_length is None else block_length
        wrong = count_problems(gen_length=gen_length, block_length=block_length, steps=steps)
        if wrong:
            return problems + wrong
        return problems + schedule_problems(gen_length, block_length, steps)

    def calls(self, gen_length: int, block_length: int | None, steps: int, random: torch.Generator) -> list[Call]:
        """The calls of the model for one answer follow from the schedule alone; nothing is drawn."""
        raise_if(self.problems(gen_length, block_length, steps))
        length = block_length or gen_length
        per_block = steps // (gen_length // length)
        passes = (False, True) if self.cfg_scale > 0 else (False,)
        calls: list[Call] = []
        for start in range(0, gen_length, length):
            masked = length
            for i in range(per_block):
                count = share(length, per_block, i)
                if count:
                    step = start // length * per_block + i
                    window = self.window(step, gen_length=gen_length, block_length=length, steps=steps) if i else None
                    calls += [Call(step, start, start + length, masked, blind, window) for blind in passes]
                masked -= count
        return calls

    def token_problems(self, vocab_size: int) -> list[str]:
        """What is wrong with the end tokens for a model with `vocab_size` tokens."""
        ids = {}
        if self.suppress_eos_logits or self.suppress_eos_confidence:
            ids["eos_token_id"] = self.eos_token_id
        if self.suppress_eos_confidence:
            ids["eot_token_id"] = self.eot_token_id
        return [
            f"sampler.{name}={token!r} is not a token of the model; ids go from 0 to {vocab_size - 1}"
            for name, token in ids.items()
            if token is not None and not (isinstance(token, int) and 0 <= token < vocab_size)
        ]

    def due(
        self, masked: Tensor, at: Sequence[int], *, block_length: int | None, steps: int, noise: Noise
    ) -> tuple[Tensor, Tensor]:
        """A step looks at the masks up to the end of its block, with a cache at those of the block alone.

        Nothing is drawn from `noise`. Where a threshold has written more before, a row writes fewer.
        """
        gen_length = masked.shape[1]
        length = block_length or gen_length
        per_block = steps // (gen_length // length)
        blocks = [self.block_at(step, gen_length=gen_length, block_length=length, steps=steps) for step in at]
        visible = torch.tensor([stop for _, stop in blocks], device=masked.device)[:, None]
        counts = torch.tensor([share(length, per_block, step % per_block) for step in at])
        position = torch.arange(gen_length, device=masked.device)
        look = masked & (position < visible)
        if self.cache is not None:
            look &= position >= visible - length
        return look, torch.minimum(counts, look.sum(1).cpu())

    def window(self, step: int, *, gen_length: int, block_length: int | None, steps: int) -> tuple[int, int] | None:
        if self.cache is None:
            return None
        start, stop = self.block_at(step, gen_length=gen_length, block_length=block_length, steps=steps)
        return start, gen_length if self.cache == "prefix" else stop

    def block_at(self, step: int, *, gen_length: int, block_length: int | None, steps: int) -> tuple[int, int]:
        length = block_length or gen_length
        start = step // (steps // (gen_length // length)) * length
        return start, start + length

    def candidates(
        self, logits: Tensor, where: Tensor, at: Sequence[int], *, noise: Noise, arch: Architecture
    ) -> tuple[Tensor, Tensor]:
        eos = arch.eos_token_id if self.eos_token_id is None else self.eos_token_id
        if self.suppress_mask:
            logits[:, arch.mask_token_id] = -torch.inf
        if self.suppress_eos_logits:
            logits[:, eos] = -torch.inf

        if self.temperature > 0:  # the argmax of exp(l) / (-log u)^t, without its overflow
            noisy = gumbel(draw(noise, "token", at, where, logits.shape[-1], logits.device))
            tokens = noisy.mul_(self.temperature).add_(logits).argmax(-1)
        else:
            tokens = logits.argmax(-1)

        if self.remasking == "random":
            confidence = draw(noise, "order", at, where, device=logits.device)[:, 0]
        if self.suppress_eos_confidence:
            ends = [eos] if self.eot_token_id is None else [eos, self.eot_token_id]
            logits[:, ends] = -torch.inf
        if self.remasking == "low_confidence":
            confidence = logits.softmax(-1).gather(-1, tokens[:, None])[:, 0]
        elif self.suppress_eos_confidence:
            confidence = confidence.masked_fill(torch.isin(tokens, torch.tensor(ends, device=tokens.device)), 0.0)
        return tokens, confidence


def schedule_problems(gen_length: int, block_length: int, steps: int) -> list[str]:
    """What keeps `steps` from being shared equally by the blocks of an answer."""
    if gen_length % block_length:
        fits = [b for b in range(1, gen_length + 1) if gen_length % b == 0]
        return [f"block_length={block_length} does not divide gen_length={gen_length}; {', '.join(map(str, fits))} do"]
    if steps % (n_blocks := gen_length // block_length):
        below = steps - steps % n_blocks
        nearest = f"{below} or {below + n_blocks}" if below else f"{n_blocks}"
        return [
            f"steps={steps} cannot be shared equally by {n_blocks} blocks (gen_length={gen_length}, "
            f"block_length={block_length}); {nearest} can"
        ]
    return []


def share(total: int, parts: int, i: int) -> int:
    """Size of part i when `total` is split evenly into `parts`, the remainder going to the first ones."""
    return total // parts + (i < total % parts)
