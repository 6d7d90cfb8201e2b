"""Calibration states of samplers that write by passes: a window as the passes that write its second part.

The model never sees such a window at once: it computes the prompt, then for every block of the answer the denoising
passes and the one that stores it, each over the keys and values of what is final. All of these passes stand side by
side in one sequence, with positions and a mask (`dqx.models.layout.Passes`) by which one forward computes for each
token what its pass does. So linears read exactly what they read at work, final tokens and those being denoised, as many
of each as the sampler makes, a block's tokens once for every pass of it. The windows of one setting grow accordingly:
P + G (1 + S) tokens with S denoising passes of each block.

On text, the sampler's own program runs with the text's tokens as the model's predictions and random probabilities so
small that no threshold is reached: its schedule alone decides how much is written in a pass, and chance where. (So each
pass writes no more than it must; how much a threshold writes at once is known to the model alone, and shown by
rollouts.) Answers have no end before the window's. Behind it, where the sampler fills its last block, stands the token
that ends texts, as in the place of mask tokens that a text itself may hold. In a rollout the program runs with the
model, to the end that the answer comes to; windows then differ in length.

W tokens of a pass, T of all, P of a prompt, G = gen_length.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from dqx.data.calibration import CalibBatch
from dqx.diffusion.noise import SeededNoise, generator
from dqx.diffusion.samplers.blockwise import BlockwiseSampler, Pass
from dqx.models.architecture import Architecture
from dqx.models.layout import WHOLE
from dqx.models.transformer import MaskedDiffusionTransformer

FOREVER = 2**40  # a pass that never comes


def pass_batches(
    model: MaskedDiffusionTransformer,
    sampler: BlockwiseSampler,
    windows: Tensor,
    *,
    gen_length: int,
    steps: int,
    seed: int,
    rollout: bool,
    progress: bool = True,
) -> list[CalibBatch]:
    """The windows [N, P + G] as the passes that write their last G tokens, one batch per window, with the times at
    which tokens are written.

    The model runs for rollouts only. Random numbers are a function of (seed, window).
    """
    seconds = 1.0 if sys.stderr.isatty() else 60.0  # a log file keeps every update
    shown = progress and rollout
    batches = []
    for i, window in enumerate(tqdm(windows, "rollouts", unit=" windows", disable=not shown, mininterval=seconds)):
        if rollout:
            passes = list[Pass]()
            prompt, noise = window[None, :-gen_length], SeededNoise(seed, [("calib", i)])
            sampler.generate(model, prompt, gen_length=gen_length, steps=steps, noise=noise, on_pass=passes.append)
        else:
            random = generator(seed, "calib", "mask", i)
            passes = text_passes(sampler, window, model.arch, gen_length=gen_length, steps=steps, random=random)
        ids, table = laid_out(passes)
        masked = (ids == model.arch.mask_token_id).float().mean(1)
        times = writing_times(passes, table, len(window) - gen_length, steps)
        batches.append(CalibBatch(ids, masked, times, table))
    return batches


def text_passes(
    sampler: BlockwiseSampler,
    window: Tensor,
    arch: Architecture,
    *,
    gen_length: int,
    steps: int,
    random: torch.Generator,
) -> list[Pass]:
    """The passes in which `sampler` writes the last `gen_length` tokens of a window [P + G], if it predicts them."""
    endless = replace(arch, eos_token_id=-1, end_token_ids=())
    window = window.masked_fill(window == arch.mask_token_id, arch.eos_token_id)
    writing = sampler.begin(window[:-gen_length], gen_length=gen_length, steps=steps, arch=endless)
    text = F.pad(window[-gen_length:], (0, max(0, len(writing.answer) - gen_length)), value=arch.eos_token_id)
    probability = sampler.unsure(torch.rand(len(text), dtype=torch.float64, generator=random))
    passes = []
    while (due := writing.due) is not None:
        passes.append(due)
        at = torch.zeros(0, dtype=torch.long) if due.predicts is None else due.predicts
        writing.send((text[at], probability[at]))
    return passes


@cache
def pass_tokens(sampler: BlockwiseSampler, arch: Architecture, prompt: int, gen_length: int, steps: int) -> int:
    """How many tokens the passes compute that write a window of text; a rollout's are about as many at most."""
    window, random = torch.zeros(prompt + gen_length, dtype=torch.long), torch.Generator()
    passes = text_passes(sampler, window, arch, gen_length=gen_length, steps=steps, random=random)
    return sum(len(one.ids) for one in passes)


def laid_out(passes: Sequence[Pass]) -> tuple[Tensor, Tensor]:
    """The tokens of all passes [1, T], and the table of `dqx.models.layout.Passes` [1, 4, T].

    Raises ValueError for a pass whose tokens take the place of stored ones, but are not stored.
    """
    stored: list[int] = []  # the column of every token in the store
    tables, width = [], 0
    until = torch.zeros(sum(len(one.ids) for one in passes), dtype=torch.long)
    for number, one in enumerate(passes):
        if one.keep is not None:
            until[stored[one.keep :]] = number
            del stored[one.keep :]
        if one.at is not None and not one.stored:
            raise ValueError("a pass takes the place of stored tokens without being stored")
        start, n = len(stored) if one.at is None else one.at, len(one.ids)
        if one.stored:
            until[stored[start : start + n]] = number
            stored[start : start + n] = range(width, width + n)
            until[width : width + n] = FOREVER
        constant = torch.full((n,), number), torch.full((n,), one.attention.block or WHOLE)
        tables.append(torch.stack((start + torch.arange(n), *constant)))
        width += n
    position, numbers, block = torch.cat(tables, dim=1)
    return torch.cat([one.ids for one in passes])[None], torch.stack((position, numbers, until, block))[None]


def writing_times(passes: Sequence[Pass], table: Tensor, prompt: int, steps: int) -> Tensor:
    """The share of the steps that have passed when each token of the passes is written [1, T]; -1 in the prompt.

    A token is written when it is predicted for the last time; one that never is counts as written last.
    """
    position = table[:, 0]
    times = torch.full((max(int(position.max()) + 1 - prompt, 1),), (steps - 1) / steps)
    for one in passes:
        if one.predicts is not None:
            times[one.predicts[one.predicts < len(times)]] = min(max(one.step, 0), steps - 1) / steps
    return torch.where(position < prompt, -1.0, times[(position - prompt).clamp(min=0)])
