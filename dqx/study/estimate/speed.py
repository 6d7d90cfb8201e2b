"""How long work takes: measured here, on random blocks of the model's shapes, or assumed for another machine (gpus.py).

Measured are, each at the lengths and batch sizes of the work itself: one block, which stands for all blocks; and all
that is no block, by running the evaluation's own `Engine` and `Scorer` on a model without blocks: embedding, head,
ranking, drawing, and their Python. Nothing is read from the checkpoint. What would take longer than `PASS` is measured
on fewer tokens and multiplied. Warmed up, the best of a few tries.

Of the seconds that evaluations of the bundled tasks took on one thread, 79 to 98 % were foretold, in both families.

B sequences of T tokens; a sequence reads R of its positions.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TypeVar

import torch
from torch import nn

from dqx.common import accelerator
from dqx.diffusion.batches import CPU_TOKENS, GPU_TOKENS, Request
from dqx.diffusion.block_engine import engine_for
from dqx.diffusion.engine import Engine, Prompt, busy_tokens
from dqx.diffusion.factorization import Factorization
from dqx.diffusion.samplers import Sampler
from dqx.diffusion.scorer import Scorer
from dqx.models.architecture import Architecture
from dqx.models.transformer import MaskedDiffusionTransformer, block_of
from dqx.study.estimate.gpus import BANDWIDTH, GPUS, OPERATIONS
from dqx.study.estimate.work import Work

PASS = 0.25  # seconds that one timed pass should take, about, at most
TRIES = 3

Module = TypeVar("Module", bound=nn.Module)


def block_parameters(arch: Architecture) -> int:
    """Weights of the linears of one block."""
    return sum(arch.in_features(role) * arch.out_features(role) for role in arch.roles)


def block_flops(arch: Architecture, length: int, computed: float | None = None) -> float:
    """Operations of one sequence in one block: the linears and attention; of `computed` tokens, None: of all."""
    tokens = length if computed is None else computed
    return 2.0 * block_parameters(arch) * tokens + 4.0 * arch.n_heads * arch.head_size * length * tokens


def head_flops(arch: Architecture, positions: float) -> float:
    """Operations of the output head on so many positions."""
    return 2.0 * arch.vocab_size * arch.hidden_size * positions


def work_flops(arch: Architecture, work: Work) -> float:
    """Operations of all forwards of `work`; the head reads the positions that are needed."""
    blocks = arch.n_blocks * block_flops(arch, work.length, work.width)
    return work.forwards * (blocks + head_flops(arch, work.read))


def batch_rows(work: Work, device_type: str) -> int:
    """Sequences that go through the model at a time on a kind of device, where memory does not bound them."""
    if work.kind == "plain" or work.batch:
        return work.batch or 1
    if work.kind == "generation":
        tokens, most = busy_tokens(device_type), work.documents
    else:
        tokens, most = CPU_TOKENS if device_type == "cpu" else GPU_TOKENS, round(work.forwards)
    return max(1, min(int(tokens // work.width), most))


@dataclass(frozen=True)
class Assumed:
    """Another machine, at a sustained speed that somebody gives, in 10^12 operations per second."""

    arch: Architecture
    tflops: float

    @property
    def label(self) -> str:
        return f"assumed: {self.tflops:g} TFLOP/s sustained (plan_tflops)"

    def seconds(self, work: Work, sampler: Sampler) -> float:
        return work_flops(self.arch, work) / (self.tflops * 1e12)


@dataclass(frozen=True)
class Published:
    """A GPU that is not here, in bfloat16, at shares of its published peaks that are assumed."""

    arch: Architecture
    name: str  # of `gpus.GPUS`

    @property
    def tflops(self) -> float:
        return OPERATIONS * GPUS[self.name].tflops

    @property
    def label(self) -> str:
        gpu = GPUS[self.name]
        return (
            f"assumed, not measured: {self.name} at {100 * OPERATIONS:.0f} % of its published {gpu.tflops:g} TFLOP/s "
            f"(bfloat16, dense) and {100 * BANDWIDTH:.0f} % of its {gpu.bandwidth:g} TB/s"
        )

    def seconds(self, work: Work, sampler: Sampler) -> float:
        """Whichever takes longer: the operations, or reading all weights once for each batch."""
        weights = self.arch.n_blocks * block_parameters(self.arch) + self.arch.vocab_size * self.arch.hidden_size
        read = work.forwards / batch_rows(work, "cuda") * weights * torch.bfloat16.itemsize
        bandwidth = BANDWIDTH * GPUS[self.name].bandwidth
        return max(work_flops(self.arch, work) / self.tflops, read / bandwidth) / 1e12


@dataclass
class Measured:
    """This machine, on one architecture in one dtype."""

    arch: Architecture
    dtype: torch.dtype
    device: torch.device
    _times: dict[tuple[object, ...], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        with torch.device("meta"):
            outer = MaskedDiffusionTransformer(replace(self.arch, n_blocks=0, tied_head=True))
            block = block_of(self.arch)
        self.outer = filled(outer, self.dtype, self.device)
        self.block = filled(block, self.dtype, self.device)
        self.limit = self._limit()

    @property
    def label(self) -> str:
        cpu = self.device.type == "cpu"
        name = f"{torch.get_num_threads()} CPU threads" if cpu else accelerator.name(self.device)
        name = "1 CPU thread" if name == "1 CPU threads" else name
        return f"measured here: {name}, {str(self.dtype).removeprefix('torch.')}, {_tflops(self.tflops)} in blocks"

    @property
    def tflops(self) -> float:
        return block_flops(self.arch, self.limit) / self.block_seconds(1, self.limit) / 1e12

    def seconds(self, work: Work, sampler: Sampler) -> float:
        """Everything that `work` takes through the model."""
        rows = self.rows(work)
        blocks = work.forwards * self.arch.n_blocks * self.block_seconds(rows, work.length, work.width) / rows
        if work.kind == "generation":
            passes = 2 if sampler.cfg_scale > 0 else 1
            own = self._passes_seconds if sampler.stores_final else self._engine_seconds
            return blocks + work.forwards / passes * own(work, rows, sampler)
        if work.kind == "likelihood":
            return blocks + work.forwards * self._scorer_seconds(work, rows, sampler.factorization())
        return blocks

    def rows(self, work: Work) -> int:
        """Sequences that go through the model at a time."""
        return batch_rows(work, self.device.type)

    def block_seconds(self, rows: int, length: int, computed: float | None = None) -> float:
        """One block on B sequences of T tokens, or on `computed` of them that see all."""
        b, t = rows, length if computed is None else max(1, round(computed))
        if b * t > self.limit:
            b, t = max(1, self.limit // t), min(t, self.limit)
        if ("block", b, t) not in self._times:
            self._times["block", b, t] = best(lambda: self._pass(b, t))
        whole, part = rows * block_flops(self.arch, length, computed), b * block_flops(self.arch, t)
        return self._times["block", b, t] * whole / part

    def _pass(self, rows: int, length: int) -> float:
        """Seconds of one pass. Of several sequences one has padding, as in batches of real prompts."""
        ids = torch.zeros(rows, length, dtype=torch.long, device=self.device)
        real = torch.ones_like(ids)
        real[0, 0] = 0
        rope, mask = self.outer.context(ids, real if rows > 1 else None)
        x = torch.randn(rows, length, self.arch.hidden_size, device=self.device).to(self.dtype)
        return timed(lambda: self.block(x, rope, mask), self.device)

    def _limit(self) -> int:
        """Tokens that one block does within `PASS`."""
        most = CPU_TOKENS if self.device.type == "cpu" else GPU_TOKENS
        tokens = 16
        while tokens < most and min(self._pass(1, tokens) for _ in range(2)) < PASS:
            tokens *= 2
        return tokens

    def _readable(self, positions: float) -> int:
        """As many positions as the head reads within `PASS`, if not all."""
        return max(1, min(round(positions), int(PASS * self.tflops * 1e12 / head_flops(self.arch, 1))))

    @torch.no_grad()
    def _engine_seconds(self, work: Work, rows: int, sampler: Sampler) -> float:
        """All that is no block of one sequence's step: one step of the engine, divided by its sequences."""
        read = round(work.read)
        shown = self._readable(rows * read)
        some, each = max(1, shown // read), min(read, shown)
        key = ("engine", repr(sampler), some, each, work.length)
        if key not in self._times:
            engine = Engine(self.outer, sampler, gen_length=each, steps=1, batch_size=some)
            length = max(1, work.length - each)
            prompts = [Prompt([1 % self.arch.vocab_size] * (length - i % 2 or 1), i) for i in range(some)]
            self._times[key] = best(lambda: timed(lambda: engine.generate(prompts), self.device))
        return self._times[key] / some * read / each

    @torch.no_grad()
    def _passes_seconds(self, work: Work, rows: int, sampler: Sampler) -> float:
        """`_engine_seconds` of a sampler that writes by passes: answers of one block, divided by their passes."""
        block = sampler.block_length(None) or 1
        some = max(1, min(rows, self._readable(rows * block) // block))
        key = ("passes", repr(sampler), some, work.length)
        if key not in self._times:
            steps = sampler.steps_for(block, None)
            engine = engine_for(sampler)(self.outer, sampler, gen_length=block, steps=steps, batch_size=some)
            prompts = [Prompt([1 % self.arch.vocab_size] * max(1, work.length - block - i % 2), i) for i in range(some)]
            taken = sum(answer.n_forwards for answer in engine.generate(prompts))
            self._times[key] = best(lambda: timed(lambda: engine.generate(prompts), self.device)) / taken
        return self._times[key]

    def _scorer_seconds(self, work: Work, rows: int, factorization: Factorization | None) -> float:
        """All that is no block of one masked sequence of a likelihood: some requests through the scorer."""
        positions = self._readable(rows * work.read)
        draws = max(1, min(work.draws, round(positions / work.read)))
        n = max(1, round(positions / work.read / draws))
        key = ("scorer", draws, n, work.target, work.length, factorization)
        if key not in self._times:
            scorer = Scorer(
                self.outer, samples=draws, seed=0, batch_tokens=rows * work.length, factorization=factorization
            )
            prefix = torch.zeros(max(1, work.length - work.target), dtype=torch.long)
            target = torch.arange(work.target) % self.arch.vocab_size
            requests = [Request(prefix.clone().fill_(i % self.arch.vocab_size), target, (i,)) for i in range(n)]

            def once() -> float:
                scorer.n_forwards = scorer.n_tokens = 0
                return timed(lambda: scorer.score(requests), self.device)

            seconds = best(once)
            each = scorer.n_forwards if factorization is None else scorer.n_tokens / work.length
            self._times[key] = seconds / each
        return self._times[key]


@lru_cache(maxsize=2)  # a head and a block of 8B take 1.5 GB
def measured(arch: Architecture, dtype: torch.dtype, device: torch.device) -> Measured:
    """The measurements of one model, for all of its runs."""
    return Measured(arch, dtype, device)


def filled(module: Module, dtype: torch.dtype, device: torch.device) -> Module:
    """A module without storage, with weights that keep activations finite: a random strip of each, repeated."""
    module = module.to(dtype).to_empty(device=device).requires_grad_(False)
    for p in module.parameters():
        if p.dim() == 1:
            p.fill_(1.0)
            continue
        strip = torch.randn(min(64, len(p)), p.shape[1], device=device) * p.shape[1] ** -0.5
        for start in range(0, len(p), len(strip)):
            p[start : start + len(strip)] = strip[: len(p) - start]
    return module


def best(seconds: Callable[[], float]) -> float:
    """The least of a few tries, of fewer where one takes long, after one that does not count."""
    seconds()
    tries = [seconds()]
    while len(tries) < TRIES and sum(tries) < PASS:
        tries.append(seconds())
    return min(tries)


def timed(do: Callable[[], object], device: torch.device) -> float:
    """Seconds until `do` has been done; on one CPU thread of this process alone, whatever else the machine does."""
    accelerator.synchronize(device)
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    started = clock()
    with torch.no_grad():
        do()
    accelerator.synchronize(device)
    return clock() - started


def _tflops(value: float) -> str:
    return f"{value:.3g} TFLOP/s" if value >= 0.1 else f"{value * 1000:.3g} GFLOP/s"
