"""Generation in batches of different prompts: the tokens of the plain sampler, in less time.

The plain path is `sampler.generate` on one prompt; `due` and `candidates` of the sampler decide here as they do there.
What saves time, and why it changes no token:

- Prompts of any length share a forward, padded on the left; padding is in no attention, positions count real tokens
  only, and neither noise nor ranking ever sees a padded column.
- A finished row frees its place for the next prompt, so rows are at different steps. Nothing in a step depends on
  other rows; noise is a function of (seed, document, step, position).
- The final norm, the head and the softmax run where a step looks (`look`) and nowhere else.
- A row stops as soon as the tokens before its first mask, which never change again, settle its text by an end token or
  a complete stop string.
- Batches are as large as memory allows, and are halved when it was not enough; a step that failed left no trace.
- A step waits for the device once: rows are kept on the CPU, and tokens and confidences come back together.

A sampler with a cache (an approximation, see `samplers/llada.py`) makes two forwards of a step: rows that begin a
block are computed whole and keep their keys and values, the others attend to their own and compute a window. Where
memory was short, what was kept is given up, and all rows begin their block again.

Equal up to rounding: two confidences closer than what a matrix product rounds could change places.

Shapes as in `samplers/base.py`: B rows, P prompt tokens with padding, G new tokens, T = P + G.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace

import torch
from torch import Tensor

from dqx.common import accelerator
from dqx.common.problems import raise_if
from dqx.diffusion.batches import TokenIds, token_ids, too_long
from dqx.diffusion.frames import Frames, OnFrame
from dqx.diffusion.noise import Key, SeededNoise, generator
from dqx.diffusion.samplers import Sampler
from dqx.diffusion.samplers.base import fetched, logits_at, most_confident, write
from dqx.diffusion.settings import count_problems
from dqx.models.kv_cache import KVCache
from dqx.models.transformer import Architecture, MaskedDiffusionTransformer
from dqx.models.vocabulary import id_problems

#: Share of the free memory that a batch is planned to take.
SHARE = 0.8


@dataclass(frozen=True)
class Prompt:
    """The tokens of a prompt, at least one, and the name of its noise."""

    ids: TokenIds
    document: Key | tuple[Key, ...]


@dataclass(frozen=True)
class Answer:
    """What was written after one prompt.

    `n_saved` is an estimate for Dream's `origin`, whose schedule is drawn, and the most there can be with a threshold.
    """

    ids: list[int]  # the new tokens; where the row stopped early, those before the first mask
    n_written: int  # tokens written, also behind the place where the row stopped
    n_forwards: int  # sequences that went through the model (guidance doubles them)
    n_tokens: int  # the tokens of those that were computed, padding not counted
    n_saved: int  # sequences that stopping made unnecessary


@dataclass(eq=False)
class Row:
    """A prompt under way. All tensors are on the CPU.

    `look` [G], `count` and `window` are what its step `step` looks at, how many tokens it writes and which it computes;
    the first `settled` tokens of the answer are written without a gap. `begun` is the row as it was before the block
    whose keys and values are kept.
    """

    index: int
    document: Key | tuple[Key, ...]
    prompt: Tensor  # [P]
    answer: Tensor  # [G]
    look: Tensor
    count: int = 0
    window: tuple[int, int] | None = None
    step: int = -1
    settled: int = 0
    n_forwards: int = 0
    n_tokens: int = 0
    begun: Row | None = None

    @property
    def reuses(self) -> bool:
        """Whether keys and values are kept for the step's block."""
        return self.window is not None and self.begun is not None and self.begun.window == self.window


