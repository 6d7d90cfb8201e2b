"""Names for people: in a row, the nearest to a mistyped one, numbers in names sorted as numbers, labels."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

SHOWN = 4  # so many names are offered at the most


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """The known names that a mistyped one may stand for, best first; capitals and the kind of dash do not count.

    Those of which it is a part, such as four models for `llada`; else those that are spelled much alike.
    """
    spelled = {other: _spelled(other) for other in known}
    wanted = _spelled(name)
    same = [other for other, text in spelled.items() if text == wanted]
    whole = [other for other, text in spelled.items() if len(wanted) > 2 and wanted in text]
    close = difflib.get_close_matches(wanted, spelled.values(), n=2, cutoff=0.6)
    alike = sorted((other for other, text in spelled.items() if text in close), key=lambda o: close.index(spelled[o]))
    return (same or whole or alike)[:SHOWN]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The nearest of the known names, or all of them where none is near."""
    names = list(known)
    if near := nearest(name, names):
        return f"did you mean {alternatives(near)}?"
    return f"there are {', '.join(names)}" if names else "there are none"


def _spelled(name: str) -> str:
    return re.sub(r"[-.\s]", "_", name.casefold())


def alternatives(names: Sequence[str]) -> str:
    """`a`, `a or b`, `a, b or c`."""
    return f"{', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else "".join(names)


def enumerated(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else "".join(names)


def natural(name: str) -> list[tuple[int, str]]:
    """Sort key by which s64 comes before s128."""
    return [(int(t), "") if t.isdigit() else (-1, t) for t in re.split(r"(\d+)", name)]


def method_label(name: str | None, variant: str | None) -> str:
    """A method in tables and folder names: `gptq`, or `gptq_as_published` where it is a variant."""
    return f"{name}_{variant}" if variant else str(name)


def approximations(threshold: float | None, cache: str | None) -> tuple[str, ...]:
    """What makes a sampler approximate, in its name and in folder names: `threshold0.9`, `dual_cache`."""
    parts = (
        None if threshold is None else f"threshold{threshold}",
        None if cache is None else f"{cache}_cache",
    )
    return tuple(part for part in parts if part)


def approximating(sampler: Mapping[str, Any]) -> tuple[float | None, str | None]:
    """Threshold and cache of a sampler's settings, where they make it approximate.

    A threshold does where the sampler may do without: then it stands beside a `cache`. Others have one of their own.
    """
    return (sampler.get("threshold"), sampler.get("cache")) if "cache" in sampler else (None, None)
