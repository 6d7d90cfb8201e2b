"""How far a quantized model's predictions have moved, before any benchmark shows it.

Accuracy needs hundreds of documents to show a change; predictions show it on a few. On fixed windows of the bundled
text, for full precision and after quantization:

- at several mask ratios, masks drawn at random: the Kullback-Leibler divergence KL(full precision || quantized) of the
  predictions at masked positions, in nats, and how often the most probable token is the same;
- the same against the denoising step, on the states that full precision visits (`dqx/diffusion/rollout.py`); there also
  how many of the tokens that full precision commits would be other tokens (`commit_flips`), or would stay masked
  because other positions come first (`commit_delays`); and the signal-to-quantization-noise ratio of the hidden state
  after every block, 10 log10(|x|^2 / |x - y|^2) dB, summed over the positions compared;
- of answers that each model writes by itself: how many tokens are the same in the end, and the first step that differs.

The text, the masks, the noise and the positions compared are the same in every run with the same seed. With guidance,
predictions on states are the guided ones, hidden states those of the first pass. With a sampler that reuses keys and
values the states are those it visits, and predictions on them those of whole forwards. Models that
write block by block are asked as `passes.py` says; what a step would commit is not judged there. A rotation of the
residual stream is undone before hidden states are compared; whatever else a method does to it counts as its error.

The two models are never in memory together, so full precision is asked first and its answers are kept: at most 8
positions of each window and state. With the default 4 windows, 16 states and answers of 16 tokens that is, for LLaDA-8B
in bfloat16, 560 rows of 126,464 log-probabilities in float32 (283 MB) and 400 of 32 hidden states (105 MB), whatever
the length of answers. What the quantized model says is compared state by state.

Shapes: N windows of T tokens, n compared positions, m positions asked for, V vocabulary, L blocks, D hidden, G new
tokens, S steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from dqx.common.halving import in_batches
from dqx.data.texts import TEXTS, token_stream
from dqx.diffusion.noise import generator
from dqx.diffusion.rollout import TOGETHER, Rollout, State, noise, write
from dqx.diffusion.samplers import Sampler
from dqx.diffusion.samplers.base import at_least_float32, logits_at, most_confident
from dqx.engines.model import EngineModel
from dqx.models.layout import Layout, Passes
from dqx.models.transformer import MaskedDiffusionTransformer

RATIOS = (0.1, 0.3, 0.5, 0.7, 0.9)
POSITIONS = 8  # compared per window and state


@dataclass(frozen=True)
class Question:
    """Windows with masks, and the positions at which two models are compared. On the CPU."""

    ids: Tensor  # [N, T]
    compared: Tensor  # [N, T] bool
    mask_ratio: float
    state: State | None = None  # None: masked at random
    passes: Tensor | None = None  # [N, 4, T], of `Passes`: windows are passes, compared in the rows that predict


@dataclass(frozen=True)
class Prediction:
    """What one model says to a question, on the CPU. Hidden states and commits are those of states, else empty."""

    log_probs: Tensor  # [n, V] float32
    hidden: Tensor  # [L, n, D] after each block, in the model's dtype
    tokens: Tensor  # [N, G] the token that each masked position would take, where the step looks at it
    commits: Tensor  # [N, G] bool: what the step would commit


def windows(tokenizer: Any, samples: int, length: int) -> Tensor:
    """The windows [N, T] of the bundled text. Raises ValueError where it has fewer."""
    ids = token_stream(TEXTS["nano"], tokenizer)
    if len(ids) < samples * length:
        raise ValueError(
            f"fidelity.samples={samples} windows of fidelity.length={length} are more than the bundled text's "
            f"{len(ids)} tokens; choose fewer"
        )
    return torch.tensor(ids[: samples * length]).view(samples, length)


@dataclass(frozen=True)
class Reference:
    """What full precision says: the answers it writes by itself, and its predictions on the questions."""

    rollout: Rollout
    questions: list[Question]
    predictions: list[Prediction]
    steps: int | None = None  # of the answers' schedule; None: as many as they have states

    def unmoved(self) -> dict[str, Any]:
        """The measures of a model that says the same."""
        return compare(self, self.predictions, self.rollout)


def measure_fidelity(
    model: MaskedDiffusionTransformer,
    sampler: Sampler,
    reference: Reference,
    *,
    seed: int = 0,
    residual_map: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Any]:
    """How far `model` is from full precision, as results.json has it; see `compare` for `residual_map`."""
    theirs = reference.rollout
    steps, gen_length = reference.steps or theirs.steps, theirs.answers.shape[2]
    rollout = write(model, sampler, theirs.prompts, gen_length=gen_length, steps=steps, seed=seed)
    said = predict(model, sampler, reference.questions, steps=steps, seed=seed)
    return compare(reference, said, rollout, residual_map=residual_map)


def questions(tokens: Tensor, states: Sequence[State], mask_token_id: int, *, seed: int = 0) -> list[Question]:
    """The windows `tokens` [N, T] with random masks at every mask ratio, then the denoising states."""
    asked = []
    length = tokens.shape[1]
    for ratio in RATIOS:
        count = max(1, round(ratio * length))
        orders = [order(length, seed, i, f"{ratio:g}") for i in range(len(tokens))]
        masked = torch.stack([order.argsort() < count for order in orders])
        asked.append(Question(tokens.masked_fill(masked, mask_token_id), _some(masked, orders), ratio))
    for state in states:  # the same positions in every state, while they are masked
        orders = [order(state.ids.shape[1], seed, i, "states") for i in range(len(state.ids))]
        asked.append(Question(state.ids, _some(state.token_class("masked"), orders), state.mask_ratio, state))
    return asked


def order(length: int, seed: int, window: int, kind: str) -> Tensor:
    """A permutation of a window's positions."""
    return torch.randperm(length, generator=generator(seed, "fidelity", window, kind))


