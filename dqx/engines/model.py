"""An engine in the place of a model: samplers, likelihoods and tasks ask it for logits and for nothing else.

Shapes: B batch, T tokens, n positions asked for, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dqx.common.problems import ConfigProblems
from dqx.diffusion.samplers import Sampler
from dqx.models.architecture import Architecture
from dqx.models.kv_cache import KVCache
from dqx.models.layout import Layout
from dqx.models.transformer import MaskedDiffusionTransformer, shift_logits


class Engine(Protocol):
    """What computes logits from a file."""

    file: Path

    def described(self) -> str:
        """The engine with its version, and the file with its digest."""

    def rows(self, ids: Tensor) -> Tensor:
        """The head's output [T, V], float32, for the token ids [T] of one sequence."""


class EngineModel(MaskedDiffusionTransformer):
    """A model without weights whose logits an engine computes, on the CPU and in float32.

    Sequences go through the engine one by one and without their padding. What needs more than logits (caches of keys
    and values, activations) raises ConfigProblems.
    """

    def __init__(self, arch: Architecture, engine: Engine):
        with torch.device("meta"):
            super().__init__(arch)
        self.engine = engine

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def _predictions(self, ids: Tensor, attention_mask: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each sequence, the columns of its tokens and the logits [., V] that predict them."""
        for b, row in enumerate(ids):
            real = torch.ones_like(row) if attention_mask is None else attention_mask[b]
            columns = real.bool().nonzero()[:, 0]
            logits = self.engine.rows(row[columns])
            yield columns, shift_logits(logits[None])[0] if self.arch.logit_shift else logits

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None, layout: Layout | None = None) -> Tensor:
        """Logits [B, T, V] for ids [B, T]; row i predicts token i. Those of padding are 0."""
        if layout is not None:
            raise _logits_alone()
        out = torch.zeros(*ids.shape, self.arch.vocab_size)
        for b, (columns, logits) in enumerate(self._predictions(ids, attention_mask)):
            out[b, columns] = logits
        return out

    def logits_where(
        self, ids: Tensor, where: Tensor, attention_mask: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Logits [n, V] of the positions marked in `where` [B, T], row by row."""
        if cache is not None:
            raise _logits_alone()
        asked = (
            logits[where[b, columns]] for b, (columns, logits) in enumerate(self._predictions(ids, attention_mask))
        )
        return torch.cat(list(asked))

    def residual_states(self, *_: Any, **__: Any) -> Iterator[Tensor]:
        raise _logits_alone()

    def empty_cache(self, rows: int, length: int) -> KVCache:
        raise _logits_alone()


def engine_problems(sampler: Sampler) -> list[str]:
    """Why an engine cannot serve a sampler, or none."""
    if not (sampler.has_cache or sampler.stores_final):
        return []
    return [f"model.sampler: {sampler.name} keeps keys and values, and an engine gives none; leave out its cache"]


def _logits_alone() -> ConfigProblems:
    return ConfigProblems(["an engine gives logits of whole sequences and nothing else: no activations, no caches"])
