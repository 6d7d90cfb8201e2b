"""An exported file beside the model it was made from: weights and logits.

Weights are read by the format's own library and compared to the bit. Logits are those of an engine, where one is here,
on windows of the bundled text with masks, beside those of the simulation.

Shapes: B windows, T tokens, n positions, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dqx.api import DiffusionLM
from dqx.common.problems import ConfigProblems
from dqx.diagnostics.fidelity import RATIOS, order, windows
from dqx.export.readers import format_of

LENGTH = 64  # tokens of a window; one for each mask ratio


@dataclass(frozen=True)
class Agreement:
    """Logits of an engine beside the simulation's, over some positions; KL(simulation || engine) in nats."""

    masked: str
    positions: int
    same: int  # most probable tokens
    mean_kl: float
    median_kl: float
    max_kl: float
    largest: float  # difference of two logits


@dataclass
class Verification:
    """What was compared, what differs, and what could not be looked at."""

    format: str
    kinds: Counter[str] = field(default_factory=Counter)  # tensors, by how they are stored
    different: list[str] = field(default_factory=list)
    logits: list[Agreement] = field(default_factory=list)
    engine: str = ""
    unchecked: list[str] = field(default_factory=list)


def verify(file: str | Path, lm: DiffusionLM) -> Verification:
    """Compare a file with the model it was made from. Raises ValueError for a path that is no exported file."""
    path = Path(file).expanduser()
    found = Verification(format_of(path))
    name = found.format.replace("-", "_")
    try:
        reader: Any = import_module(f"dqx.export.readers.{name}")
        _weights(found, reader, lm, path)
    except ModuleNotFoundError as missing:
        found.unchecked.append(f"weights: the package {missing.name} is missing; pip install 'dqx[export]'")
        return found
    except ValueError as damage:
        found.different.append(str(damage))
        return found
    if not found.different:
        _logits(found, reader, lm, path)
    else:
        found.unchecked.append("logits: they would be those of another model")
    return found


def _weights(found: Verification, reader: Any, lm: DiffusionLM, path: Path) -> None:
    for pair in reader.tensors(lm, path):
        found.kinds[pair.kind] += 1
        if pair.difference:
            found.different.append(f"{pair.name}: {pair.difference}")
    if hasattr(reader, "metadata"):
        keys = reader.metadata(lm, path)
        found.different += [f"{key}: not what dqx writes for this model" for key in keys]


def _logits(found: Verification, reader: Any, lm: DiffusionLM, path: Path) -> None:
    try:
        model = reader.model(lm, path)
    except ConfigProblems as problems:
        found.unchecked += [f"logits: {problem}" for problem in problems.problems]
        return
    found.engine, ids = reader.ENGINE, masked_windows(lm)
    ours, theirs = (torch.cat([each(row[None]).float().cpu() for row in ids]) for each in (lm.logits, model))
    found.logits = [agreement(f"{r:.0%}", a, b) for r, a, b in zip(RATIOS, ours, theirs, strict=True)]
    found.logits.append(agreement("all", ours.flatten(0, 1), theirs.flatten(0, 1)))


def masked_windows(lm: DiffusionLM) -> Tensor:
    """Ids [5, 64] of the bundled text, a window for each mask ratio, masks drawn by the window's number alone."""
    ids = windows(lm.tokenizer, len(RATIOS), LENGTH)
    for i, ratio in enumerate(RATIOS):
        ids[i, order(LENGTH, 0, i, f"{ratio:g}")[: round(ratio * LENGTH)]] = lm.model.arch.mask_token_id
    return ids


def agreement(masked: str, ours: Tensor, theirs: Tensor) -> Agreement:
    """Of logits [n, V]."""
    p, q = ours.double().log_softmax(-1), theirs.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).clamp(min=0)
    same = int((ours.argmax(-1) == theirs.argmax(-1)).sum())
    largest = (ours - theirs).abs().max().item()
    return Agreement(masked, len(ours), same, kl.mean().item(), kl.median().item(), kl.max().item(), largest)
