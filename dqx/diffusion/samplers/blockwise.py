"""Samplers of models with block-wise attention: an answer as a program of passes over what is stored.

What is final is stored, keys and values, and is never computed again. So the answer to one prompt is written by a
`program`, a generator: it yields the next `Pass`, new tokens to compute behind those that are stored, and is sent what
the model predicts where the pass looks. It reads like its authors' loop, and knows nothing of batches: `generate` here
runs one program at a time, `block_engine.py` many together.

A new sampler of this kind is a dataclass of its settings with `name`, `problems` and `program`, and a file in
`conf/model/sampler`. Shapes: P prompt tokens, G new ones, W tokens of a pass, n of these that a pass looks at.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dqx.common.problems import raise_if
from dqx.diffusion.noise import Noise, SeededNoise
from dqx.diffusion.samplers.base import Call, Generation, OnStep, at_least_float32, fetched
from dqx.diffusion.samplers.generate import Sampler, own_choice
from dqx.models.architecture import Architecture, Attention
from dqx.models.layout import Layout, sees
from dqx.models.transformer import MaskedDiffusionTransformer
from dqx.models.vocabulary import id_problems


@dataclass(frozen=True)
class Pass:
    """One forward of a row. All tensors are on the CPU.

    ids: [W], new tokens, at the positions behind what is stored.
    attention: which of them see which; all see what is stored.
    stored: whether their keys and values are kept, since the tokens are final.
    look: [W], where the head's output is asked for; None: nowhere.
    predicts: [n], the tokens of the answer that it predicts there, from 0; None where it looks nowhere.
    step: the denoising step it belongs to, from 0 over the whole answer; it names the noise.
    keep: how many of the stored tokens remain, where some are given up; None: all.
    at: where the new tokens take the place of stored ones; None: behind all that is stored.
    """

    ids: Tensor
    attention: Attention
    stored: bool
    look: Tensor | None = None
    predicts: Tensor | None = None
    step: int = 0
    keep: int | None = None
    at: int | None = None


UNSURE = 1e-9  # a probability that reaches no threshold but 0
#: What the model predicts where a pass looks: tokens [n], and the probability of each [n].
Found = tuple[Tensor, Tensor]
Program = Generator[Pass, Found, None]


@dataclass
class Writing:
    """An answer under way: `program` writes into `canvas` [T], the prompt and what follows, in place."""

    canvas: Tensor
    prompt: int  # tokens that were given
    program: Program
    mask_token_id: int
    due: Pass | None = field(init=False)

    def __post_init__(self) -> None:
        self.due = next(self.program, None)

    @property
    def answer(self) -> Tensor:
        return self.canvas[self.prompt :]

    def send(self, found: Found) -> None:
        """On to the next pass; `due` is None once the answer is complete."""
        try:
            self.due = self.program.send(found)
        except StopIteration:
            self.due = None


class BlockwiseSampler(Sampler):
    """How answers are written block by block, each block final before the next begins."""

    @property
    def has_cache(self) -> bool:
        return True

    @property
    def stores_final(self) -> bool:
        return True

    @abstractmethod
    def fits(self, arch: Architecture) -> bool:
        """Whether models of this architecture have learned what the sampler asks them."""

    def model_problems(self, arch: Architecture) -> list[str]:
        if self.fits(arch):
            return []
        return [
            f"this sampler ({self.name}) asks for block-wise attention and logits that models of family {arch.family} "
            f"have not learned; write model.sampler={own_choice(arch)}"
        ]

    def model_notes(self, arch: Architecture) -> list[str]:
        block = self.block_length(None)
        if block in (None, 1, arch.block_length):
            return []
        return [
            f"answers and likelihoods have blocks of {block} tokens (model.sampler.block), but config.json, or the "
            f"family where that is silent, says that the model was trained with blocks of {arch.block_length}"
        ]

    @abstractmethod
    def program(self, canvas: Tensor, prompt: int, *, gen_length: int, steps: int, arch: Architecture) -> Program:
        """The passes that write into `canvas` behind its first `prompt` tokens."""

    @abstractmethod
    def canvas(self, prompt: Tensor, gen_length: int, arch: Architecture) -> Tensor:
        """The prompt [P] and behind it masks: at least `gen_length`, as many as the sampler writes at most."""

    def begin(self, prompt: Tensor, *, gen_length: int, steps: int, arch: Architecture) -> Writing:
        """The answer to a prompt [P] before its first pass."""
        canvas = self.canvas(prompt.cpu().long(), gen_length, arch)
        program = self.program(canvas, len(prompt), gen_length=gen_length, steps=steps, arch=arch)
        return Writing(canvas, len(prompt), program, arch.mask_token_id)

    def unsure(self, order: Tensor) -> Tensor:
        """What a program is sent in place of probabilities [n] for it to write no more than is due, in the `order` of
        numbers from 0 to 1."""
        return UNSURE * order

    def candidates(
        self, logits: Tensor, where: Tensor, at: Sequence[int], *, noise: Noise, arch: Architecture
    ) -> tuple[Tensor, Tensor]:
        """The likeliest tokens and their probabilities: `where` [B, G] are the tokens of the answer predicted."""
        best, tokens = logits.softmax(-1).max(-1)
        return tokens, best

    def due(
        self, masked: Tensor, at: Sequence[int], *, block_length: int | None, steps: int, noise: Noise
    ) -> tuple[Tensor, Tensor]:
        raise NotImplementedError(f"{type(self).__name__} writes by passes; see `program`")

    @torch.no_grad()
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
        attention_mask: Tensor | None = None,
        cached: bool = True,
        on_pass: Callable[[Pass], None] | None = None,
    ) -> Generation:
        """`Sampler.generate`, one row after the other; without `cached` a pass computes all tokens before it anew.

        Answers are cut to `gen_length` tokens. `on_step` gets a row's prompt and answer [1, P + G] before each pass
        that looks, `on_pass` each pass before it runs. `n_tokens` counts the tokens computed.
        """
        problems = self.problems(gen_length, block_length, steps) + self.token_problems(model.arch.vocab_size)
        raise_if(problems + id_problems(prompt, model.arch.vocab_size))
        noise = noise or SeededNoise(0, range(len(prompt)))
        answers, n_forwards, n_tokens = [], 0, 0
        for row, ids in enumerate(prompt):
            given = ids if attention_mask is None else ids[attention_mask[row].bool()]
            writing = self.begin(given, gen_length=gen_length, steps=steps, arch=model.arch)
            runner = Cached(model, len(writing.canvas)) if cached else Recomputed(model)
            while (due := writing.due) is not None:
                if on_pass:
                    on_pass(due)
                if on_step and due.look is not None:
                    on_step(writing.canvas[None, : len(given) + gen_length].clone())
                logits, computed = runner.run(due)
                where, at = predicted(due, writing), [due.step]
                rows = OneRow(noise, row)
                tokens, sure = fetched([self.candidates(logits, where[None], at, noise=rows, arch=model.arch)])
                writing.send((tokens, sure))
                n_forwards, n_tokens = n_forwards + 1, n_tokens + computed
            answers.append(writing.answer[:gen_length])
        return Generation(torch.stack(answers).to(model.device), n_forwards, n_tokens)


@dataclass(frozen=True)
class OneRow:
    """The noise of one row of a batch, for a batch of that row alone."""

    noise: Noise
    row: int

    def uniform(self, kind: str, rows: Tensor, positions: Tensor, steps: Tensor, width: int = 1) -> Tensor:
        return self.noise.uniform(kind, rows + self.row, positions, steps, width)


def predicted(due: Pass, writing: Writing) -> Tensor:
    """The tokens of the answer that a pass predicts [G]."""
    where = torch.zeros(len(writing.answer), dtype=torch.bool)
    if due.predicts is not None:
        where[due.predicts] = True
    return where


class Cached:
    """Runs the passes of one row over a store."""

    def __init__(self, model: MaskedDiffusionTransformer, length: int):
        self.model, self.store = model, model.empty_store(1, length)

    def run(self, due: Pass) -> tuple[Tensor, int]:
        """Logits [n, V], at least float32, and how many tokens were computed."""
        if due.keep is not None:
            self.store.lengths[0] = due.keep
        everywhere = torch.ones(1, len(due.ids), dtype=torch.bool)
        feed = self.store.feed(everywhere, [due.attention], [due.stored], at=[due.at])
        look = torch.zeros_like(everywhere) if due.look is None else due.look[None]
        logits = self.model.head_rows(due.ids[None].to(self.model.device), look, feed)
        feed.commit()
        return at_least_float32(logits), len(due.ids)


class Recomputed:
    """Runs the passes of one row without a store: each computes anew what was stored, by its own mask."""

    def __init__(self, model: MaskedDiffusionTransformer):
        self.model = model
        self.ids, self.sees = torch.zeros(0, dtype=torch.long), torch.zeros(0, 0, dtype=torch.bool)

    def run(self, due: Pass) -> tuple[Tensor, int]:
        """As `Cached.run`."""
        if due.keep is not None:
            self.ids, self.sees = self.ids[: due.keep], self.sees[: due.keep, : due.keep]
        before, new = len(self.ids), len(due.ids)
        ids = torch.cat((self.ids, due.ids))
        positions = torch.arange(before + new)
        mask = torch.zeros(before + new, before + new, dtype=torch.bool)
        mask[:before, :before] = self.sees
        mask[before:, :before] = True
        mask[before:, before:] = sees(positions[None, before:], due.attention)[0]
        device = self.model.device
        layout = Layout(positions[None].to(device), mask[None, None].to(device))
        *_, last = self.model.hidden_states(ids[None].to(device), layout=layout)
        if due.stored:
            self.ids, self.sees = ids, mask
        rows = last[0, before:][due.look.to(device)] if due.look is not None else last[0, :0]
        return at_least_float32(self.model.head(rows)), before + new


def most_probable(probability: Tensor, count: int, threshold: float | None, *, above: bool = False) -> Tensor:
    """Marks [n] the `count` largest of `probability` [n], and all that reach the threshold (or lie above it).

    Equal ones go to the leftmost. Raises FloatingPointError on NaN.
    """
    if probability.isnan().any():
        raise FloatingPointError("the model's logits hold NaN: nothing can be generated from them")
    chosen = torch.zeros(len(probability), dtype=torch.bool)
    chosen[probability.sort(descending=True, stable=True).indices[:count]] = True
    if threshold is not None:
        chosen |= probability > threshold if above else probability >= threshold
    return chosen


def calls_of_blocks(gen_length: int, block: int, per_block: int, counts: Sequence[int]) -> Iterator[Call]:
    """The calls of an answer whose blocks begin with it: denoising steps that write `counts`, then one that stores."""
    for number, start in enumerate(range(0, gen_length, block)):
        masked, stop = min(block, gen_length - start), min(start + block, gen_length)
        for i, count in enumerate(counts):
            if masked <= 0:
                break
            whole = number == 0 and i == 0  # the prompt is stored by a pass of its own, at the same price
            yield Call(number * per_block + i, start, stop, masked, window=None if whole else (start, stop))
            masked -= count
        yield Call(number * per_block + per_block - 1, start, stop, 0, window=(start, stop))


def stored(ids: Tensor, attention: Attention, ahead: bool, predicts: int, step: int = 0) -> Pass:
    """A pass of final tokens; with `ahead` its last row predicts the next one, token `predicts` of the answer."""
    if not ahead:
        return Pass(ids.clone(), attention, True, step=step)
    last = torch.arange(len(ids)) == len(ids) - 1
    return Pass(ids.clone(), attention, True, last, torch.tensor([predicts]), step)


def first_end(ids: Tensor, arch: Architecture) -> int | None:
    """Where the first token that ends an answer is."""
    ends = torch.isin(ids, torch.tensor([arch.eos_token_id, *arch.end_token_ids])).nonzero()
    return int(ends[0]) if len(ends) else None


def own_block(block_length: int | None, block: int) -> list[str]:
    """What is wrong with a block length that is not the sampler's own."""
    if block_length in (None, block):
        return []
    return [f"block_length={block_length} differs from the sampler's own, {block}; leave it out"]


def no_schedule(gen_length: int, steps: int, why: str) -> list[str]:
    """What is wrong with a number of steps where the sampler has none."""
    return [] if steps == gen_length else [f"steps={steps} has no meaning: {why}; leave it out"]
