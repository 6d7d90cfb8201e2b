"""Numbers and texts of a record as people read them."""

from __future__ import annotations

import re

from dqx.evaluate.spec import NLL

#: Control characters but for tab and newline, separators of lines, marks of direction, halves of surrogate pairs.
UNSEEN = re.compile(
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u061c\\u200b-\\u200f\\u2028-\\u202e\\u2060-\\u2069\\ufeff\\ud800-\\udfff]"
)


def value(score: float, metric: str | None) -> str:
    """A score in percent, or in nats per token with three digits after the point."""
    return f"{score:.3f}" if metric == NLL else f"{100 * score:.1f}"


def difference(fraction: float, metric: str | None) -> str:
    """A difference of scores in points or nats, always signed except for zero."""
    if metric != NLL:
        return points(fraction)
    text = f"{fraction:+.3f}"
    return "0.000" if text in ("+0.000", "-0.000") else text


def points(fraction: float) -> str:
    """A difference of fractions in percentage points, always signed except for zero."""
    text = f"{100 * fraction:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text


def short(value: float) -> str:
    """Three significant digits, without an exponent where that stays short."""
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def visible(text: str) -> str:
    """Text of models and files as it may be shown: what steers a terminal or turns the direction of writing is escaped.

    Lines and tabs stay; control characters, marks of direction and halves of surrogate pairs become `\\x1b`, `\\u202e`.
    """
    return UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)
