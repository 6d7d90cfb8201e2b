"""What drawing tokens costs: a denoising step at temperature above 0 beside one at temperature 0.

    python -m dqx.benchmarks.temperature                       LLaDA's shapes, an eighth as wide, 4 blocks: a minute
    python -m dqx.benchmarks.temperature --scale 1 --blocks 32 --device cuda --dtype bfloat16 --rows 16

Both sides write the same number of tokens with the same random model, one after the other and several times; the
median counts. The vocabulary is the real one, over which noise is drawn for every position that a step looks at.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from statistics import median

import torch

from dqx.benchmarks.cases import MODELS, scaled
from dqx.benchmarks.common import CPU, check, options, seconds, table, tell, write_figures
from dqx.benchmarks.evaluate import DTYPES
from dqx.benchmarks.paths import random_model
from dqx.diffusion.engine import Engine, Prompt
from dqx.diffusion.noise import SeededNoise
from dqx.diffusion.samplers.llada import LLaDASampler
from dqx.models.transformer import Architecture
from dqx.report.tables import Table

ROUNDS = 3


@dataclass
class Figures:
    """Seconds of a step, by temperature, of each round; and of the uniforms of one position."""

    rows: int
    looked_at: float  # positions per step, mean
    vocab_size: int
    steps: dict[float, list[float]] = field(default_factory=dict)
    uniforms: float = 0.0

    def step(self, temperature: float) -> float:
        return median(self.steps[temperature])


@torch.no_grad()
def compare(
    arch: Architecture,
    *,
    rows: int,
    prompt: int,
    gen_length: int,
    steps: int,
    temperature: float,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    rounds: int = ROUNDS,
) -> Figures:
    """`rows` answers of `gen_length` tokens to prompts of `prompt` tokens, written together in `steps` steps."""
    model = random_model(arch, 0, device, dtype)
    ids = torch.randint(1, 1000, (rows, prompt), generator=torch.Generator().manual_seed(1))
    prompts = [Prompt(row, i) for i, row in enumerate(ids)]
    looked_at = rows * sum(gen_length - step * gen_length // steps for step in range(steps)) / steps
    figures = Figures(rows, looked_at, arch.vocab_size)

    def write(temperature: float) -> float:
        sampler = LLaDASampler(temperature=temperature, suppress_mask=True)
        engine = Engine(model, sampler, gen_length=gen_length, steps=steps, batch_size=rows)
        return seconds(lambda: engine.generate(prompts), device) / steps

    write(temperature)  # the first one pays for what is set up once
    for _ in range(rounds):
        for each in (0.0, temperature):
            figures.steps.setdefault(each, []).append(write(each))
    places = torch.arange(gen_length, device=device)
    noise = SeededNoise(0, ["document"])
    work = seconds(lambda: noise.uniform("token", 0 * places, places, 0 * places, arch.vocab_size), device)
    figures.uniforms = work / gen_length
    return figures


def overview(figures: Figures) -> Table:
    zero, drawn = figures.steps
    lines: list[tuple[str, ...]] = [(f"temperature {t:g}", f"{1000 * figures.step(t):.1f}") for t in figures.steps]
    more = figures.step(drawn) - figures.step(zero)
    lines.append(("more", f"{1000 * more:.1f}", f"{100 * more / figures.step(zero):.1f} %"))
    lines.append(("uniforms of one position", f"{1000 * figures.uniforms:.2f}"))
    notes = [
        f"a step of {figures.rows} answers looks at {figures.looked_at:g} positions, each with {figures.vocab_size} "
        f"tokens to choose from; median of {len(figures.steps[zero])}."
    ]
    return table(("a denoising step", "milliseconds", "of a step"), lines, notes)


def main(argv: list[str] | None = None) -> None:
    parser = options("temperature", __doc__)
    parser.add_argument("--model", default="llada_8b", choices=MODELS, help="whose shapes (llada_8b)")
    parser.add_argument("--scale", type=int, default=8, help="all widths divided by this (8)")
    parser.add_argument("--blocks", type=int, default=4, help="number of blocks (4)")
    parser.add_argument("--rows", type=int, default=4, help="answers written at a time (4)")
    parser.add_argument("--prompt", type=int, default=96, help="tokens of a prompt (96)")
    parser.add_argument("--gen-length", type=int, default=32, help="tokens of an answer (32)")
    parser.add_argument("--steps", type=int, default=4, help="denoising steps (4)")
    parser.add_argument("--temperature", type=float, default=0.8, help="the temperature beside 0 (0.8)")
    parser.add_argument("--device", default="cpu", help="where to run: cpu, cuda, xpu (cpu)")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="type of the weights (float32)")
    args = parser.parse_args(argv)
    check(parser, args, "rows", "prompt", "gen_length", "steps", "blocks", models=[args.model])
    if args.temperature <= 0:
        parser.error(f"--temperature={args.temperature:g} must be above 0; temperature 0 is measured beside it")
    torch.set_num_threads(1)
    figures = compare(
        replace(scaled(MODELS[args.model], args.scale), n_blocks=args.blocks),
        rows=args.rows,
        prompt=args.prompt,
        gen_length=args.gen_length,
        steps=args.steps,
        temperature=args.temperature,
        device=torch.device(args.device),
        dtype=DTYPES[args.dtype],
    )
    tell(overview(figures))
    write_figures(args.json, asdict(figures))


if __name__ == "__main__":
    main()
