"""Fast-dLLM v2's sampler: blocks over exact keys and values, in each of them sub-blocks from left to right.

Wu et al. 2025, arXiv:2509.26328, and the `generate` of the checkpoints, whose tokens and passes it reproduces. Logits
are shifted: row i - 1 predicts token i, and behind a finished block its last row writes the first token of the next
one. We differ in three things:
- where a step would change nothing, because the likeliest token is the mask, the sub-block ends (theirs repeats the
  step for ever);
- equal probabilities go to the leftmost position;
- the answer is cut to the length that was asked for.

A prompt of exactly one block is neither stored nor seen, as in theirs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from dqx.common.problems import raise_if
from dqx.diffusion.factorization import Factorization
from dqx.diffusion.samplers.base import Call
from dqx.diffusion.samplers.blockwise import (
    BlockwiseSampler,
    Pass,
    Program,
    calls_of_blocks,
    first_end,
    most_probable,
    no_schedule,
    own_block,
    stored,
)
from dqx.diffusion.settings import count_problems, number_problems
from dqx.models.architecture import CAUSAL, FULL, Architecture, Attention


@dataclass(frozen=True)
class FastDLLMSampler(BlockwiseSampler):
    """Settings of the checkpoints' `generate`. There is no number of steps: a sub-block takes those it needs."""

    block: int = 32
    sub_block: int = 8
    threshold: float = 0.9  # what lies above it is written at once, and always the likeliest token
    #: Passes compute the sub-block alone, over keys and values of the rest of the block as an earlier pass had them.
    block_cache: bool = False

    @property
    def name(self) -> str:
        cache = ", block cache" if self.block_cache else ""
        return f"low_confidence {self.threshold:g}, blocks of {self.block} in {self.sub_block}{cache}"

    @property
    def approximations(self) -> tuple[str, ...]:
        return ("block_cache",) if self.block_cache else ()

    def exact(self) -> FastDLLMSampler:
        return replace(self, block_cache=False)

    def block_length(self, wanted: int | None) -> int:
        """The sampler's own."""
        return self.block

    def problems(self, gen_length: int, block_length: int | None, steps: int) -> list[str]:
        problems = count_problems(**{"sampler.block": self.block, "sampler.sub_block": self.sub_block})
        if not problems and self.block % self.sub_block:
            problems.append(f"sampler.sub_block={self.sub_block} does not divide sampler.block={self.block}")
        problems += number_problems("sampler.threshold", self.threshold, 0, 1)
        problems += own_block(block_length, self.block) + count_problems(gen_length=gen_length, steps=steps)
        return problems + no_schedule(gen_length, steps, "a sub-block takes as many passes as its threshold asks for")

    def calls(self, gen_length: int, block_length: int | None, steps: int, random: torch.Generator) -> list[Call]:
        raise_if(self.problems(gen_length, block_length, steps))
        return list(calls_of_blocks(gen_length, self.block, self.block, [1] * (self.block - 1)))

    def fits(self, arch: Architecture) -> bool:
        """Block-wise attention, and logits that are shifted."""
        return arch.attention not in (FULL, CAUSAL) and arch.logit_shift

    def factorization(self) -> Factorization:
        """Blocks whose first token is autoregressive, as it is written behind a finished block (training predicts it
        from the masked block before). A prompt of exactly one block is seen."""
        return Factorization(self.block, Attention(self.block), ahead=True, shift=True)

    def canvas(self, prompt: Tensor, gen_length: int, arch: Architecture) -> Tensor:
        """Up to the end of a block, and one token more."""
        end = (len(prompt) // self.block + -(-gen_length // self.block)) * self.block + 1
        return F.pad(prompt, (0, end - len(prompt)), value=arch.mask_token_id)

    def program(self, canvas: Tensor, prompt: int, *, gen_length: int, steps: int, arch: Architecture) -> Program:
        mask, attention = arch.mask_token_id, Attention(self.block)
        known, start, base = prompt, prompt // self.block * self.block, 0  # base: how many tokens are stored
        if prompt > self.block:
            tokens, _ = yield stored(canvas[:start], attention, start == prompt, 0)
            base = start
            if start == prompt:
                canvas[prompt], known = tokens[0], prompt + 1
        for start in range(start, len(canvas) - 1, self.block):  # noqa: B020  from the one that holds the first mask
            if first_end(canvas[prompt:known], arch) is not None:
                break
            block, computed = canvas[start : start + self.block], False
            for sub in range(0, self.block, self.sub_block):
                here = block[sub : sub + self.sub_block]
                while (masked := here == mask).any():
                    alone = self.block_cache and computed and not bool(masked[0])
                    first = sub if alone else 0  # of the tokens computed, in the block
                    rows = (sub - first + masked.nonzero()[:, 0] - 1).clamp(min=0)
                    look = torch.zeros(self.sub_block if alone else self.block, dtype=torch.bool)
                    look[rows] = True
                    looked = look.nonzero()[:, 0]
                    tokens, probability = yield Pass(
                        (here if alone else block).clone(),
                        attention,
                        stored=self.block_cache,
                        look=look,
                        predicts=start - prompt + first + looked + 1,
                        step=start - prompt + sub,
                        keep=None if alone else base,
                        at=base + sub if alone else None,
                    )
                    computed, found = True, torch.searchsorted(looked, rows)
                    chosen = most_probable(probability[found], 1, self.threshold, above=True)
                    written = here[masked].where(~chosen, tokens[found])
                    if written.equal(here[masked]):
                        break
                    here[masked] = written
                    end = first_end(canvas[known : start + self.block], arch)
                    if end is not None and not (canvas[known : known + end] == mask).any():
                        canvas[known + end + 1 :] = mask
                        return
            known = start + self.block
            last = torch.arange(self.block) == self.block - 1
            ahead = torch.tensor([known - prompt])
            tokens, _ = yield Pass(block.clone(), attention, True, last, ahead, known - prompt, keep=base)
            base += self.block
            canvas[known] = tokens[0]
            known += 1
        if (end := first_end(canvas[prompt:known], arch)) is not None:
            canvas[prompt + end + 1 :] = mask
