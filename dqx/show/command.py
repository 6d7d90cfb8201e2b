"""Denoising, live in the terminal: `dqx generate MODEL`, masks turning into text.

    dqx generate nano_llada
    dqx generate nano_llada --bits w3a16 --method rtn --compare

`MODEL` is what `dqx export` takes: a run's folder, a saved model, a model's name or folder; with `--gguf FILE` its name
or folder, of which tokenizer and sampler are taken, and llama.cpp computes the logits. Where the output is no
terminal, the text alone is printed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from dqx.api import DiffusionLM
    from dqx.show.drawing import Moment, Pane

#: A program that the bundled models have learned to write, and its length.
PROMPT = 'def convert(xs):\n    """Return xs after: first sort, then reverse, last keep those above 5."""\n'
GEN_LENGTH, BLOCK_LENGTH = 40, 20
SAMPLER = ("temperature", "threshold")  # settings of model.sampler that have an option here


def parser() -> argparse.ArgumentParser:
    """The options, in the words of the configuration."""
    parser = argparse.ArgumentParser(
        description="The denoising of an answer, live: masks turn into text, in the colour of their probability.",
        epilog="Example: dqx generate nano_llada --method rtn --bits w3a16 --compare",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder of a run or of a saved model, or a model's name")
    add(
        "--prompt",
        default=PROMPT,
        metavar="TEXT",
        help="what is given (a program that the bundled models can write)",
    )
    add("--gen-length", type=int, default=GEN_LENGTH, metavar="N", help="tokens to write (40)")
    add(
        "--block-length",
        type=int,
        metavar="N",
        help="of a block (the sampler's own, or 20 where 40 are written)",
    )
    add("--steps", type=int, metavar="N", help="denoising steps (one per token)")
    add("--temperature", type=float, metavar="T", help="model.sampler.temperature, for samplers that have one")
    add(
        "--threshold",
        type=float,
        metavar="P",
        help="model.sampler.threshold: what is as probable is written at once",
    )
    add("--seed", type=int, default=0, metavar="N", help="of the noise, and of quantization (0)")
    add("--method", metavar="NAME", help="quantize first, with a method of conf/method (gptq)")
    add("--bits", metavar="NAME", help="quantize first, to widths of conf/bits (w4a16)")
    add("--gguf", metavar="FILE", help="an exported file of MODEL, computed by llama.cpp")
    add("--compare", action="store_true", help="full precision and quantized side by side, forward by forward")
    add("--delay", type=float, default=0.1, metavar="S", help="seconds that a frame is shown at least (0.1)")
    add("--svg", metavar="FILE", help="also a picture, for slides; FILE must not exist")
    add("--at", type=int, metavar="N", help="the picture after so many frames (the last)")
    return parser


def main() -> int:
    """The command line. Returns the exit code."""
    options = parser().parse_args()
    from dqx.report.terminal import errors_end

    with errors_end():
        check(options)
        generate(options)
    return 0


def check(options: argparse.Namespace) -> None:
    """Raise ConfigProblems with all that can be told before a model is loaded."""
    from dqx.common.problems import raise_if
    from dqx.config.compose import compose
    from dqx.diffusion.settings import count_problems, number_problems

    problems = count_problems(**{"--gen-length": options.gen_length})
    problems += [] if options.at is None else count_problems(**{"--at": options.at})
    if options.gguf and (options.method or options.bits):
        problems.append("--gguf FILE is quantized already; leave out --method and --bits")
    problems += number_problems("--delay", options.delay, 0)
    if options.at is not None and not options.svg:
        problems.append("--at chooses the frame of a picture; give --svg FILE too, or leave it out")
    if options.svg and Path(options.svg).expanduser().exists():
        problems.append(f"--svg {options.svg} exists already; name a new file")
    elif options.svg and not Path(options.svg).expanduser().parent.is_dir():
        problems.append(f"--svg {options.svg}: there is no such folder; make it, or name another")
    raise_if(problems)
    named = {"method": options.method, "bits": options.bits}
    chosen = [f"{key}={value}" for key, value in named.items() if value is not None]
    compose(chosen)
    if chosen:
        from dqx.study.source import is_quantized

        quantized = is_quantized(options.model)
        raise_if([f"{options.model} is quantized already; leave out --method and --bits"] if quantized else [])


def generate(options: argparse.Namespace) -> None:
    """Write the answer, or both, and draw them meanwhile."""
    from rich.console import Console

    from dqx.api import load
    from dqx.study.source import full_precision, loaded

    console = Console(highlight=False, emoji=False)
    lm = load(options.model, gguf=options.gguf) if options.gguf else loaded(options.model)
    quantizes = options.method is not None or options.bits is not None
    show = Show(options, console)
    if not options.compare:
        if quantizes:
            quantize(lm, options)
        show.write(lm)
    elif quantizes:
        show.write(lm, play=False)
        quantize(lm, options)
        show.write(lm)
    else:
        show.write(loaded(options.model) if options.gguf else full_precision(options.model, lm), play=False)
        show.write(lm)
    show.end()


def quantize(lm: DiffusionLM, options: argparse.Namespace) -> None:
    """As the options say."""
    lm.quantize(options.method or "gptq", options.bits or "w4a16", seed=options.seed)


class Show:
    """Answers to one prompt, each drawn beside those before it as it is written."""

    def __init__(self, options: argparse.Namespace, console: Console):
        self.options, self.console = options, console
        self.live = console.is_terminal and not console.is_dumb_terminal
        self.sides: list[tuple[Pane, list[Moment], str]] = []

    def write(self, lm: DiffusionLM, *, play: bool = True) -> None:
        """Let a model write the answer; with `play` draw every frame of it, and those of the models before."""
        from rich.text import Text

        from dqx.record.words import visible

        pane, settings = prepared(lm, self.options)
        moments: list[Moment] = []
        if not (self.live and play):
            with self.console.status(Text(f"{visible(pane.title)} writes first")) if self.live else nullcontext():
                text = self._generate(lm, settings, moments, None)
            self.sides.append((pane, moments, text))
            return
        from rich.live import Live

        with Live(console=self.console, auto_refresh=False) as live:
            text = self._generate(lm, settings, moments, lambda: live.update(self._drawn(pane, moments), refresh=True))
            self.sides.append((pane, moments, text))
            for at in range(len(moments), self._frames()):  # of a model before, which took more forwards
                live.update(self._screen(at, self.console, height=self.console.height), refresh=True)
                time.sleep(self.options.delay)
            live.update(self._screen(self._frames() - 1, self.console, now=False), refresh=True)

    def _generate(
        self, lm: DiffusionLM, settings: dict[str, Any], moments: list[Moment], draw: Callable[[], None] | None
    ) -> str:
        """The text. Each frame is added to `moments` and shown with `draw`, which is not part of the time."""
        from dqx.show.drawing import Moment

        start, waited = time.perf_counter(), 0.0

        def on_frame(frame: Any) -> None:
            nonlocal waited
            begun = time.perf_counter()
            moments.append(Moment(frame, begun - start - waited))
            if draw:
                draw()
                took = moments[-1].seconds - (moments[-2].seconds if len(moments) > 1 else 0)
                time.sleep(max(0.0, self.options.delay - took))
            waited += time.perf_counter() - begun

        return str(lm.generate(self.options.prompt, **settings, on_frame=on_frame))

    def _frames(self) -> int:
        return max(len(moments) for _, moments, _ in self.sides)

    def _drawn(self, pane: Pane, moments: list[Moment]) -> Any:
        return self._screen(len(moments) - 1, self.console, height=self.console.height, more=(pane, moments))

    def _screen(
        self,
        at: int,
        console: Console,
        *,
        height: int | None = None,
        now: bool = True,
        more: tuple[Pane, list[Moment]] | None = None,
    ) -> Any:
        """All answers after frame `at`."""
        from dqx.show.drawing import screen

        sides = [(pane, moments) for pane, moments, _ in self.sides] + ([more] if more else [])
        panes = [(pane, moments[min(at, len(moments) - 1)]) for pane, moments in sides]
        return screen(self.options.prompt, panes, console, height=height, now=now)

    def end(self) -> None:
        """What is left to say after the last frame, and the picture."""
        from dqx.common.problems import raise_if
        from dqx.record.words import visible
        from dqx.show.picture import svg

        if not self.live:
            for pane, _, text in self.sides:
                heading = [f"{pane.title}:"] if len(self.sides) > 1 else []
                self.console.print(*heading, visible(text), sep="\n", markup=False, soft_wrap=True)
        elif len(self.sides) > 1:
            (_, one, _), (_, other, _) = self.sides
            pairs = list(zip(one[-1].frame.ids, other[-1].frame.ids, strict=True))
            same = sum(a == b for a, b in pairs)
            self.console.print(f"{same} of {len(pairs)} tokens are the same", markup=False)
        if self.options.svg:
            at, frames = self.options.at or self._frames(), self._frames()
            raise_if([f"--at {at}: there are {frames} frames; the picture was not written"] if at > frames else [])
            text = svg(lambda console: self._screen(at - 1, console), title=f"dqx generate {self.options.model}")
            Path(self.options.svg).expanduser().write_text(text, encoding="utf-8")


def prepared(lm: DiffusionLM, options: argparse.Namespace) -> tuple[Pane, dict[str, Any]]:
    """What is drawn of a model, and the arguments of its `generate`; its sampler gets the settings of the options.

    Raises ConfigProblems for settings that the sampler does not have.
    """
    from dataclasses import replace

    from dqx.common.problems import raise_if
    from dqx.show.drawing import Pane

    asked = {name: getattr(options, name) for name in SAMPLER if getattr(options, name) is not None}
    raise_if(
        [
            f"--{name}: the sampler of {lm.config.name} ({lm.sampler.name}) has no {name}; leave it out"
            for name in asked
            if name not in type(lm.sampler).__dataclass_fields__
        ]
    )
    lm.sampler = replace(lm.sampler, **asked)
    block = options.block_length
    if block is None and options.gen_length == GEN_LENGTH:
        block = lm.sampler.block_length(BLOCK_LENGTH)
    settings = {
        "gen_length": options.gen_length,
        "block_length": block,
        "steps": options.steps,
        "seed": options.seed,
        "chat": lm.config.chat,
    }
    special = frozenset(lm.tokenizer.all_special_ids)
    pane = Pane(
        title=f"{lm.config.name}, {lm.facts()['precision']}",
        tokenizer=lm.tokenizer,
        special=special,
        mask_token_id=lm.model.arch.mask_token_id,
        steps=lm.sampler.steps_for(options.gen_length, options.steps),
    )
    return pane, settings