def _some(masked: Tensor, orders: Sequence[Tensor]) -> Tensor:
    """The first POSITIONS of each window's `masked` [N, T] positions, in the window's order."""
    chosen = torch.zeros_like(masked)
    for row, order in enumerate(orders):
        chosen[row, order[masked[row, order]][:POSITIONS]] = True
    return chosen


def predict(
    model: MaskedDiffusionTransformer,
    sampler: Sampler,
    asked: Iterable[Question],
    *,
    steps: int,
    seed: int = 0,
    together: int = TOGETHER,
) -> Iterator[Prediction]:
    """What one model says to each question, `together` windows at a time. The states were written in `steps`."""
    for question in asked:

        def said(rows: range, question: Question = question) -> Prediction:
            return _predict(model, sampler, question, rows, steps, seed)

        parts = list(in_batches(len(question.ids), together, said, model.device))
        yield Prediction(
            torch.cat([part.log_probs for part in parts]),
            torch.cat([part.hidden for part in parts], dim=1),
            torch.cat([part.tokens for part in parts]),
            torch.cat([part.commits for part in parts]),
        )


@torch.no_grad()
def _predict(
    model: MaskedDiffusionTransformer, sampler: Sampler, question: Question, rows: range, steps: int, seed: int
) -> Prediction:
    """What a model says to some rows of a question."""
    window = slice(rows.start, rows.stop)
    ids, compared, state = question.ids[window], question.compared[window], question.state
    if question.passes is not None:
        layout = Passes(question.passes[window].to(model.device)).layout
        hidden, logits = _forward(
            model, ids.to(model.device), compared, compared, deep=state is not None, layout=layout
        )
        nothing = torch.zeros(len(rows), 0, dtype=torch.long)
        return Prediction(logits.log_softmax(-1).float().cpu(), hidden, nothing, nothing.bool())
    asked = compared if state is None else state.token_class("masked")[window]
    hidden, logits = _forward(model, ids.to(model.device), asked, compared, deep=state is not None)
    if state is not None and sampler.cfg_scale > 0:
        logits = logits_at(
            model,
            ids.to(model.device),
            asked,
            prompt_length=state.prompt,
            cfg_scale=sampler.cfg_scale,
            whole=False,
        )
    log_probs = logits[compared[asked].to(model.device)].log_softmax(-1).float().cpu()
    if state is None:
        nothing = torch.zeros(len(rows), 0, dtype=torch.long)
        return Prediction(log_probs, hidden, nothing, nothing.bool())
    masked, at = asked[:, state.prompt :], [state.step] * len(rows)
    draws = noise(seed, rows)
    look, counts = sampler.due(masked, at, block_length=None, steps=steps, noise=draws)
    tokens, confidence = sampler.candidates(
        logits[look[masked].to(model.device)], look, at, noise=draws, arch=model.arch
    )
    commits = most_confident(confidence.cpu(), look, counts, sampler.threshold)
    return Prediction(log_probs, hidden, ids[:, state.prompt :].masked_scatter(look, tokens.cpu()), commits)


def _forward(
    model: MaskedDiffusionTransformer,
    ids: Tensor,
    asked: Tensor,
    compared: Tensor,
    *,
    deep: bool,
    layout: Layout | None = None,
) -> tuple[Tensor, Tensor]:
    """Hidden states [L, n, D] (with `deep`) of the columns that predict `compared`, and logits [m, V] of `asked`.

    With a `layout` these are the columns themselves. An engine shows no hidden states: [0, n, 0].
    """
    if isinstance(model, EngineModel):
        return torch.empty(0, int(compared.sum()), 0), model.logits_where(ids, asked)
    shift = int(model.arch.logit_shift and layout is None)

    def columns(where: Tensor) -> tuple[Tensor, Tensor]:
        row, column = where.nonzero(as_tuple=True)
        row, column = torch.stack((row, (column - shift).clamp(min=0))).to(ids.device)
        return row, column

    at = columns(compared)
    hidden = []
    for depth, x in enumerate(model.residual_states(ids, layout=layout)):
        if deep and depth:
            hidden.append(x[at].cpu())
    logits = at_least_float32(model.head(model.norm(x[columns(asked)])))
    return torch.stack(hidden) if hidden else torch.empty(0, len(at[0]), 0), logits


