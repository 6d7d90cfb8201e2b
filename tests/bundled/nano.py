"""Train the bundled models `nano_llada`, `nano_dream` and `nano_block`.

    PYTHONPATH=tests python -m bundled.nano --family dream --out DIR

LLaDA's objective (arXiv 2502.09992): mask a share t of the tokens, predict them, weight 1/t; t is spread evenly
over each batch. A step mixes four sub-batches, each of one length so that no padding exists:

- facts, sums and code with the prompt visible; answers of sums and code are filled with EOS to the length that
  is generated at evaluation, answers of facts are scored without EOS;
- packed windows of all documents, every token maskable, so that calibration text is in distribution.

Every second answer of LLaDA's sums and code is a state of its semi-autoregressive sampler. Dream's sampler has no
blocks, so its answers are plain: t of the whole answer. The first token of Dream's windows is never masked:
the row of the logits that would predict it predicts the second one (see `dqx.models.transformer.shift_logits`).

SDAR's model is trained for block diffusion (arXiv 2503.09573): a row is the clean text and behind it a noisy copy of
the blocks to be learned, each with a t of its own; it sees itself and the clean blocks before it (`clean_and_noisy`).
Its answers are filled with EOS to the end of their last block.

The model is trained with activation outliers that were put there and are held in place: see `tests/bundled/hold.py`.
The commands that made the bundled weights are in the README.md next to them, under `dqx/assets`.
The learning rate warms up, stays constant, and falls linearly over the last part of `--steps`; a run can be
resumed with another `--steps`, so that it can be ended early or extended.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bundled import generated as nano
from bundled.hold import OutlierPlan, plant
from bundled.state import load_state, save_state
from dqx.common.parts import build_part
from dqx.models.architecture import Attention
from dqx.models.checkpoint import save
from dqx.models.family import Family, families, family_of
from dqx.models.layout import Layout, copies
from dqx.models.transformer import MaskedDiffusionTransformer, initialise

FAMILIES = ("facts", "sums", "code")
STATE = "last.safetensors"  # what training resumes from
PACKED_LENGTH = 96
BLOCK = {"sums": 8, "code": 20}  # block length of LLaDA's sampler
BLOCK_DIFFUSION = 8  # block length of SDAR's model, from position 0
VOCABULARY = 512  # rows of the embedding; the tokenizer uses a little fewer


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that must exist."""
    number = tokenizer.token_to_id(token)
    if number is None:
        raise KeyError(f"the tokenizer has no token {token!r}")
    return int(number)


def config(tokenizer: Tokenizer, family: str) -> dict[str, Any]:
    """The `config.json` of a family's bundled model: heads are grouped where the published ones are."""
    eos, mask = token_id(tokenizer, nano.EOS), token_id(tokenizer, nano.MASK)
    assert tokenizer.get_vocab_size() <= VOCABULARY
    published = family_of(family).published
    assert published is not None
    shape: dict[str, Any] = {"n_heads": 4, "n_kv_heads": 4 if published[1].n_kv_heads == published[1].n_heads else 2}
    if published[1].block_length:  # heads of a width of their own, together wider than the residual stream
        shape = {"n_heads": 8, "n_kv_heads": 2, "head_dim": 64, "block_length": BLOCK_DIFFUSION}
        shape["attention"] = Attention(BLOCK_DIFFUSION)
    return family_of(family).config(
        replace(
            published[1],
            vocab_size=VOCABULARY,
            hidden_size=256,
            mlp_size=512,
            n_blocks=3,
            rope_theta=10000.0,
            mask_token_id=mask,
            eos_token_id=eos,
            max_length=4096,
            **shape,
        )
    )


@dataclass(frozen=True)
class Batch:
    """Noisy ids [B, T], their targets, and the weight of each position in the loss: 1 in all, for each row."""

    ids: Tensor
    targets: Tensor
    weights: Tensor
    layout: Layout | None = None


