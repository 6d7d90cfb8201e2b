"""LLaDA's sampler: semi-autoregressive denoising with low-confidence remasking.

Nie et al. 2025, arXiv:2502.09992, Algorithms 4 and 5, and the authors' generate.py, whose tokens it reproduces. We
differ in four things that the published settings never show:
- masks inside the prompt are part of the prompt and stay (theirs get filled in);
- equal confidences go to the leftmost position (theirs: whatever topk returns);
- a step in which nothing is written costs no forward;
- `suppress_eos_confidence` acts at every temperature (theirs, EOS: only at 0) and under random remasking.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dqx.diffusion.noise import Noise, SeededNoise
from dqx.diffusion.sampler import (
    Call,
    Generation,
    OnStep,
    append_masks,
    choice_problems,
    count_problems,
    draw,
    gumbel,
    logits_at,
    most_confident,
    number_problems,
    raise_if,
    write,
)
from dqx.models.transformer import Architecture, MaskedDiffusionTransformer

REMASKING = ("low_confidence", "random")


@dataclass(frozen=True)
class LLaDASampler:
    """Settings of the sampler.

    remasking: which masked tokens of the block to write first: the most probable ones, or random ones.
    temperature: 0 takes the argmax; above 0, Gumbel noise of that strength is added in float64.
    cfg_scale: classifier-free guidance w, 0 is off; above 0 doubles the forwards.
    suppress_eos_logits: the end token is never predicted.
    suppress_eos_confidence: positions that predict the end token (or end of turn) are written last.
    eos_token_id: the end token; null takes the model's own. eot_token_id: end of turn (LLaDA-8B: 126348).
    suppress_mask: the mask token is never predicted. Off as in the authors' code, where a model that
        predicts it (trained ones do not) writes a mask, which later steps may fill, or which stays.
    """

    remasking: str = "low_confidence"
    temperature: float = 0.0
    cfg_scale: float = 0.0
    suppress_eos_logits: bool = False
    suppress_eos_confidence: bool = False
    eos_token_id: int | None = None
    eot_token_id: int | None = None
    suppress_mask: bool = False

    def problems(self, gen_length: int, block_length: int | None, steps: int) -> list[str]:
        """Everything wrong with the settings and the schedule, in plain words; empty when it can run."""
        found = choice_problems("sampler.remasking", self.remasking, REMASKING)
        found += number_problems("sampler.temperature", self.temperature, 0)
        found += number_problems("sampler.cfg_scale", self.cfg_scale, 0)
        block_length = gen_length if block_length is None else block_length
        wrong = count_problems(gen_length=gen_length, block_length=block_length, steps=steps)
        if wrong:
            return found + wrong
        if gen_length % block_length:
            fits = [b for b in range(1, gen_length + 1) if gen_length % b == 0]
            found.append(
                f"block_length={block_length} does not divide gen_length={gen_length}; {', '.join(map(str, fits))} do"
            )
        elif steps % (n_blocks := gen_length // block_length):
            below = steps - steps % n_blocks
            nearest = f"{below} or {below + n_blocks}" if below else f"{n_blocks}"
            found.append(
                f"steps={steps} cannot be shared equally by {n_blocks} blocks (gen_length={gen_length}, "
                f"block_length={block_length}); {nearest} can"
            )
        return found

    def calls(self, gen_length: int, block_length: int | None, steps: int, random: torch.Generator) -> list[Call]:
        """The calls of the model for one answer, in order. They follow from the schedule alone; nothing is drawn.

        Raises ValueError with the `problems` of the settings.
        """
        raise_if(self.problems(gen_length, block_length, steps))
        length = block_length or gen_length
        per_block = steps // (gen_length // length)
        passes = (False, True) if self.cfg_scale > 0 else (False,)
        found: list[Call] = []
        for start in range(0, gen_length, length):
            masked = length
            for i in range(per_block):
                count = share(length, per_block, i)
                if count:
                    step = start // length * per_block + i
                    found += [Call(step, start, start + length, masked, blind) for blind in passes]
                masked -= count
        return found

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

    @torch.no_grad()
    def generate(
        self,
        model: MaskedDiffusionTransformer,
        prompt: Tensor,
        *,
        gen_length: int,
        block_length: int | None = None,
        steps: int,
        noise: Noise | None = None,
        on_step: OnStep | None = None,
    ) -> Generation:
        """Write `gen_length` tokens after each row of `prompt` [B, P]; rows do not influence each other.

        The answer is cut into blocks of `block_length` (null: one block), written left to right, and
        `steps` are shared equally by the blocks. `noise` serves temperature and random remasking; null is
        seed 0 with the row's number as its document. `on_step` gets a copy of the sequences [B, P + G]
        before each step, also before those that write nothing.

        Raises ValueError with the `problems` of the settings.
        """
        raise_if(self.problems(gen_length, block_length, steps) + self.token_problems(model.arch.vocab_size))
        noise = noise or SeededNoise(0, range(len(prompt)))
        prompt_length = prompt.shape[1]
        ids = append_masks(model, prompt, gen_length)
        answer = ids[:, prompt_length:]
        n_forwards = 0
        for step in range(steps):
            if on_step:
                on_step(ids.clone())
            at = [step] * len(ids)
            masked = answer == model.arch.mask_token_id
            look, counts = self.due(masked, at, block_length=block_length, steps=steps, noise=noise)
            if not counts.any():
                continue
            where = torch.cat((torch.zeros_like(ids[:, :prompt_length], dtype=torch.bool), look), dim=1)
            logits = logits_at(model, ids, where, prompt_length=prompt_length, cfg_scale=self.cfg_scale)
            n_forwards += len(ids) * (2 if self.cfg_scale > 0 else 1)
            tokens, confidence = self.candidates(logits, look, at, noise=noise, arch=model.arch)
            write(answer, look, tokens, most_confident(confidence, look, counts))
        return Generation(answer, n_forwards)

    def due(
        self, masked: Tensor, at: Sequence[int], *, block_length: int | None, steps: int, noise: Noise
    ) -> tuple[Tensor, Tensor]:
        """The positions [B, G] of `masked` [B, G] that each row looks at in its step `at` [B], and how many it writes.

        They are the masks up to the end of the current block. Nothing is drawn from `noise`. The numbers [B] are on
        the CPU.
        """
        gen_length = masked.shape[1]
        length = block_length or gen_length
        per_block = steps // (gen_length // length)
        visible = torch.tensor([(step // per_block + 1) * length for step in at], device=masked.device)
        counts = torch.tensor([share(length, per_block, step % per_block) for step in at])
        return masked & (torch.arange(gen_length, device=masked.device) < visible[:, None]), counts

    def candidates(
        self, logits: Tensor, where: Tensor, at: Sequence[int], *, noise: Noise, arch: Architecture
    ) -> tuple[Tensor, Tensor]:
        """A token and a confidence, both [n], for each position of `where` [B, G], from its logits [n, V].

        Row b is at step at[b]. `logits` is overwritten.
        """
        eos = arch.eos_token_id if self.eos_token_id is None else self.eos_token_id
        if self.suppress_mask:
            logits[:, arch.mask_token_id] = -torch.inf
        if self.suppress_eos_logits:
            logits[:, eos] = -torch.inf

        if self.temperature > 0:  # the argmax of exp(l) / (-log u)^t, without its overflow
            uniforms = draw(noise, "token", at, where, logits.shape[-1]).to(logits.device)
            tokens = (logits.double() + self.temperature * gumbel(uniforms)).argmax(-1)
        else:
            tokens = logits.argmax(-1)

        if self.remasking == "random":
            confidence = draw(noise, "order", at, where)[:, 0].to(logits.device)
        if self.suppress_eos_confidence:
            ends = [eos] if self.eot_token_id is None else [eos, self.eot_token_id]
            logits[:, ends] = -torch.inf
        if self.remasking == "low_confidence":
            confidence = logits.softmax(-1).gather(-1, tokens[:, None])[:, 0]
        elif self.suppress_eos_confidence:
            confidence = confidence.masked_fill(torch.isin(tokens, torch.tensor(ends, device=tokens.device)), 0.0)
        return tokens, confidence


def share(total: int, parts: int, i: int) -> int:
    """Size of part i when `total` is split evenly into `parts`, the remainder going to the first ones."""
    return total // parts + (i < total % parts)