def to_tensors(predictions: Iterable[Prediction]) -> dict[str, Tensor]:
    """Predictions as named tensors, for a file."""
    return {f"{i}.{f.name}": getattr(said, f.name) for i, said in enumerate(predictions) for f in fields(Prediction)}


def from_tensors(tensors: Mapping[str, Tensor]) -> list[Prediction]:
    """What `to_tensors` gave."""
    names = [f.name for f in fields(Prediction)]
    return [Prediction(*(tensors[f"{i}.{name}"] for name in names)) for i in range(len(tensors) // len(names))]


def compare(
    reference: Reference,
    predictions: Iterable[Prediction],
    rollout: Rollout,
    *,
    residual_map: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Any]:
    """The measures, as results.json has them, of another model's `predictions` and `rollout`.

    `residual_map` maps hidden states [L, n, D] of full precision to the coordinates in which the other model has them.
    """
    by_ratio: list[dict[str, Any]] = []
    by_step: list[dict[str, Any]] = []
    ratios_dB: list[list[float | None]] = []  # by step, then by block
    for question, ours, theirs in zip(reference.questions, reference.predictions, predictions, strict=True):
        row = {"mask_ratio": question.mask_ratio, **_distance(ours.log_probs, theirs.log_probs)}
        if question.state is None:
            by_ratio.append(row)
            continue
        by_step.append({"step": question.state.step, **row, **_commits(ours, theirs)})
        if len(theirs.hidden):
            ratios_dB.append(
                sqnr(ours.hidden if residual_map is None else residual_map(ours.hidden.double()), theirs.hidden)
            )
    layers = {
        "steps": [row["step"] for row in by_step],
        "mask_ratios": [row["mask_ratio"] for row in by_step],
        "sqnr_db": [list(block) for block in zip(*ratios_dB, strict=True)],
    }
    answers = compare_answers(reference.rollout, rollout)
    return {"by_mask_ratio": by_ratio, "by_step": by_step, "layers": layers, "answers": answers}


def _distance(full_precision: Tensor, quantized: Tensor) -> dict[str, Any]:
    """Mean divergence and agreement of log-probabilities [n, V]."""
    p, q = full_precision.double(), quantized.double()
    mean = torch.where(p.isneginf(), 0.0, p.exp() * (p - q)).sum(-1).mean().item()
    return {
        "positions": len(p),
        "divergence": 0.0 if mean < 0 else mean,  # below 0 only by rounding
        "agreement": (p.argmax(-1) == q.argmax(-1)).double().mean().item(),
    }


def _commits(full_precision: Prediction, quantized: Prediction) -> dict[str, float | None]:
    """Of the positions that full precision commits, the shares that get another token, and that stay masked."""
    committed = full_precision.commits
    if not committed.any():
        return {"commit_flips": None, "commit_delays": None}
    flips = (full_precision.tokens != quantized.tokens)[committed]
    delays = ~quantized.commits[committed]
    return {"commit_flips": flips.double().mean().item(), "commit_delays": delays.double().mean().item()}


def sqnr(x: Tensor, y: Tensor) -> list[float | None]:
    """10 log10(|x|^2 / |x - y|^2) dB of each block's hidden states [L, n, D]; None where the two are equal."""
    signal = x.double().square().sum((1, 2))
    error = (x.double() - y.double()).square().sum((1, 2))
    ratios = 10 * (signal / error).log10()
    return [None if exact else value for exact, value in zip((error == 0).tolist(), ratios.tolist(), strict=True)]


def compare_answers(full_precision: Rollout, quantized: Rollout) -> dict[str, Any]:
    """The measures of answers that each model has written by itself, as results.json has them."""
    steps = max(full_precision.steps, quantized.steps)
    ours, theirs = full_precision.lasting(steps).answers, quantized.lasting(steps).answers
    differ = (ours != theirs).any(-1)  # [S + 1, N]
    return {
        "documents": differ.shape[1],
        "tokens": ours.shape[2],
        "steps": len(differ) - 1,
        "agreement": (ours[-1] == theirs[-1]).double().mean().item(),
        "first_diverging_step": [first_step(column) for column in differ.T.tolist()],
    }


def first_step(differ: Sequence[bool]) -> int | None:
    """The step, from 1, after which two answers differ for the first time; None where they never do."""
    return next((step for step, different in enumerate(differ) if different), None)
