"""What the statistics say, in short: a row per site, and plain sentences about which outliers sit where."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

from dqx.activations.stats import OutlierStats, PartStats, SiteStats
from dqx.models.transformer import SITES

LISTED = 6  # channels or tokens named in a sentence


def summary(stats: OutlierStats) -> list[dict[str, Any]]:
    """Per site the block with the largest value, in short."""
    rows = []
    for site in SITES:
        worst = stats.worst(site)
        rows.append(
            {
                "site": site,
                "block": worst.block,
                "abs_max": worst.abs_max,
                "median": worst.median,
                "max_over_median": worst.max_over_median,
                "kurtosis": worst.kurtosis,
                "outlier_channels": worst.outlier_channels,
                "channels": worst.channels,
                "massive_values": worst.massive_values,
                "massive_token_share": worst.massive_token_share,
                "relative_values": worst.relative_values,
                "relative_token_share": worst.relative_token_share,
                "not_finite": worst.not_finite,
            }
        )
    return rows


def findings(stats: OutlierStats) -> list[str]:
    """Sentences: which values are massive, at which layers, channels and tokens; which channels are outliers, where.

    Layers where the same channels stand out, for massive values on the same tokens, share a sentence.
    """
    massive = [row for row in stats.rows if row.massive_values]
    outlying = [row for row in stats.rows if row.outlier_channels]
    broken = [row for row in stats.rows if row.not_finite]
    lines = [_massive(stats, rows) for rows in _alike(massive, lambda row: (row.site, _massive_at(row)))]
    lines += [] if massive else ["No massive values."]
    lines += [_touched(stats, site) for site in SITES if any(p.massive_values for p in _classes(stats, site))]
    lines += [
        f"Outlier channels at {_layers(stats, rows)}: {_listed(_outliers(rows[0]), rows[0].outlier_channels)}."
        for rows in _alike(outlying, _outliers)
    ]
    lines += [] if outlying else ["No outlier channels."]
    if broken:
        lines.append(f"Values that are not finite at {_layers(stats, broken)}.")
    return lines


def _massive(stats: OutlierStats, rows: Sequence[SiteStats]) -> str:
    first = rows[0]
    channels, tokens = _massive_at(first)
    one = "channel" if first.n_massive_channels == 1 else "channels"
    texts = [repr(stats.token_texts.get(i, i)) for i in tokens]
    largest, share = max(row.abs_max for row in rows), max(row.massive_token_share for row in rows)
    return (
        f"Massive values at {_layers(stats, rows)}, up to {largest:.3g}: {one} "
        f"{_listed(channels, first.n_massive_channels)}, on {100 * share:.2g} % of tokens: "
        f"{_listed(texts, first.n_massive_token_ids)}."
    )


def _touched(stats: OutlierStats, site: str) -> str:
    """Where in an answer massive values sit."""
    shares = [
        f"{100 * part.massive_tokens / part.tokens:.2g} % of {part.token_class} tokens"
        for part in _classes(stats, site)
    ]
    return f"While an answer is written, massive values at {site} touch {', '.join(shares)}."


def _classes(stats: OutlierStats, site: str) -> list[PartStats]:
    """Of every token class, the block where massive values touch most tokens of a site."""
    by_class: dict[str, PartStats] = {}
    for part in stats.parts:
        if part.site == site and part.step is None:
            best = by_class.setdefault(part.token_class, part)
            by_class[part.token_class] = max(best, part, key=lambda p: p.massive_tokens)
    return list(by_class.values())


def _massive_at(row: SiteStats) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Channels and token ids with massive values, in rising order."""
    return tuple(sorted(t.channel for t in row.massive_channels)), tuple(sorted(row.massive_token_ids))


def _outliers(row: SiteStats) -> tuple[int, ...]:
    """The outlier channels that are listed, in rising order."""
    return tuple(sorted(c.channel for c in row.top_channels[: row.outlier_channels]))


def _alike(rows: Iterable[SiteStats], key: Callable[[SiteStats], Hashable]) -> list[list[SiteStats]]:
    """Rows with the same key together, in the order of their first."""
    found: dict[Hashable, list[SiteStats]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return list(found.values())


def _layers(stats: OutlierStats, rows: Sequence[SiteStats]) -> str:
    """`attn_in and mlp_in of every block`, `mlp_out of blocks 0-2, 5`, sites with the same blocks together."""
    count = 1 + max(row.block for row in stats.rows)
    by_site = {site: tuple(row.block for row in rows if row.site == site) for site in SITES}
    sites_of: dict[tuple[int, ...], list[str]] = {}
    for site, blocks in by_site.items():
        if blocks:
            sites_of.setdefault(blocks, []).append(site)
    return "; ".join(f"{_and(sites)} of {_blocks(blocks, count)}" for blocks, sites in sites_of.items())


def _blocks(blocks: Sequence[int], count: int) -> str:
    if len(blocks) == count:
        return "every block"
    runs: list[list[int]] = []
    for block in blocks:
        if runs and block == runs[-1][-1] + 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    return ("block " if len(blocks) == 1 else "blocks ") + ", ".join(
        str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs
    )


def _listed(things: Sequence[object], count: int) -> str:
    """The first few of `count` things."""
    shown = ", ".join(map(str, things[:LISTED]))
    more = count - min(LISTED, len(things))
    return f"{shown} and {more} more" if more else shown


def _and(words: Sequence[str]) -> str:
    return ", ".join(words[:-1]) + " and " + words[-1] if words[1:] else words[0]
