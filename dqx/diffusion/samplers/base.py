"""What samplers and the loops around them share: result types, logits at masked positions, noise, ranking.

Shapes: B rows, P prompt tokens, G new tokens, T = P + G, V vocabulary, n masked positions over all rows in
row-major order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dqx.diffusion.noise import Noise
from dqx.models.kv_cache import KVCache
from dqx.models.transformer import MaskedDiffusionTransformer

OnStep = Callable[[Tensor], None]


@dataclass(frozen=True)
class Generation:
    """New tokens `ids` [B, G] on the model's device, and what they took: sequences through the model, their tokens."""

    ids: Tensor
    n_forwards: int
    n_tokens: int


@dataclass(frozen=True)
class Call:
    """One call of the model while an answer is written: which of its tokens are still masks.

    Those before `start` are written, of those in [start, stop) `masked` are masks, and all from `stop` on. `step` is
    the step it belongs to, from 0. `blind`: the second pass of guidance, which sees masks in place of the prompt.
    `window`: the tokens [first, stop) of the answer that are computed; None: all, the prompt's too.
    """

    step: int
    start: int
    stop: int
    masked: int
    blind: bool = False
    window: tuple[int, int] | None = None


def append_masks(model: MaskedDiffusionTransformer, prompt: Tensor, gen_length: int) -> Tensor:
    """Sequences [B, P + G] on the model's device: a copy of `prompt` [B, P] followed by masks."""
    if prompt.dim() != 2:
        raise ValueError(f"prompt has shape {list(prompt.shape)}; give [B, P], one row per document")
    masks = torch.full((prompt.shape[0], gen_length), model.arch.mask_token_id, device=model.device)
    return torch.cat((prompt.to(model.device), masks), dim=1)


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or unchanged in float64: probabilities are never computed in half precision."""
    return x if x.dtype == torch.float64 else x.float()


def logits_at(
    model: MaskedDiffusionTransformer,
    ids: Tensor,
    where: Tensor,
    *,
    prompt_length: int | Tensor,
    cfg_scale: float = 0.0,
    attention_mask: Tensor | None = None,
    whole: bool = True,
    cache: KVCache | None = None,
) -> Tensor:
    """Logits [n, V], at least float32, of the positions marked in `where` [B, T], for ids [B, T].

    Where `where` lies on the CPU, nothing waits for the device.

    `whole` is the plain way: the head runs on every position. Without it, it runs only where it is asked for, and a
    `cache` may say which columns are computed at all; it serves one pass, so there is no guidance with it.

    With `cfg_scale` w > 0 (classifier-free guidance as in LLaDA's generate.py) a second pass sees masks in
    place of the first `prompt_length` columns (one number, or one per row [B, 1]), and the result is
    `u + (w + 1) * (l - u)`.
    """

    def read(ids: Tensor) -> Tensor:
        if whole:
            return at_least_float32(model(ids, attention_mask)[where])
        if cache is not None:
            return at_least_float32(model.logits_where(ids, where, attention_mask, cache))
        return at_least_float32(model.logits_where(ids, where, attention_mask))

    logits = read(ids)
    if cfg_scale > 0:
        prompt = torch.arange(ids.shape[1], device=ids.device) < prompt_length
        without = read(ids.masked_fill(prompt, model.arch.mask_token_id))
        logits = without + (cfg_scale + 1) * (logits - without)
    return logits


def draw(
    noise: Noise, kind: str, at: Sequence[int], where: Tensor, width: int = 1, device: torch.device | None = None
) -> Tensor:
    """Uniforms [n, width], float64, for the positions marked in `where` [B, G]; row b is at step at[b].

    They are made on `device`; None: where `where` is.
    """
    rows, positions = where.nonzero(as_tuple=True)
    steps = torch.tensor(list(at), device=where.device)[rows]
    rows, positions, steps = torch.stack((rows, positions, steps)).to(device)
    return noise.uniform(kind, rows, positions, steps, width)


def gumbel(uniforms: Tensor) -> Tensor:
    """Standard Gumbel noise `-log(-log u)` from uniforms in [0, 1), in their place; u = 0 gives -inf."""
    return uniforms.log_().neg_().log_().neg_()


def most_confident(confidence: Tensor, masked: Tensor, counts: Tensor, threshold: float | None = None) -> Tensor:
    """Mark [B, G] the `counts` [B] masked positions of each row with the highest `confidence` [n].

    With a `threshold`, all others that reach it too, in rows where anything is due. Equal confidences go to the
    leftmost position, so the order is the same on every device and in every batch (`torch.topk` leaves it open).
    Raises FloatingPointError on NaN.
    """
    if confidence.isnan().any():
        raise FloatingPointError("the model's logits hold NaN: nothing can be generated from them")
    table = torch.full(masked.shape, -torch.inf, dtype=confidence.dtype, device=masked.device)
    table.masked_scatter_(masked, confidence)
    order = table.sort(dim=1, descending=True, stable=True).indices
    counts = counts.to(masked.device)[:, None]
    first = torch.arange(masked.shape[1], device=masked.device) < counts
    chosen = torch.zeros_like(masked).scatter(1, order, first) & masked
    return chosen if threshold is None else chosen | (table >= threshold) & (counts > 0)


def write(answer: Tensor, masked: Tensor, tokens: Tensor, chosen: Tensor) -> None:
    """Put into `answer` [B, G], in place, those `tokens` [n] of the masked positions that are `chosen` [B, G]."""
    answer.copy_(torch.where(chosen, answer.masked_scatter(masked, tokens), answer))


def fetched(parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Tokens, confidences and the like [n] of several forwards, one behind the other, on the CPU: in one round trip."""
    together = torch.cat([torch.stack([x.double() for x in part]) for part in parts], dim=1).cpu()  # exact in float64
    return tuple(values.to(x.dtype) for values, x in zip(together, parts[0], strict=True))
