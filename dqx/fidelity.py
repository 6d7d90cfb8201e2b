"""How far a quantized model's predictions have moved, before any benchmark shows it.

Accuracy needs hundreds of documents to show a change; predictions show it on a few. On fixed windows of the bundled
text, for full precision and after quantization:

- at several mask ratios, the Kullback-Leibler divergence KL(full precision || quantized) of the predictions at masked
  positions, in nats, and how often the most probable token is the same;
- of answers that the run's sampler writes after the first half of each window, one token per step (with a threshold at
  least one, while there are any): how many of their tokens are the same in the end, and the first step after which the
  two differ. Noise, if the sampler uses any, is the same for both.

The text, the masks and the positions compared are the same in every run with the same seed. Guidance plays a part in
the answers only. Full precision is asked before quantization, for the weights change in place; kept are at most 8
positions of a state: samples x 5 x 8 rows of the vocabulary in float32, 80 MB for 4 windows at LLaDA-8B's size.

Shapes: N windows of T tokens, n compared positions, V vocabulary, G new tokens, S steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dqx.data.texts import TEXTS
from dqx.diffusion.noise import SeededNoise, generator
from dqx.diffusion.sampler import Sampler, at_least_float32
from dqx.evaluate.text import token_stream
from dqx.models.transformer import MaskedDiffusionTransformer

RATIOS = (0.1, 0.3, 0.5, 0.7, 0.9)
POSITIONS = 8  # compared per window and mask ratio


@dataclass(frozen=True)
class Predictions:
    """What one model says to the fixed questions."""

    log_probs: Tensor  # [n, V] float32, on the CPU
    ratios: list[float]  # [n]
    states: Tensor  # [S + 1, N, G]: the answers before each step and in the end

    def to_tensors(self) -> dict[str, Tensor]:
        """The same as named tensors, for a file."""
        ratios = torch.tensor(self.ratios, dtype=torch.float64)
        return {"log_probs": self.log_probs, "ratios": ratios, "states": self.states}

    @classmethod
    def from_tensors(cls, found: Mapping[str, Tensor]) -> Predictions:
        """What `to_tensors` gave."""
        return cls(found["log_probs"], found["ratios"].tolist(), found["states"])


def windows(tokenizer: Any, samples: int, length: int) -> Tensor:
    """The windows [N, T]. Raises ValueError where the bundled text has fewer."""
    ids = token_stream(TEXTS["nano"], tokenizer)
    if len(ids) < samples * length:
        raise ValueError(
            f"fidelity.samples={samples} windows of fidelity.length={length} are more than the bundled text's "
            f"{len(ids)} tokens; choose fewer"
        )
    return torch.tensor(ids[: samples * length]).view(samples, length)


@torch.no_grad()
def predict(
    model: MaskedDiffusionTransformer, sampler: Sampler, tokens: Tensor, *, gen_length: int, seed: int = 0
) -> Predictions:
    """Ask one model about the windows `tokens` [N, T]."""
    rows, ratios = [], []
    length = tokens.shape[1]
    for ratio in RATIOS:
        count = max(1, round(ratio * length))
        masked = torch.zeros(tokens.shape, dtype=torch.bool)
        compared = torch.zeros_like(masked)
        for i in range(len(tokens)):
            order = torch.randperm(length, generator=generator(seed, "fidelity", i, f"{ratio:g}"))
            masked[i, order[:count]] = True
            compared[i, order[: min(count, POSITIONS)]] = True
        states = tokens.masked_fill(masked, model.arch.mask_token_id).to(model.device)
        logits = model.logits_where(states, compared.to(model.device))
        rows.append(at_least_float32(logits).log_softmax(-1).float().cpu())
        ratios += [ratio] * len(rows[-1])
    steps: list[Tensor] = []
    prompt = tokens[:, : length // 2]
    noise = SeededNoise(seed, [("fidelity", i) for i in range(len(tokens))])
    answer = sampler.generate(
        model, prompt, gen_length=gen_length, steps=gen_length, noise=noise, on_step=lambda ids: steps.append(ids.cpu())
    )
    states = torch.stack([*(ids[:, prompt.shape[1] :] for ids in steps), answer.ids.cpu()])
    return Predictions(torch.cat(rows), ratios, states)


def compare(full_precision: Predictions, quantized: Predictions) -> dict[str, Any]:
    """The measures, as results.json has them."""
    p, q = full_precision.log_probs.double(), quantized.log_probs.double()
    divergence = torch.where(p.isneginf(), 0.0, p.exp() * (p - q)).sum(-1)
    same = p.argmax(-1) == q.argmax(-1)
    by_ratio = []
    for ratio in dict.fromkeys(full_precision.ratios):
        members = torch.tensor([r == ratio for r in full_precision.ratios])
        mean = divergence[members].mean().item()
        by_ratio.append(
            {
                "mask_ratio": ratio,
                "positions": int(members.sum()),
                "divergence": 0.0 if mean < 0 else mean,  # below 0 only by rounding
                "agreement": same[members].double().mean().item(),
            }
        )
    differ = (full_precision.states != quantized.states).any(-1)  # [S + 1, N]
    return {
        "by_mask_ratio": by_ratio,
        "answers": {
            "documents": differ.shape[1],
            "tokens": full_precision.states.shape[2],
            "steps": len(differ) - 1,
            "agreement": (full_precision.states[-1] == quantized.states[-1]).double().mean().item(),
            "first_diverging_step": [first_step(column) for column in differ.T.tolist()],
        },
    }


def first_step(differ: Sequence[bool]) -> int | None:
    """The step, from 1, after which two answers differ for the first time; None where they never do."""
    return next((step for step, different in enumerate(differ) if different), None)
