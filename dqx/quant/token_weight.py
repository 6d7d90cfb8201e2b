"""How much each calibration token counts in statistics that are averages over tokens: `method.token_weight`.

A mask predictor reads tokens of two kinds, masked and visible, and only what it says at masked ones is ever used, that
of which it is sure first. DLLMQuant (Xu and Yang 2025, arXiv:2508.14090, certainty-guided quantization) therefore gives
every token a weight in GPTQ's Hessian, `H = X^T diag(w) X / N`, by whether it is masked and by the model's confidence
in it. There is no code of the authors; the constants are those of a community's re-implementation (visible 0.5, masked
0.5 + p, divided by the mean of each sequence). Here the weights go into every average over tokens: the Hessian, GPTAQ's
cross term, AWQ's mean |x|, its judges' and its clip search's errors, and the mean shift.

A sampler never takes back a token that it has written, right or wrong. FAIR-Calib (Huang et al. 2026, arXiv:2606.06547)
weighs the positions of an answer by what an error there does: at every step of a generation of the full-precision
model with a random order of commitments, a position gains lambda_0(t) if it is written then, more at early steps, and
while it is masked lambda_1 times the model's confidence in it, normalised over the masked positions; tokens outside
the answer have a small floor (`Frontier`). There is no code of the authors either: shape and constants of lambda_0, the
floor and the confidence's norm are ours. Theirs is a mean over 512 such generations. Here the windows of
`calib=trajectory` each know a whole order of commitments and show one of its states, so that the mean over windows
estimates the same sum in one pass over them; and the weights act on these states, where theirs act on visible text.

Weights are divided by their mean over all tokens, so that GPTQ's damping keeps its meaning. Equal weights change
nothing, to the bit; weight 0 leaves tokens out.

B sequences of a batch, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dqx.formats.integers import wide
from dqx.models.layout import Passes
from dqx.models.transformer import pick, shift_logits
from dqx.quant.activations_store import Row
from dqx.quant.home import Home
from dqx.quant.protocols import Context, Tables, TokenWeight
from dqx.quant.stream import passes_of

HEAD_TOKENS = 256  # tokens whose logits are looked at a time
NOTHING = 1e-30  # stands for a sum of confidences that is 0, to divide by


@dataclass(frozen=True)
class MaskState:
    """One weight for masked tokens, another for visible ones."""

    masked: float = 2.0
    visible: float = 1.0
    per_sequence: bool = False  # the mean of every sequence is 1, not only that of all
    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, facts: Mapping[str, Tensor]) -> Tensor:
        return torch.where(facts["masked"], self.masked, self.visible)

    def problems(self, where: str, context: Context) -> list[str]:
        return _number_problems(where, masked=self.masked, visible=self.visible)


@dataclass(frozen=True)
class Confidence:
    """Masked tokens count `base + p^power`, p the full-precision model's probability of its first choice there."""

    base: float = 0.5
    power: float = 1.0
    visible: float = 0.5  # the weight of visible tokens
    per_sequence: bool = True  # the mean of every sequence is 1, not only that of all
    needs: ClassVar[frozenset[str]] = frozenset({"confidence"})

    def __call__(self, facts: Mapping[str, Tensor]) -> Tensor:
        return torch.where(facts["masked"], self.base + facts["confidence"].pow(self.power), self.visible)

    def problems(self, where: str, context: Context) -> list[str]:
        return _number_problems(where, base=self.base, power=self.power, visible=self.visible)


@dataclass(frozen=True)
class Frontier:
    """Tokens of an answer count by when they are written and how sure the model is of them while they are masked."""

    commit: float = 1.0  # weight of a token that is written in the last step
    early: float = 1.0  # in the first step it is 1 + early times that, in between linear
    reliability: float = 1.0  # mean weight by confidence of the answer's tokens: of masked ones, as they share it
    floor: float = 0.1  # weight of a token outside the answer, as a share of the mean weight inside
    by_position: bool = True  # the mean over windows, by position; false: of every window its own
    per_sequence: bool = False  # the mean of every sequence is 1, not only that of all

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"committed"} | ({"confidence"} if self.reliability else set()))

    def __call__(self, facts: Mapping[str, Tensor]) -> Tensor:
        time = facts["committed"].double()
        answer = time >= 0
        weight = self.commit * (1 + self.early * (1 - time))
        if self.reliability:
            sure = torch.where(answer, facts["confidence"].double(), 0)
            weight = weight + self.reliability * sure * (answer.sum() / sure.sum().clamp(min=NOTHING))
        inside = weight[answer].mean()
        return torch.where(answer, weight, self.floor * inside)

    def problems(self, where: str, context: Context) -> list[str]:
        problems = _number_problems(where, commit=self.commit, reliability=self.reliability)
        return problems + _at_least_0(where, early=self.early, floor=self.floor)


