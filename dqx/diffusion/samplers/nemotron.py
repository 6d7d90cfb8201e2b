"""Samplers of Nemotron-Labs-Diffusion (arXiv:2607.05722): three ways to write with the same weights.

Final tokens are always computed causally, and each block begins with the token that the last final row predicts (the
next one, as in an autoregressive model). `NemotronSampler` denoises the rest of a block with full attention over what
is stored, where row i predicts token i; `AutoregressiveSampler` writes token by token; `SpeculativeSampler` drafts a
block by denoising and keeps the part that the causal pass would have written itself.

They reproduce the tokens and the passes of the checkpoint's own functions at temperature 0. Blocks are counted from the
end of the prompt. We differ in that equal probabilities go to the leftmost position.
"""

from __future__ import annotations

from dataclasses import dataclass

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
from dqx.diffusion.samplers.llada import schedule_problems, share
from dqx.diffusion.settings import count_problems, number_problems
from dqx.models.architecture import CAUSAL, FULL, Architecture


@dataclass(frozen=True)
class NemotronSampler(BlockwiseSampler):
    """The checkpoint's `generate`. `steps` are shared equally by the blocks of an answer."""

    block: int = 32
    threshold: float | None = 0.9  # what reaches it is written at once; None: the schedule alone
    causal_context: bool = True  # False: final tokens see each other in full, and no token is written ahead of a block
    max_thinking_tokens: int | None = None  # at this token of the answer `end_think_token_id` is written
    end_think_token_id: int | None = None

    @property
    def name(self) -> str:
        threshold = "" if self.threshold is None else f" {self.threshold:g}"
        return f"low_confidence{threshold}, blocks of {self.block}" + ("" if self.causal_context else ", full context")

    def block_length(self, wanted: int | None) -> int:
        """The sampler's own."""
        return self.block

    def problems(self, gen_length: int, block_length: int | None, steps: int) -> list[str]:
        problems = count_problems(**{"sampler.block": self.block})
        if self.threshold is not None:
            problems += number_problems("sampler.threshold", self.threshold, 0, 1)
        if (self.max_thinking_tokens is None) != (self.end_think_token_id is None):
            problems.append(
                "sampler.max_thinking_tokens and sampler.end_think_token_id belong together: the token is written once "
                "so many have been; set both, or neither"
            )
        problems += own_block(block_length, self.block)
        problems += count_problems(gen_length=gen_length, steps=steps)
        return problems or schedule_problems(-(-gen_length // self.block) * self.block, self.block, steps)

    def token_problems(self, vocab_size: int) -> list[str]:
        token = self.end_think_token_id
        if token is None or 0 <= token < vocab_size:
            return []
        return [f"sampler.end_think_token_id={token} is not a token of the model; ids go from 0 to {vocab_size - 1}"]

    def per_block(self, gen_length: int, steps: int) -> int:
        """Denoising steps of a block, at most."""
        return max(1, steps // -(-gen_length // self.block))

    def calls(self, gen_length: int, block_length: int | None, steps: int, random: torch.Generator) -> list[Call]:
        raise_if(self.problems(gen_length, block_length, steps))
        per_block = self.per_block(gen_length, steps)
        counts = [share(self.block - self.causal_context, per_block, i) for i in range(per_block)]
        return list(calls_of_blocks(gen_length, self.block, per_block, counts))

    def steps_for(self, gen_length: int, wanted: int | None) -> int:
        """As many as the answer has tokens are as many as its whole blocks have."""
        whole = -(-gen_length // self.block) * self.block
        return whole if wanted is None or wanted == gen_length else wanted

    def fits(self, arch: Architecture) -> bool:
        """Causal attention, and full attention inside a block."""
        return arch.attention == CAUSAL and not arch.logit_shift

    def factorization(self) -> Factorization:
        """Blocks from the end of the prefix, each with an autoregressive first token: the causal pass over all before
        predicts it exactly, and the block's other tokens are denoised beside it, as `program` does."""
        raise_if(self.likelihood_problems())
        return Factorization(self.block, CAUSAL, from_prefix=True, ahead=True)

    def likelihood_problems(self) -> list[str]:
        if self.causal_context:
            return []
        return [
            "sampler.causal_context=false lets final tokens see each other in full, for which no likelihood is "
            "computed; leave it true for likelihood and text tasks"
        ]

    def canvas(self, prompt: Tensor, gen_length: int, arch: Architecture) -> Tensor:
        """Up to the end of a block."""
        return F.pad(prompt, (0, -(-gen_length // self.block) * self.block), value=arch.mask_token_id)

    def program(self, canvas: Tensor, prompt: int, *, gen_length: int, steps: int, arch: Architecture) -> Program:
        final, mask = CAUSAL if self.causal_context else FULL, arch.mask_token_id
        per_block = self.per_block(gen_length, steps)
        seed, _ = yield stored(canvas[:prompt], final, self.causal_context, 0)
        for number, start in enumerate(range(prompt, len(canvas), self.block)):
            block = canvas[start : start + self.block]
            if self.causal_context:
                block[0] = seed[0]
            self._end_thinking(block, canvas[prompt:start])
            total = int((block == mask).sum())
            for i in range(per_block):
                masked = block == mask
                if not masked.any():
                    break
                where = start - prompt + masked.nonzero()[:, 0]
                step = number * per_block + i
                tokens, probability = yield Pass(block.clone(), FULL, False, masked, where, step)
                due = share(total, per_block, i)
                count = min(len(tokens), due if self.threshold is None else max(1, due))
                block[masked] = block[masked].where(~most_probable(probability, count, self.threshold), tokens)
                if (end := first_end(block, arch)) is not None and not (block[:end] == mask).any():
                    break
            step, ahead = (number + 1) * per_block - 1, start + self.block - prompt
            seed, _ = yield stored(block, final, self.causal_context and ahead < len(canvas) - prompt, ahead, step)
            if (end := first_end(canvas[prompt : start + self.block], arch)) is not None:
                canvas[prompt + end + 1 :] = mask
                return

    def _end_thinking(self, block: Tensor, before: Tensor) -> None:
        if self.max_thinking_tokens is None or self.end_think_token_id is None:
            return
        if len(before) + len(block) > self.max_thinking_tokens and not (before == self.end_think_token_id).any():
            block[max(0, self.max_thinking_tokens - len(before))] = self.end_think_token_id


@dataclass(frozen=True)
class AutoregressiveSampler(BlockwiseSampler):
    """The checkpoint's `ar_generate`: the likeliest next token, one after the other, with causal attention."""

    @property
    def name(self) -> str:
        return "autoregressive"

    def block_length(self, wanted: int | None) -> int:
        """One token at a time."""
        return 1

    def problems(self, gen_length: int, block_length: int | None, steps: int) -> list[str]:
        problems = own_block(block_length, 1) + count_problems(gen_length=gen_length, steps=steps)
        return problems + no_schedule(gen_length, steps, "an autoregressive answer takes one pass for each token")

    def calls(self, gen_length: int, block_length: int | None, steps: int, random: torch.Generator) -> list[Call]:
        raise_if(self.problems(gen_length, block_length, steps))
        return [Call(i, i, i + 1, 1, window=(i, i + 1) if i else None) for i in range(gen_length)]

    def fits(self, arch: Architecture) -> bool:
        """Causal attention, in whose logits row i predicts the next token."""
        return arch.attention == CAUSAL and not arch.logit_shift

    def factorization(self) -> Factorization:
        """Every token is predicted by the causal row before it: the exact autoregressive likelihood."""
        return Factorization(1, CAUSAL, from_prefix=True, ahead=True)

    def canvas(self, prompt: Tensor, gen_length: int, arch: Architecture) -> Tensor:
        """`gen_length` masks."""
        return F.pad(prompt, (0, gen_length), value=arch.mask_token_id)

    def program(self, canvas: Tensor, prompt: int, *, gen_length: int, steps: int, arch: Architecture) -> Program:
        new = canvas[:prompt]
        for at in range(prompt, len(canvas)):
            tokens, _ = yield stored(new, CAUSAL, True, at - prompt, at - prompt)
            canvas[at] = tokens[0]
            new = canvas[at : at + 1]
            if first_end(new, arch) is not None:
                return


@dataclass(frozen=True)
class SpeculativeSampler(AutoregressiveSampler):
    """The checkpoint's `linear_spec_generate`, without the adapter that it drafts with.

    The answer is that of `AutoregressiveSampler`, in other numbers of passes. A draft fills a block in one pass where
    `threshold` is 0; else it writes what reaches it, or the likeliest token, until the block is full.
    """

    block: int = 32
    threshold: float = 0.0

    @property
    def name(self) -> str:
        return f"autoregressive, drafts of {self.block}"

    def problems(self, gen_length: int, block_length: int | None, steps: int) -> list[str]:
        problems = count_problems(**{"sampler.block": self.block})
        problems += number_problems("sampler.threshold", self.threshold, 0, 1)
        return problems + super().problems(gen_length, block_length, steps)

    def canvas(self, prompt: Tensor, gen_length: int, arch: Architecture) -> Tensor:
        """With room for a draft behind the last token."""
        return F.pad(prompt, (0, gen_length + self.block), value=arch.mask_token_id)

    def program(self, canvas: Tensor, prompt: int, *, gen_length: int, steps: int, arch: Architecture) -> Program:
        mask, known = arch.mask_token_id, prompt + 1  # known: tokens that are written
        seed, _ = yield stored(canvas[:prompt], CAUSAL, True, 0)
        canvas[prompt] = seed[0]
        while known - prompt < gen_length and first_end(canvas[prompt:known], arch) is None:
            draft = F.pad(canvas[known - 1 : known], (0, self.block - 1), value=mask)
            behind = known - prompt + torch.arange(self.block)
            while (masked := draft == mask).any():
                where = behind[masked] - 1
                tokens, probability = yield Pass(draft.clone(), FULL, False, masked, where, keep=known - 1)
                draft[masked] = draft[masked].where(~most_probable(probability, 1, self.threshold), tokens)
            everywhere = torch.ones(self.block, dtype=torch.bool)
            tokens, _ = yield Pass(draft, CAUSAL, True, everywhere, behind, keep=known - 1)
            agree = (tokens[:-1] == draft[1:]).long().cumprod(0).sum()
            accepted = tokens[: int(agree) + 1]
            canvas[known : known + len(accepted)] = accepted
            known += len(accepted)
        if (end := first_end(canvas[prompt:known], arch)) is not None:
            canvas[prompt + end + 1 :] = mask
