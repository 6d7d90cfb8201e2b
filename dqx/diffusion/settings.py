"""Checks of settings, which come from config files, so that their types are checked too.

Each returns problems in plain words.
"""

from __future__ import annotations

from collections.abc import Sequence


def number_problems(
    name: str, value: object, low: float, high: float = float("inf"), *, above: bool = False
) -> list[str]:
    """Problems of a real-valued setting that must lie in [low, high], or in (low, high] with `above`."""
    wanted = f"above {low:g}" if above else f"at least {low:g}"
    if high != float("inf"):
        wanted += f" and at most {high:g}"
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if good and low <= value <= high and not (above and value == low):  # type: ignore[operator]
        return []
    return [f"{name}={value!r} is not a number {wanted}"]


def count_problems(**values: object) -> list[str]:
    """Problems of settings that must be positive integers."""
    return [
        f"{name}={value!r} is not a positive integer"
        for name, value in values.items()
        if not isinstance(value, int) or isinstance(value, bool) or value < 1
    ]


def choice_problems(name: str, value: object, choices: Sequence[str]) -> list[str]:
    """Problems of a setting that must be one of `choices`."""
    return [] if value in choices else [f"{name}={value!r} is not one of {', '.join(choices)}"]
