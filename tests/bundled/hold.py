"""Activation outliers that a network is trained with: put into the initialisation and held in place at every step.

Large language models grow a few residual channels that are huge for all tokens, and massive activations at the
input of `down` for a few delimiter tokens. A small network does not, so they are put there on purpose:

- two *steady* channels get a large constant from the embedding of every token. Nothing writes into them, the norm
  gains keep their ratio to the other channels, and the columns of q, k, v, gate and up that read them keep an
  ordinary size. The two columns cancel each other in exact arithmetic, so training is not hampered, but they
  are there to be rounded, and channel scaling cannot make them small.
- where keys are normalised head by head, the gain of one pair of their channels is large, that of the queries' small
  by as much: scores stay as they are, keys get outlier channels.
- one *delimiter* channel is huge for the newline token only. In some blocks a few MLP units read it strongly, so
  `silu(gate) * up` is massive at the newline, at the input of `down`, and nowhere else.

Everything else is trained around these entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dqx.models.transformer import MaskedDiffusionTransformer


@dataclass(frozen=True)
class OutlierPlan:
    """Sizes of what is put in; channels are residual channels, units are MLP units."""

    steady: tuple[tuple[int, float], tuple[int, float]] = ((41, 96.0), (170, -64.0))
    steady_gain: float = 3.0  # norm gain of the steady channels
    steady_columns: float = 1.0  # size of the first steady channel's columns, in units of an ordinary column
    delimiter: tuple[int, float] = (99, 200.0)
    massive_blocks: tuple[int, ...] = (0, 1)
    massive_units: tuple[tuple[int, float, float], ...] = ((37, 1.8, 2.4), (301, 1.5, -2.0))  # unit, gate, up
    key_pair: tuple[int, float] = (27, 12.0)  # the first channel of a pair that rope turns together, and its gain
    massive_columns: float = 0.25  # size of down's columns at these units, in units of an ordinary column


class Held:
    """Entries of the parameters that must not change. `grads()` before the optimiser's step, `restore()` after."""

    def __init__(self, model: MaskedDiffusionTransformer):
        self.parameters = dict(model.named_parameters())
        self.masks: dict[str, Tensor] = {}
        self.values: dict[str, Tensor] = {}

    def put(self, name: str, index: tuple[slice | int | Tensor, ...], value: Tensor | float) -> None:
        """Set `parameter[index] = value` and hold it there."""
        p = self.parameters[name]
        mask = self.masks.setdefault(name, torch.zeros_like(p, dtype=torch.bool))
        with torch.no_grad():
            p[index] = value
        mask[index] = True
        self.values[name] = p.detach().clone()

    @torch.no_grad()
    def grads(self) -> None:
        """Zero the gradients of held entries, so that they do not count in gradient clipping."""
        for name, mask in self.masks.items():
            grad = self.parameters[name].grad
            if grad is not None:
                grad.masked_fill_(mask, 0.0)

    @torch.no_grad()
    def restore(self) -> None:
        """Undo what weight decay or momentum did to held entries."""
        for name, mask in self.masks.items():
            p = self.parameters[name]
            p.copy_(torch.where(mask, self.values[name], p))


def plant(model: MaskedDiffusionTransformer, plan: OutlierPlan, delimiter_id: int, generator: torch.Generator) -> Held:
    """Put the outliers of `plan` into a freshly initialised model; returns the entries to hold."""
    held = Held(model)
    size = model.arch.hidden_size
    (first, high), (second, low) = plan.steady
    special, peak = plan.delimiter
    channels = torch.tensor([first, second, special])
    every = slice(None)
    # the root mean square of a residual row that holds only the steady channels: gains undo it for normal channels
    scale = ((high**2 + low**2) / size) ** 0.5

    held.put("embed.weight", (every, channels), torch.tensor([high, low, 0.0]))
    held.put("embed.weight", (delimiter_id, special), peak)
    held.put("head.weight", (every, channels), 0.0)
    for name, p in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            pair, gain = torch.tensor([plan.key_pair[0], plan.key_pair[0] + len(p) // 2]), plan.key_pair[1]
            held.put(name, (pair,), gain if name.endswith("k_norm.weight") else 1 / gain)
        elif name.endswith("norm.weight"):
            held.put(name, (every,), scale)
            held.put(name, (channels,), torch.tensor([plan.steady_gain, plan.steady_gain, 1.0]))
        elif name.endswith(("o.weight", "down.weight")):
            held.put(name, (channels,), 0.0)
        elif name.endswith(tuple(f".{role}.weight" for role in ("q", "k", "v", "gate", "up"))):
            ordinary = p.shape[1] ** -0.5
            column = torch.randn(p.shape[0], generator=generator) * ordinary * plan.steady_columns
            held.put(name, (every, first), column)
            held.put(name, (every, second), -column * high / low)
            held.put(name, (every, special), torch.randn(p.shape[0], generator=generator) * ordinary)
    for i in plan.massive_blocks:
        for unit, gate, up in plan.massive_units:
            held.put(f"blocks.{i}.gate.weight", (unit, special), gate)
            held.put(f"blocks.{i}.up.weight", (unit, special), up)
            down = held.parameters[f"blocks.{i}.down.weight"].detach()[:, unit] * plan.massive_columns
            held.put(f"blocks.{i}.down.weight", (every, unit), down)
    return held
