"""What the statistics say, in short: a row per site, and plain sentences about which outliers sit where."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from dqx.common.names import enumerated
from dqx.diagnostics.activations.stats import OutlierStats, PartStats, SiteStats

LISTED = 6  # channels or tokens named in a sentence
SENTENCES = 6  # of a kind


#: What a summary says of a site, by attributes of `SiteStats`.
SUMMARY: tuple[str, ...]
SUMMARY = ("site", "block", "abs_max", "median", "max_over_median", "kurtosis", "outlier_channels", "channels")
SUMMARY += ("massive_values", "massive_token_share", "relative_values", "relative_token_share", "not_finite")


def summary(stats: OutlierStats) -> list[dict[str, Any]]:
    """Per site the block with the largest value, in short."""
    return [{name: getattr(worst, name) for name in SUMMARY} for worst in map(stats.worst, stats.sites)]


def findings(stats: OutlierStats) -> list[str]:
    """Sentences: which values are massive, at which layers, channels and tokens; which channels are outliers, where.

    Channels that stand out at the same layers share a sentence. Of each kind the first few sentences are there, those
    of the largest values, or of the most layers; the last one says how much is left out.
    """
    massive = _by_layers(
        ((row.site, token.channel), row, abs(token.value)) for row in stats.rows for token in row.massive_channels
    )
    massive.sort(key=lambda group: -group.largest)
    outlying = _by_layers((("", channel), row, row.abs_max) for row in stats.rows for channel in _outliers(row))
    outlying.sort(key=lambda group: -len(group.rows))
    broken = [row for row in stats.rows if row.not_finite]
    counted = [row for row in stats.rows if row.massive_values]
    unplaced = f"Massive values at {_layers(stats, counted)}; the record does not say in which channels."
    lines = [_massive(stats, group) for group in massive[:SENTENCES]]
    lines = lines or [unplaced if counted else "No massive values."]  # records of before version 4 have counts alone
    lines += _left_out("Channels with massive values", massive)
    lines += [_touched(stats, site) for site in stats.sites if any(p.massive_values for p in _classes(stats, site))]
    lines += [
        f"Outlier channels at {_layers(stats, group.rows)}: {_listed(group.channels)}."
        for group in outlying[:SENTENCES]
    ] or ["No outlier channels."]
    lines += _left_out("Outlier channels", outlying)
    if broken:
        lines.append(f"Values that are not finite at {_layers(stats, broken)}.")
    return lines


@dataclass
class ChannelGroup:
    """Channels that stand out at the same layers."""

    channels: list[int]
    rows: list[SiteStats]
    largest: float


def _by_layers(outstanding: Iterable[tuple[tuple[str, int], SiteStats, float]]) -> list[ChannelGroup]:
    """Groups from single finds: what has to be alike besides the layers, with the channel; the layer; the value."""
    layers: dict[tuple[str, int], list[SiteStats]] = {}
    largest: dict[tuple[str, int], float] = {}
    for key, row, value in outstanding:
        layers.setdefault(key, []).append(row)
        largest[key] = max(value, largest.get(key, 0.0))
    groups: dict[Hashable, ChannelGroup] = {}
    for (kind, channel), rows in sorted(layers.items()):
        places = (kind, *((row.block, row.site) for row in rows))
        group = groups.setdefault(places, ChannelGroup([], rows, 0.0))
        group.channels.append(channel)
        group.largest = max(group.largest, largest[kind, channel])
    return list(groups.values())


def _massive(stats: OutlierStats, group: ChannelGroup) -> str:
    ids = sorted({i for row in group.rows for i in row.massive_token_ids})
    texts = [repr(stats.token_texts.get(i, i)) for i in ids]
    more = max(row.n_massive_token_ids - len(row.massive_token_ids) for row in group.rows)
    share = max(row.massive_token_share for row in group.rows)
    return (
        f"Massive values at {_layers(stats, group.rows)}, up to {group.largest:.3g}: "
        f"{'channels' if group.channels[1:] else 'channel'} {_listed(group.channels)}; "
        f"tokens that have any there: {_listed(texts, more)} ({100 * share:.2g} %)."
    )


def _left_out(what: str, groups: Sequence[ChannelGroup]) -> list[str]:
    count = sum(len(group.channels) for group in groups[SENTENCES:])
    return [f"{what} besides these: {count}."] if count else []


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


def _outliers(row: SiteStats) -> tuple[int, ...]:
    """The outlier channels that are listed, in rising order."""
    return tuple(sorted(c.channel for c in row.top_channels[: row.outlier_channels]))


def _layers(stats: OutlierStats, rows: Sequence[SiteStats]) -> str:
    """`attn_in and mlp_in of every block`, `mlp_out of blocks 0-2, 5`, sites with the same blocks together."""
    count = 1 + max(row.block for row in stats.rows)
    by_site = {site: tuple(row.block for row in rows if row.site == site) for site in stats.sites}
    sites_of: dict[tuple[int, ...], list[str]] = {}
    for site, blocks in by_site.items():
        if blocks:
            sites_of.setdefault(blocks, []).append(site)
    return "; ".join(f"{enumerated(sites)} of {_blocks(blocks, count)}" for blocks, sites in sites_of.items())


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


def _listed(things: Sequence[object], unknown: int = 0) -> str:
    """The first few things, and how many more there are, `unknown` ones among them."""
    shown = ", ".join(map(str, things[:LISTED]))
    more = len(things[LISTED:]) + unknown
    return f"{shown} and {more} more" if more else shown
