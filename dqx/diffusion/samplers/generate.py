"""What every sampler is, and the one loop that writes answers with it.

A sampler is two pure functions: `due` says which masked positions a step looks at and how many of them it writes,
`candidates` turns their logits into tokens and confidences. `generate` is the plain loop around them, `engine.py` the
one in batches. Two choices make a sampler approximate, and part of its `name`: a `threshold` writes more than is due, a
`window` leaves the keys and values of other tokens as they were.

A new sampler is a dataclass of its settings with the five abstract methods below, and a file in `conf/model/sampler`.
Shapes as in `base.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from dqx.common.problems import raise_if
from dqx.diffusion.factorization import Factorization
from dqx.diffusion.noise import Noise, SeededNoise
from dqx.diffusion.samplers.base import Call, Generation, OnStep, append_masks, logits_at, most_confident, write
from dqx.models.architecture import FULL, Architecture
from dqx.models.family import family_of
from dqx.models.transformer import MaskedDiffusionTransformer
from dqx.models.vocabulary import id_problems


class Sampler(ABC):
    """How answers are written. What is not abstract here is right for an exact sampler without guidance."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The order of writing and the approximations, in short: part of a result's name."""

    @property
    def approximations(self) -> tuple[str, ...]:
        """What makes the sampler another one than its authors', in short names."""
        return ()

    @property
    def cfg_scale(self) -> float:
        """Guidance; above 0 doubles the forwards."""
        return 0.0

    @property
    def threshold(self) -> float | None:
        """The confidence from which tokens are written that are not due; None: no token is."""
        return None

    @property
    def forwards_vary(self) -> bool:
        """Whether the number of forwards per token depends on what the model predicts."""
        return self.threshold is not None

    @property
    def has_cache(self) -> bool:
        """Whether keys and values are kept from one forward to another."""
        return False

    @property
    def stores_final(self) -> bool:
        """Whether what is kept is stored once, block by block, when its tokens are final: no forward has them all."""
        return False

    def factorization(self) -> Factorization | None:
        """How the likelihood of what it writes is a sum over blocks; None: a target is masked as a whole."""
        return None

    def likelihood_problems(self) -> list[str]:
        """What stands against likelihoods with these settings."""
        return []

    def exact(self) -> Sampler:
        """The same sampler without approximations."""
        return self

    def block_length(self, wanted: int | None) -> int | None:
        """The block length to ask for where a task wants `wanted`."""
        return wanted

    def steps_for(self, gen_length: int, wanted: int | None) -> int:
        """The denoising steps of an answer where `wanted` are set; None: one per token."""
        return gen_length if wanted is None else wanted

    def model_problems(self, arch: Architecture) -> list[str]:
        """What is wrong with a model of this architecture: it would be asked what it has not learned."""
        if arch.attention == FULL:
            return []
        return [
            f"this sampler ({self.name}) asks for tokens that see the whole answer, but models of family {arch.family} "
            f"have learned attention that sees no later block; write model.sampler={own_choice(arch)}"
        ]

    def model_notes(self, arch: Architecture) -> list[str]:
        """What a reader of results should know of the sampler beside a model."""
        return []

    def notes(self, gen_length: int | None, block_length: int | None) -> list[str]:
        """What a reader of results should know whose answers were to be written in these lengths."""
        return [f"approximate: answers written by {self.name}"] if self.approximations else []

    @abstractmethod
    def problems(self, gen_length: int, block_length: int | None, steps: int) -> list[str]:
        """Everything wrong with the settings and the schedule, in plain words; empty when it can run."""

    def token_problems(self, vocab_size: int) -> list[str]:
        """What is wrong with the tokens that settings name, for a model with `vocab_size` tokens."""
        return []

    @abstractmethod
    def calls(self, gen_length: int, block_length: int | None, steps: int, random: torch.Generator) -> list[Call]:
        """The calls of the model for one answer, in order: the most there can be. `random` serves drawn schedules.

        Raises ConfigProblems with the `problems` of the settings.
        """

    @abstractmethod
    def due(
        self, masked: Tensor, at: Sequence[int], *, block_length: int | None, steps: int, noise: Noise
    ) -> tuple[Tensor, Tensor]:
        """The positions [B, G] of `masked` [B, G] that each row looks at in its step `at` [B], and how many it writes.

        The numbers [B] are on the CPU. No row depends on another one.
        """

    def due_together(
        self, masked: Tensor, step: int, *, block_length: int | None, steps: int, noise: Noise
    ) -> tuple[Tensor, Tensor]:
        """`due` where all rows are at one step; a sampler may let them share a number, as its authors' code does."""
        return self.due(masked, [step] * len(masked), block_length=block_length, steps=steps, noise=noise)

    def window(self, step: int, *, gen_length: int, block_length: int | None, steps: int) -> tuple[int, int] | None:
        """The tokens [first, stop) of the answer that a step computes where its block has had its first; None: all."""
        return None

    def block_at(self, step: int, *, gen_length: int, block_length: int | None, steps: int) -> tuple[int, int]:
        """The tokens [first, stop) of the answer that a step is about; its block, where there are several."""
        return 0, gen_length

    @abstractmethod
    def candidates(
        self, logits: Tensor, where: Tensor, at: Sequence[int], *, noise: Noise, arch: Architecture
    ) -> tuple[Tensor, Tensor]:
        """A token and a confidence, both [n], for each position of `where` [B, G], from its logits [n, V].

        Row b is at step at[b]. `logits` is overwritten.
        """

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
        attention_mask: Tensor | None = None,
    ) -> Generation:
        """Write an answer after each row of `prompt` [B, P]; rows do not influence each other, but in `due_together`.

        Args:
            model: what predicts the masked tokens.
            prompt: token ids; masks among them stay.
            gen_length: new tokens G of each row.
            block_length: tokens per block, for samplers that write block by block; None: one block.
            steps: denoising steps over the whole answer.
            noise: where random numbers come from; None: seed 0, with a row's number as its document.
            on_step: gets a copy of the sequences [B, P + G] before each step, also before those that write nothing.
            attention_mask: [B, P], 1 at real tokens and 0 at padding on the left; None: all are real.

        Returns:
            The new tokens and what they took.

        Raises:
            ValueError: with the `problems` and `token_problems` of the settings, and for ids that are no tokens.
        """
        problems = self.problems(gen_length, block_length, steps) + self.token_problems(model.arch.vocab_size)
        raise_if(problems + id_problems(prompt, model.arch.vocab_size))
        noise = noise or SeededNoise(0, range(len(prompt)))
        ids, prompt_length = append_masks(model, prompt, gen_length), prompt.shape[1]
        answer = ids[:, prompt_length:]
        if attention_mask is not None:
            real = attention_mask.to(ids.device)
            attention_mask = torch.cat((real, real.new_ones(answer.shape)), dim=1)
        passes, n_forwards, n_tokens = 2 if self.cfg_scale > 0 else 1, 0, 0
        kept, kept_for = None, None  # keys and values, and the window of the block that they were kept for
        for step in range(steps):
            if on_step:
                on_step(ids.clone())
            masked = answer == model.arch.mask_token_id
            look, counts = self.due_together(masked, step, block_length=block_length, steps=steps, noise=noise)
            if not counts.any():
                continue
            where = torch.cat((torch.zeros_like(ids[:, :prompt_length], dtype=torch.bool), look), dim=1)
            window = self.window(step, gen_length=gen_length, block_length=block_length, steps=steps)
            if window is not None and kept is None:
                kept = model.empty_cache(*ids.shape)
            cache, computed = kept, ids.shape[1]
            if kept is not None and window is not None and window == kept_for:
                first = prompt_length + window[0] - model.arch.logit_shift  # the column that predicts it
                cache, computed = kept.window(first, prompt_length + window[1]), prompt_length + window[1] - first
            kept_for = window
            logits = logits_at(
                model,
                ids,
                where,
                prompt_length=prompt_length,
                cfg_scale=self.cfg_scale,
                attention_mask=attention_mask,
                whole=cache is None,
                cache=cache,
            )
            n_forwards += len(ids) * passes
            n_tokens += len(ids) * passes * computed
            tokens, confidence = self.candidates(logits, look, [step] * len(ids), noise=noise, arch=model.arch)
            write(answer, look, tokens, most_confident(confidence, look, counts, self.threshold))
        return Generation(answer, n_forwards, n_tokens)


def own_choice(arch: Architecture) -> str:
    """The file in `conf/model/sampler` of the sampler that a model's family writes with."""
    return str(family_of(arch.family).sampler["_target_"]).split(".")[-2]
