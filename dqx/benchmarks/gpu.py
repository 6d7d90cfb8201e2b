"""The first ten minutes on a GPU: does it compute what the CPU computes, how fast is it, and how much memory is taken.

    python -m dqx.benchmarks.gpu --minutes 8 --out gpu.json     LLaDA-8B's shapes, random bfloat16 weights
    python -m dqx.benchmarks.gpu --scale small                  small shapes, also on a CPU: half a minute

Checks come first, then speeds, then one block of each method. Each step prints a line when it is done, and the file is
written again. What does not fit into the minutes is left out, by name: a step may take half of the time that is left,
the last one all of it. Exit code 1 where a check found a difference or a step failed. The file's schema is
gpu.schema.json, and README.md beside this file says what the figures are.
"""

from __future__ import annotations

import argparse
import gc
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dqx.benchmarks import agreement
from dqx.benchmarks.common import check, options
from dqx.benchmarks.evaluate import matmul_rate, quick
from dqx.benchmarks.lengths import Lengths, read, spread
from dqx.benchmarks.paths import PATHS, Comparison, architecture, counted, random_model
from dqx.benchmarks.sides import BITS
from dqx.common import accelerator
from dqx.common.devices import pick_device
from dqx.common.environment import environment
from dqx.common.files import write_json
from dqx.common.memory import gigabytes, peak_ram, watch_peaks
from dqx.config import compose
from dqx.models.transformer import MaskedDiffusionTransformer
from dqx.quant import quantize
from dqx.record.outcomes import why
from dqx.study.design import Design
from dqx.study.estimate.memory import FIXED, evaluating_bytes, memory_needs, weight_bytes
from dqx.study.estimate.speed import batch_rows, best, timed
from dqx.study.estimate.work import Work, work_of_tasks
from dqx.study.experiment import designed

VERSION = 1  # of the file
DTYPE = torch.bfloat16
FORWARDS = ("gsm8k", "mmlu", "arc_challenge")  # tasks at whose lengths forwards are timed
EVALUATED = {"gsm8k": 8, "arc_challenge": 2}  # documents that both paths evaluate
TOKENS_PER_STEP = 4  # so that an answer takes a quarter of the study's time, on both paths alike
LEAST = 0.2  # seconds that a step needs to begin


@dataclass(frozen=True)
class Scale:
    """How large the models are, and how much text quantizing looks at (None: as much as the study)."""

    divisor: int
    blocks: int
    calibration: tuple[str, ...] = ()


SCALES = {"full": Scale(1, 32), "small": Scale(32, 2, ("calib.samples=4", "calib.length=64"))}


class OutOfTime(Exception):
    """A step has not finished within its time."""


@dataclass(frozen=True)
class Outcome:
    """What a step found: its figures, a line for people, and whether a check found a difference."""

    figures: dict[str, Any]
    line: str
    ok: bool = True


Step = Callable[[], Outcome]


