"""Running statistics of what the linears of one site read: fixed in size, however many tokens pass.

G groups of tokens, N tokens, C channels of the site.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dqx.diagnostics.activations.moments import Moments
from dqx.diagnostics.activations.sketch import LogHistogram
from dqx.diagnostics.activations.stats import ChannelRow, PartStats, SiteStats, Thresholds, TokenRow

MANTISSA_BITS = 7  # 128 bins per power of two: percentiles to 0.4 %
PART_MANTISSA_BITS = 5  # 32 bins, for parts: 1.6 %
PART_TOP = 4  # tokens listed per part
CHUNK = {"cpu": 2**17, "gpu": 2**23}  # values looked at together: what a CPU's cache holds, 64 MiB of float64


@dataclass(frozen=True)
class Tokens:
    """The tokens of a forward: `places` [N, 3] sequence, position, token id; `group` [N] from 0, None: all alike."""

    places: Tensor
    group: Tensor | None = None

    @classmethod
    def of(cls, ids: Tensor, first_sequence: int, group: Tensor | None = None) -> Tokens:
        """Those of ids [B, T], whose rows are sequences `first_sequence` onwards."""
        row, position = torch.meshgrid(*(torch.arange(n, device=ids.device) for n in ids.shape), indexing="ij")
        places = torch.stack((row + first_sequence, position, ids), dim=-1).flatten(0, 1)
        return cls(places, None if group is None else group.flatten())


@dataclass(frozen=True)
class Chunk:
    """A few tokens' activations x [N, C] in float32, what is not finite set to 0, and what every meter asks of them."""

    x: Tensor
    size: Tensor  # |x|
    finite: Tensor | None  # [N, C]; None: everything is
    tokens: Tokens
    token_max: Tensor  # [N]

    def outstanding(self, ratio: float) -> Tensor:
        """Where |x| exceeds `ratio` times the token's median, and that is above 0: [N, C] bool."""
        typical = _median(self.size)[:, None]
        return (self.size > ratio * typical) & (typical > 0)

    def largest(self) -> tuple[Tensor, Tensor]:
        """The largest value of every token [N], and its place [N, 4]: sequence, position, token id, channel."""
        channel = self.size.argmax(1, keepdim=True)
        return self.x.gather(1, channel)[:, 0], torch.cat((self.tokens.places, channel), dim=1)


