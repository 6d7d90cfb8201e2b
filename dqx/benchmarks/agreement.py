"""Whether a device computes what the CPU computes: the same small random models, inputs and noise on both.

Looked at are the forward in float32 and bfloat16, the tokens that every sampler writes, likelihoods, and of every
method the codes and what the quantized model then computes. Differences beyond rounding are no agreement.

B sequences of T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dqx.benchmarks.cases import MODELS
from dqx.benchmarks.paths import random_model
from dqx.config import compose
from dqx.diffusion.batches import Request
from dqx.diffusion.engine import Engine, Prompt
from dqx.diffusion.samplers import DreamSampler, LLaDASampler, Sampler
from dqx.diffusion.scorer import Scorer
from dqx.models.transformer import MaskedDiffusionTransformer
from dqx.quant import quantize
from dqx.quant.linear import QuantLinear

CPU = torch.device("cpu")
VOCABULARY = 512
SMALL: dict[str, Any] = {
    "n_blocks": 2,
    "hidden_size": 256,
    "mlp_size": 512,
    "n_heads": 2,
    "vocab_size": VOCABULARY,
    "mask_token_id": VOCABULARY - 2,
    "eos_token_id": VOCABULARY - 1,
}
LENGTHS = (9, 23, 40)  # of prompts, which share a batch

#: The most that is rounding: of logits and likelihoods relative to the largest, of tokens and codes a share.
LOGITS = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
LIKELIHOODS, TOKENS, CODES = 1e-4, 0.0, 0.01
#: Of quantized logits, relative to their error: activations next to the border of two codes fall on either side.
QUANTIZED = 0.25
ERRORS = 0.1  # where searches part ways at ties: how far apart the two models' errors may be, relative to each other

#: Method and widths, one for every kind of part and format; searches are made shorter, which takes the same kernels.
METHODS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("rtn", "w4a16", ()),
    ("rtn", "fp8", ()),
    ("rtn", "mxfp4", ()),
    ("rtn", "nvfp4", ()),
    ("gptq", "w4a16", ()),
    ("gptaq", "w4a16", ()),
    ("awq", "w4a16", ("method.transforms.scale.n_grid=5", "method.clip.n_grid=8")),
    ("smoothquant", "w8a8", ()),
    ("quarot", "w4a4", ("method.clip.n_grid=8",)),
    ("duquant", "w4a4", ("method.transforms.rotate.steps=32",)),
    ("d2quant", "w2a16", ("method.clip.n_grid=4",)),
    ("quant_dllm", "w2a16", ()),
)

SAMPLERS: dict[str, dict[str, Sampler]] = {
    "llada": {
        "temperature 0": LLaDASampler(suppress_mask=True),
        "temperature 1": LLaDASampler(suppress_mask=True, temperature=1.0),
        "random order": LLaDASampler(suppress_mask=True, remasking="random"),
        "guidance": LLaDASampler(suppress_mask=True, cfg_scale=1.0),
        "threshold": LLaDASampler(suppress_mask=True, threshold=0.5),
        "prefix cache": LLaDASampler(suppress_mask=True, cache="prefix"),
        "dual cache": LLaDASampler(suppress_mask=True, cache="dual"),
    },
    "dream": {
        "entropy": DreamSampler(suppress_mask=True, top_p=0.95),
        "margin": DreamSampler(suppress_mask=True, alg="topk_margin"),
        "temperature 1": DreamSampler(suppress_mask=True, temperature=1.0, top_k=50),
        "drawn order": DreamSampler(suppress_mask=True, alg="maskgit_plus", alg_temp=0.5),
        "origin": DreamSampler(suppress_mask=True, alg="origin", temperature=1.0),
    },
}


@dataclass(frozen=True)
class Agreement:
    """One thing that was computed on both: how far the device is from the CPU, and how far rounding explains it."""

    path: str
    measure: str  # logits, tokens, likelihoods, codes, quantized logits
    difference: float
    allowed: float
    explained: bool = False  # beyond that, and yet right: see `method`

    @property
    def ok(self) -> bool:
        return self.difference <= self.allowed or self.explained  # False for NaN


def pair(
    family: str, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[MaskedDiffusionTransformer, MaskedDiffusionTransformer]:
    """One random model of a family's form, on the CPU and on the device."""
    arch = next(arch for arch in MODELS.values() if arch.family == family)
    heads = SMALL["n_heads"] if arch.n_kv_heads == arch.n_heads else 1
    model = random_model(replace(arch, **SMALL, n_kv_heads=heads), 0, CPU, dtype).requires_grad_(False)
    return model, copy.deepcopy(model).to(device)


def random_ids(*shape: int) -> Tensor:
    return torch.randint(VOCABULARY - 2, shape, generator=torch.Generator().manual_seed(1))


def distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest absolute value."""
    expected = expected.double()
    return float((found.cpu().double() - expected).abs().max() / expected.abs().max())


def root_mean_square(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def forward(device: torch.device) -> Iterator[Agreement]:
    """Logits [B, T, V] of sequences alike, and of some with padding, which takes other kernels of attention."""
    ids = random_ids(3, 48)
    real = torch.ones_like(ids)
    real[0, :20] = real[1, :7] = 0
    for family in SAMPLERS:
        for dtype, allowed in LOGITS.items():
            ours, theirs = pair(family, device, dtype)
            for what, mask in (("alike", None), ("padded", real)):
                expected, found = ours(ids, mask), theirs(ids.to(device), None if mask is None else mask.to(device))
                shown = real.bool()
                name = str(dtype).removeprefix("torch.")
                yield Agreement(f"{family}, {name}, {what}", "logits", distance(found[shown], expected[shown]), allowed)


def tokens(device: torch.device) -> Iterator[Agreement]:
    """Answers of the engine, to prompts of several lengths at a time."""
    prompts = [Prompt(random_ids(length), i) for i, length in enumerate(LENGTHS)]
    for family, samplers in SAMPLERS.items():
        models = pair(family, device)
        for name, sampler in samplers.items():
            block_length = sampler.block_length(8)
            answers = []
            for model in models:
                engine = Engine(model, sampler, gen_length=16, block_length=block_length, steps=8, seed=3)
                answers.append(torch.tensor([answer.ids for answer in engine.generate(prompts)]))
            differing = float((answers[0] != answers[1]).double().mean())
            yield Agreement(f"{family}, {name}", "tokens", differing, TOKENS)


def likelihoods(device: torch.device) -> Iterator[Agreement]:
    """Targets of several lengths, drawn, enumerated, and drawn with guidance."""
    requests = [
        Request(random_ids(p), random_ids(t), (i,)) for i, (p, t) in enumerate(zip(LENGTHS, (1, 3, 9), strict=True))
    ]
    for family in SAMPLERS:
        models = pair(family, device)
        for name, settings in (("drawn", {}), ("exact", {"exact": True}), ("guidance", {"cfg_scale": 1.0})):
            ours, theirs = (
                torch.tensor(Scorer(model, samples=16, seed=3, **settings).score(requests), dtype=torch.float64)
                for model in models
            )
            yield Agreement(f"{family}, {name}", "likelihoods", distance(theirs, ours), LIKELIHOODS)


def method(name: str, bits: str, device: torch.device, *, overrides: Sequence[str] = ()) -> Iterator[Agreement]:
    """Codes that a method gives on both, and the logits of the device's quantized model on both.

    Where two maxima or two losses are equal but for rounding, a search takes another way, and all codes differ after
    it. Both results are right if their models are equally far from full precision.
    """
    ids = random_ids(8, 64)
    choice = compose.select(method=name, bits=bits, overrides=overrides)
    for family in SAMPLERS:
        models = pair(family, device)
        original = models[0](ids)
        for model in models:
            calibration = [ids] if compose.build(choice.method).needs_data else []
            quantize(model, compose.build(choice.method), choice.bits, calibration, progress=False)
        ours, theirs = models
        logits = theirs(ids.to(device)).cpu()
        moved = theirs.cpu()
        expected = moved(ids)
        errors = [root_mean_square(quantized - original) for quantized in (ours(ids), expected)]
        alike = abs(errors[1] - errors[0]) <= ERRORS * errors[0]
        moved_by = root_mean_square(logits - expected) / errors[1]
        yield Agreement(f"{family}, {name} {bits}", "codes", differing_codes(ours, moved), CODES, alike)
        yield Agreement(f"{family}, {name} {bits}", "quantized logits", moved_by, QUANTIZED)


def differing_codes(ours: MaskedDiffusionTransformer, theirs: MaskedDiffusionTransformer) -> float:
    """The share of the weights' codes in which two quantized models differ."""
    differing = total = 0
    for one, other in zip(ours.modules(), theirs.modules(), strict=True):
        if isinstance(one, QuantLinear) and isinstance(other, QuantLinear) and one.scale is not None:
            differing += int((one.codes() != other.codes()).sum())
            total += one.weight.numel()
    return differing / total


Check = Callable[[torch.device], Iterator[Agreement]]


def checks() -> dict[str, Check]:
    """By name, everything above."""
    by_method = {
        f"{name} {bits}": partial(method, name, bits, overrides=overrides) for name, bits, overrides in METHODS
    }
    return {"forward": forward, "tokens": tokens, "likelihoods": likelihoods, **by_method}


def summary(found: Sequence[Agreement]) -> str:
    """The largest differences by measure; what is wrong comes first."""
    wrong = [f"{row.path}: {row.measure} {row.difference:.2g}, at most {row.allowed:g}" for row in found if not row.ok]
    if wrong:
        return f"DIFFERS: {'; '.join(wrong)}"
    worst = {row.measure: max(r.difference for r in found if r.measure == row.measure) for row in found}
    return f"agrees: {', '.join(f'{measure} within {value:.2g}' for measure, value in worst.items())}"
