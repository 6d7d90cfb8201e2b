"""Calibration states: which tokens of the calibration windows are masked, by `calib.masking`.

A mask predictor never sees at work what mainstream calibration shows it: text without a single mask. The kinds, all
on the same windows of text:

- `clean`: no masks.
- `mcs`, masked calibration simulation (Zhang et al. 2025, arXiv:2510.03274): the first `visible` of a window stays (a
  quarter), every later token of window i of N is masked with probability t = (i + 1) / N.
- `random_t`, the states of training: every token is masked with probability t, t uniform in (0, 1), stratified over
  windows: t = (i + u) / N. The share of masks in 32 windows of 256 tokens has a standard deviation of 0.5 points over
  seeds (with independent draws of t: 5 points).
- `trajectory`, the states that the model's sampler visits. A window is a prompt, always visible, and an answer of
  `gen_length` tokens. Window i shows one call of the model out of `Sampler.calls`: finished blocks are visible, the
  current block has exactly as many masks as the sampler leaves there, later blocks are masked. The N windows are
  spread evenly over the calls, so every call has the same weight. (Dream's sampler has one block; truncation is in its
  counts. With guidance, every second call has masks in place of the prompt. With a threshold, a rollout shows fewer
  masks than the scheduled calls say.)
  With `buckets`, calls have other weights (Xu and Yang 2025, DLLMQuant, arXiv:2508.14090, temporal-mask adaptive
  sampling): calls are sorted into so many buckets by the share of the answer that is still masked, 1 to 0 in equal
  steps, the earliest first, and each bucket gets its share of the windows, spread evenly over its calls. The paper's
  shares are 0.3, 0.2, 0.2, 0.3: more of the first and last steps. Its code is not public; a community's
  re-implementation draws states of real generations from each bucket at random, where these are spread.
  Which positions are still masked is drawn uniformly, and written ones hold the text's own tokens. With `rollout`, the
  model as it is before quantization continues the prompt with its sampler, and the state at that call is taken: the
  states really visited, at the cost of half a generation per window.
  Every window knows at which step each token of its answer is written (`CalibBatch.committed`): in the order in which
  its positions were drawn, so that a random order of commitments belongs to every state; with `rollout` in that of the
  generation, which then runs to its end.
  Samplers that store blocks once they are final never look at a whole window. There a window shows all passes that
  write its answer, side by side, each with its own attention over what is stored: `passes.py`.

The other kinds are text with the attention of the architecture: where a model denoises blocks over causal text
(Nemotron-Labs-Diffusion), `clean` is causal.

`gen_length`, `block_length` and `steps` belong to `calib`, not to a task: a quantized model depends on model (with
its sampler), method, bits, calibration and seed, and is the same whatever is evaluated afterwards.

Random numbers are a function of (seed, window). N windows, T tokens per window, P of them prompt, G = gen_length.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from dqx.common.names import did_you_mean
from dqx.common.problems import raise_if
from dqx.data.calibration import CalibBatch
from dqx.data.passes import pass_batches, pass_tokens
from dqx.diffusion.noise import SeededNoise, generator
from dqx.diffusion.rollout import spread
from dqx.diffusion.samplers import Call, Sampler
from dqx.diffusion.samplers.blockwise import BlockwiseSampler
from dqx.models.architecture import Architecture
from dqx.models.transformer import MaskedDiffusionTransformer

#: The kinds, and the settings of `calib` that each one reads.
MASKINGS: dict[str, tuple[str, ...]] = {
    "clean": (),
    "mcs": ("visible",),
    "random_t": ("visible",),
    "trajectory": ("gen_length", "block_length", "steps", "rollout", "buckets"),
}


class MaskingSettings(Protocol):
    """The fields of the `calib` config group that this module reads."""

    masking: str
    length: int
    visible: float | None
    gen_length: int | None
    block_length: int | None
    steps: int | None
    rollout: bool
    buckets: list[float] | None


def masking_problems(calib: MaskingSettings, sampler: Sampler | None) -> list[str]:
    """What config alone can tell is wrong with the masking; without a sampler, its schedule is not judged."""
    kind = calib.masking
    if kind not in MASKINGS:
        return [f"calib.masking={kind} is unknown; {did_you_mean(kind, tuple(MASKINGS))}"]
    problems = []
    for setting in dict.fromkeys(name for names in MASKINGS.values() for name in names):
        value = getattr(calib, setting)
        if value not in (None, False) and setting not in MASKINGS[kind]:
            readers = " and ".join(f"calib={other}" for other, read in MASKINGS.items() if setting in read)
            problems.append(f"calib.{setting}={value} does nothing with calib.masking={kind}; it belongs to {readers}")
    if "visible" in MASKINGS[kind] and not (calib.visible is not None and 0 <= calib.visible < 1):
        visible = "null" if calib.visible is None else calib.visible
        problems.append(
            f"calib.visible={visible} must be the share of each window that stays visible, at least 0 "
            f"and below 1; calib={kind} sets it"
        )
    return problems + (_schedule_problems(calib, sampler) if kind == "trajectory" else [])


def _schedule_problems(calib: MaskingSettings, sampler: Sampler | None) -> list[str]:
    length = calib.gen_length
    if length is None:
        return ["calib.gen_length is not set; calib=trajectory sets it to half of calib.length"]
    problems = []
    if length >= calib.length:
        problems.append(
            f"calib.gen_length={length} leaves no room for a prompt in windows of calib.length={calib.length} tokens; "
            f"choose less than {calib.length}, or longer windows"
        )
    if sampler is not None:
        steps = length if calib.steps is None else calib.steps
        for problem in sampler.problems(length, sampler.block_length(calib.block_length), steps):
            problems.append(f"model.{problem}" if problem.startswith("sampler.") else f"calib.{problem}")
    if calib.buckets is not None and isinstance(sampler, BlockwiseSampler):
        problems.append(
            f"calib.buckets=[{','.join(map(str, calib.buckets))}] shares windows among the sampler's calls, but with "
            "this sampler a window shows all of them; write calib.buckets=null"
        )
    elif calib.buckets is not None:
        problems += _bucket_problems(calib, None if problems else sampler)
    return problems


def _bucket_problems(calib: MaskingSettings, sampler: Sampler | None) -> list[str]:
    """What is wrong with `calib.buckets`; without a sampler, its schedule is not judged."""
    shares = list(calib.buckets or ())
    where = f"calib.buckets=[{','.join(map(str, shares))}]"
    if not shares or not all(share >= 0 for share in shares) or not math.isclose(sum(shares), 1, abs_tol=1e-6):
        return [f"{where} must be the shares of the windows by bucket, which sum up to 1, such as [0.3,0.2,0.2,0.3]"]
    if sampler is None:
        return []
    drawn = [_calls(calib, sampler, generator(i, "calib", "schedule")) for i in range(2)]
    if drawn[0] != drawn[1]:
        return [
            f"{where}: the schedule of model.sampler ({sampler.name}) is drawn anew for every window, and may skip a "
            "bucket; write model.sampler.alg=entropy, or calib.buckets=null"
        ]
    by_bucket = _by_bucket(drawn[0], len(shares), calib.gen_length or 0)
    for i, (share, calls) in enumerate(zip(shares, by_bucket, strict=True)):
        if share and not calls:
            high, low = (1 - edge / len(shares) for edge in (i, i + 1))
            return [
                f"{where}: no call of the sampler leaves {low:.0%} to {high:.0%} of the answer masked, which is bucket "
                f"{i + 1}; write more steps (calib.steps={calib.steps or calib.gen_length}), or fewer buckets"
            ]
    return []


def window_tokens(calib: MaskingSettings, sampler: Sampler, arch: Architecture) -> int:
    """Tokens of a calibration window as the model computes them, or about as many at most.

    `calib.length` where settings are wrong.
    """
    by_passes = calib.masking == "trajectory" and isinstance(sampler, BlockwiseSampler)
    if not by_passes or masking_problems(calib, sampler):
        return calib.length
    new = calib.gen_length or 0
    return pass_tokens(sampler, arch, calib.length - new, new, calib.steps or new)


def calibration_states(
    model: MaskedDiffusionTransformer,
    sampler: Sampler,
    windows: Tensor,
    calib: MaskingSettings,
    *,
    seed: int,
    progress: bool = True,
    commitments: bool = False,
) -> list[CalibBatch]:
    """The windows [N, T] as `calib.masking` shows them, with the model's mask token, one batch per window.

    With `commitments` those of a trajectory say at which step each token is written. Raises ConfigProblems with the
    `masking_problems`. The model runs for rollouts only.
    """
    raise_if(masking_problems(calib, sampler))
    mask_id = model.arch.mask_token_id
    committed = None
    if calib.masking == "trajectory" and isinstance(sampler, BlockwiseSampler):
        length = calib.gen_length or 0
        batches = pass_batches(
            *(model, sampler, windows),
            gen_length=length,
            steps=calib.steps or length,
            seed=seed,
            rollout=calib.rollout,
            progress=progress,
        )
        return batches if commitments else [replace(batch, committed=None) for batch in batches]
    if calib.rollout:
        ids, committed = rollouts(model, sampler, windows, calib, seed=seed, progress=progress, whole=commitments)
    else:
        ids = windows.masked_fill(masks(calib, sampler, *windows.shape, seed=seed), mask_id)
        if commitments and calib.masking == "trajectory":
            committed = commitment_times(calib, sampler, *windows.shape, seed=seed)
    return [
        CalibBatch(row[None], (row[None] == mask_id).float().mean(1), None if committed is None else committed[i][None])
        for i, row in enumerate(ids)
    ]


def masks(calib: MaskingSettings, sampler: Sampler, samples: int, length: int, *, seed: int) -> Tensor:
    """Which tokens are masked [N, T], by `calib.masking`."""
    if calib.masking == "clean":
        return torch.zeros(samples, length, dtype=torch.bool)
    uniforms = torch.stack([_uniforms(seed, "mask", i, length) for i in range(samples)])
    if calib.masking == "trajectory":
        shown = shown_calls(calib, sampler, samples, seed=seed)
        return torch.stack([_mask_of(call, calib, row) for call, row in zip(shown, uniforms, strict=True)])
    window = torch.arange(samples, dtype=torch.float64)
    within = torch.cat([_uniforms(seed, "t", i, 1) for i in range(samples)]) if calib.masking == "random_t" else 1.0
    masked = uniforms < ((window + within) / samples)[:, None]
    masked[:, : int((calib.visible or 0) * length)] = False
    return masked


def shown_calls(calib: MaskingSettings, sampler: Sampler, samples: int, *, seed: int) -> list[Call]:
    """The call of the model that each of N windows shows, spread evenly over the calls of a generation or a bucket."""
    if calib.buckets is not None:
        calls = _schedule(calib, sampler, seed, 0)
        by_bucket = _by_bucket(calls, len(calib.buckets), calib.gen_length or 0)
        counts = allotted(samples, calib.buckets)
        return [some[at] for some, n in zip(by_bucket, counts, strict=True) for at in spread(n, len(some))]
    shown = []
    for i in range(samples):
        calls = _schedule(calib, sampler, seed, i)
        shown.append(calls[spread(samples, len(calls))[i]])
    return shown


def commitment_times(calib: MaskingSettings, sampler: Sampler, samples: int, length: int, *, seed: int) -> Tensor:
    """The share of the steps that have passed when each token of N windows is written [N, T]; -1 in the prompt.

    A token is written at the last call at which it is masked, if `masks` at all calls drew the same numbers.
    """
    gen_length = calib.gen_length or 0
    times = torch.full((samples, length), -1.0)
    for i in range(samples):
        answer, uniforms = times[i, -gen_length:], _uniforms(seed, "mask", i, length)[-gen_length:]
        for call in _schedule(calib, sampler, seed, i):
            open_ones = uniforms[call.start : call.stop].argsort(stable=True)[: call.masked]
            answer[call.start + open_ones] = call.step / (calib.steps or gen_length)
    return times


def _schedule(calib: MaskingSettings, sampler: Sampler, seed: int, window: int) -> list[Call]:
    """The calls of a window's generation; the schedule of Dream's `origin` is random, each window draws its own."""
    return _calls(calib, sampler, generator(seed, "calib", "schedule", window))


def _calls(calib: MaskingSettings, sampler: Sampler, random: torch.Generator) -> list[Call]:
    gen_length = calib.gen_length or 0
    return sampler.calls(gen_length, sampler.block_length(calib.block_length), calib.steps or gen_length, random)


def _by_bucket(calls: Sequence[Call], buckets: int, gen_length: int) -> list[list[Call]]:
    """Calls by the share of the answer that is written before them, in `buckets` equal parts of 0 to 1."""
    sorted_calls: list[list[Call]] = [[] for _ in range(buckets)]
    for call in calls:
        written = call.stop - call.masked
        sorted_calls[written * buckets // gen_length].append(call)
    return sorted_calls


def allotted(total: int, shares: Sequence[float]) -> list[int]:
    """`total` by `shares`, which sum up to 1: rounded down, and one more for those that lost most, the first first."""
    exact = [total * share for share in shares]
    counts = [math.floor(part + 1e-9) for part in exact]  # 10 * 0.3 is 3
    lost = sorted(range(len(shares)), key=lambda i: counts[i] - exact[i])
    for i in lost[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _mask_of(call: Call, calib: MaskingSettings, uniforms: Tensor) -> Tensor:
    """The masked tokens [T] of a window at a call, its open positions drawn uniformly by ranking `uniforms` [T]."""
    prompt = len(uniforms) - (calib.gen_length or 0)
    masked = torch.zeros(len(uniforms), dtype=torch.bool)
    masked[:prompt] = call.blind
    masked[prompt + call.stop :] = True
    block = uniforms[prompt + call.start : prompt + call.stop]
    masked[prompt + call.start + block.argsort(stable=True)[: call.masked]] = True
    return masked


def _uniforms(seed: int, kind: str, window: int, n: int) -> Tensor:
    return torch.rand(n, dtype=torch.float64, generator=generator(seed, "calib", kind, window))


def rollouts(
    model: MaskedDiffusionTransformer,
    sampler: Sampler,
    windows: Tensor,
    calib: MaskingSettings,
    *,
    seed: int,
    progress: bool = True,
    whole: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """States [N, T] that `sampler` really visits when it continues the first P tokens of each window with `model`.

    Each window is taken at the step of its call in `shown_calls`. (For Dream's `origin` that step may write nothing in
    this very generation; the state then is that of the next call.) With `whole` generations run to their ends, and the
    second result has the times at which tokens are written [N, T], as `commitment_times`; a mask that the model writes
    counts as written last.
    """
    gen_length = calib.gen_length or 0
    steps, mask_id = calib.steps or gen_length, model.arch.mask_token_id
    states, times = windows.clone(), torch.full(windows.shape, -1.0)
    shown = shown_calls(calib, sampler, len(windows), seed=seed)
    seconds = 1.0 if sys.stderr.isatty() else 60.0  # a log file keeps every update
    bar = tqdm(shown, desc="rollouts", unit=" windows", disable=not progress, mininterval=seconds)
    for i, call in enumerate(bar):
        seen = _states(
            None if whole else call.step,
            sampler,
            model,
            windows[i : i + 1, :-gen_length],
            gen_length=gen_length,
            block_length=sampler.block_length(calib.block_length),
            steps=steps,
            noise=SeededNoise(seed, [("calib", i)]),
        )
        states[i] = seen[min(call.step, len(seen) - 1)].cpu()
        if whole:
            answers = torch.stack([state[-gen_length:] for state in seen]) == mask_id
            times[i, -gen_length:] = (answers.sum(0).cpu() - 1) / steps
        if call.blind:
            states[i, :-gen_length] = mask_id
    return states, times if whole else None


class _Reached(Exception):
    """Ends a generation at the step that was asked for."""


def _states(
    last: int | None, sampler: Sampler, model: MaskedDiffusionTransformer, prompt: Tensor, **settings: Any
) -> list[Tensor]:
    """A sequence [P + G] before every step of a generation; those after step `last` are not made, with None all are."""
    seen: list[Tensor] = []

    def on_step(ids: Tensor) -> None:
        seen.append(ids[0])
        if last is not None and len(seen) > last:
            raise _Reached

    with suppress(_Reached):
        sampler.generate(model, prompt, on_step=on_step, **settings)
    return seen
