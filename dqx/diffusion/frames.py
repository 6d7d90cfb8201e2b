"""An answer as it is written: a frame after every forward, for whoever wants to watch.

Frames are made beside the engine and change nothing in it: with and without them, tokens are equal to the bit. How sure
a token was is the same number for every sampler, whatever the sampler ranks by: the probability that the model gave it
where it was written, from the logits as they were before temperature, filters and suppressed tokens.

Shapes: G tokens of an answer, n of these that a forward predicts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Frame:
    """The answer to a prompt after one more forward. Positions are those of the answer, from 0."""

    index: int  # of the prompt, in the order in which prompts were given
    ids: list[int]  # [G], the mask token where none is written
    #: [G], of each token where it was written; None where a mask is, and where the sampler put a token of its own.
    probability: list[float | None]
    committed: list[int]  # positions that hold another token than one frame before, in ascending order
    remasked: list[int]  # positions that held a token one frame before and hold a mask
    block: tuple[int, int]  # the tokens [first, stop) that the forward was about; empty where it stored the prompt
    step: int  # the denoising step that it belongs to, from 0
    forwards: int  # sequences that went through the model for this answer until now


OnFrame = Callable[[Frame], object]


class Frames:
    """Makes the frames of many answers of `gen_length` tokens, one after the other, and hands them to `on_frame`."""

    def __init__(self, on_frame: OnFrame, gen_length: int, mask_token_id: int):
        self.on_frame, self.gen_length, self.mask_token_id = on_frame, gen_length, mask_token_id
        self._last: dict[int, tuple[list[int], list[float | None]]] = {}

    def show(
        self,
        index: int,
        answer: Tensor,
        where: Tensor,
        probability: Tensor,
        *,
        block: tuple[int, int],
        step: int,
        forwards: int,
    ) -> None:
        """The frame of prompt `index` with its `answer` after a forward.

        The forward was about the tokens of `block`; it predicted those marked in `where`, as long as `answer`, of which
        the model gave those it chose this `probability` [n].
        """
        mask = self.mask_token_id
        ids = [*answer.tolist(), *[mask] * self.gen_length][
            : self.gen_length
        ]  # a sampler may stop a little short of it
        predicted = dict(zip(where.nonzero()[:, 0].tolist(), probability.tolist(), strict=True))
        before, sure = self._last.get(index, ([mask] * len(ids), [None] * len(ids)))
        changed = [i for i in range(len(ids)) if ids[i] != before[i]]
        sure = list(sure)
        for i in changed:
            sure[i] = None if ids[i] == mask else predicted.get(i)
        self._last[index] = ids, sure
        first, stop = (min(max(0, edge), len(ids)) for edge in block)
        self.on_frame(
            Frame(
                index=index,
                ids=ids,
                probability=sure,
                committed=[i for i in changed if ids[i] != mask],
                remasked=[i for i in changed if ids[i] == mask],
                block=(first, stop),
                step=step,
                forwards=forwards,
            )
        )
