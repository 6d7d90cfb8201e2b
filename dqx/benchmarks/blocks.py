"""What the exact cache and the engine save for block diffusion: answers to the same prompts, written in three ways.

    python -m dqx.benchmarks.blocks                        SDAR-8B's proportions at a sixteenth of its width, one core
    python -m dqx.benchmarks.blocks --model FOLDER         a checkpoint of a family with block-wise attention
    python -m dqx.benchmarks.blocks --lengths 4,32 --prompt 512 --answer 256

Sides: `recomputed`, one prompt at a time, each pass computing all tokens before it; `stored`, one at a time over stored
keys and values; `engine`, many prompts side by side. Their tokens are compared. See README.md beside this file.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from dqx.benchmarks.cases import MODELS, scaled
from dqx.benchmarks.common import check, options, progress, seconds, table, tell, write_figures
from dqx.diffusion.block_engine import BlockEngine
from dqx.diffusion.engine import Prompt
from dqx.diffusion.samplers.sdar import SDARSampler
from dqx.models.architecture import Attention
from dqx.models.checkpoint import inspect, load_weights
from dqx.models.transformer import MaskedDiffusionTransformer, initialise
from dqx.report.tables import Table

VOCABULARY = 1024  # of the random model, so that the head has about its share


@dataclass
class Side:
    """One way to write the answers, for blocks of one length."""

    length: int
    name: str
    seconds: float
    forwards: int
    tokens: int
    equal: int  # answers that are those of `recomputed`


def random_model(scale: int, blocks: int, length: int, device: torch.device) -> MaskedDiffusionTransformer:
    """A random model of SDAR-8B's proportions whose predictions differ from place to place."""
    shape = replace(scaled(MODELS["sdar_8b"], scale), n_blocks=blocks, vocab_size=VOCABULARY)
    special = replace(shape, mask_token_id=VOCABULARY - 1, eos_token_id=VOCABULARY - 2)  # which no prompt has
    arch = replace(special, attention=Attention(length), block_length=length)
    model = MaskedDiffusionTransformer(arch)
    initialise(model, torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.head.weight[arch.eos_token_id] = -model.head.weight.mean(0)  # an end that comes at random tells nothing
    return model.eval().requires_grad_(False).to(device)


def measure(model: MaskedDiffusionTransformer, length: int, args: argparse.Namespace) -> list[Side]:
    """The three sides for blocks of `length`."""
    g = torch.Generator().manual_seed(1)
    sampler = SDARSampler(block=length, threshold=args.threshold, suppress_mask=True)
    lengths = torch.randint(args.prompt // 2, args.prompt + 1, (args.prompts,), generator=g).tolist()
    prompts = [torch.randint(0, model.arch.vocab_size - 2, (n,), generator=g) for n in lengths]
    settings: dict[str, Any] = {"gen_length": args.answer, "steps": args.answer}
    found: dict[str, tuple[float, list[Any]]] = {}
    for name in ("recomputed", "stored"):
        written: list[Any] = []

        def plain(cached: bool = name == "stored", written: list[Any] = written) -> None:
            written += [sampler.generate(model, p[None].to(model.device), cached=cached, **settings) for p in prompts]

        found[name] = seconds(plain, model.device), written
    engine, answers = BlockEngine(model, sampler, **settings), []
    took = seconds(lambda: answers.extend(engine.generate([Prompt(p, i) for i, p in enumerate(prompts)])), model.device)
    rows = [
        (name, took, [(w.ids[0].tolist(), w.n_forwards, w.n_tokens) for w in ws]) for name, (took, ws) in found.items()
    ]
    rows.append(("engine", took, [(a.ids, a.n_forwards, a.n_tokens) for a in answers]))
    mask = model.arch.mask_token_id
    first = [ids for ids, _, _ in rows[0][2]]
    wanted = [ids[: ids.index(mask)] if mask in ids else ids for ids in first]
    sides = []
    for name, spent, answered in rows:
        equal = sum(ids[: len(ours)] == ours for (ids, _, _), ours in zip(answered, wanted, strict=True))
        forwards, tokens = (sum(row[i] for row in answered) for i in (1, 2))
        sides.append(Side(length, name, spent, forwards, tokens, equal))
    return sides


def overview(sides: list[Side], args: argparse.Namespace, arch_words: str) -> Table:
    """Seconds, passes and tokens of each side, and how many times faster than `recomputed` it is."""
    rows = []
    for at in range(0, len(sides), 3):
        first = sides[at]
        rows += [
            [
                str(side.length) if side is first else "",
                side.name,
                f"{side.seconds:.2f}",
                f"{first.seconds / side.seconds:.1f}",
                str(side.forwards),
                f"{side.tokens / 1000:.1f}k",
                f"{first.tokens / side.tokens:.1f}",
                f"{side.equal} of {args.prompts}",
            ]
            for side in sides[at : at + 3]
        ]
    columns = ("block", "side", "s", "faster", "passes", "tokens", "fewer", "equal")
    told = (
        f"{arch_words}; {args.prompts} prompts of {args.prompt // 2} to {args.prompt} tokens, answers of {args.answer}"
    )
    return table(columns, rows, [f"{told}; threshold {args.threshold:g}."], left=2)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = options("blocks", __doc__)
    parser.add_argument("--model", help="a checkpoint (a random model)")
    parser.add_argument("--lengths", help="lengths of blocks (4,16,32; of a checkpoint its own)")
    parser.add_argument("--prompts", type=int, default=8, help="how many (8)")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the longest prompt (256)")
    parser.add_argument("--answer", type=int, default=128, help="tokens of an answer (128)")
    parser.add_argument("--threshold", type=float, default=0.9, help="of the sampler (0.9)")
    parser.add_argument("--scale", type=int, default=16, help="divide SDAR-8B's widths by this (16)")
    parser.add_argument("--blocks", type=int, default=4, help="transformer blocks (4)")
    parser.add_argument("--device", default="cpu", help="where all sides run: cpu, cuda, xpu (cpu)")
    parser.add_argument("--threads", type=int, default=1, help="threads on the CPU (1)")
    args = parser.parse_args(argv)
    check(parser, args, "prompts", "prompt", "answer", "blocks", "threads", models=["sdar_8b"])
    return args


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    loaded = None if args.model is None else load_weights(inspect(args.model), torch.float32, device)
    default = "4,16,32" if loaded is None else str(loaded.arch.block_length)
    sides: list[Side] = []
    words = ""
    with progress() as line:
        for length in map(int, (args.lengths or default).split(",")):
            say = line(f"blocks of {length}")
            model = loaded or random_model(args.scale, args.blocks, length, device)
            arch = model.arch
            words = f"{arch.n_blocks} blocks, hidden {arch.hidden_size}, MLP {arch.mlp_size}, float32"
            sides += measure(model, length, args)
            say(f"{sides[-3].seconds / sides[-1].seconds:.1f} times as fast")
    write_figures(args.json, [asdict(side) for side in sides])
    tell(overview(sides, args, words))


if __name__ == "__main__":
    main()
