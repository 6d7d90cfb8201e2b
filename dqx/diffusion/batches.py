"""Masked sequences of many requests, put together to go through the model: each once, longest first, in batches.

A group holds what requests with one prefix and one target length need, a batch the rows of consecutive groups. Both
follow from the tokens alone. Shorter sequences of a batch are padded on the right.

Shapes: P prefix, L target, T = P + L, U different sequences of a group, D pairs of a request and a state of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b

import torch
from torch import Tensor

from dqx.common import accelerator
from dqx.diffusion.noise import Key
from dqx.models.transformer import Architecture, MaskedDiffusionTransformer

#: Tokens of a batch: on the CPU, where larger ones gain nothing, and the most on a GPU.
CPU_TOKENS = 768
GPU_TOKENS = 16384


#: Token ids in a row, as a list or as a tensor [T] on any device.
TokenIds = Sequence[int] | Tensor
#: A request's index, and which of its pieces it is.
Name = tuple[int, int]


def token_ids(ids: TokenIds) -> Tensor:
    """Token ids [T] as int64 on the CPU. Raises ValueError for anything but whole numbers in a row."""
    try:
        row = torch.as_tensor(ids, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"token ids are whole numbers in a row; got {type(ids).__name__} ({error})") from error
    if row.dim() != 1 or (len(row) and (row.is_floating_point() or row.dtype == torch.bool)):
        raise ValueError(f"token ids are whole numbers in a row; got {row.dtype} of shape {list(row.shape)}")
    return row.long()


@dataclass(frozen=True, init=False)
class Request:
    """A target [L] after a prefix [P], on the CPU, and the name of its noise; see `likelihood.log_likelihood`."""

    prefix: Tensor
    target: Tensor
    key: tuple[Key, ...]

    def __init__(self, prefix: TokenIds, target: TokenIds, key: tuple[Key, ...] = ()):
        for name, value in (("prefix", token_ids(prefix)), ("target", token_ids(target)), ("key", key)):
            object.__setattr__(self, name, value)

    @property
    def length(self) -> int:
        return len(self.prefix) + len(self.target)


@dataclass(frozen=True)
class Piece:
    """Tokens of a target that are scored together: all, or those of one term of its likelihood (`factorization.py`).

    The tokens of `target` [L] follow `prefix` [P]; `key` names their noise. Where the model writes block by block, what
    is before `start` is final. Of the target those tokens are scored that a state masks; with `by_final` [L] instead
    those that it marks, which final tokens predict; the last one is.
    """

    prefix: Tensor
    target: Tensor
    key: tuple[Key, ...]
    start: int = 0
    by_final: Tensor | None = None

    @property
    def length(self) -> int:
        return len(self.prefix) + len(self.target)

    @property
    def text(self) -> Tensor:
        """What is final: before `start`, or up to what predicts the last token."""
        return self.prefix[: self.start] if self.by_final is None else torch.cat((self.prefix, self.target[:-1]))

    @property
    def alike(self) -> tuple[int, int, bytes, bytes]:
        """What pieces that share sequences have in common, and their order."""
        if self.by_final is not None:
            return -self.length, len(self.target), digest_of(self.text), self.by_final.numpy().tobytes()
        # a text has hundreds of pieces
        before = digest_of(self.prefix) if self.start else self.prefix.numpy().tobytes()
        return -self.length, len(self.target), before, b""


def digest_of(ids: Tensor) -> bytes:
    """16 bytes that tell rows of token ids apart."""
    return blake2b(ids.numpy().tobytes(), digest_size=16).digest()


@dataclass
class SequenceGroup:
    """The sequences that pieces with one prefix and targets of one length need, each once.

    `rows` [U, L] are the targets with masks, `wanted` [U, L] the positions whose logits are needed. Pair d reads
    sequence `row[d]` (rising), and scores its own `tokens` [D, L] where `scored` [D, L].
    """

    piece: Piece  # any of them
    rows: Tensor
    wanted: Tensor
    row: Tensor
    scored: Tensor
    tokens: Tensor
    pairs: dict[Name, Tensor]  # of each piece, in the order of its states
    log_probs: Tensor = field(init=False)  # [D], summed over the scored tokens of a pair

    def __post_init__(self) -> None:
        self.log_probs = torch.zeros(len(self.row), dtype=torch.float64)

    @property
    def prefix(self) -> Tensor:
        return self.piece.prefix

    @property
    def length(self) -> int:
        return self.piece.length


@dataclass(frozen=True)
class Part:
    """Rows [start, stop) of a group; those of equal `line` share a text (`block_rows.py`)."""

    group: SequenceGroup
    start: int
    stop: int
    line: int = 0

    def __len__(self) -> int:
        return self.stop - self.start


#: A piece with its name, and the masks [S, L] of the states it needs.
Needed = tuple[Name, Piece, Tensor]


def group(needed: Sequence[Needed], mask_token_id: int) -> SequenceGroup:
    """The group of pieces that are alike."""
    masked = torch.cat([masks for _, _, masks in needed])
    tokens = torch.cat([piece.target.expand(len(masks), -1) for _, piece, masks in needed])
    rows, row = tokens.masked_fill(masked, mask_token_id).unique(dim=0, return_inverse=True)
    by_final = needed[0][1].by_final
    scored = (masked if by_final is None else by_final) & (tokens != mask_token_id)
    order = row.argsort(stable=True)
    pairs = order.argsort().split([len(masks) for _, _, masks in needed])
    return SequenceGroup(
        piece=needed[0][1],
        rows=rows,
        wanted=torch.zeros(rows.shape, dtype=torch.long).index_add_(0, row, scored.long()) > 0,
        row=row[order],
        scored=scored[order],
        tokens=tokens[order],
        pairs={name: own for (name, _, _), own in zip(needed, pairs, strict=True)},
    )


def batches(groups: Iterable[SequenceGroup], tokens: Callable[[], int]) -> Iterator[list[Part]]:
    """Rows of consecutive groups: as many as have at most `tokens()` if all are as long as the first; one at least.

    A batch that is half full ends where the length changes, so that most need no padding.
    """
    batch: list[Part] = []
    size = room = 0
    for group in groups:
        if batch and group.length < batch[0].group.length and 2 * room <= size:
            yield batch
            batch = []
        start = 0
        while start < len(group.rows):
            if not batch:
                size = room = max(1, tokens() // group.length)
            part = Part(group, start, min(start + room, len(group.rows)))
            batch.append(part)
            start = part.stop
            room -= len(part)
            if not room:
                yield batch
                batch = []
    if batch:
        yield batch


def halves(batch: Sequence[Part]) -> tuple[list[Part], list[Part]]:
    """A batch of two or more rows cut in the middle."""
    left: list[Part] = []
    right: list[Part] = []
    room = sum(map(len, batch)) // 2
    for part in batch:
        cut = part.start + min(room, len(part))
        room -= cut - part.start
        left += [replace(part, stop=cut)] if cut > part.start else []
        right += [replace(part, start=cut)] if part.stop > cut else []
    return left, right


def too_long(length: int, *choices: str) -> torch.OutOfMemoryError:
    """The error where not even one sequence fits, with what to change."""
    error = torch.OutOfMemoryError(f"one sequence of {length} tokens does not fit into memory")
    error.add_note(f"choose {', '.join((*choices, 'a smaller model.dtype'))}, or a device with more memory")
    return error


def default_batch_tokens(
    model: MaskedDiffusionTransformer, requests: Sequence[Request], widest: int | None = None
) -> int:
    """Tokens of a batch that fit into two thirds of the GPU's free memory, at most GPU_TOKENS; CPU_TOKENS elsewhere.

    Sequences are as long as requests, or have up to `widest` tokens, of which all may be scored.
    """
    if model.device.type == "cpu" or not requests:
        return CPU_TOKENS
    free = accelerator.free_memory(model.device)
    longest = widest or max(request.length for request in requests)
    share = 1.0 if widest else max(len(request.target) / max(1, request.length) for request in requests)
    per_token = token_bytes(model.arch, model.embed.weight.element_size(), longest, share)
    return max(1, min(GPU_TOKENS, int(free * 2 / 3) // per_token))


def token_bytes(arch: Architecture, size: int, length: int, share: float) -> int:
    """What a token of a sequence needs in a batch, with numbers of `size` bytes.

    A dozen vectors of the hidden width and four of the MLP's, a row of the attention mask, and, for the share of target
    tokens, logits in the model's type and twice in float32.
    """
    per_token = size * (12 * arch.hidden_size + 4 * arch.mlp_size + 2 * length)
    return per_token + int(share * arch.vocab_size * (size + 8))
