"""What outlier statistics cost beside the evaluation that they accompany.

    python -m dqx.benchmarks.activations                     LLaDA's shapes, a quarter as wide, 4 blocks
    python -m dqx.benchmarks.activations --scale 1 --blocks 1
    python -m dqx.benchmarks.activations --run               besides, the default run: its own timings

A random model answers one question as evaluation does, and is measured with the settings of a run: text windows and
denoising states, both also without meters. On a CPU the clock is the processor time of the process.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from tempfile import TemporaryDirectory

import torch

from dqx.benchmarks.cases import MODELS, scaled
from dqx.benchmarks.common import check, options, seconds, table, tell, write_figures
from dqx.benchmarks.sweep import launch
from dqx.config.schema import FidelityConfig, OutlierConfig
from dqx.data.calibration import CalibBatch
from dqx.diagnostics.activations import default_blocks, measure_activations
from dqx.diffusion.noise import SeededNoise
from dqx.diffusion.rollout import State, write
from dqx.diffusion.samplers.llada import LLaDASampler
from dqx.models.checkpoint import skeleton
from dqx.models.transformer import Architecture, initialise
from dqx.record.folder import RunFolder
from dqx.report.tables import Table

LIMIT = 0.15  # of the evaluation: the share that statistics may take
DOCUMENTS = (8, 32, 128, 1000)


@dataclass(frozen=True)
class Figures:
    """Seconds."""

    document: float  # one answer
    windows: float  # forwards of the text windows
    windows_metered: float
    states: float  # forwards of the denoising states
    states_metered: float

    @property
    def statistics(self) -> float:
        return self.windows_metered + self.states_metered

    def share(self, documents: int) -> float:
        """What statistics take, of an evaluation of so many documents."""
        return self.statistics / (documents * self.document)


@torch.no_grad()
def compare(arch: Architecture, *, window: int, prompt: int, gen_length: int, steps: int) -> Figures:
    """One answer of `gen_length` tokens, and statistics at their default settings, with windows of `window` tokens."""
    settings, fidelity = OutlierConfig(), FidelityConfig()
    model = skeleton(arch).to_empty(device="cpu")
    initialise(model, torch.Generator().manual_seed(0))
    sampler = LLaDASampler()

    def text(rows: int, length: int) -> torch.Tensor:
        return torch.randint(1, 1000, (rows, length), generator=torch.Generator().manual_seed(1))

    batches = [CalibBatch(ids[None], torch.zeros(1)) for ids in text(settings.samples, window)]
    rollout = write(
        model, sampler, text(fidelity.samples, fidelity.length // 2), gen_length=fidelity.gen_length,
        steps=fidelity.gen_length,
    )  # fmt: skip
    states = rollout.states(settings.steps)
    noise = SeededNoise(0, [("document", 0)])
    chosen = default_blocks(arch.n_blocks)

    def metered(states: list[State]) -> float:
        return seconds(lambda: measure_activations(model, batches, states=states, surfaces=chosen))

    def forwards(shown: Sequence[CalibBatch | State]) -> float:
        return seconds(lambda: [deque(model.hidden_states(each.ids), maxlen=0) for each in shown])

    forwards(batches)  # the first one pays for what is set up once
    windows = metered([])
    return Figures(
        document=seconds(
            lambda: sampler.generate(model, text(1, prompt), gen_length=gen_length, steps=steps, noise=noise)
        ),
        windows=forwards(batches),
        windows_metered=windows,
        states=forwards(states),
        states_metered=metered(states) - windows,
    )


def default_run() -> dict[str, float]:
    """Timings of `python launch.py`, everything computed afresh."""
    with TemporaryDirectory() as folder:
        launch(f"hydra.run.dir={folder}/run", f"cache_dir={folder}/cache", "wandb.mode=disabled")
        return RunFolder(f"{folder}/run").read(documents=False).timings


def overview(figures: Figures) -> Table:
    rows = [
        ("one document", "", f"{figures.document:.2f}"),
        ("statistics, text windows", f"{figures.windows_metered:.2f}", f"{figures.windows:.2f}"),
        ("statistics, denoising states", f"{figures.states_metered:.2f}", f"{figures.states:.2f}"),
    ]
    shares = [(f"share of {n} documents", f"{100 * figures.share(n):.1f} %") for n in DOCUMENTS]
    return table(("", "seconds", "without meters"), [*rows, *shares])


def main(argv: list[str] | None = None) -> None:
    parser = options("activations", __doc__)
    parser.add_argument("--model", default="llada_8b", choices=MODELS, help="whose shapes (llada_8b)")
    parser.add_argument("--scale", type=int, default=4, help="all widths divided by this (4)")
    parser.add_argument("--blocks", type=int, default=4, help="number of blocks (4)")
    parser.add_argument("--window", type=int, default=256, help="tokens of a text window (256)")
    parser.add_argument("--prompt", type=int, default=192, help="tokens of a document's prompt (192)")
    parser.add_argument("--gen-length", type=int, default=64, help="tokens of its answer (64)")
    parser.add_argument("--steps", type=int, default=64, help="denoising steps (64)")
    parser.add_argument("--run", action="store_true", help="also the default run of the bundled model: a minute or two")
    args = parser.parse_args(argv)
    check(parser, args, "blocks", "window", "prompt", "gen_length", "steps", models=[args.model])
    torch.set_num_threads(1)
    arch = scaled(MODELS[args.model], args.scale)
    words = arch.vocab_size // args.scale
    arch = replace(arch, n_blocks=args.blocks, vocab_size=words, mask_token_id=words - 1)
    figures = compare(arch, window=args.window, prompt=args.prompt, gen_length=args.gen_length, steps=args.steps)
    tell(overview(figures))
    if args.run:
        timings = default_run()
        parts = {what: sum(v for k, v in timings.items() if k.startswith(what)) for what in ("outliers", "evaluate")}
        share = parts["outliers"] / parts["evaluate"]
        print("default run: statistics {outliers:.1f} s, evaluation {evaluate:.1f} s".format(**parts))
        print(f"a share of {100 * share:.1f} %" + (", more than it should be" if share > LIMIT else ""))
    write_figures(args.json, asdict(figures))


if __name__ == "__main__":
    main()
