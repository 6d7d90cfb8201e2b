"""How tasks are evaluated, beyond each task's own settings. Nothing heavy is imported here (`spec.py`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass
class LikelihoodSettings:
    """How likelihoods are estimated. The default is the plain estimate from all draws, as the study takes it."""

    exact: bool = False  # the expectation itself where an answer has no more mask states than there are draws
    adaptive: bool = False  # draw only until a question is decided (dqx/diffusion/stopping.py)
    error_level: float = 0.01  # adaptive: probability of deciding a question early for a choice that is not the best
    batch_tokens: int | None = None  # tokens through the model together; speed only; None: by device and memory

    def deciding(self) -> dict[str, Any]:
        """The settings that a result depends on by more than rounding."""
        return {"exact": self.exact, "error_level": self.error_level if self.adaptive else None}

    def problems(self) -> Iterator[str]:
        if not 0 < self.error_level < 1:
            yield f"likelihood.error_level={self.error_level} must be a probability above 0 and below 1"
        if self.batch_tokens is not None and self.batch_tokens < 1:
            yield f"likelihood.batch_tokens={self.batch_tokens} must be 1 or more"


@dataclass(frozen=True)
class EvaluationSettings:
    """What all tasks of an evaluation have in common."""

    limit: int | None = None  # documents of a task (of a group from its members in turn), windows of a text; None: all
    steps: int | None = None  # denoising steps of the generation tasks, in place of their own
    seed: int = 0
    data_root: str | None = None  # a folder with copies of the datasets in the hub's layout; None: the hub
    chat: bool = False  # prompts go through the tokenizer's chat template
    progress: bool = True  # whether bars are drawn
    likelihood: LikelihoodSettings = field(default_factory=LikelihoodSettings)