class Machine:
    """The steps on one device, and what they share: its speed, and the model."""

    def __init__(self, device: torch.device, scale: Scale, peak: float | None = None):
        """`peak` is the device's own figure in FLOP/s; None measures a large matrix product."""
        self.device, self.scale, self.given = device, scale, peak
        self.rate = peak
        self.arch = architecture(scale.divisor, scale.blocks)
        self._model: MaskedDiffusionTransformer | None = None

    def steps(self) -> dict[str, Step]:
        """By name, in the order in which they are worth doing."""

        def of(do: Callable[..., Outcome], *arguments: Any) -> Step:
            return lambda: do(*arguments)

        checks = {f"check {name}": of(self.check, check) for name, check in agreement.checks().items()}
        forwards = {f"forwards {task}": of(self.forwards, task) for task in FORWARDS}
        evaluated = {f"evaluate {task}": of(self.evaluate, task) for task in EVALUATED}
        quantized = {f"quantize {method} {bits}": of(self.quantize, method, bits) for method, bits in BITS.items()}
        return {"matrix product": self.matrix_product, **checks, **forwards, **evaluated, **quantized}

    def matrix_product(self) -> Outcome:
        """The speed that fractions of peak are of."""
        measured = matmul_rate(self.device, DTYPE)
        self.rate = self.given or measured
        line = f"{_flops(measured)} in bfloat16"
        figures = {"flops_per_second": measured, "given": self.given}
        return Outcome(figures, line + (f"; peak: {_flops(self.rate)}, as given" if self.given else ""))

    @torch.no_grad()
    def check(self, check: agreement.Check) -> Outcome:
        """One of the comparisons with the CPU."""
        rows = list(check(self.device))
        ok = all(row.ok for row in rows)
        return Outcome({"ok": ok, "rows": [asdict(row) | {"ok": row.ok} for row in rows]}, agreement.summary(rows), ok)

    @torch.no_grad()
    def forwards(self, task: str) -> Outcome:
        """The model alone, at a task's lengths, in batches as evaluation makes them."""
        model, work = self.model(), work_of_tasks(self.design("rtn", "w4a16"))[task]
        rows, length, looked = batch_rows(work, self.device.type), work.length, max(1, round(work.read))
        ids = self.random_ids(rows, length).to(self.device)
        where = torch.zeros_like(ids, dtype=torch.bool)
        where[:, -looked:] = True
        with counted(model) as once:
            model.logits_where(ids, where)
        seconds = best(lambda: timed(lambda: model.logits_where(ids, where), self.device))
        flops = once.flops / seconds
        figures = {
            "batch": rows,
            "length": length,
            "read": looked,
            "forwards_per_second": rows / seconds,
            "tokens_per_second": rows * length / seconds,
            "flops_per_second": flops,
            "of_peak": self.of_peak(flops),
        }
        batch = f"{rows} at a time" if rows > 1 else "one at a time"
        return Outcome(
            figures, f"{_number(rows / seconds)} per second of {length} tokens, {batch}: {self.speed(flops)}"
        )

    def evaluate(self, task: str) -> Outcome:
        """dqx's engine or scorer against the plain path: as many tokens, or choices, by both."""
        spec, documents = compose.suite([task])[task], spread(read(task), EVALUATED[task])
        if spec.gen_length is not None:
            spec = replace(spec, steps=spec.gen_length // TOKENS_PER_STEP)
        if self.scale.divisor > 1:
            spec, documents = quick(spec, documents)
        if spec.gen_length is not None:  # every answer to its end
            documents = [Lengths(document.prompt, (spec.gen_length,)) for document in documents]
        model, targets = self.model(), [target for document in documents for target in document.targets]
        length = max(document.prompt + max(document.targets) for document in documents)
        longest = max(targets)
        generates = spec.kind == "generation"
        work = Work(
            spec.kind,
            forwards=len(targets) * (spec.mc_samples or 1),
            at_most=0,
            length=length,
            read=float(spec.block_length or longest),
            target=longest,
            documents=len(documents),
        )
        weights = weight_bytes(self.arch, DTYPE)
        planned = weights + evaluating_bytes(self.arch, DTYPE, [(work, batch_rows(work, self.device.type))])
        watch_peaks(self.device)
        both = PATHS[spec.kind](model, spec, documents, 0)
        count, unit = (sum(targets), "tokens") if generates else (len(targets), "choices")
        sides: dict[str, dict[str, Any]] = {
            name: {
                "seconds": side.seconds,
                "per_second": count / side.seconds,
                "forwards": side.sequences,
                "of_peak": self.of_peak(side.flops / side.seconds),
            }
            for name, side in (("plain", both.plain), ("dqx", both.dqx))
        }
        memory, ratio = self.memory(planned), both.plain.seconds / both.dqx.seconds
        figures = {
            "documents": len(documents),
            "unit": unit,
            "count": count,
            **sides,
            "ratio": ratio,
            "equal_answers": sum(both.equal) if generates else None,
            "likelihood_error": None if generates else both.error,
            "memory": memory,
        }
        plain, ours = (sides[name]["per_second"] for name in ("plain", "dqx"))
        line = (
            f"{_number(ours)} {unit} per second, plain {_number(plain)}: {ratio:.2f} times as fast; "
            f"{_agreement(both, generates)}; {_memory(memory)}"
        )
        return Outcome(figures, line)

    def quantize(self, method: str, bits: str) -> Outcome:
        """One block in a model of one block: forwards, statistics, searches, rounding."""
        self.release()
        design = self.design(method, bits)
        one = replace(design, arch=replace(self.arch, n_blocks=1))
        model = random_model(one.arch, 0, self.device, DTYPE).requires_grad_(False)
        calib, needs = design.config.calib, memory_needs(one)
        ids = self.random_ids(calib.samples, calib.length)
        watch_peaks(self.device)
        seconds = timed(
            lambda: quantize(model, design.method, design.config.bits, [row[None] for row in ids], progress=False),
            self.device,
        )
        memory = self.memory(needs.weights + needs.quantizing)
        figures = {
            "samples": calib.samples,
            "length": calib.length,
            "seconds_per_block": seconds,
            "blocks": self.arch.n_blocks,
            "seconds_per_model": seconds * self.arch.n_blocks,
            "memory": memory,
        }
        whole = f"{_time(seconds * self.arch.n_blocks)} for {self.arch.n_blocks}"
        text = f"{calib.samples} windows of {calib.length} tokens"
        return Outcome(figures, f"{_time(seconds)} per block, {whole} by extrapolation ({text}); {_memory(memory)}")

    def design(self, method: str, bits: str) -> Design:
        """A run of this model with a method, as a plan sees it."""
        tasks = ",".join({*FORWARDS, *EVALUATED})
        choices = ["model=llada_8b_base", f"method={method}", f"bits={bits}", f"task=[{tasks}]"]
        small = [] if self.scale.divisor == 1 else ["model.sampler.eot_token_id=null"]  # beyond a small vocabulary
        config = compose.resolve(compose.compose([*choices, *small, *self.scale.calibration]))
        return designed(config, self.arch, DTYPE, self.device)

    def model(self) -> MaskedDiffusionTransformer:
        if self._model is None:
            self._model = random_model(self.arch, 0, self.device, DTYPE).requires_grad_(False)
        return self._model

    def random_ids(self, *shape: int) -> Tensor:
        """No masks among them."""
        return torch.randint(self.arch.mask_token_id, shape, generator=torch.Generator().manual_seed(0))

    def release(self) -> None:
        """Give back what the model takes."""
        self._model = None
        gc.collect()
        accelerator.empty_cache(self.device)

    def of_peak(self, flops: float) -> float | None:
        return None if self.rate is None else flops / self.rate

    def speed(self, flops: float) -> str:
        share = self.of_peak(flops)
        return _flops(flops) + ("" if share is None else f", {100 * share:.0f} % of peak")

    def memory(self, planned: int) -> dict[str, Any]:
        """Bytes taken since `watch_peaks`, on the device (on a CPU by the whole process), beside what a plan says."""
        if self.device.type == "cpu":
            return {"where": "ram", "peak": peak_ram(), "planned": planned + FIXED}
        return {"where": "gpu", "peak": accelerator.peak_memory(self.device), "planned": planned}


def _agreement(both: Comparison, generates: bool) -> str:
    if generates:
        return f"{sum(both.equal)} of {len(both.equal)} answers equal"
    return f"likelihoods within {both.error:.1e}"


def _memory(memory: dict[str, Any]) -> str:
    return f"{gigabytes(memory['peak'])} at most, {gigabytes(memory['planned'])} planned"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _flops(number: float) -> str:
    return f"{number / 1e12:.3g} TFLOP/s" if number >= 1e11 else f"{number / 1e9:.3g} GFLOP/s"


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < 120 else f"{seconds / 60:.3g} min"


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the block when it takes longer, as soon as Python gets a word in."""

    def stop(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def attempt(step: Step, limit: float) -> tuple[dict[str, Any], str]:
    """A step's entry in the file, and its line."""
    if limit < LEAST:
        return {"state": "left out", "reason": "no time was left"}, "left out: no time was left"
    try:
        with at_most(limit):
            outcome = step()
    except OutOfTime:
        reason = f"not done within {limit:.0f} s"
        return {"state": "left out", "reason": reason}, f"left out: {reason}"
    except Exception as error:  # the others are still worth doing
        return {"state": "failed", "reason": why(error)}, f"FAILED: {why(error)}"
    return {"state": "done", "ok": outcome.ok, "figures": outcome.figures}, outcome.line


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = options("gpu", __doc__, figures=False)
    parser.add_argument("--minutes", type=float, default=8.0, help="what may be spent (8)")
    parser.add_argument("--out", type=Path, help="write the figures to this file, again after each step")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, xpu (auto)")
    parser.add_argument("--scale", choices=SCALES, help="full: LLaDA-8B's shapes; small (full, on a CPU small)")
    parser.add_argument("--peak", type=float, help="TFLOP/s of the device in bfloat16 (those of a matrix product)")
    args = parser.parse_args(argv)
    check(parser, args)
    if not args.minutes > 0:
        parser.error(f"--minutes={args.minutes:g} must be above 0")
    if args.peak is not None and not args.peak > 0:
        parser.error(f"--peak={args.peak:g} must be above 0")
    if args.out is not None and not args.out.absolute().parent.is_dir():
        parser.error(f"--out={args.out}: there is no folder {args.out.parent}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    started = time.monotonic()
    args = arguments(argv)
    device = pick_device(args.device)
    name = args.scale or ("small" if device.type == "cpu" else "full")
    machine = Machine(device, SCALES[name], None if args.peak is None else args.peak * 1e12)
    arch = machine.arch
    report: dict[str, Any] = {
        "version": VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(device),
        "settings": {"device": str(device), "scale": name, "minutes": args.minutes},
        "model": {
            "blocks": arch.n_blocks,
            "hidden": arch.hidden_size,
            "mlp": arch.mlp_size,
            "vocabulary": arch.vocab_size,
        },
        "finished": False,
        "seconds": 0.0,
        "steps": [],
    }
    shapes = f"{arch.n_blocks} blocks, hidden {arch.hidden_size}, MLP {arch.mlp_size}, vocabulary {arch.vocab_size}"
    print(f"{accelerator.name(device)}, torch {torch.__version__}; {shapes}, bfloat16", flush=True)

    def passed() -> float:
        return time.monotonic() - started

    steps = machine.steps()
    for i, (called, step) in enumerate(steps.items()):
        left, before = 60 * args.minutes - passed(), passed()
        entry, line = attempt(step, left if i == len(steps) - 1 else left / 2)
        if entry["state"] != "done":
            machine.release()  # what an interrupted step has left
        report["steps"].append({"name": called, "seconds": passed() - before, **entry})
        report["seconds"], report["finished"] = passed(), i == len(steps) - 1
        print(f"{math.floor(passed() / 60):>3}:{passed() % 60:02.0f}  {called:<24}{line}", flush=True)
        if args.out is not None:
            write_json(args.out, report)
    return told(report)


def told(report: dict[str, Any]) -> int:
    """Print how it ended, the steps that were left out by name. Returns the exit code."""
    by_state: dict[str, list[str]] = {}
    for step in report["steps"]:
        state = "differing" if step.get("ok") is False else step["state"]
        by_state.setdefault(state, []).append(step["name"])
    print(f"\n{len(by_state.get('done', []))} of {len(report['steps'])} steps done in {_time(report['seconds'])}")
    for state in ("differing", "failed", "left out"):
        if state in by_state:
            print(f"{state}: {', '.join(by_state[state])}")
    return 1 if {"differing", "failed"} & set(by_state) else 0


if __name__ == "__main__":
    sys.exit(main())
