"""Generation in batches with samplers that write block by block: the tokens of the plain loop, in less time.

The plain path is `BlockwiseSampler.generate`, one program after the other; here many programs run side by side, each at
its own place: one stores its prompt while another denoises its third block. What saves time, and changes no token:

- Final tokens are computed once and stored; a pass computes the new ones, over stores of different lengths.
- Rows whose passes are about as wide share a forward: padding on the right is seen by no token.
- A finished row frees its place for the next prompt, and a row stops as soon as what is settled ends its text.
- The head and the softmax run where a pass looks and nowhere else, and a step waits for the device once.
- Batches are as large as memory allows, and are halved when it was not enough; a step that failed left no trace.

Equal up to rounding: two probabilities closer than what a matrix product rounds could change places.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from dqx.common import accelerator
from dqx.common.problems import raise_if
from dqx.diffusion.batches import token_ids, too_long
from dqx.diffusion.engine import SHARE, Answer, Engine, Prompt, busy_tokens, cache_bytes, row_bytes
from dqx.diffusion.noise import Key
from dqx.diffusion.samplers.base import at_least_float32, fetched
from dqx.diffusion.samplers.blockwise import BlockwiseSampler, Writing, predicted
from dqx.models.commit_cache import CommitCache, Feed
from dqx.models.vocabulary import id_problems


@dataclass(eq=False)
class BlockRow:
    """A prompt under way, and what it took."""

    index: int
    document: Key | tuple[Key, ...]
    writing: Writing
    settled: int = 0
    n_forwards: int = 0
    n_tokens: int = 0

    @property
    def width(self) -> int:
        assert self.writing.due is not None
        return len(self.writing.due.ids)


class BlockEngine(Engine):
    """`Engine` for a `BlockwiseSampler`."""

    sampler: BlockwiseSampler

    def __post_init__(self) -> None:
        super().__post_init__()
        self._store: CommitCache | None = None
        self._rows: list[BlockRow] = []  # those that the store is of

    @torch.no_grad()
    def stream(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Answer]]:
        for i, prompt in enumerate(prompts):
            if not len(prompt.ids):
                raise ValueError(f"prompt {i} has no token; give at least one")
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].ids))
        waiting = deque(self.begin_row(i, prompts[i]) for i in order)
        largest, over = len(prompts), [0] * len(prompts)
        free = accelerator.free_memory(self.model.device)
        batch: list[BlockRow] = []
        self._store, self._rows, self._frames = None, [], self._watched()
        while waiting or batch:
            while waiting and len(batch) < min(largest, self.places([*batch, waiting[0]], free)):
                batch.append(waiting.popleft())
            if not self.advance(batch):
                if len(batch) == 1:
                    raise too_long(len(batch[0].writing.canvas), "shorter answers (gen_length)")
                largest = len(batch) // 2
                self.notes.append(f"out of memory with {len(batch)} sequences at a time; went on with {largest}")
                fresh = [self.begin_row(row.index, prompts[row.index]) for row in batch[largest:]]
                waiting.extendleft(reversed(fresh))  # what they had stored is given up with their places
                batch = batch[:largest]
                accelerator.empty_cache(self.model.device)
                continue
            going, passed = [], 0
            for row in batch:
                due = None if self._is_over(row) else row.writing.due
                now = self.steps if due is None else max(over[row.index], min(due.step, self.steps))
                passed, over[row.index] = passed + now - over[row.index], now
                if due is None:
                    yield row.index, self._answer(row)
                else:
                    going.append(row)
            batch = going
            if self.progress:
                self.progress(passed)
        self._store, self._rows = None, []

    def begin_row(self, index: int, prompt: Prompt) -> BlockRow:
        """A prompt before its first pass. Raises ValueError for what is no row of the model's token ids."""
        ids = token_ids(prompt.ids)
        raise_if(id_problems(ids, self.model.arch.vocab_size))
        arch = self.model.arch
        writing = self.sampler.begin(ids, gen_length=self.gen_length, steps=self.steps, arch=arch)
        return BlockRow(index, prompt.document, writing)

    def advance(self, batch: list[BlockRow]) -> bool:
        """One pass of every row. False, and nothing has changed: out of memory."""
        try:
            self._keep(batch)
            assert self._store is not None
            groups = alike(batch)
            parts = [self._found(rows) for rows in groups]
            tokens, confidence, *probability = fetched([found for found, _ in parts])
        except torch.OutOfMemoryError:
            return False
        for _, feed in parts:
            feed.commit()
        start, rows = 0, [row for rows in groups for row in rows]
        for row, place in zip(rows, [place for _, feed in parts for place in feed.starts], strict=True):
            due = row.writing.due
            assert due is not None
            stop = start + (0 if due.look is None else int(due.look.sum()))
            row.n_forwards += 1
            row.n_tokens += len(due.ids)
            row.writing.send((tokens[start:stop], confidence[start:stop]))
            if self._frames:
                first = place - row.writing.prompt
                self._frames.show(
                    row.index,
                    row.writing.answer,
                    predicted(due, row.writing),
                    probability[0][start:stop],
                    block=(first, first + len(due.ids)),
                    step=due.step,
                    forwards=row.n_forwards,
                )
            start = stop
        return True

    def _keep(self, batch: list[BlockRow]) -> None:
        """Make the store that of these rows, new ones with nothing stored; once they are not those it has."""
        if self._store is not None and batch == self._rows:
            return
        columns = max(len(row.writing.canvas) for row in batch)
        store = self.model.empty_store(len(batch), columns)
        old = self._store
        known = [(at, self._rows.index(row)) for at, row in enumerate(batch) if row in self._rows]
        if old is not None and known:
            kept = min(max(old.lengths[there] for _, there in known), columns)
            to, there = (torch.tensor(list(index), device=store.store.device) for index in zip(*known, strict=True))
            store.store[:, :, to, :, :kept] = old.store[:, :, there, :, :kept]
            for at, before in known:
                store.lengths[at] = old.lengths[before]
        self._store, self._rows = store, list(batch)

    def _found(self, rows: list[BlockRow]) -> tuple[tuple[Tensor, ...], Feed]:
        """What rows find where they look, on the device; their keys and values are written behind what is stored."""
        assert self._store is not None
        arch, device = self.model.arch, self.model.device
        due = [row.writing.due for row in rows]
        passes = [one for one in due if one is not None]
        width = max(len(one.ids) for one in passes)
        ids = torch.stack([F.pad(one.ids, (0, width - len(one.ids)), value=arch.eos_token_id) for one in passes])
        real = torch.arange(width) < torch.tensor([len(one.ids) for one in passes])[:, None]
        look = torch.zeros(ids.shape, dtype=torch.bool)
        for b, one in enumerate(passes):
            if one.look is not None:
                look[b, : len(one.ids)] = one.look
        places = [self._rows.index(row) for row in rows]
        for place, one in zip(places, passes, strict=True):
            if one.keep is not None:
                self._store.lengths[place] = one.keep
        feed = self._store.feed(
            real, [one.attention for one in passes], [one.stored for one in passes], places, [one.at for one in passes]
        )
        logits = at_least_float32(self.model.head_rows(ids.to(device), look, feed))
        where = pad_sequence([predicted(one, row.writing) for one, row in zip(passes, rows, strict=True)], True)
        return self._candidates(logits, where, [one.step for one in passes], [row.document for row in rows]), feed

    def _is_over(self, row: BlockRow) -> bool:
        """Whether what is written ends the row's text."""
        answer = row.writing.answer[: self.gen_length]
        masks = (answer == self.model.arch.mask_token_id).nonzero()
        written = int(masks[0]) if len(masks) else len(answer)
        if self.settled is None or written == row.settled:
            return False
        row.settled = written
        return self.settled(answer[:written].tolist())

    def _answer(self, row: BlockRow) -> Answer:
        answer = row.writing.answer
        mask = self.model.arch.mask_token_id
        stopped = row.writing.due is not None
        ids = answer[: row.settled if stopped else self.gen_length].tolist()
        return Answer(
            ids=ids[: ids.index(mask)] if mask in ids else ids,
            n_written=int((answer != mask).sum()),
            n_forwards=row.n_forwards,
            n_tokens=row.n_tokens,
            n_saved=0,
        )

    def places(self, rows: Sequence[BlockRow], free: float) -> int:
        """`batch_size`, or how many rows of the greatest length keep the device busy and fit into `free` bytes."""
        if self.batch_size:
            return self.batch_size
        arch, length = self.model.arch, max(len(row.writing.canvas) for row in rows)
        block = arch.block_length or 1
        needed = row_bytes(arch, length, block) + cache_bytes(arch, length, self.model.dtype.itemsize)
        busy = busy_tokens(self.model.device.type) // block
        return max(1, int(min(busy, SHARE * free / needed)))


def alike(rows: Sequence[BlockRow]) -> list[list[BlockRow]]:
    """Rows whose passes are about as wide, within a factor of two, widest first."""
    groups: list[list[BlockRow]] = []
    for row in sorted(rows, key=lambda row: -row.width):
        if groups and 2 * row.width >= groups[-1][0].width:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def engine_for(sampler: object) -> type[Engine]:
    """The engine that runs a sampler."""
    return BlockEngine if isinstance(sampler, BlockwiseSampler) else Engine
