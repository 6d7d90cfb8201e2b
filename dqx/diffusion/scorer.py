"""Likelihoods of many targets at once: `likelihood.log_likelihood` of each, computed with less work.

What is saved, and why nothing changes but rounding (tests/diffusion/test_scorer.py):
- every masked sequence goes through the model once: repeated draws of a request are weighted (`states.py`), and
  requests with one prefix share sequences (choices of one token a single one);
- norm and head run at the masked positions of targets only (`MaskedDiffusionTransformer.logits_where`);
- batches hold sequences of many requests, longest first, up to a number of tokens; shorter ones are padded on the
  right, where no real token looks.
As options, the expectation itself by enumeration (`states.enumerated`), and draws only until a question is decided
(`stopping.py`).

Sequences are ordered and cut into batches by nothing but their tokens: neither the order of the requests nor timing
changes anything at all. A run that is continued plans its batches from all requests, leaves out those in which
everything is known and takes the others whole: with equal batch sizes, to the last bit the values of a run without
interruption. (With adaptive draws only what is missing is scored.) Running out of GPU memory halves the batches, which
may change rounding and is noted.

Shapes as in `batches.py`; B rows, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field

import torch
from torch import Tensor

from dqx.common import accelerator
from dqx.common.problems import raise_if
from dqx.diffusion.batches import (
    Part,
    Piece,
    Request,
    SequenceGroup,
    batches,
    default_batch_tokens,
    digest_of,
    group,
    halves,
    too_long,
)
from dqx.diffusion.block_rows import block_batches, block_log_probs, widest
from dqx.diffusion.factorization import Factorization, factorization_problems
from dqx.diffusion.likelihood import true_log_probs
from dqx.diffusion.samplers.base import logits_at
from dqx.diffusion.settings import count_problems, number_problems
from dqx.diffusion.states import Estimate, n_states, piece_estimate
from dqx.diffusion.stopping import Question, decided, stages
from dqx.models.transformer import MaskedDiffusionTransformer
from dqx.models.vocabulary import id_problems

Progress = Callable[[int], object]
Finished = Callable[[dict[int, float]], object]


@dataclass(eq=False, repr=False)
class Scorer:
    """Scores requests with one model and one set of settings.

    `samples` draws per target; `exact` takes the enumerated expectation where a target has no more states than that.
    `error_level` (None: always all draws) is the probability of deciding a question early for a choice that is not
    the best. `batch_tokens` (None: by device and free memory) changes nothing but speed and rounding. A model that
    writes block by block needs its sampler's `factorization`; then each term has so many draws of its own.

    Over all calls, `n_forwards` counts sequences through the model, `n_tokens` their tokens, `draws` has the number of
    questions by the draws that their choices took, and `notes` says what a reader of the results should know.
    """

    model: MaskedDiffusionTransformer
    _: KW_ONLY
    samples: int
    seed: int
    cfg_scale: float = 0.0
    exact: bool = False
    error_level: float | None = None
    batch_tokens: int | None = None
    factorization: Factorization | None = None
    n_forwards: int = field(default=0, init=False)
    n_tokens: int = field(default=0, init=False)
    draws: Counter[int] = field(default_factory=Counter, init=False)
    notes: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        problems = count_problems(samples=self.samples) + number_problems("cfg_scale", self.cfg_scale, 0)
        if self.batch_tokens is not None:
            problems += count_problems(batch_tokens=self.batch_tokens)
        if self.error_level is not None:
            problems += number_problems("error_level", self.error_level, 0, 1, above=True)
        problems += factorization_problems(self.model.arch, self.factorization, self.cfg_scale)
        raise_if(problems)

    def work(self, request: Request) -> int:
        """Tokens through the model that a request takes at most: the unit of `progress`."""
        if self.factorization is not None:
            return self.factorization.work(request, self.samples)
        return min(self.samples, n_states(len(request.target))) * request.length

    @torch.no_grad()
    def score(
        self,
        requests: Sequence[Request],
        questions: Sequence[Question] = (),
        *,
        known: Mapping[int, float] | None = None,
        progress: Progress | None = None,
        finished: Finished | None = None,
    ) -> list[float]:
        """Nats of each request. With an error level, those that belong to a question may get fewer draws.

        `known` values, by index, are taken as they are (of a question, all or none). `progress` is told of finished
        `work` in portions, that of the known ones first; `finished` of new values in portions, each once.
        Raises ValueError for ids that are no tokens of the model, FloatingPointError on NaN.
        """
        size = self.model.arch.vocab_size
        raise_if(
            [p for request in requests for ids in (request.prefix, request.target) for p in id_problems(ids, size)]
        )
        if self.factorization is not None:
            raise_if([p for request in requests for p in self.factorization.problems(request)])
        run = _Run(self, requests, known or {}, progress, finished)
        compared = [] if self.error_level is None else list(questions)
        undecided = [question for question in compared if not run.known.keys() >= set(question.requests)]
        run.stage(set(range(len(requests))) - {i for question in compared for i in question.requests}, 1)
        strides = stages(self.samples)
        for stride in strides if undecided else ():
            run.stage({i for question in undecided for i in question.requests}, stride)
            still = []
            for question in undecided:
                if stride > 1 and not self._decided(question, run, stride, len(strides) - 1):
                    still.append(question)
                    continue
                self.draws[len(range(0, self.samples, stride))] += 1
                for i in question.requests:
                    run.close(i)
            run.hand_over()
            undecided = still
        return run.values

    def pieces(self, request: Request) -> list[Piece]:
        """The terms of a request's likelihood."""
        if self.factorization is not None:
            return self.factorization.pieces(request)
        return [Piece(request.prefix, request.target, request.key)] if len(request.target) else []

    def _decided(self, question: Question, run: _Run, stride: int, looks: int) -> bool:
        scaled = [run.draws(i, stride) / scale for i, scale in zip(question.requests, question.scales, strict=True)]
        assert self.error_level is not None
        return decided(torch.stack(scaled), looks=looks, error_level=self.error_level)