def _at_least_0(where: str, **numbers: float) -> list[str]:
    return [
        f"{where}.{name}={number} must be a number of at least 0"
        for name, number in numbers.items()
        if not (number >= 0 and math.isfinite(number))
    ]


def _number_problems(where: str, **numbers: float) -> list[str]:
    problems = _at_least_0(where, **numbers)
    if not problems and not any(numbers.values()):
        problems = [f"{where}: {' and '.join(numbers)} are all 0, so no token would count; give one of them above 0"]
    return problems


def token_weights(
    part: TokenWeight,
    home: Home,
    ids: Sequence[Tensor],
    committed: Sequence[Tensor] = (),
    passes: Sequence[Tensor | None] = (),
) -> Row:
    """The weights [1, T] in float32 of each calibration sequence among `ids` [B, T], their mean over all tokens 1.

    `committed` and `passes` are as in `CalibBatch`, none where the sequences are on no sampler's way. The model must
    not have been changed yet, its embedding and head loaded. Raises ValueError where no token is masked, where
    `committed` is needed and missing, and where the weights are not finite, negative, or all 0.
    """
    rows = [row for batch in ids for row in batch.split(1)]
    masked = [row == home.model.arch.mask_token_id for row in rows]
    if not any(row.any() for row in masked):
        raise ValueError(
            "method.token_weight tells masked calibration tokens from visible ones, but none is masked; calibrate on "
            "masked text (calib=mcs, random_t or trajectory), or write method.token_weight=null"
        )
    facts = [{"masked": row} for row in masked]
    if "committed" in part.needs:
        times = [row for batch in committed for row in batch.split(1)]
        if len(times) != len(rows) or any((row < 0).all() for row in times):
            raise ValueError(
                f"method.token_weight={type(part).__name__} needs the step at which each calibration token is written, "
                "which batches of calib=trajectory have (calibration_states with commitments=True); give those, or "
                "take method.token_weight=mask_state or confidence"
            )
        facts = [{**known, "committed": time.to(home.device)} for known, time in zip(facts, times, strict=True)]
    if "confidence" in part.needs:
        confident = zip(facts, confidences(home, rows, passes_of(ids, passes)), strict=True)
        facts = [{**known, "confidence": seen.where(known["masked"], 0.0)} for known, seen in confident]
    weights = [part(known).double() for known in facts]
    if getattr(part, "by_position", False):
        weights = _means_by_position(weights)
    if any(not row.isfinite().all() or (row < 0).any() for row in weights):
        raise ValueError(f"method.token_weight={type(part).__name__} gave weights that are negative or not finite")
    if part.per_sequence:
        weights = [row / row.mean().clamp(min=torch.finfo(row.dtype).tiny) for row in weights]
    mean = torch.cat(weights, dim=1).mean()
    if mean == 0:
        raise ValueError(f"method.token_weight={type(part).__name__} gives weight 0 to every calibration token")
    kept = home.store.row(keep=True)
    for row in weights:
        kept.append((row / mean).float())
    return kept


def _means_by_position(weights: Sequence[Tensor]) -> list[Tensor]:
    if len({row.shape for row in weights}) > 1:
        raise ValueError(
            "method.token_weight.by_position=true averages over calibration sequences position by position, but they "
            "differ in length; make them equal, or write method.token_weight.by_position=false"
        )
    return [torch.stack(list(weights)).mean(0)] * len(weights)


def confidences(home: Home, rows: Sequence[Tensor], passes: Sequence[Passes | None] | None = None) -> Iterator[Tensor]:
    """The probability [1, T] of the model's first choice at every token of each sequence [1, T], as the model is now.

    Blocks come one at a time, as from disk, and nothing is changed.
    """
    model, passes = home.model, passes or [None] * len(rows)
    states = _kept(home, (model.embed(row) for row in rows))
    for index in range(model.arch.n_blocks):
        states = _outputs(home, index, states, rows, passes)
    for x, passed in zip(states, passes, strict=True):
        x = model.norm(x)
        if model.arch.logit_shift:  # the head sees tokens one by one
            x = shift_logits(x) if passed is None else pick(x, passed.predicting)
        chosen = [wide(model.head(part)).softmax(-1).amax(-1) for part in x.split(HEAD_TOKENS, dim=1)]
        yield torch.cat(chosen, dim=1).float()


def _outputs(home: Home, index: int, states: Row, rows: Sequence[Tensor], passes: Sequence[Passes | None]) -> Row:
    """What a block makes of its inputs; it is let go before the next one comes."""
    block, model = home.take(index), home.model

    def tables(i: int) -> Tables:
        passed = passes[i]
        return model.context(rows[i]) if passed is None else model.tables(passed.layout)

    return _kept(home, (block(x, *tables(i)) for i, x in enumerate(states)))


def _kept(home: Home, tensors: Iterator[Tensor]) -> Row:
    row = home.store.row()
    for x in tensors:
        row.append(x)
    return row
