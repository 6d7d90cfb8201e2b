"""Calibration: text -> token windows. What of them is masked is decided in `dqx/data/masking.py`.

Two ways of drawing windows, as the reference implementations do: `stream` texts (WikiText-2 in GPTQ's code) are
joined and cut at random places; `documents` texts (the Pile in AWQ's code) are visited in random order, joined and
cut one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dqx.data.texts import TextSource, find_text, load_texts, separator_ids, text_problems, token_stream
from dqx.diffusion.noise import generator
from dqx.models.vocabulary import text_ids


@dataclass(frozen=True)
class CalibBatch:
    """`ids` [B, T] int64 as the model sees them, and the share of masked tokens of each row `mask_ratio` [B].

    `committed` [B, T]: of states on a sampler's way, the share of the steps that have passed when each token is
    written, 0 at the first; -1 for tokens that are given. None where there is no such way, or nobody has asked.
    `passes` [B, 4, T]: of the passes of a sampler with a store, laid side by side, who sees whom
    (`dqx.models.layout.Passes`). None: the tokens are a text, attention is the architecture's own.
    """

    ids: Tensor
    mask_ratio: Tensor
    committed: Tensor | None = None
    passes: Tensor | None = None


class CalibSettings(Protocol):
    """The fields of the `calib` config group that this module reads."""

    text: str
    config: str | None
    split: str | None
    field: str
    samples: int
    length: int


def source(calib: CalibSettings, data_root: str | None = None) -> TextSource:
    """The text that `calib.text` names: a registered name, a local file, or a dataset id (under `data_root` if set)."""
    return find_text(calib.text, config=calib.config, split=calib.split, field=calib.field, data_root=data_root)


def calib_problems(calib: CalibSettings, data_root: str | None = None) -> list[str]:
    """What config alone can tell is wrong with the calibration text."""
    return text_problems(calib.text, source(calib, data_root), data_root)


def windows(text: TextSource, tokenizer: Any, samples: int, length: int, seed: int) -> Tensor:
    """[samples, length] token ids drawn from the text with `seed`, wherever it lies.

    Raises ValueError where the text is too short for a single window.
    """
    noise = generator(seed, "calib", Path(text.path).name)
    if not text.documents:
        ids = torch.tensor(token_stream(text, tokenizer))
        _long_enough(text, len(ids), length)
        starts = torch.randint(0, len(ids) - length + 1, (samples,), generator=noise)
        return torch.stack([ids[s : s + length] for s in starts.tolist()])
    rows = load_texts(text)
    gap = separator_ids(text, tokenizer)
    stream: list[int] = []
    while len(stream) < samples * length:
        before = len(stream)
        for i in torch.randperm(len(rows), generator=noise).tolist():
            stream += text_ids(tokenizer, rows[i].strip()) + gap
            if len(stream) >= samples * length:
                break
        _long_enough(text, len(stream) - before, length if len(stream) < samples * length else 1)
    return torch.tensor(stream[: samples * length]).view(samples, length)


def _long_enough(text: TextSource, tokens: int, length: int) -> None:
    if tokens < length:
        raise ValueError(
            f"{text.path} has only {tokens} tokens, fewer than one window of calib.length={length}; choose less"
        )


def calibration_windows(calib: CalibSettings, tokenizer: Any, *, seed: int, data_root: str | None = None) -> Tensor:
    """The text that `calib` names as `calib.samples` windows of `calib.length` tokens [N, T], fully visible."""
    return windows(source(calib, data_root), tokenizer, calib.samples, calib.length, seed)
