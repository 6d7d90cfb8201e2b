"""Mistakes in what somebody has set, told all at once in plain words."""

from __future__ import annotations

from collections.abc import Sequence


class ConfigProblems(ValueError):
    """Settings that cannot be used: every problem found, each in plain words with its remedy."""

    def __init__(self, problems: Sequence[str]):
        self.problems = list(problems)
        numbered = [f"{i}. {p}" for i, p in enumerate(self.problems, 1)]
        super().__init__("\n".join(self.problems if len(self.problems) == 1 else numbered))


def raise_if(problems: Sequence[str]) -> None:
    """Raise ConfigProblems with all problems at once, if there are any."""
    if problems:
        raise ConfigProblems(problems)