def chunks(x: Tensor, tokens: Tokens) -> Iterator[Chunk]:
    """The activations x [..., C] of `tokens`, a few at a time."""
    flat = x.detach().reshape(-1, x.shape[-1])
    step = max(1, CHUNK["cpu" if x.device.type == "cpu" else "gpu"] // flat.shape[1])
    for start in range(0, len(flat), step):
        part = flat[start : start + step].float()
        finite = part.isfinite()
        known = None if finite.all() else finite
        part = part if known is None else part.masked_fill(~finite, 0.0)
        group = None if tokens.group is None else tokens.group[start : start + step]
        size = part.abs()
        yield Chunk(part, size, known, Tokens(tokens.places[start : start + step], group), size.amax(1))


class SiteMeter:
    """All tokens of one block and site of width C."""

    def __init__(self, channels: int, vocabulary: int, device: torch.device, settings: Thresholds):
        self.settings = settings
        self.tokens = 0
        self.moments = Moments(device=device)
        self.values = LogHistogram(MANTISSA_BITS, device=device)
        self.maxima = LogHistogram(MANTISSA_BITS, device=device)  # of each token's largest |x|
        self.not_finite = torch.zeros((), dtype=torch.long, device=device)
        self.channel_peak = torch.zeros(channels, device=device)  # the value with the largest |x|
        self.channel_place = torch.zeros(channels, 3, dtype=torch.long, device=device)  # and where it was
        self.channel_sum = torch.zeros(channels, dtype=torch.float64, device=device)
        self.channel_hits = torch.zeros(channels, dtype=torch.long, device=device)
        self.id_max = torch.zeros(vocabulary, device=device)  # the largest |x| by token id
        self.top = Top(settings.top, 1, device)

    @property
    def channel_max(self) -> Tensor:
        return self.channel_peak.abs()

    def update(self, x: Tensor, tokens: Tokens) -> None:
        """Take in x [B, T, C] of these tokens."""
        for chunk in chunks(x, tokens):
            if chunk.finite is not None:
                self.not_finite += (~chunk.finite).sum()
            self.tokens += len(chunk.x)
            self.moments.add(chunk.x, chunk.finite)
            self.values.add(chunk.size, chunk.finite)
            self.maxima.add(chunk.token_max)
            self.channel_sum += chunk.size.sum(dim=0, dtype=torch.float64)
            self.channel_hits += chunk.outstanding(self.settings.channel_ratio).sum(dim=0)
            self.id_max.scatter_reduce_(0, chunk.tokens.places[:, 2], chunk.token_max, "amax")
            self._peaks(chunk)
            self.top.add(*chunk.largest())

    def _peaks(self, chunk: Chunk) -> None:
        """Channels that are larger here than ever before."""
        larger = (chunk.size.amax(0) > self.channel_max).nonzero()[:, 0]
        if len(larger):
            row = chunk.size[:, larger].argmax(0)
            self.channel_peak[larger] = chunk.x[row, larger]
            self.channel_place[larger] = chunk.tokens.places[row]

    def result(self, block: int, site: str) -> SiteStats:
        settings, values = self.settings, self.values
        mean, std, kurtosis = self.moments.of()
        median, p99, p999, p9999 = values.quantiles((0.5, 0.99, 0.999, 0.9999))
        relative = values.bin_of(settings.massive_relative * median) if median > 0 else values.counts.shape[1]
        massive = values.bin_of(settings.massive_absolute)
        if median > 0:
            massive = max(massive, relative)
        massive_tokens, relative_tokens = self.maxima.count_from(massive), self.maxima.count_from(relative)
        channels = self._massive_channels(values.edge(massive))
        ids = _largest(self.id_max, values.edge(massive))
        return SiteStats(
            block=block,
            site=site,
            channels=len(self.channel_peak),
            tokens=self.tokens,
            not_finite=int(self.not_finite),
            abs_max=float(self.channel_max.max()),
            mean=mean,
            std=std,
            kurtosis=kurtosis,
            median=median,
            p99=p99,
            p999=p999,
            p9999=p9999,
            outlier_channels=int((self.channel_hits >= settings.channel_share * self.tokens).sum()),
            top_channels=self._top_channels(),
            massive_threshold=values.edge(massive),
            massive_values=values.count_from(massive),
            massive_tokens=massive_tokens,
            massive_token_share=massive_tokens / self.tokens,
            relative_threshold=values.edge(relative) if median > 0 else None,
            relative_values=values.count_from(relative),
            relative_tokens=relative_tokens,
            relative_token_share=relative_tokens / self.tokens,
            top_tokens=self.top.rows(),
            histogram=values.octaves(),
            massive_channels=channels[: settings.top],
            massive_token_ids=ids[: settings.top],
            n_massive_channels=len(channels),
            n_massive_token_ids=len(ids),
        )

    def _top_channels(self) -> list[ChannelRow]:
        hits, largest = self.channel_hits.tolist(), self.channel_max.tolist()
        means = (self.channel_sum / self.tokens).tolist()
        order = sorted(range(len(hits)), key=lambda c: (hits[c], largest[c]), reverse=True)
        return [ChannelRow(c, largest[c], means[c], hits[c] / self.tokens) for c in order[: self.settings.top]]

    def _massive_channels(self, threshold: float) -> list[TokenRow]:
        places, values = self.channel_place.tolist(), self.channel_peak.tolist()
        return [TokenRow(*[*places[c], c, values[c]]) for c in _largest(self.channel_max, threshold)]


class PartMeter:
    """Groups of tokens of one block and site of width C, with thresholds that are known beforehand."""

    def __init__(self, channels: int, groups: int, device: torch.device, settings: Thresholds, row: SiteStats):
        self.settings, self.row = settings, row
        self.moments = Moments(groups, device)
        self.values = LogHistogram(PART_MANTISSA_BITS, groups, device)
        self.counts = torch.zeros(groups, 5, dtype=torch.long, device=device)  # see `_counted`
        self.abs_max = torch.zeros(groups, device=device)
        self.channel_hits = torch.zeros(groups, channels, dtype=torch.long, device=device)
        self.top = Top(PART_TOP, groups, device)

    def update(self, x: Tensor, tokens: Tokens) -> None:
        """Take in x [B, T, C] of these tokens, which have groups."""
        for chunk in chunks(x, tokens):
            group = chunk.tokens.group
            assert group is not None
            member = group == torch.arange(len(self.counts), device=x.device)[:, None]  # [G, N]
            self.moments.add(chunk.x, chunk.finite, member)
            self.values.add(chunk.size, chunk.finite, group)
            self.counts += (member.double() @ self._counted(chunk)).long()
            self.abs_max = torch.maximum(self.abs_max, (member * chunk.token_max).amax(1))
            # whole numbers below 2^24: exact in float32
            outstanding = chunk.outstanding(self.settings.channel_ratio).float()
            self.channel_hits += (member.float() @ outstanding).long()
            self.top.add(*chunk.largest(), member)

    def _counted(self, chunk: Chunk) -> Tensor:
        """What every token counts [N, 5]: itself, massive values, whether it has any, and the same by the median."""
        columns = [torch.ones_like(chunk.token_max)]
        for threshold in (self.row.massive_threshold, self.row.relative_threshold):
            limit = math.inf if threshold is None else threshold
            columns += [(chunk.size >= limit).sum(1), chunk.token_max >= limit]
        return torch.stack([column.double() for column in columns], dim=1)

    def merge(self, other: PartMeter) -> None:
        """Take in what another one has, group by group; where this one has a single group, all groups as one."""
        sets = (-1, len(self.counts))  # the other's groups, as sets of as many as there are here
        self.moments.merge(other.moments)
        self.values.counts += other.values.counts.unflatten(0, sets).sum(0)
        self.counts += other.counts.unflatten(0, sets).sum(0)
        self.abs_max = torch.maximum(self.abs_max, other.abs_max.unflatten(0, sets).amax(0))
        self.channel_hits += other.channel_hits.unflatten(0, sets).sum(0)
        self.top.merge(other.top)

    def total(self) -> PartMeter:
        """All groups as one."""
        whole = PartMeter(self.channel_hits.shape[1], 1, self.counts.device, self.settings, self.row)
        whole.merge(self)
        return whole

    def result(
        self, token_class: str, group: int = 0, step: int | None = None, mask_ratio: float | None = None
    ) -> PartStats | None:
        """The statistics of a group, None where it has no tokens."""
        tokens, massive_values, massive_tokens, relative_values, relative_tokens = self.counts[group].tolist()
        if not tokens:
            return None
        median, p99, p999 = self.values.quantiles((0.5, 0.99, 0.999), group)
        hits = self.channel_hits[group]
        channels = (hits >= self.settings.channel_share * tokens).nonzero()[:, 0]
        order = hits[channels].sort(descending=True, stable=True).indices
        return PartStats(
            block=self.row.block,
            site=self.row.site,
            token_class=token_class,
            step=step,
            mask_ratio=mask_ratio,
            tokens=tokens,
            abs_max=float(self.abs_max[group]),
            median=median,
            p99=p99,
            p999=p999,
            kurtosis=self.moments.of(group)[2],
            outlier_channels=len(channels),
            massive_values=massive_values,
            massive_tokens=massive_tokens,
            relative_values=relative_values,
            relative_tokens=relative_tokens,
            channels=channels[order][: self.settings.top].tolist(),
            top_tokens=self.top.rows(group),
        )


class Top:
    """Of each group the tokens with the largest |x|, at most `count`; of equals, those seen first."""

    def __init__(self, count: int, groups: int, device: torch.device):
        self.size = torch.full((groups, count), -1.0, device=device)  # |x|; below 0: no token yet
        self.values = torch.zeros(groups, count, device=device)
        self.places = torch.zeros(groups, count, 4, dtype=torch.long, device=device)  # sequence, ..., channel

    def add(self, values: Tensor, places: Tensor, member: Tensor | None = None) -> None:
        """Take in the largest value [N] of each token, its place [N, 4], and its groups [G, N] (None: there is one)."""
        groups = len(self.size)
        size = values.abs().expand(groups, -1)
        size = size if member is None else size.masked_fill(~member, -1.0)
        self._keep(size, values.expand(groups, -1), places.expand(groups, -1, -1))

    def merge(self, other: Top) -> None:
        """Take in what another one has, as `PartMeter.merge` does."""
        groups = len(self.size)
        self._keep(other.size.view(groups, -1), other.values.view(groups, -1), other.places.view(groups, -1, 4))

    def rows(self, group: int = 0) -> list[TokenRow]:
        listed = zip(*(t[group].tolist() for t in (self.size, self.places, self.values)), strict=True)
        return [TokenRow(*[*place, value]) for size, place, value in listed if size >= 0]

    def _keep(self, size: Tensor, values: Tensor, places: Tensor) -> None:
        count, size = self.size.shape[1], torch.cat((self.size, size), dim=1)
        best = size.sort(dim=1, descending=True, stable=True).indices[:, :count]
        self.size = size.gather(1, best)
        self.values = torch.cat((self.values, values), dim=1).gather(1, best)
        self.places = torch.cat((self.places, places), dim=1).gather(1, best[..., None].expand(-1, -1, 4))


def _median(size: Tensor) -> Tensor:
    """The lower median of each row, [N] of [N, C]."""
    if size.device.type != "cpu":
        return size.median(dim=1).values
    middle = (size.shape[1] - 1) // 2
    return torch.from_numpy(np.partition(size.numpy(), middle, axis=1)[:, middle])  # 5 to 15 times as fast as torch's


def _largest(sizes: Tensor, threshold: float) -> list[int]:
    """Indices of the entries that reach a threshold, the largest first."""
    reaching: list[int] = (sizes >= threshold).nonzero()[:, 0].tolist()
    at = sizes.tolist()
    return sorted(reaching, key=lambda i: -at[i])
