"""Log-likelihood of a target after a prefix: the Monte-Carlo bound of masked diffusion models, in nats.

For a target of L tokens: draw how many to mask, c, uniformly from 1..L; mask that many at random; then
`(L / c) * sum over masked of log p(true token)` has the bound as its mean (LLaDA, arXiv:2502.09992, equation 6; LLaDA's
get_log_likelihood). A one-token target has a single mask state, so one forward is exact.

A model that writes block by block has a bound of each block, and exact terms where final tokens predict
(`factorization.py`); one token is exact there too.

We differ from the authors' code on purpose:
- masks are a pure function of (seed, key, draw), not of batch size, process or generator state;
- counts are spread evenly over all draws (theirs: over a batch, so that the batch size changes the estimator);
- the same estimator serves both families. Dream's own harness never masks the last token and so never
  scores it; here it counts like any other.
Their estimates are reproduced by `log_likelihood_given` when their masks are given.

Shapes: P prefix, L target, T = P + L tokens, N sequences, V vocabulary. Values are Python floats or float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dqx.common.halving import in_batches
from dqx.common.problems import raise_if
from dqx.diffusion.batches import Piece, Request, TokenIds, token_ids
from dqx.diffusion.factorization import Factorization, factorization_problems
from dqx.diffusion.noise import Key, generator
from dqx.diffusion.samplers import greedy
from dqx.diffusion.samplers.base import logits_at
from dqx.diffusion.samplers.blockwise import Cached, Pass
from dqx.diffusion.settings import count_problems, number_problems
from dqx.models.architecture import FULL
from dqx.models.transformer import MaskedDiffusionTransformer
from dqx.models.vocabulary import id_problems


@dataclass(frozen=True)
class LogLikelihood:
    """An estimate in nats (0 or less), and how many sequences went through the model for it."""

    value: float
    n_forwards: int


def mask_states(length: int, *, samples: int, seed: int, key: tuple[Key, ...] = ()) -> Tensor:
    """Which target tokens each draw masks, bool [samples, L]: a pure function of the arguments.

    Over the draws the counts 1..L come equally often, up to one (a uniform shift per key keeps each draw
    uniform); which tokens are masked is drawn per (key, draw).
    """
    shift = torch.rand((), generator=generator(seed, *key, "count"), dtype=torch.float64).item()
    states = torch.zeros(samples, length, dtype=torch.bool)
    for i in range(samples):
        count = math.floor((shift + i / samples) % 1.0 * length) + 1
        scores = torch.rand(length, generator=generator(seed, *key, "mask", i), dtype=torch.float64)
        states[i, scores.argsort(stable=True)[:count]] = True
    return states


@torch.no_grad()
def masked_log_probs(
    model: MaskedDiffusionTransformer,
    states: Tensor,
    tokens: Tensor,
    *,
    prefix_length: int = 0,
    cfg_scale: float = 0.0,
    batch_size: int = 8,
) -> Tensor:
    """Log-probability of the true `tokens` [T] at each masked position of `states` [N, T]; 0 elsewhere.

    Float64 [N, T] on the CPU. `cfg_scale` above 0 guides as in generation: the prefix is masked in the second
    pass. A mask that is part of `tokens` is not scored.

    Raises ValueError when a state differs from `tokens` where it is not masked and for ids that are no tokens,
    FloatingPointError on NaN.
    """
    raise_if(number_problems("cfg_scale", cfg_scale, 0) + count_problems(batch_size=batch_size))
    states, tokens = states.cpu(), tokens.cpu()
    raise_if(id_problems(tokens, model.arch.vocab_size))
    masked = (states == model.arch.mask_token_id) & (tokens != model.arch.mask_token_id)
    if not (masked | (states == tokens)).all():
        raise ValueError("a state holds tokens that are neither masks nor the true ones: nothing would be scored there")
    out = torch.zeros(states.shape, dtype=torch.float64)

    def score(rows: range) -> None:
        batch, where = states[rows.start : rows.stop], masked[rows.start : rows.stop]
        logits = logits_at(model, batch.to(model.device), where, prompt_length=prefix_length, cfg_scale=cfg_scale)
        true = tokens.expand(len(batch), -1)[where]
        out[rows.start : rows.stop][where] = true_log_probs(logits, true, torch.arange(len(true)))

    for _ in in_batches(len(states), batch_size, score, model.device):
        pass
    return out


def true_log_probs(logits: Tensor, tokens: Tensor, rows: Tensor) -> Tensor:
    """Log-probabilities, float64 [n] on the CPU, of `tokens` [n] by the `rows` [n] of `logits` [m, V].

    Raises FloatingPointError on NaN.
    """
    rows, tokens = rows.to(logits.device), tokens.to(logits.device)
    log_probs = (logits[rows, tokens].double() - logits.logsumexp(-1)[rows].double()).cpu()
    if log_probs.isnan().any():
        raise FloatingPointError("the model's logits hold NaN: no likelihood can be computed from them")
    return log_probs


def log_likelihood(
    model: MaskedDiffusionTransformer,
    prefix: TokenIds,
    target: TokenIds,
    *,
    samples: int,
    seed: int,
    key: tuple[Key, ...] = (),
    batch_size: int = 8,
    cfg_scale: float = 0.0,
    factorization: Factorization | None = None,
) -> LogLikelihood:
    """The bound on log p(target [L] | prefix [P]) from `samples` draws, in nats; exact for one token.

    `key` names the request, for example (task, document, choice); requests with one key share their noise.
    `batch_size` sequences go through the model at a time and change nothing but rounding. An empty target
    has likelihood 1. A model that writes block by block needs its sampler's `factorization`, and computes one block at
    a time, over what is stored.
    """
    raise_if(count_problems(samples=samples) + factorization_problems(model.arch, factorization, cfg_scale))
    if factorization is not None:
        request = Request(prefix, target, key)
        vocab = model.arch.vocab_size
        raise_if([p for ids in (request.prefix, request.target) for p in id_problems(ids, vocab)])
        raise_if(factorization.problems(request))
        found = [_piece_value(model, p, factorization, samples, seed) for p in factorization.pieces(request)]
        return LogLikelihood(sum(value for value, _ in found), sum(passes for _, passes in found))
    prefix, target = token_ids(prefix), token_ids(target)
    if len(target) == 0:
        return LogLikelihood(0.0, 0)
    if len(target) == 1:
        drawn = torch.ones(1, 1, dtype=torch.bool)
    else:
        drawn = mask_states(len(target), samples=samples, seed=seed, key=key)
    tokens = torch.cat((prefix, target))
    states = tokens.repeat(len(drawn), 1)
    states[:, len(prefix) :].masked_fill_(drawn, model.arch.mask_token_id)
    value = log_likelihood_given(
        model,
        states,
        tokens,
        drawn.double().mean(1),
        prefix_length=len(prefix),
        cfg_scale=cfg_scale,
        batch_size=batch_size,
    )
    return LogLikelihood(value, len(states) * (2 if cfg_scale > 0 else 1))


def _piece_value(
    model: MaskedDiffusionTransformer, piece: Piece, factorization: Factorization, samples: int, seed: int
) -> tuple[float, int]:
    """One term in nats, and its passes: as a sampler computes it, the text stored and then a block over it."""
    runner, mask, text = Cached(model, piece.start + factorization.block), model.arch.mask_token_id, piece.text
    if piece.by_final is not None:
        look = torch.zeros(len(text), dtype=torch.bool)
        look[len(piece.prefix) - 1 + piece.by_final.nonzero()[:, 0]] = True
        logits, _ = runner.run(Pass(text, factorization.final, stored=True, look=look))
        true = piece.target[piece.by_final]
        log_probs = true_log_probs(logits, true, torch.arange(len(true)))
        return float(log_probs[true != mask].sum()), 1
    if len(text):
        runner.run(Pass(text, factorization.final, stored=True))
    length, total = len(piece.target), 0.0
    one = torch.ones(1, 1, dtype=torch.bool)
    drawn = one if length == 1 else mask_states(length, samples=samples, seed=seed, key=piece.key)
    for state in drawn:
        at = (state & (piece.target != mask)).nonzero()[:, 0]
        block = factorization.blocks(piece, piece.target.masked_fill(state, mask)[None], mask)[0]
        row = (len(piece.prefix) - piece.start + at - int(factorization.shift)).clamp(min=0)
        logits, _ = runner.run(Pass(block, FULL, stored=False, look=torch.ones(len(block), dtype=torch.bool)))
        total += float(true_log_probs(logits, piece.target[at], row).sum()) * length / int(state.sum())
    return total / len(drawn), len(drawn) + bool(len(text))


def log_likelihood_given(
    model: MaskedDiffusionTransformer,
    perturbed: Tensor,
    tokens: Tensor,
    p_mask: Tensor,
    *,
    prefix_length: int = 0,
    cfg_scale: float = 0.0,
    batch_size: int = 8,
) -> float:
    """The estimate under given masks: the mean over `perturbed` [N, T] of sum over masked of log p / p_mask.

    `tokens` [T] is the true sequence, `p_mask` [N] or [N, T] the probability with which a token was masked.
    Any position may be masked, also in the prefix (Dream's `btf` and `union`; divide by T for the latter).
    """
    log_probs = masked_log_probs(
        model, perturbed, tokens, prefix_length=prefix_length, cfg_scale=cfg_scale, batch_size=batch_size
    )
    weights = p_mask.cpu().double()
    return (log_probs / (weights[:, None] if weights.dim() == 1 else weights)).sum(1).mean().item()


def greedy_matches(
    model: MaskedDiffusionTransformer, prefix: TokenIds, target: TokenIds, *, cfg_scale: float = 0.0
) -> bool:
    """Whether greedy decoding, one token per step and the most confident first, writes exactly `target` [L].

    Costs L forwards (2 L with guidance), so ask only for metrics that use it.
    """
    if len(target) == 0:
        return True
    decoded = greedy(cfg_scale).generate(model, token_ids(prefix)[None], gen_length=len(target), steps=len(target))
    return decoded.ids[0].cpu().equal(token_ids(target))