class Batches:
    """Training batches by family of documents; the draw depends on the seed and the step only."""

    def __init__(self, tokenizer: Tokenizer, n_documents: int, seed: int, model: Family):
        self.seed = seed
        arch = model.architecture(config(tokenizer, model.name))
        self.first = int(arch.logit_shift)  # of a window, to be masked
        self.block = arch.block_length
        self.in_blocks = self.block is None and build_part(dict(model.sampler)).block_length(1) is not None
        self.mask_id = token_id(tokenizer, nano.MASK)
        self.groups: dict[str, list[tuple[Tensor, int]]] = {}  # family -> (ids [N, T], prompt length)
        documents: list[list[int]] = []
        eos, newline = token_id(tokenizer, nano.EOS), token_id(tokenizer, "Ċ")
        self.separators = ([eos], [newline, newline])
        for family in FAMILIES:
            by_length: dict[tuple[int, int], list[list[int]]] = defaultdict(list)
            pairs = nano.training_documents(family, n_documents, seed)
            prompts = tokenizer.encode_batch([p for p, _ in pairs])
            answers = tokenizer.encode_batch([a for _, a in pairs])
            for p, a in zip(prompts, answers, strict=True):
                fill = nano.GEN_LENGTH.get(family, len(a.ids)) - len(a.ids)
                if self.block and family in nano.GEN_LENGTH:
                    fill += -(len(p.ids) + nano.GEN_LENGTH[family]) % self.block
                by_length[len(p.ids), len(a.ids) + fill].append(p.ids + a.ids + [eos] * fill)
            self.groups[family] = [(torch.tensor(rows), key[0]) for key, rows in sorted(by_length.items())]
            documents += [p.ids + a.ids for p, a in zip(prompts[:5000], answers[:5000], strict=True)]
        self.documents = documents

    def draw(self, family: str, size: int, step: int) -> Batch:
        """One sub-batch of `size` rows."""
        rng = random.Random(f"{self.seed}/{family}/{step}")
        generator = torch.Generator().manual_seed(rng.getrandbits(48))
        if family == "packed":
            rows, prompt = torch.tensor([self.window(rng) for _ in range(size)]), self.first
        else:
            groups = self.groups[family]
            pool, prompt = rng.choices(groups, [len(rows) for rows, _ in groups])[0]
            rows = pool[torch.randint(len(pool), (size,), generator=generator)]
        if self.block:
            return clean_and_noisy(rows, prompt, self.block, self.mask_id, generator)
        length = rows.shape[1] - prompt
        # low discrepancy: one uniform draw shifted by i/size; at least one token is masked
        t = (torch.arange(size) / size + torch.rand(1, generator=generator)) % 1.0
        count = (t * length).floor().long().clamp(max=length - 1) + 1
        hidden = torch.rand(size, length, generator=generator).argsort(1).argsort(1) < count[:, None]
        scored = hidden.clone()
        if family in nano.GEN_LENGTH and self.in_blocks:  # every second row: a state of the sampler
            width = BLOCK[family]
            block = torch.arange(length) // width
            current = torch.randint(length // width, (size, 1), generator=generator)
            count = (t * width).floor().long().clamp(max=width - 1) + 1
            ranks = torch.rand(size, length // width, width, generator=generator).argsort(2).argsort(2)
            inside = (block == current) & (ranks.flatten(1) < count[:, None])
            hidden[1::2], scored[1::2] = (inside | (block > current))[1::2], inside[1::2]
        masked, noisy = torch.zeros_like(rows, dtype=torch.bool), rows.clone()
        masked[:, prompt:] = scored
        noisy[:, prompt:][hidden] = self.mask_id
        return Batch(noisy, rows, masked / masked.sum(1, keepdim=True))

    def window(self, rng: random.Random) -> list[int]:
        """A window over documents with one kind of separator, starting anywhere in the first one."""
        separator = rng.choice(self.separators)
        ids: list[int] = []
        start = rng.randrange(30)
        while len(ids) < start + PACKED_LENGTH:
            ids += rng.choice(self.documents) + separator
        return ids[start : start + PACKED_LENGTH]


def clean_and_noisy(rows: Tensor, prompt: int, block: int, mask_id: int, generator: torch.Generator) -> Batch:
    """Block diffusion: of rows [B, T] the clean text, and the blocks behind the prompt once more with masks.

    In each of these blocks the number of masks is spread evenly over the batch, from 1 to what the block has behind the
    prompt; a block's masked tokens share its part of the loss.
    """
    size, length = rows.shape
    first = prompt // block * block
    number = torch.arange(length) // block
    maskable = torch.arange(length) >= prompt
    noise = torch.rand(size, length, generator=generator)
    weights = torch.zeros(size, length)
    for i in range(first // block, -(-length // block)):
        inside = maskable & (number == i)
        width = int(inside.sum())
        t = (torch.randperm(size, generator=generator) / size + torch.rand(1, generator=generator)) % 1.0
        count = (t * width).floor().long().clamp(max=width - 1) + 1
        rank = noise[:, inside].argsort(1).argsort(1)
        weights[:, inside] = (rank < count[:, None]) / count[:, None]
    weights /= weights.sum(1, keepdim=True)
    noisy = rows.masked_fill(weights > 0, mask_id)
    kept = torch.cat((torch.arange((length - 1) // block * block), length + torch.arange(first, length)))
    layout = copies(length, block, Attention(block), 1)
    assert layout.mask is not None
    layout = Layout(layout.positions[:, kept], layout.mask[..., kept, :][..., kept])
    pairs = (rows, noisy), (rows, rows), (torch.zeros_like(weights), weights)
    ids, targets, counted = (torch.cat(pair, dim=1)[:, kept] for pair in pairs)
    return Batch(ids, targets, counted, layout)


def loss_of(model: MaskedDiffusionTransformer, batch: Batch) -> Tensor:
    """Mean over rows of the mean cross-entropy over masked positions: weight L/count per token, nats."""
    logits = model(batch.ids, layout=batch.layout).float()
    ce = F.cross_entropy(logits.transpose(1, 2), batch.targets, reduction="none")
    return (ce * batch.weights).sum(1).mean()


@torch.no_grad()
def generate(model: MaskedDiffusionTransformer, prompts: Tensor, length: int, block: int) -> Tensor:
    """Answers [B, length] of the family's sampler, as many steps as tokens, in blocks where it has any."""
    own = {} if model.arch.block_length is None else {"block": model.arch.block_length}
    sampler = build_part({**family_of(model.arch.family).sampler, **own})
    settings = {"gen_length": length, "block_length": sampler.block_length(block), "steps": length}
    answers: Tensor = sampler.generate(model, prompts, **settings).ids
    return answers


def generated(model: MaskedDiffusionTransformer, tokenizer: Tokenizer, family: str, prompts: list[str]) -> list[str]:
    """Answers as text, cut at the first EOS; prompts of one length share a batch."""
    by_length: dict[int, list[int]] = defaultdict(list)
    ids = [e.ids for e in tokenizer.encode_batch(prompts)]
    for i, row in enumerate(ids):
        by_length[len(row)].append(i)
    texts = [""] * len(prompts)
    for rows in by_length.values():
        out = generate(model, torch.tensor([ids[i] for i in rows]), nano.GEN_LENGTH[family], BLOCK[family]).tolist()
        for i, answer in zip(rows, out, strict=True):
            eos = model.arch.eos_token_id
            texts[i] = tokenizer.decode(answer[: answer.index(eos)] if eos in answer else answer)
    return texts


@torch.no_grad()
def choose(model: MaskedDiffusionTransformer, tokenizer: Tokenizer, fact: nano.Fact) -> int:
    """The choice with the highest likelihood bound, exact over all mask states (answers have one or two tokens)."""
    prefix = tokenizer.encode(nano.question(fact.question)).ids
    scores = []
    for choice in fact.choices:
        answer = tokenizer.encode(f" {choice}").ids
        n = len(answer)
        masks = [[True]] if n == 1 else [[True, True], [True, False], [False, True]]
        weights = torch.tensor([1.0] if n == 1 else [0.5, 0.5, 0.5])
        masked = torch.tensor(masks)
        clean = torch.tensor([answer] * len(masks))
        noisy = clean.masked_fill(masked, model.arch.mask_token_id)
        logits = model(torch.cat((torch.tensor([prefix] * len(masks)), noisy), 1))[:, len(prefix) :].float()
        ce = F.cross_entropy(logits.transpose(1, 2), clean, reduction="none") * masked
        scores.append(-float((ce.sum(1) * weights).sum()))
    return scores.index(max(scores))


def accuracy(model: MaskedDiffusionTransformer, tokenizer: Tokenizer, n: int) -> dict[str, float]:
    """Share right of the first `n` test documents per family; code by the reference program's text, a lower bound."""
    facts = nano.fact_tests(192)[:n]
    sums = [s for s, _ in zip(nano.sums(nano.SEED, test=True), range(min(n, 128)), strict=False)]
    code = [p for p, _ in zip(nano.programs(nano.SEED, test=True), range(min(n, 128)), strict=False)]
    totals = generated(model, tokenizer, "sums", [nano.question(s.question) for s in sums])
    texts = generated(model, tokenizer, "code", [p.prompt for p in code])
    return {
        "facts": sum(choose(model, tokenizer, f) == f.answer for f in facts) / len(facts),
        "sums": sum(t.endswith(f"= {s.answer}") for t, s in zip(totals, sums, strict=True)) / len(sums),
        "code": sum(t == p.canonical_solution for t, p in zip(texts, code, strict=True)) / len(code),
    }


def rate(step: int, steps: int, peak: float, warmup: int, decay: float) -> float:
    """Learning rate: linear warm-up, constant, linear fall to zero over the last share `decay` of the steps."""
    return peak * min(1.0, (step + 1) / warmup, (steps - step) / max(1.0, decay * steps))


def train(args: argparse.Namespace) -> None:
    """The training loop; writes the state, the loss curve and, at the end and at each checkpoint, the model."""
    torch.manual_seed(args.seed)
    tokenizer = nano.tokenizer()
    settings = config(tokenizer, args.family)
    model = MaskedDiffusionTransformer(family_of(args.family).architecture(settings))
    generator = torch.Generator().manual_seed(args.seed)
    initialise(model, generator)
    held = plant(model, OutlierPlan(), token_id(tokenizer, "Ċ"), generator)
    optimiser = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=args.weight_decay)
    batches = Batches(tokenizer, args.documents, args.seed, family_of(args.family))
    args.out.mkdir(parents=True, exist_ok=True)
    first, tokens, seconds = 0, 0, 0.0
    if (args.out / STATE).exists():
        counters = load_state(args.out / STATE, model, optimiser)
        first, tokens, seconds = int(counters["step"]), int(counters["tokens"]), counters["seconds"]
    sizes = {"facts": args.facts, "sums": args.sums, "code": args.code, "packed": args.packed}
    curve = args.out / "loss_curve.csv"
    if first == 0:
        curve.write_text("step,tokens,seconds,lr,facts,sums,code,packed,facts_acc,sums_acc,code_acc\n")
    recent: dict[str, list[float]] = defaultdict(list)
    start = time.monotonic() - seconds
    for step in range(first, min(args.steps, args.until or args.steps)):
        lr = rate(step, args.steps, args.lr, args.warmup, args.decay)
        for group in optimiser.param_groups:
            group["lr"] = lr
        for family, size in sizes.items():
            batch = batches.draw(family, size, step)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(model, batch)
            (loss * args.weights[family]).backward()
            recent[family].append(loss.item())
            tokens += batch.ids.numel()
        held.grads()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        held.restore()
        done = step + 1
        if done % args.log_every and done != args.steps:
            continue
        scores: dict[str, float] = {}
        if done % args.eval_every == 0 or done == args.steps:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                scores = accuracy(model, tokenizer, 256 if done == args.steps else 48)
            save_all(args.out, model, optimiser, settings, tokenizer, done, tokens, time.monotonic() - start)
        means = [sum(recent[f]) / len(recent[f]) for f in sizes]
        recent.clear()
        row = [done, tokens, round(time.monotonic() - start, 1), f"{lr:.2e}", *(f"{m:.4f}" for m in means)]
        row += [f"{scores[f]:.3f}" if scores else "" for f in FAMILIES]
        with curve.open("a", newline="") as f:
            csv.writer(f).writerow(row)
        print(*row, flush=True)


def save_all(
    out: Path,
    model: MaskedDiffusionTransformer,
    optimiser: torch.optim.Optimizer,
    settings: dict[str, Any],
    tokenizer: Tokenizer,
    step: int,
    tokens: int,
    seconds: float,
) -> None:
    """Write the state to resume from, and the model in bfloat16 in hub format under `out/model`."""
    save_state(out / STATE, model, optimiser, {"step": step, "tokens": tokens, "seconds": seconds})
    rounded = MaskedDiffusionTransformer(model.arch)
    rounded.load_state_dict(model.state_dict())
    save(rounded.to(torch.bfloat16), settings, out / "model")
    nano.write_tokenizer(out / "model")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints; training resumes from it")
    parser.add_argument("--family", choices=sorted(families()), required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--until", type=int, help="stop after this step (a multiple of --eval-every), to resume later")
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--decay", type=float, default=0.6, help="share of the steps over which the rate falls")
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--documents", type=int, default=60000, help="sums and programs to draw from, each")
    parser.add_argument("--facts", type=int, default=48, help="rows per step")
    parser.add_argument("--sums", type=int, default=80)
    parser.add_argument("--code", type=int, default=40)
    parser.add_argument("--packed", type=int, default=12)
    parser.add_argument("--weights", type=json.loads, default=None, help='loss weights, {"facts": 1.0, ...}')
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--eval-every", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    args.weights = {"facts": 1.0, "sums": 1.0, "code": 1.0, "packed": 0.5} | (args.weights or {})
    return args


def main() -> None:
    """Parse the command line and train."""
    args = arguments()
    torch.set_num_threads(args.threads)
    with sdpa_kernel(SDPBackend.MATH):  # for sequences this short, a third faster than flash attention on CPUs
        train(args)


if __name__ == "__main__":
    main()
