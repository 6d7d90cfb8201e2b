"""Questions of `fidelity.py` to models that write block by block, which never see a whole window at once.

A question shows each window as passes over a store (`dqx.models.layout.Passes`): one forward computes for the tokens of
a pass what the sampler computes. On the states that full precision visits these are the tokens stored by then and the
pass that looks, compared where it looks. At a mask ratio they are all blocks of the text in turn, each with masks and
then as it is stored; a first token that final ones predict keeps its own (`Sampler.factorization`).

Shapes: N windows, T tokens of passes, C columns of a question.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dqx.data.passes import laid_out
from dqx.diagnostics.fidelity import POSITIONS, RATIOS, Question, order
from dqx.diffusion.factorization import Factorization
from dqx.diffusion.rollout import Rollout, State, write
from dqx.diffusion.samplers.blockwise import BlockwiseSampler, Pass
from dqx.models.architecture import FULL
from dqx.models.layout import WHOLE
from dqx.models.transformer import MaskedDiffusionTransformer

#: A window's tokens [T], table [4, T] and where its passes look [T].
Shown = tuple[Tensor, Tensor, Tensor]


def written(
    model: MaskedDiffusionTransformer,
    sampler: BlockwiseSampler,
    prompts: Tensor,
    *,
    gen_length: int,
    steps: int,
    seed: int,
) -> dict[str, Tensor]:
    """The answers of `rollout.write` as `ids`, and of each window all passes that wrote its own, for a file."""
    passes: list[list[Pass]] = [[] for _ in prompts]
    rollout = write(
        model,
        sampler,
        prompts,
        gen_length=gen_length,
        steps=steps,
        seed=seed,
        on_pass=lambda row, one: passes[row].append(one),
    )
    kept = {"ids": rollout.ids}
    for i, own in enumerate(passes):
        kept |= {f"{name}.{i}": tensor for name, tensor in zip(("tokens", "table", "look"), shown(own), strict=True)}
    return kept


def shown(passes: Sequence[Pass]) -> Shown:
    """All passes of a window, side by side."""
    ids, table = laid_out(passes)
    look = [torch.zeros(len(one.ids), dtype=torch.bool) if one.look is None else one.look for one in passes]
    return ids[0], table[0], torch.cat(look)


def state_questions(kept: dict[str, Tensor], rollout: Rollout, count: int, *, seed: int) -> list[Question]:
    """At most `count` states of what `written` has kept, each at the pass that looked at it."""
    windows = [(kept[f"tokens.{i}"], kept[f"table.{i}"], kept[f"look.{i}"]) for i in range(rollout.ids.shape[1])]
    asked = []
    for state in rollout.states(count):
        rows = [at_pass(window, state.step) for window in windows]
        asked.append(question(rows, state.mask_ratio, "states", seed, state))
    return asked


def at_pass(window: Shown, step: int) -> Shown:
    """What the looking pass `step` of a window, from 0, sees and is; nothing where it has fewer."""
    tokens, table, look = window
    number, until = table[1], table[2]
    looking = number[look].unique().tolist()
    if step >= len(looking):
        return tokens[:0], table[:, :0], look[:0]
    now = looking[step]
    column = (number == now) | (number < now) & (now < until)
    return tokens[column], table[:, column], look[column] & (number[column] == now)


def ratio_questions(
    tokens: Tensor, factorization: Factorization | None, mask_token_id: int, *, seed: int
) -> list[Question]:
    """The windows `tokens` [N, L] with random masks at every mask ratio; none where final tokens predict all others, or
    it is not known what predicts them."""
    if factorization is None or factorization.block == 1:
        return []
    asked = []
    for ratio in RATIOS:
        rows = []
        for i, text in enumerate(tokens):
            masked = order(len(text), seed, i, f"{ratio:g}").argsort() < max(1, round(ratio * len(text)))
            rows.append(shown(denoised(text, masked, factorization, mask_token_id)))
        asked.append(question(rows, ratio, f"{ratio:g}, compared", seed))
    return asked


def denoised(text: Tensor, masked: Tensor, factorization: Factorization, mask_token_id: int) -> list[Pass]:
    """The blocks of a text [L] in turn: as they are denoised where `masked` [L], then as they are stored."""
    passes = []
    for start in range(0, len(text), factorization.block):
        block, hidden = (each[start : start + factorization.block] for each in (text, masked.clone()))
        if factorization.ahead and start:
            hidden[0] = False
        if hidden.any():
            rows = (hidden.nonzero()[:, 0] - int(factorization.shift)).clamp(min=0)
            look = torch.zeros_like(hidden)
            look[rows] = True
            passes.append(Pass(block.masked_fill(hidden, mask_token_id), FULL, stored=False, look=look))
        passes.append(Pass(block, factorization.final, stored=True))
    return passes


def question(rows: Sequence[Shown], mask_ratio: float, kind: str, seed: int, state: State | None = None) -> Question:
    """Windows of passes side by side, and of each the first POSITIONS where it looks, in an order of its own."""
    width = max(len(tokens) for tokens, _, _ in rows)
    alone = torch.tensor([0, 2**40, 0, WHOLE])[:, None]  # padding: a pass that sees itself, and that nothing sees
    ids, tables, compared = [], [], []
    for i, (tokens, table, look) in enumerate(rows):
        lack = width - len(tokens)
        ids.append(F.pad(tokens, (0, lack)))
        tables.append(torch.cat((table, alone.expand(-1, lack)), dim=1))
        chosen = order(len(tokens), seed, i, kind)
        some = torch.zeros(width, dtype=torch.bool)
        some[chosen[look[chosen]][:POSITIONS]] = True
        compared.append(some)
    return Question(torch.stack(ids), torch.stack(compared), mask_ratio, state, torch.stack(tables))
