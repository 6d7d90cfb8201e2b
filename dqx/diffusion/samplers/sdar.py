"""SDAR's sampler: blocks from left to right, each denoised over the exact keys and values of those before it.

Cheng et al. 2025, arXiv:2510.06303, and the authors' generate.py, whose tokens and number of passes it reproduces
(TraDo's is the same). Blocks are counted from position 0, so that the prompt's last tokens may share a block with the
answer's first. We differ in four things:
- temperature 0 takes the likeliest token and its probability (theirs divides by it);
- where a block has fewer masks than a step is to write, all of them are written (theirs writes over known tokens);
- a block in which the model has predicted the mask token is stored after its last step with that mask in it (theirs
  never stores it, and goes on without it);
- equal probabilities go to the leftmost position, and the answer is cut to the length that was asked for.

`entropy_bound` is that of Ben-Hamu et al. 2025 (arXiv:2505.24857, EB-Sampler): of the positions by rising entropy a
step writes as many as keep the sum of their entropies, less the largest, within the bound, and those that are due.
The script's own branch of that name does not run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dqx.common.problems import raise_if
from dqx.diffusion.factorization import Factorization
from dqx.diffusion.noise import Noise
from dqx.diffusion.samplers.base import Call, draw
from dqx.diffusion.samplers.blockwise import BlockwiseSampler, Pass, Program, calls_of_blocks, most_probable
from dqx.diffusion.samplers.dream import draw_tokens, filter_logits
from dqx.diffusion.samplers.llada import schedule_problems, share
from dqx.diffusion.settings import choice_problems, count_problems, number_problems
from dqx.models.architecture import CAUSAL, FULL, Architecture, Attention

REMASKING = ("low_confidence_dynamic", "low_confidence_static", "sequential", "entropy_bound")


@dataclass(frozen=True)
class SDARSampler(BlockwiseSampler):
    """Settings of SDAR's generate script. `steps` are shared equally by the blocks of an answer."""

    block: int = 4  # tokens of a block; the length that the checkpoint was trained with
    remasking: str = "low_confidence_dynamic"
    threshold: float | None = 0.85  # of low_confidence_dynamic: what lies above it is written at once
    bound: float = 0.1  # of entropy_bound, in nats
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    suppress_mask: bool = False  # the mask token is never predicted

    @property
    def name(self) -> str:
        """The order, with the threshold: `low_confidence_dynamic 0.85`."""
        limits = {"low_confidence_dynamic": self.threshold, "entropy_bound": self.bound}
        limit = f" {limits[self.remasking]:g}" if self.remasking in limits else ""
        return f"{self.remasking}{limit}, blocks of {self.block}"

    @property
    def forwards_vary(self) -> bool:
        return self.remasking in ("low_confidence_dynamic", "entropy_bound")

    def block_length(self, wanted: int | None) -> int:
        """The sampler's own: a model with block-wise attention has learned one length."""
        return self.block

    def problems(self, gen_length: int, block_length: int | None, steps: int) -> list[str]:
        problems = choice_problems("sampler.remasking", self.remasking, REMASKING)
        problems += number_problems("sampler.temperature", self.temperature, 0)
        problems += count_problems(**{"sampler.block": self.block})
        if self.remasking == "low_confidence_dynamic":
            problems += number_problems("sampler.threshold", self.threshold, 0, 1)
        if self.remasking == "entropy_bound":
            problems += number_problems("sampler.bound", self.bound, 0)
        if self.top_p is not None:
            problems += number_problems("sampler.top_p", self.top_p, 0, 1, above=True)
        if self.top_k is not None:
            problems += count_problems(**{"sampler.top_k": self.top_k})
        if block_length not in (None, self.block):
            problems.append(f"block_length={block_length} differs from sampler.block={self.block}; leave it out")
        wrong = count_problems(gen_length=gen_length, steps=steps)
        if wrong or problems:
            return problems + wrong
        return schedule_problems(-(-gen_length // self.block) * self.block, self.block, steps)

    def calls(self, gen_length: int, block_length: int | None, steps: int, random: torch.Generator) -> list[Call]:
        raise_if(self.problems(gen_length, block_length, steps))
        per_block = self.per_block(gen_length, steps)
        counts = [share(self.block, per_block, i) for i in range(per_block)]
        return list(calls_of_blocks(gen_length, self.block, per_block, counts))

    def per_block(self, gen_length: int, steps: int) -> int:
        """Denoising steps of a block, at most."""
        return max(1, steps // -(-gen_length // self.block))

    def steps_for(self, gen_length: int, wanted: int | None) -> int:
        """As many as the answer has tokens are as many as its whole blocks have."""
        whole = -(-gen_length // self.block) * self.block
        return whole if wanted is None or wanted == gen_length else wanted

    def fits(self, arch: Architecture) -> bool:
        """Block-wise attention, and row i predicts token i."""
        return arch.attention not in (FULL, CAUSAL) and not arch.logit_shift

    def factorization(self) -> Factorization:
        return Factorization(self.block, Attention(self.block))

    def canvas(self, prompt: Tensor, gen_length: int, arch: Architecture) -> Tensor:
        """Up to the end of a block."""
        new = gen_length + -(len(prompt) + gen_length) % self.block
        return F.pad(prompt, (0, new), value=arch.mask_token_id)

    def program(self, canvas: Tensor, prompt: int, *, gen_length: int, steps: int, arch: Architecture) -> Program:
        attention, per_block = Attention(self.block), self.per_block(gen_length, steps)
        ends = torch.tensor([arch.eos_token_id, *arch.end_token_ids])
        whole = prompt // self.block * self.block
        if whole:
            yield Pass(canvas[:whole].clone(), attention, stored=True)
        for number, start in enumerate(range(whole, len(canvas), self.block)):
            block = canvas[start : start + self.block]
            for i in range(per_block):
                masked = (block == arch.mask_token_id) & (torch.arange(start, start + self.block) >= prompt)
                if not masked.any():
                    break
                tokens, probability = yield Pass(
                    block.clone(),
                    attention,
                    stored=False,
                    look=masked,
                    predicts=start - prompt + masked.nonzero()[:, 0],
                    step=number * per_block + i,
                )
                count = min(share(self.block, per_block, i), len(tokens))
                block[masked] = block[masked].where(~self.chosen(probability, count), tokens)
            yield Pass(block.clone(), attention, stored=True, step=number * per_block + per_block - 1)
            if torch.isin(canvas[prompt : start + self.block], ends).any():
                return

    def chosen(self, probability: Tensor, count: int) -> Tensor:
        """Which of the masked tokens [n] of a block a step writes, of which `count` are due; `probability` is that of
        the tokens, of entropy_bound the negative entropy of their places."""
        if self.remasking == "sequential":
            return torch.arange(len(probability)) < count
        if self.remasking == "entropy_bound":
            entropy, order = (-probability).sort(stable=True)
            within = int((entropy.cumsum(0) - entropy <= self.bound).sum())
            chosen = torch.zeros(len(probability), dtype=torch.bool)
            chosen[order[: max(within, count)]] = True
            return chosen
        threshold = self.threshold if self.remasking == "low_confidence_dynamic" else None
        return most_probable(probability, count, threshold, above=True)

    def unsure(self, order: Tensor) -> Tensor:
        return order - 2 - self.bound if self.remasking == "entropy_bound" else super().unsure(order)

    def candidates(
        self, logits: Tensor, where: Tensor, at: Sequence[int], *, noise: Noise, arch: Architecture
    ) -> tuple[Tensor, Tensor]:
        if self.suppress_mask:
            logits[:, arch.mask_token_id] = -torch.inf
        if self.temperature == 0:
            probs = logits.softmax(-1)
            tokens = probs.argmax(-1)
        else:
            logits = filter_logits(logits / self.temperature, None, self.top_k)
            probs = filter_logits(logits, self.top_p, None).softmax(-1)
            tokens = draw_tokens(probs, draw(noise, "token", at, where, device=probs.device))
        if self.remasking == "entropy_bound":
            return tokens, torch.special.xlogy(probs, probs).sum(-1)  # the entropy's negative: the larger, the surer
        return tokens, probs.gather(-1, tokens[:, None])[:, 0]
