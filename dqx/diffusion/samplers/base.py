"""What both samplers share: the result type, logits at masked positions, noise, ranking, setting checks.

A sampler is two pure functions: `due` says which masked positions a step looks at and how many of them it writes,
`candidates` turns their logits into tokens and confidences. The plain `generate` and the batches of `engine.py` are
two loops around them. Rows may be at different steps. Two choices make a sampler approximate, and part of its `name`:
a `threshold` writes more than is due, a `window` leaves the keys and values of other tokens as they were.

Shapes: B rows, P prompt tokens, G new tokens, T = P + G, V vocabulary, n masked positions over all rows in
row-major order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dqx.diffusion.noise import Noise
from dqx.models.kv_cache import KVCache
from dqx.models.transformer import Architecture, MaskedDiffusionTransformer

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
    `window`: the tokens [first, stop) of the answer that are computed; null: all, the prompt's too.
    """

    step: int
    start: int
    stop: int
    masked: int
    blind: bool = False
    window: tuple[int, int] | None = None


class Sampler(Protocol):
    """What evaluation and calibration need from a sampler; see `LLaDASampler` for the meaning of each argument."""

    @property
    def name(self) -> str: ...

    @property
    def approximations(self) -> tuple[str, ...]: ...

    @property
    def cfg_scale(self) -> float: ...

    @property
    def threshold(self) -> float | None: ...

    def block_length(self, wanted: int | None) -> int | None: ...

    def problems(self, gen_length: int, block_length: int | None, steps: int) -> list[str]: ...

    def token_problems(self, vocab_size: int) -> list[str]: ...

    def calls(self, gen_length: int, block_length: int | None, steps: int, random: torch.Generator) -> list[Call]: ...

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
    ) -> Generation: ...

    def due(
        self, masked: Tensor, at: Sequence[int], *, block_length: int | None, steps: int, noise: Noise
    ) -> tuple[Tensor, Tensor]: ...

    def window(self, step: int, *, gen_length: int, block_length: int | None, steps: int) -> tuple[int, int] | None: ...

    def candidates(
        self, logits: Tensor, where: Tensor, at: Sequence[int], *, noise: Noise, arch: Architecture
    ) -> tuple[Tensor, Tensor]: ...


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
    prompt_length: int,
    cfg_scale: float = 0.0,
    attention_mask: Tensor | None = None,
    whole: bool = True,
    cache: KVCache | None = None,
) -> Tensor:
    """Logits [n, V], at least float32, of the positions marked in `where` [B, T], for ids [B, T].

    `whole` is the plain way: the head runs on every position. Without it, it runs only where it is asked for, and a
    `cache` may say which columns are computed at all; it serves one pass, so there is no guidance with it.

    With `cfg_scale` w > 0 (classifier-free guidance as in LLaDA's generate.py) a second pass sees masks in
    place of the prompt, and the result is `u + (w + 1) * (l - u)`.
    """

    def read(ids: Tensor) -> Tensor:
        if whole:
            return at_least_float32(model(ids, attention_mask)[where])
        if cache is not None:
            return at_least_float32(model.logits_where(ids, where, attention_mask, cache))
        return at_least_float32(model.logits_where(ids, where, attention_mask))

    logits = read(ids)
    if cfg_scale > 0:
        blind = ids.clone()
        blind[:, :prompt_length] = model.arch.mask_token_id
        without = read(blind)
        logits = without + (cfg_scale + 1) * (logits - without)
    return logits


def draw(noise: Noise, kind: str, at: Sequence[int], masked: Tensor, width: int = 1) -> Tensor:
    """Uniforms [n, width], float64, on the CPU, for the positions marked in `masked` [B, G]; row b is at step at[b]."""
    rows = [noise.uniform(kind, at[b], b, row.nonzero()[:, 0].cpu(), width) for b, row in enumerate(masked)]
    return torch.cat(rows)


def gumbel(uniforms: Tensor) -> Tensor:
    """Standard Gumbel noise `-log(-log u)` from uniforms in [0, 1), in their dtype; u = 0 gives -inf."""
    return -(-uniforms.log()).log()


def most_confident(confidence: Tensor, masked: Tensor, counts: Tensor, threshold: float | None = None) -> Tensor:
    """Mark [B, G] the `counts` [B] masked positions of each row with the highest `confidence` [n].

    With a `threshold`, all others that reach it too, in rows where anything is due. Equal confidences go to the
    leftmost position, so the order is the same on every device and in every batch (`torch.topk` leaves it open).
    Raises FloatingPointError on NaN.
    """
    if confidence.isnan().any():
        raise FloatingPointError("the model's logits hold NaN: nothing can be generated from them")
    table = torch.full(masked.shape, -torch.inf, dtype=confidence.dtype, device=masked.device)
    table[masked] = confidence
    order = table.sort(dim=1, descending=True, stable=True).indices
    counts = counts.to(masked.device)[:, None]
    first = torch.arange(masked.shape[1], device=masked.device) < counts
    chosen = torch.zeros_like(masked).scatter(1, order, first) & masked
    return chosen if threshold is None else chosen | (table >= threshold) & (counts > 0)


def write(answer: Tensor, masked: Tensor, tokens: Tensor, chosen: Tensor) -> None:
    """Put into `answer` [B, G], in place, those `tokens` [n] of the masked positions that are `chosen` [B, G]."""
    candidates = answer.masked_scatter(masked, tokens)
    answer[chosen] = candidates[chosen]


# Settings come from config files, so their types are checked too. Each check returns problems in plain words.


def number_problems(
    name: str, value: object, low: float, high: float = float("inf"), *, above: bool = False
) -> list[str]:
    """Problems of a real-valued setting that must lie in [low, high], or in (low, high] with `above`."""
    wanted = f"above {low:g}" if above else f"at least {low:g}"
    if high != float("inf"):
        wanted += f" and at most {high:g}"
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if good and low <= value <= high and not (above and value == low):  # type: ignore[operator]
        return []
    return [f"{name}={value!r} is not a number {wanted}"]


def count_problems(**values: object) -> list[str]:
    """Problems of settings that must be positive integers."""
    return [
        f"{name}={value!r} is not a positive integer"
        for name, value in values.items()
        if not isinstance(value, int) or isinstance(value, bool) or value < 1
    ]


def choice_problems(name: str, value: object, choices: Sequence[str]) -> list[str]:
    """Problems of a setting that must be one of `choices`."""
    return [] if value in choices else [f"{name}={value!r} is not one of {', '.join(choices)}"]


def raise_if(problems: list[str]) -> None:
    """Raise ValueError with all problems at once, if there are any."""
    if problems:
        raise ValueError("; ".join(problems))