@dataclass
class _Run:
    """The state of one call of `Scorer.score`."""

    scorer: Scorer
    requests: Sequence[Request]
    known: Mapping[int, float]
    progress: Progress | None
    finished: Finished | None

    def __post_init__(self) -> None:
        self.model = self.scorer.model
        self.estimates: dict[int, dict[int, Estimate]] = {}  # of requests that are not finished, by piece
        self.pieces: dict[int, list[Piece]] = {}
        self.awaited: Counter[int] = Counter()  # pieces of a request that a stage has not brought yet
        self.values = [self.known.get(i, 0.0) for i in range(len(self.requests))]
        self.final = set(self.known)
        self.fresh: dict[int, float] = {}  # values that became final and are not handed over
        self.told = [0] * len(self.requests)
        self.blocks = self.scorer.factorization
        line = None if self.blocks is None else max((widest(request.length) for request in self.requests), default=1)
        self.batch_tokens = self.scorer.batch_tokens or default_batch_tokens(self.model, self.requests, line)
        for i in self.known:
            self._tell(i, self.scorer.work(self.requests[i]))

    def stage(self, members: Iterable[int], stride: int) -> None:
        """Bring requests to every `stride`-th draw: their values are those of these draws. 1 finishes them."""
        groups, room = self._groups(members, stride), lambda: self.batch_tokens
        cut = batches(groups, room) if self.blocks is None else block_batches(groups, room, self.blocks.block)
        for batch in cut:
            if any(i not in self.known for part in batch for i, _ in part.group.pairs):
                self._forward(batch)
            for part in batch:
                if part.stop == len(part.group.rows):
                    for (i, j), pairs in part.group.pairs.items():
                        estimate = self.estimates[i][j]
                        estimate.enter(estimate.missing(stride), part.group.log_probs[pairs])
                        self._reached(i, stride)
            self.hand_over()
        self.hand_over()

    def close(self, i: int) -> None:
        """No more draws for a request: its value stays."""
        self.estimates.pop(i, None)
        self.pieces.pop(i, None)
        if i not in self.final:
            self.final.add(i)
            self.fresh[i] = self.values[i]
            self._tell(i, self.scorer.work(self.requests[i]))

    def hand_over(self) -> None:
        """Tell of the values that became final."""
        if self.finished and self.fresh:
            self.finished(self.fresh)
        self.fresh = {}

    def draws(self, i: int, stride: int) -> Tensor:
        """The estimate of every `stride`-th draw: the sum of those of a request's pieces, which are independent."""
        return torch.stack([estimate.draws(stride) for estimate in self.estimates[i].values()]).sum(0)

    def _reached(self, i: int, stride: int) -> None:
        """A piece of a request has its value."""
        self.awaited[i] -= 1
        if self.awaited[i]:
            return
        if i not in self.known:
            self.values[i] = sum(self.estimates[i][j].value(stride) for j in sorted(self.estimates[i]))
        if stride == 1:
            self.close(i)
        else:
            self._tell(i, self.scorer.work(self.requests[i]) // stride)

    def _tell(self, i: int, work: int) -> None:
        if self.progress and work > self.told[i]:
            self.progress(work - self.told[i])
            self.told[i] = work

    def _groups(self, members: Iterable[int], stride: int) -> Iterator[SequenceGroup]:
        """Groups by falling length, made when they are asked for. Requests that need nothing are finished here."""
        together: dict[tuple[int | bytes, ...], list[tuple[int, int]]] = {}
        place: dict[tuple[int | bytes, ...], tuple[int | bytes, ...]] = {}
        for i in members:
            pieces = self.pieces[i] = self.pieces.get(i) or self.scorer.pieces(self.requests[i])
            if not pieces:
                self.close(i)
                continue
            self.awaited[i] = len(pieces)
            last = max(pieces, key=lambda piece: piece.start)
            chain = () if self.blocks is None else (-last.start, digest_of(last.text))
            for j, piece in enumerate(pieces):
                together.setdefault(piece.alike, []).append((i, j))
                first = (*chain, -piece.start)
                place[piece.alike] = min(first, place.get(piece.alike, first))
        for _, alike in sorted(together.items(), key=lambda item: (place[item[0]], item[0])):
            needed = []
            for i, j in alike:
                estimate, piece = self._estimate(i, j), self.pieces[i][j]
                states = estimate.missing(stride)
                if len(states):
                    needed.append(((i, j), piece, estimate.masks[states]))
                else:
                    self._reached(i, stride)
            if needed:
                yield group(needed, self.model.arch.mask_token_id)

    def _estimate(self, i: int, j: int) -> Estimate:
        scorer, piece, known = self.scorer, self.pieces[i][j], self.estimates.setdefault(i, {})
        if j not in known:
            known[j] = piece_estimate(piece, samples=scorer.samples, seed=scorer.seed, exact=scorer.exact)
        return known[j]

    # through the model

    def _forward(self, batch: list[Part]) -> None:
        """Run a batch, in halves where the GPU's memory does not do, and fill in the groups' `log_probs`."""
        try:
            self._log_probs(batch)
            return
        except torch.OutOfMemoryError as error:
            if sum(map(len, batch)) == 1:
                raise too_long(batch[0].group.length) from error
        accelerator.empty_cache(self.model.device)  # outside of the handler, which keeps the failed pass alive
        self.batch_tokens = max(1, self.batch_tokens // 2)
        note = "likelihood batches were made smaller because the GPU's memory was full"
        self.scorer.notes += [] if note in self.scorer.notes else [note]
        for half in halves(batch):
            self._forward(half)

    def _log_probs(self, batch: list[Part]) -> None:
        if self.blocks is not None:
            found = block_log_probs(self.model, batch, self.blocks)
            self.scorer.n_forwards += found.n_lines
            self.scorer.n_tokens += found.n_tokens
            for part, pair, values in zip(batch, found.pairs, found.log_probs, strict=True):
                part.group.log_probs.index_add_(0, pair, values)
            return
        n, width = sum(map(len, batch)), batch[0].group.length
        ids = torch.full((n, width), self.model.arch.eos_token_id)
        where = torch.zeros(n, width, dtype=torch.bool)
        prefix, length = torch.zeros(2, n, 1, dtype=torch.long)
        first = [0]
        for part in batch:
            begin, rows = len(part.group.prefix), slice(first[-1], first[-1] + len(part))
            ids[rows, :begin] = part.group.prefix
            ids[rows, begin : part.group.length] = part.group.rows[part.start : part.stop]
            where[rows, begin : part.group.length] = part.group.wanted[part.start : part.stop]
            prefix[rows], length[rows] = begin, part.group.length
            first.append(rows.stop)

        place = where.flatten().cumsum(0).view(n, width) - 1  # of a wanted position among the logits
        picked, tokens, pairs = [], [], []
        for part, top in zip(batch, first, strict=False):
            low, high = torch.searchsorted(part.group.row, torch.tensor([part.start, part.stop])).tolist()
            pair, at = part.group.scored[low:high].nonzero(as_tuple=True)
            pair = pair + low
            picked.append(place[part.group.row[pair] - part.start + top, len(part.group.prefix) + at])
            tokens.append(part.group.tokens[pair, at])
            pairs.append(pair)

        column = torch.arange(width)
        real = None if bool((length == width).all()) else column < length
        device = self.model.device
        logits = logits_at(
            self.model,
            ids.to(device),
            where,
            prompt_length=prefix.to(device),
            cfg_scale=self.scorer.cfg_scale,
            attention_mask=None if real is None else real.to(device),
            whole=False,
        )
        log_probs = true_log_probs(logits, torch.cat(tokens), torch.cat(picked))
        passes = 2 if self.scorer.cfg_scale > 0 else 1
        self.scorer.n_forwards += n * passes
        self.scorer.n_tokens += int(length.sum()) * passes
        for part, pair, values in zip(batch, pairs, log_probs.split([len(p) for p in pairs]), strict=True):
            part.group.log_probs.index_add_(0, pair, values)
