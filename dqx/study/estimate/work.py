"""How many sequences go through the model, counted as the evaluation engine needs them.

Likelihood: the draws of a target of L tokens repeat, so that the number of *different* states is counted, by its
expectation over the draws of `mask_states`; and choices of one length after one prompt share the state that masks all
of a target (those of one token are a single sequence). What choices share beyond that, having tokens in common, is
not counted. Where the likelihood is a sum over blocks, a sequence is a text with masked blocks beside it.

Generation: answers are taken to be as long as those in the data, and a row stops when its answer has ended. The block
in which it ends is written from the most confident token on, so that this happens anywhere between the answer's own
tokens and the whole block: half way is counted. Dream's sampler has one block. `at_most` is the whole schedule;
samplers with a confidence threshold need less. Samplers that store final tokens compute a block per sequence,
which sees what is stored.

N draws, L tokens of a target, C tokens of it that are masked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction

from dqx.diagnostics.fidelity import RATIOS
from dqx.diffusion.batches import Request
from dqx.diffusion.block_rows import widest
from dqx.diffusion.factorization import Factorization
from dqx.diffusion.noise import generator
from dqx.diffusion.samplers import Sampler
from dqx.evaluate.settings import LikelihoodSettings
from dqx.evaluate.spec import TaskSpec, steps_of
from dqx.study.design import Design
from dqx.study.estimate.sizes import SIZES, TEXT_TOKENS, BenchmarkSize

CHAT_TOKENS = 20  # that a chat template adds to a prompt, about


@dataclass(frozen=True)
class Work:
    """Sequences of one length that one kind of work sends through the model.

    `read` of the positions of each are scored or ranked, on average. `forwards` are expected, `at_most` is what they
    cannot exceed where texts are as long as assumed. `draws` are those of one likelihood; 0: none is estimated.
    """

    kind: str  # likelihood, generation, or plain: one sequence at a time without a head
    forwards: float
    at_most: int
    length: int
    read: float = 0.0
    draws: int = 0
    target: int = 0  # likelihood: mean tokens of a target
    documents: int = 1
    each: str = ""  # "256 steps", "4 choices x 128 draws"
    programs: int = 0  # run in the sandbox
    batch: int | None = None  # sequences at a time, where the config says so
    computed: float = 0.0  # tokens of a sequence that are computed, on average; 0: all

    @property
    def width(self) -> float:
        """Tokens of a sequence that are computed, on average."""
        return self.computed or self.length

    @property
    def tokens(self) -> float:
        return self.forwards * self.width


def work_of_tasks(design: Design) -> dict[str, Work]:
    """One evaluation of each of a run's tasks whose size is known."""
    config, steps = design.config, design.config.steps.count
    limit, chat, likelihood = config.task.limit, config.model.chat, config.likelihood
    works = {
        name: task_work(spec, design.sampler, limit=limit, steps=steps, chat=chat, likelihood=likelihood)
        for name, spec in config.task.suite.items()
    }
    return {name: work for name, work in works.items() if work is not None}


def task_work(
    spec: TaskSpec,
    sampler: Sampler,
    *,
    limit: int | None = None,
    steps: int | None = None,
    chat: bool = False,
    likelihood: LikelihoodSettings | None = None,
) -> Work | None:
    """One evaluation of a task; None where its size is not known."""
    if spec.kind == "text":
        return _text(spec, limit, sampler)
    size = SIZES.get(spec.harness)
    if size is None:
        return None
    documents = size.documents if limit is None else min(limit, size.documents)
    prompt = size.prompt(spec) + (CHAT_TOKENS if chat else 0)
    if spec.kind == "likelihood":
        return _likelihood(spec, size, documents, prompt, likelihood or LikelihoodSettings(), sampler)
    return _generation(spec, size, documents, prompt, sampler, steps_of(spec, steps))