@dataclass(eq=False, repr=False)
class Engine:
    """Writes the answers to many prompts with one sampler and one schedule.

    `settled` gets the tokens before an answer's first mask whenever there are more of them, and says whether what
    follows cannot matter; None writes every answer to its end. `batch_size` rows go through the model at a time; None
    chooses from free memory. After running out of memory it is halved, which `notes` says. `progress` is told how many
    of the prompts' `steps` are over, whenever some are; an answer that stops early has all of its steps behind it.
    `on_frame` gets a `Frame` after every forward of every row, which changes no token.

    Raises ConfigProblems with the `problems` of the settings.
    """

    model: MaskedDiffusionTransformer
    sampler: Sampler
    _: KW_ONLY
    gen_length: int
    steps: int
    block_length: int | None = None
    seed: int = 0
    settled: Callable[[list[int]], bool] | None = None
    batch_size: int | None = None
    progress: Callable[[int], object] | None = None
    on_frame: OnFrame | None = None
    notes: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        wrong = self.sampler.problems(self.gen_length, self.block_length, self.steps)
        wrong += [] if self.batch_size is None else count_problems(batch_size=self.batch_size)
        raise_if(wrong + self.sampler.token_problems(self.model.arch.vocab_size))
        self.passes = 2 if self.sampler.cfg_scale > 0 else 1
        self._kept: tuple[list[Row], KVCache] | None = None
        self._frames: Frames | None = None

    def generate(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """The answers in the order of the prompts."""
        answers = dict(self.stream(prompts))
        return [answers[i] for i in range(len(prompts))]

    @torch.no_grad()
    def stream(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Answer]]:
        """(index of a prompt, its answer), as they are finished. Long prompts come first.

        Raises ValueError for an empty prompt, torch.OutOfMemoryError where a single row does not fit.
        """
        for i, prompt in enumerate(prompts):
            if not len(prompt.ids):
                raise ValueError(f"prompt {i} has no token; give at least one")
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].ids))
        waiting = deque(self.begin(i, prompts[i]) for i in order)
        self._frames = self._watched()
        largest = len(prompts)
        free = accelerator.free_memory(self.model.device)
        batch: list[Row] = []
        over = [0] * len(prompts)  # steps, of each prompt

        def tell(rows: Sequence[Row], steps: int | None = None) -> None:
            passed = 0
            for row in rows:
                now = max(over[row.index], row.step + 1 if steps is None else steps)
                passed, over[row.index] = passed + now - over[row.index], now
            if self.progress:
                self.progress(passed)

        while waiting or batch:
            while waiting and len(batch) < min(largest, self.room([*batch, waiting[0]], free)):
                row = waiting.popleft()
                if row.count or self._advance(row):
                    batch.append(row)
                else:
                    tell([row], self.steps)
                    yield row.index, self._finish(row)
            if batch and not self._step(batch):
                if len(batch) == 1 and self._kept is None:
                    raise too_long(len(batch[0].prompt) + self.gen_length, "shorter answers (gen_length)")
                self._kept = None  # what it takes is needed more than what it saves
                batch = [row.begun if row.reuses and row.begun else row for row in batch]
                accelerator.empty_cache(self.model.device)
                if len(batch) > 1:
                    largest = len(batch) // 2
                    self.notes.append(f"out of memory with {len(batch)} sequences at a time; went on with {largest}")
                    waiting.extendleft(reversed(batch[largest:]))
                    batch = batch[:largest]
                continue
            tell(batch)
            going = []
            for row in batch:
                if (stopped := self._is_settled(row)) or not self._advance(row):
                    tell([row], self.steps)
                    yield row.index, self._finish(row, stopped)
                else:
                    going.append(row)
            batch = going

    def begin(self, index: int, prompt: Prompt) -> Row:
        """The row of a prompt before its first step. Raises ValueError for what is no row of the model's token ids."""
        ids = token_ids(prompt.ids)
        raise_if(id_problems(ids, self.model.arch.vocab_size))
        masks = torch.full((self.gen_length,), self.model.arch.mask_token_id)
        return Row(index, prompt.document, ids, masks, look=torch.zeros_like(masks, dtype=torch.bool))

    def _advance(self, row: Row) -> bool:
        """On to the row's next step that writes something. False: there is none."""
        masked = (row.answer == self.model.arch.mask_token_id)[None]
        noise = SeededNoise(self.seed, [row.document])
        for step in range(row.step + 1, self.steps):
            look, counts = self.sampler.due(
                masked, [step], block_length=self.block_length, steps=self.steps, noise=noise
            )
            row.step, row.look, row.count = step, look[0], int(counts)
            row.window = self._window(step)
            if row.count:
                return True
        return False

    def _watched(self) -> Frames | None:
        """What makes the frames of a generation, where somebody watches it."""
        return Frames(self.on_frame, self.gen_length, self.model.arch.mask_token_id) if self.on_frame else None

    def _window(self, step: int) -> tuple[int, int] | None:
        return self.sampler.window(step, gen_length=self.gen_length, block_length=self.block_length, steps=self.steps)

    def _step(self, batch: list[Row]) -> bool:
        """One step of every row, each at its own. False, and nothing has changed: out of memory."""
        whole = [row for row in batch if not row.reuses]
        inside = [row for row in batch if row.reuses]
        try:
            old, fill = self._reused(inside), bool(whole) and whole[0].window is not None
            new = self.model.empty_cache(len(whole), self._width(whole) + self.gen_length) if fill else None
            found = fetched([self._forward(rows, cache) for rows, cache in ((whole, new), (inside, old)) if rows])
            caches = [cache for cache in (new, old) if cache is not None]
            joined = KVCache.join(caches) if caches else None
        except torch.OutOfMemoryError:
            return False
        rows = [*whole, *inside]
        self._kept = None if joined is None else (rows, joined)
        tokens, confidence, *probability = found
        for row, answer in zip(rows, self._written(rows, tokens, confidence), strict=True):
            computed = len(row.prompt) + self.gen_length
            if row.window is not None and row.reuses:
                computed = row.window[1] - row.window[0] + self.model.arch.logit_shift
            elif row.window is not None:
                row.begun = replace(row, begun=None)
            row.answer = answer
            row.n_forwards += self.passes
            row.n_tokens += self.passes * computed
        if self._frames:
            self._show(rows, *probability)
        return True

    def _show(self, rows: list[Row], probability: Tensor) -> None:
        """The frames of a step, in which rows gave the tokens [n] where they looked this probability."""
        assert self._frames is not None
        for row, own in zip(rows, probability.split([int(row.look.sum()) for row in rows]), strict=True):
            block = self.sampler.block_at(
                row.step, gen_length=self.gen_length, block_length=self.block_length, steps=self.steps
            )
            self._frames.show(row.index, row.answer, row.look, own, block=block, step=row.step, forwards=row.n_forwards)

    def _reused(self, rows: list[Row]) -> KVCache | None:
        """What is kept of these rows, and of no others from now on, for a forward of their windows."""
        if not rows or self._kept is None:
            self._kept = None
            return None
        owners, cache = self._kept
        width = self._width(rows)
        cache = cache.take([owners.index(row) for row in rows], width + self.gen_length)
        self._kept = rows, cache
        windows = [row.window for row in rows if row.window is not None]
        shift = self.model.arch.logit_shift  # the first token is predicted one column before it
        return cache.window([width + first - shift for first, _ in windows], [width + stop for _, stop in windows])

    def _width(self, rows: Sequence[Row]) -> int:
        return max(len(row.prompt) for row in rows)

    def _forward(self, rows: list[Row], cache: KVCache | None) -> tuple[Tensor, ...]:
        """What rows would write where they look, as `_candidates` finds it, on the device."""
        arch, device = self.model.arch, self.model.device
        width = self._width(rows)
        ids = torch.full((len(rows), width + self.gen_length), arch.eos_token_id)
        real = torch.zeros(ids.shape, dtype=torch.bool)
        where = torch.zeros(ids.shape, dtype=torch.bool)
        for b, row in enumerate(rows):
            start = width - len(row.prompt)
            ids[b, start:] = torch.cat((row.prompt, row.answer))
            real[b, start:] = True
            where[b, width:] = row.look
        logits = logits_at(
            self.model,
            ids.to(device),
            where,
            prompt_length=width,
            cfg_scale=self.sampler.cfg_scale,
            attention_mask=None if real.all() else real.to(device),
            whole=False,
            cache=cache,
        )
        return self._candidates(logits, where[:, width:], [row.step for row in rows], [row.document for row in rows])

    def _candidates(
        self, logits: Tensor, where: Tensor, at: Sequence[int], documents: Sequence[Key | tuple[Key, ...]]
    ) -> tuple[Tensor, ...]:
        """The sampler's tokens and confidences [n]; for frames also the probability [n] that the model gives them."""
        given = logits.softmax(-1) if self._frames else None  # the sampler may overwrite the logits
        noise = SeededNoise(self.seed, documents)
        tokens, confidence = self.sampler.candidates(logits, where, at, noise=noise, arch=self.model.arch)
        if given is None:
            return tokens, confidence
        return tokens, confidence, given.gather(-1, tokens[:, None])[:, 0]

    def _written(self, rows: list[Row], tokens: Tensor, confidence: Tensor) -> Iterator[Tensor]:
        """The answers of rows after their step."""
        look, answers = torch.stack([row.look for row in rows]), torch.stack([row.answer for row in rows])
        counts = torch.tensor([row.count for row in rows])
        write(answers, look, tokens, most_confident(confidence, look, counts, self.sampler.threshold))
        return (answer.clone() for answer in answers)

    def _is_settled(self, row: Row) -> bool:
        masks = (row.answer == self.model.arch.mask_token_id).nonzero()
        written = int(masks[0]) if len(masks) else self.gen_length
        if self.settled is None or written == row.settled:
            return False
        row.settled = written
        return self.settled(row.answer[:written].tolist())

    def _finish(self, row: Row, stopped: bool = False) -> Answer:
        saved = 0
        if stopped:
            schedule = generator(self.seed, "schedule")
            planned = self.sampler.calls(self.gen_length, self.block_length, self.steps, schedule)
            saved = sum(call.step > row.step for call in planned)
        return Answer(
            ids=row.answer[: row.settled if stopped else self.gen_length].tolist(),
            n_written=int((row.answer != self.model.arch.mask_token_id).sum()),
            n_forwards=row.n_forwards,
            n_tokens=row.n_tokens,
            n_saved=saved,
        )

    def room(self, rows: Sequence[Row], free: float) -> int:
        """`batch_size`, or how many rows of the greatest length keep the device busy and fit into `free` bytes."""
        if self.batch_size:
            return self.batch_size
        arch, length = self.model.arch, self._width(rows) + self.gen_length
        needed = row_bytes(arch, length, self.block_length or self.gen_length)
        window = self._window(0)
        if window is not None:
            needed += cache_bytes(arch, length, self.model.dtype.itemsize)
        busy = busy_tokens(self.model.device.type) // (length if window is None else window[1] - window[0])
        return max(1, int(min(busy, SHARE * free / needed)))


def busy_tokens(device_type: str) -> int:
    """Tokens per forward that keep a kind of device busy; more of them cost memory and gain nothing."""
    return 512 if device_type == "cpu" else 16384


def row_bytes(arch: Architecture, length: int, read: int) -> int:
    """An upper estimate of what one sequence of `length` tokens needs while logits of `read` positions are ranked.

    The wide tensors of a block in float32, its attention mask, and eight numbers per logit (sorting, float64).
    """
    return length * (8 * arch.hidden_size + 4 * arch.mlp_size) * 4 + length**2 * 4 + read * arch.vocab_size * 32


def cache_bytes(arch: Architecture, length: int, item: int) -> int:
    """What the keys and values of one sequence of `length` tokens take, with `item` bytes per number.

    Twice their own size: rows that join or leave make a new copy.
    """
    return 2 * 2 * arch.n_blocks * arch.n_kv_heads * arch.head_size * length * item
