"""Generation in batches of different prompts: the tokens of the plain sampler, in less time.

The plain path is `sampler.generate` on one prompt; `due` and `candidates` of the sampler decide here as they do there.
What saves time, and why it changes no token:

- Prompts of any length share a forward. They are padded on the left; padding is in no attention, positions count real
  tokens only, and neither noise nor ranking ever sees a padded column.
- A finished row frees its place for the next prompt, so rows are at different steps. Nothing in a step depends on
  other rows; noise is a function of (seed, document, step, position).
- The final norm, the head and the softmax run where a step looks (`look`) and nowhere else.
- A row stops as soon as its text is settled. Tokens before the first mask of an answer are never changed again, so
  whatever they decide (an end token, a complete stop string) is decided, and the rest of the answer cannot matter.
- Batches are as large as memory allows, and are halved when it was not enough; a step that failed left no trace.

Equal up to rounding: a matrix product may round differently in another batch, so two confidences closer than that
could change places.

Shapes as in `sampler.py`: B rows, P prompt tokens with padding, G new tokens, T = P + G.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dqx.diffusion.noise import Key, SeededNoise, generator
from dqx.diffusion.sampler import Sampler, count_problems, logits_at, most_confident, raise_if, write
from dqx.models.transformer import Architecture, MaskedDiffusionTransformer

#: Tokens per forward that keep a device busy; more of them cost memory and gain nothing.
BUSY = {"cpu": 512, "cuda": 16384}

#: Share of the free memory that a batch is planned to take.
SHARE = 0.8


@dataclass(frozen=True)
class Prompt:
    """The tokens of a prompt, at least one, and the name of its noise."""

    ids: Sequence[int]
    document: Key | tuple[Key, ...]


@dataclass(frozen=True)
class Answer:
    """What was written after one prompt.

    ids: the new tokens; where the row stopped early, those before the first mask.
    n_written: tokens written, also behind the place where the row stopped.
    n_forwards: sequences that went through the model (guidance doubles them).
    n_saved: those that stopping made unnecessary (of Dream's `origin`, whose schedule is drawn, an estimate).
    """

    ids: list[int]
    n_written: int
    n_forwards: int
    n_saved: int


@dataclass
class Row:
    """A prompt under way. All tensors are on the CPU.

    `look` [G] and `count` are what its step `step` looks at and how many tokens it writes; the first `settled` tokens
    of the answer are written without a gap.
    """

    index: int
    document: Key | tuple[Key, ...]
    prompt: Tensor  # [P]
    answer: Tensor  # [G]
    look: Tensor
    count: int = 0
    step: int = -1
    settled: int = 0
    n_forwards: int = 0


class Engine:
    """Writes the answers to many prompts with one sampler and one schedule.

    `settled` gets the tokens before an answer's first mask whenever there are more of them, and says whether what
    follows cannot matter; null writes every answer to its end. `batch_size` rows go through the model at a time; null
    chooses from free memory. After running out of memory it is halved, which `notes` says.

    Raises ValueError with the `problems` of the settings.
    """

    def __init__(
        self,
        model: MaskedDiffusionTransformer,
        sampler: Sampler,
        *,
        gen_length: int,
        block_length: int | None = None,
        steps: int,
        seed: int = 0,
        settled: Callable[[list[int]], bool] | None = None,
        batch_size: int | None = None,
    ):
        wrong = [] if batch_size is None else count_problems(batch_size=batch_size)
        wrong += sampler.token_problems(model.arch.vocab_size)
        raise_if(sampler.problems(gen_length, block_length, steps) + wrong)
        self.model, self.sampler = model, sampler
        self.gen_length, self.block_length, self.steps, self.seed = gen_length, block_length, steps, seed
        self.settled, self.batch_size = settled, batch_size
        self.passes = 2 if sampler.cfg_scale > 0 else 1
        self.notes: list[str] = []

    def generate(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """The answers in the order of the prompts."""
        answers = dict(self.stream(prompts))
        return [answers[i] for i in range(len(prompts))]

    @torch.no_grad()
    def stream(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Answer]]:
        """(index of a prompt, its answer), as they are finished. Long prompts come first.

        Raises ValueError for an empty prompt, torch.cuda.OutOfMemoryError where a single row does not fit.
        """
        for i, prompt in enumerate(prompts):
            if not len(prompt.ids):
                raise ValueError(f"prompt {i} has no token; give at least one")
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].ids))
        waiting = deque(self._begin(i, prompts[i]) for i in order)
        largest = len(prompts)
        free = free_memory(self.model.device)
        batch: list[Row] = []
        while waiting or batch:
            while waiting and len(batch) < min(largest, self._room([*batch, waiting[0]], free)):
                row = waiting.popleft()
                if row.count or self._advance(row):
                    batch.append(row)
                else:
                    yield row.index, self._finish(row)
            if batch and not self._step(batch):
                if len(batch) == 1:
                    length = len(batch[0].prompt) + self.gen_length
                    raise torch.cuda.OutOfMemoryError(f"one sequence of {length} tokens does not fit into memory")
                torch.cuda.empty_cache()
                largest = len(batch) // 2
                self.notes.append(f"out of memory with {len(batch)} sequences at a time; went on with {largest}")
                waiting.extendleft(reversed(batch[largest:]))
                batch = batch[:largest]
                continue
            going = []
            for row in batch:
                if (stopped := self._is_settled(row)) or not self._advance(row):
                    yield row.index, self._finish(row, stopped)
                else:
                    going.append(row)
            batch = going

    def _begin(self, index: int, prompt: Prompt) -> Row:
        masks = torch.full((self.gen_length,), self.model.arch.mask_token_id)
        ids = torch.tensor(prompt.ids, dtype=torch.long)
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
            if row.count:
                return True
        return False

    def _step(self, batch: list[Row]) -> bool:
        """One step of every row, each at its own. False, and nothing has changed: out of memory."""
        arch, device = self.model.arch, self.model.device
        width = max(len(row.prompt) for row in batch)
        ids = torch.full((len(batch), width + self.gen_length), arch.eos_token_id)
        real = torch.zeros(ids.shape, dtype=torch.bool)
        where = torch.zeros(ids.shape, dtype=torch.bool)
        for b, row in enumerate(batch):
            start = width - len(row.prompt)
            ids[b, start:] = torch.cat((row.prompt, row.answer))
            real[b, start:] = True
            where[b, width:] = row.look
        look = where[:, width:]
        try:
            logits = logits_at(
                self.model,
                ids.to(device),
                where.to(device),
                prompt_length=width,
                cfg_scale=self.sampler.cfg_scale,
                attention_mask=None if real.all() else real.to(device),
                whole=False,
            )
            tokens, confidence = self.sampler.candidates(
                logits,
                look,
                [row.step for row in batch],
                noise=SeededNoise(self.seed, [row.document for row in batch]),
                arch=arch,
            )
            tokens, confidence = tokens.cpu(), confidence.cpu()
        except torch.cuda.OutOfMemoryError:
            return False
        counts = torch.tensor([row.count for row in batch])
        write(ids[:, width:], look, tokens, most_confident(confidence, look, counts))
        for row, answer in zip(batch, ids[:, width:], strict=True):
            row.answer = answer.clone()
            row.n_forwards += self.passes
        return True

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
            saved = max(0, len(planned) - row.n_forwards)
        return Answer(
            ids=row.answer[: row.settled if stopped else self.gen_length].tolist(),
            n_written=int((row.answer != self.model.arch.mask_token_id).sum()),
            n_forwards=row.n_forwards,
            n_saved=saved,
        )

    def _room(self, rows: Sequence[Row], free: float) -> int:
        """`batch_size`, or how many rows of the greatest length keep the device busy and fit into `free` bytes."""
        if self.batch_size:
            return self.batch_size
        length = max(len(row.prompt) for row in rows) + self.gen_length
        busy = BUSY.get(self.model.device.type, BUSY["cpu"]) // length
        read = self.block_length or self.gen_length
        return max(1, int(min(busy, SHARE * free / row_bytes(self.model.arch, length, read))))


def free_memory(device: torch.device) -> float:
    """Bytes that a batch may take on a GPU; infinite elsewhere, where `BUSY` is reached long before."""
    if device.type != "cuda":
        return float("inf")
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return float(torch.cuda.mem_get_info(device)[0] + cached)


def row_bytes(arch: Architecture, length: int, read: int) -> int:
    """An upper estimate of what one sequence of `length` tokens needs while logits of `read` positions are ranked.

    The wide tensors of a block in float32, its attention mask, and eight numbers per logit (sorting, float64).
    """
    return length * (8 * arch.hidden_size + 4 * arch.mlp_size) * 4 + length**2 * 4 + read * arch.vocab_size * 32