def _likelihood(
    spec: TaskSpec,
    size: BenchmarkSize,
    documents: int,
    prompt: int,
    settings: LikelihoodSettings,
    sampler: Sampler,
) -> Work:
    draws = spec.mc_samples or 1
    share = documents / size.documents
    answers = sum(n for n, _ in size.answers.values())
    target = sum(length * n for length, (n, _) in size.answers.items()) / answers
    forwards = masked = 0.0
    for length, (n, prompts) in size.answers.items():
        by_count = different_states(length, draws, exact=settings.exact)
        needed = n * sum(by_count.values()) - (n - prompts) * by_count[length]
        forwards += needed
        masked += n * sum(count * states for count, states in by_count.items())
    choices = round(answers / size.documents)
    longest = sum(n * min(draws, 2**length - 1) for length, (n, _) in size.answers.items())
    work = Work(
        "likelihood",
        forwards=forwards * share,
        at_most=math.ceil(longest * share),
        length=prompt + round(target),
        read=masked / forwards,
        draws=draws,
        target=max(1, round(target)),
        batch=settings.batch_tokens and max(1, settings.batch_tokens // (prompt + round(target))),
        documents=documents,
        each=f"{choices} choices x {draws} draw{'s' if draws > 1 else ''}",
    )
    factorization = sampler.factorization()
    if factorization is None:
        return work
    lines = block_lines(size.answers, size.documents, prompt, factorization, draws, exact=settings.exact)
    return lines.of(work, share, settings.batch_tokens)


@dataclass(frozen=True)
class Lines:
    """Texts with masked blocks beside them (`dqx/diffusion/block_rows.py`): how many are expected, how many there can
    be, their tokens, and how many of these are scored."""

    expected: float
    at_most: float
    length: int
    read: float

    def of(self, work: Work, share: float = 1.0, batch_tokens: int | None = None) -> Work:
        """`work` where the likelihood is a sum over blocks; `share` of the documents are asked for."""
        return replace(
            work,
            forwards=self.expected * share,
            at_most=math.ceil(self.at_most * share),
            length=self.length,
            read=self.read,
            batch=batch_tokens and max(1, batch_tokens // self.length),
        )


def block_lines(
    answers: Mapping[int, tuple[int, int]],
    documents: int,
    prompt: int,
    factorization: Factorization,
    draws: int,
    *,
    exact: bool = False,
) -> Lines:
    """Of all answers after prompts of so many tokens. Choices whose final text is their prompt's share its line."""
    blocks = most = read = texts = tokens = 0.0
    total = sum(n for n, _ in answers.values())
    for length, (n, prompts) in answers.items():
        pieces = factorization.pieces(Request([0] * prompt, [0] * length))
        text = max(piece.start for piece in pieces)
        own = n if text > prompt else documents * n / total
        texts, tokens = texts + own, tokens + own * text
        for piece in pieces:
            if piece.by_final is not None:
                read += (n if text > prompt else prompts) * int(piece.by_final.sum())
                continue
            masked = len(piece.target)
            by_count = different_states(masked, draws, exact=exact)
            shared = n - prompts if piece.start <= prompt else 0
            blocks += n * sum(by_count.values()) - shared * by_count[masked]
            read += n * sum(count * states for count, states in by_count.items())
            most += n * min(draws, 2**masked - 1)
    mean = tokens / texts
    beside = widest(round(mean)) - mean
    expected, at_most = (texts * max(1.0, n * factorization.block / texts / beside) for n in (blocks, most))
    return Lines(expected, at_most, round(mean + blocks * factorization.block / expected), read / expected)


def different_states(length: int, draws: int, *, exact: bool = False) -> dict[int, float]:
    """The expected number of different states of a target, by how many of its tokens they mask.

    `mask_states` puts N points at equal distances on a circle and shifts them at random: each of the L counts has
    floor(N / L) of them, and one more with the probability of the remainder. Of M = C(L, C) states n draws find
    M (1 - (1 - 1/M)^n). With `exact` all states are enumerated where there are no more than N.
    """
    if exact and 2**length - 1 <= draws:
        return {count: float(math.comb(length, count)) for count in range(1, length + 1)}
    if length == 1:
        return {1: 1.0}
    fewest, more = divmod(Fraction(draws, length), 1)
    return {
        count: float(1 - more) * _different(math.comb(length, count), fewest)
        + float(more) * _different(math.comb(length, count), fewest + 1)
        for count in range(1, length + 1)
    }


def _different(states: int, draws: int) -> float:
    """How many of so many equally likely states are expected among the draws."""
    if states == 1 or draws == 0:
        return float(min(states, draws))
    return -states * math.expm1(draws * math.log1p(-1 / states))


def _generation(
    spec: TaskSpec, size: BenchmarkSize, documents: int, prompt: int, sampler: Sampler, wanted: int | None
) -> Work:
    gen_length = spec.gen_length or 0
    block, steps = sampler.block_length(spec.block_length), sampler.steps_for(gen_length, wanted)
    calls = sampler.calls(gen_length, block, steps, generator(0, "schedule"))
    schedule, read, computed = len(calls), ((block or gen_length) + 1) / 2, 0.0
    if sampler.stores_final:
        widths = [prompt + gen_length if call.window is None else call.window[1] - call.window[0] for call in calls]
        read, computed = sum(call.masked for call in calls) / schedule, sum(widths) / schedule
    written = _written({length: n for length, (n, _) in size.answers.items()}, gen_length, block or gen_length)
    return Work(
        "generation",
        forwards=documents * schedule * written,
        at_most=documents * schedule,
        length=prompt + gen_length,
        read=read,
        computed=computed,
        documents=documents,
        each=f"{schedule} passes" if sampler.stores_final else f"{steps} steps",
        programs=documents if spec.category == "code" else 0,
        batch=spec.batch_size,
    )


def _written(answers: Mapping[int, int], gen_length: int, block: int) -> float:
    """The share of the new tokens that is written before a row stops, on average."""
    total = 0.0
    for length, n in answers.items():
        last = min(math.ceil(length / block) * block, gen_length)
        total += n * (min(length, gen_length) + last) / 2
    return total / (gen_length * sum(answers.values()))


def _text(spec: TaskSpec, limit: int | None, sampler: Sampler) -> Work | None:
    tokens = TEXT_TOKENS.get(spec.text or "")
    if tokens is None or not spec.length or not spec.mc_samples:
        return None
    windows = min(n for n in (tokens // spec.length, spec.windows, limit) if n is not None)
    by_count = different_states(spec.length, spec.mc_samples)
    work = Work(
        "likelihood",
        forwards=windows * sum(by_count.values()),
        at_most=windows * spec.mc_samples,
        length=spec.length + 1,
        read=(spec.length + 1) / 2,
        draws=spec.mc_samples,
        target=spec.length,
        documents=windows,
        each=f"{spec.mc_samples} draw{'s' if spec.mc_samples > 1 else ''}",
    )
    factorization = sampler.factorization()
    if factorization is None:
        return work
    return block_lines({spec.length: (windows, windows)}, windows, 1, factorization, spec.mc_samples).of(work)


def outlier_work(samples: int, length: int) -> Work:
    """Windows, or denoising states, whose activations are looked at."""
    return Work("plain", samples, samples, length)


def fidelity_work(samples: int, length: int, gen_length: int, *, steps: int, states: int, guided: bool) -> list[Work]:
    """The predictions that are compared: every mask ratio, then answers of so many steps, and on `states` of them.

    Guidance takes two passes of a step, and of a state a third for its hidden states.
    """
    ratios = samples * len(RATIOS)
    written = samples * (steps + states + (steps + 2 * states if guided else 0))
    return [Work("plain", ratios, ratios, length), Work("plain", written, written, length // 2 + gen_length)]
