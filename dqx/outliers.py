"""Where activation outliers sit: statistics of every linear's input, streamed in one pass, nothing stored.

Per block and site (`attn_in attn_out mlp_in mlp_out`). Memory is a constant per site, about 0.5 MB plus three
numbers per channel, however many tokens pass:

- extremes and moments are exact (float64, merged chunk by chunk: Pebay 2008, SAND2008-6212);
- percentiles come from a histogram of |x| with 128 bins per power of two, so they are within RELATIVE_ERROR of
  the order statistic they stand for;
- counts above a threshold come from the same histogram, and tokens from one of each token's maximum. A threshold
  relative to the median is known only at the end, so it is moved down to the nearest bin edge (by less than
  1/128 of it). Counts are exact for the edge, and the edge is what the record states.

A *normal* outlier is a channel that is large for most tokens: |x| > `channel_ratio` times the token's own median
over channels, for at least `channel_share` of the tokens. A *massive* outlier is a single value with
|x| >= `massive_absolute` and >= `massive_relative` times the median over all values; the count by the relative
condition alone is reported beside it, since small models are small in absolute terms.

B batch, T tokens, C channels of a site, N = B * T.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dqx.models.transformer import SITES, MaskedDiffusionTransformer

MANTISSA_BITS = 7  # 128 bins per power of two
SHIFT = 23 - MANTISSA_BITS
N_BINS = 255 << MANTISSA_BITS  # all finite float32 magnitudes
RELATIVE_ERROR = 2.0 ** -(MANTISSA_BITS + 1)  # of a bin's middle to anything in it: 0.4 %
CHUNK = 2**23  # values looked at together: 64 MiB in float64


class HasIds(Protocol):
    """A batch: token ids [B, T] as the model sees them."""

    @property
    def ids(self) -> Tensor: ...


@dataclass(frozen=True)
class Thresholds:
    """What counts as an outlier; see the module's text."""

    channel_ratio: float = 6.0
    channel_share: float = 0.5
    massive_absolute: float = 100.0
    massive_relative: float = 1000.0
    top: int = 16  # channels and tokens listed per site


@dataclass(frozen=True)
class ChannelRow:
    """One large channel: its maximum, its mean |x|, and the share of tokens where it stands out."""

    channel: int
    abs_max: float
    mean_abs: float
    share: float


@dataclass(frozen=True)
class TokenRow:
    """A token and its largest value. `sequence` counts rows over all batches."""

    sequence: int
    position: int
    token_id: int
    channel: int
    value: float


@dataclass(frozen=True)
class SiteStats:
    """One block and site. `massive_*` need both conditions, `relative_*` only that on the median."""

    block: int
    site: str
    channels: int
    tokens: int
    not_finite: int  # NaN or infinite values, left out of everything below
    abs_max: float
    mean: float
    std: float
    kurtosis: float | None  # fourth standardised moment over all values, 3 for a normal distribution
    median: float  # of |x|, as the percentiles
    p99: float
    p999: float
    p9999: float
    outlier_channels: int
    top_channels: list[ChannelRow]  # by share, then by maximum: outlier channels first, then the runners-up
    massive_threshold: float
    massive_values: int
    massive_tokens: int
    massive_token_share: float
    relative_threshold: float | None  # None where the median is 0: nothing can be judged by it
    relative_values: int
    relative_tokens: int
    relative_token_share: float
    top_tokens: list[TokenRow]  # the tokens with the largest |x|, massive or not
    histogram: dict[str, list[float]]  # |x| by powers of two: `edges`, one more than `counts`

    @property
    def max_over_median(self) -> float | None:
        return self.abs_max / self.median if self.median else None


@dataclass(frozen=True)
class OutlierStats:
    """Statistics of every block and site, in data-flow order, and the settings they were made with."""

    thresholds: Thresholds
    sequences: int
    tokens: int
    rows: list[SiteStats]
    relative_error: float = RELATIVE_ERROR  # of the percentiles

    def at(self, block: int, site: str) -> SiteStats:
        """The row of one block and site. Raises KeyError."""
        for row in self.rows:
            if (row.block, row.site) == (block, site):
                return row
        raise KeyError((block, site))

    def worst(self, site: str) -> SiteStats:
        """The block whose largest value at this site is the largest; values that are not finite are larger than any."""
        return max((row for row in self.rows if row.site == site), key=lambda row: (row.not_finite, row.abs_max))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> OutlierStats:
        """The statistics that `to_dict` wrote."""
        rows = []
        for row in data["rows"]:
            channels = [ChannelRow(**c) for c in row["top_channels"]]
            tokens = [TokenRow(**t) for t in row["top_tokens"]]
            values: dict[str, Any] = {k: float(v) if v == "NaN" else v for k, v in row.items()}
            rows.append(SiteStats(**(values | {"top_channels": channels, "top_tokens": tokens})))
        return cls(Thresholds(**data["thresholds"]), data["sequences"], data["tokens"], rows, data["relative_error"])


@torch.no_grad()
def measure(
    model: MaskedDiffusionTransformer, batches: Iterable[HasIds], thresholds: Thresholds | None = None
) -> OutlierStats:
    """Run `batches` through the model once and return the statistics of every linear's input.

    Works alike before and after quantization: a quantized linear is called with the same activation, before its
    own activation quantizer. Raises ValueError without batches.
    """
    settings = thresholds or Thresholds()
    readers = {site: roles[0] for site, roles in SITES.items()}  # linears of one site read the same tensor
    meters: dict[tuple[int, str], _Meter] = {}
    ids = torch.empty(0, 0, dtype=torch.long)
    sequences = tokens = 0

    def watch(meter: _Meter, module: nn.Module) -> Any:
        return module.register_forward_pre_hook(lambda _, inputs: meter.update(inputs[0], ids, sequences))

    with ExitStack() as stack:
        for index, block in enumerate(model.blocks):
            for site, role in readers.items():
                meters[index, site] = meter = _Meter(model.arch.in_features(role), model.device, settings)
                stack.callback(watch(meter, getattr(block, role)).remove)
        for batch in batches:
            ids = batch.ids.to(model.device)
            deque(model.hidden_states(ids), maxlen=0)  # every block, without the head
            sequences += ids.shape[0]
            tokens += ids.numel()
    if not tokens:
        raise ValueError("no batch to measure outliers on; set outliers.samples to 1 or more")
    return OutlierStats(settings, sequences, tokens, [meter.result(*place) for place, meter in meters.items()])


class _Meter:
    """The running statistics of one site of width C, on the device of its activations."""

    def __init__(self, channels: int, device: torch.device, settings: Thresholds):
        self.settings = settings
        self.n = self.tokens = 0
        self.moments = torch.zeros(4, dtype=torch.float64, device=device)  # mean and 2nd to 4th central sums
        self.not_finite = torch.zeros((), dtype=torch.long, device=device)
        self.values = torch.zeros(N_BINS, dtype=torch.long, device=device)  # histogram of |x|
        self.maxima = torch.zeros(N_BINS, dtype=torch.long, device=device)  # histogram of each token's largest |x|
        self.channel_max = torch.zeros(channels, device=device)
        self.channel_sum = torch.zeros(channels, dtype=torch.float64, device=device)
        self.channel_hits = torch.zeros(channels, dtype=torch.long, device=device)
        self.top_values = torch.zeros(0, device=device)
        self.top_places = torch.zeros(0, 4, dtype=torch.long, device=device)  # sequence, position, token id, channel

    def update(self, x: Tensor, ids: Tensor, first_sequence: int) -> None:
        """Take in x [B, T, C] of the tokens ids [B, T], whose rows are sequences `first_sequence` onwards."""
        flat, length = x.detach().reshape(-1, x.shape[-1]), ids.shape[1]
        step = max(1, CHUNK // flat.shape[1])
        for start in range(0, flat.shape[0], step):
            rows = torch.arange(start, min(start + step, flat.shape[0]), device=x.device)
            sequence = rows // length + first_sequence
            places = torch.stack((sequence, rows % length, ids.reshape(-1)[rows]), dim=1)
            self._chunk(flat[start : start + step].float(), places)

    def _chunk(self, x: Tensor, places: Tensor) -> None:
        finite = x.isfinite()
        bad = int((~finite).sum())
        if bad:
            self.not_finite += bad
            x = x.masked_fill(~finite, 0.0)
        self._merge_moments(x[finite] if bad else x)
        size = x.abs()
        self.values += torch.bincount(_bins(size[finite] if bad else size), minlength=N_BINS)
        token_max, token_channel = size.max(dim=1)
        self.maxima += torch.bincount(_bins(token_max), minlength=N_BINS)
        self.tokens += len(x)
        self.channel_max = torch.maximum(self.channel_max, size.amax(dim=0))
        self.channel_sum += size.sum(dim=0, dtype=torch.float64)
        typical = size.median(dim=1, keepdim=True).values
        self.channel_hits += ((size > self.settings.channel_ratio * typical) & (typical > 0)).sum(dim=0)
        self._merge_top(x.gather(1, token_channel[:, None])[:, 0], torch.cat((places, token_channel[:, None]), dim=1))

    def _merge_moments(self, x: Tensor) -> None:
        """Pebay's update of mean and central sums by those of a chunk, in float64."""
        b = x.numel()
        if not b:
            return
        a, n = self.n, self.n + b
        wide = x.double()
        mean = wide.mean()
        d = wide - mean
        square = d * d
        m2, m3, m4 = square.sum(), (square * d).sum(), (square * square).sum()
        old_mean, o2, o3, o4 = self.moments.unbind()
        gap = mean - old_mean
        self.moments = torch.stack(
            (
                old_mean + gap * b / n,
                o2 + m2 + gap**2 * a * b / n,
                o3 + m3 + gap**3 * a * b * (a - b) / n**2 + 3 * gap * (a * m2 - b * o2) / n,
                o4
                + m4
                + gap**4 * a * b * (a * a - a * b + b * b) / n**3
                + 6 * gap**2 * (a * a * m2 + b * b * o2) / n**2
                + 4 * gap * (a * m3 - b * o3) / n,
            )
        )
        self.n = n

    def _merge_top(self, values: Tensor, places: Tensor) -> None:
        values, places = torch.cat((self.top_values, values)), torch.cat((self.top_places, places))
        best = values.abs().sort(descending=True, stable=True).indices[: self.settings.top]  # of equals, the first seen
        self.top_values, self.top_places = values[best], places[best]

    def result(self, block: int, site: str) -> SiteStats:
        settings, values = self.settings, self.values.cpu()
        mean, m2, _, m4 = self.moments.tolist()
        variance = m2 / self.n if self.n else math.nan
        median, p99, p999, p9999 = _quantiles(values, (0.5, 0.99, 0.999, 0.9999))
        relative_bin = _bin_of(settings.massive_relative * median) if median > 0 else N_BINS
        massive_bin = _bin_of(settings.massive_absolute)
        if median > 0:
            massive_bin = max(massive_bin, relative_bin)
        maxima = self.maxima.cpu()
        relative_tokens, massive_tokens = int(maxima[relative_bin:].sum()), int(maxima[massive_bin:].sum())
        return SiteStats(
            block=block,
            site=site,
            channels=len(self.channel_max),
            tokens=self.tokens,
            not_finite=int(self.not_finite),
            abs_max=float(self.channel_max.max()),
            mean=mean,
            std=math.sqrt(variance),
            kurtosis=m4 / self.n / variance**2 if variance > 0 else None,
            median=median,
            p99=p99,
            p999=p999,
            p9999=p9999,
            outlier_channels=int((self.channel_hits >= settings.channel_share * self.tokens).sum()),
            top_channels=self._top_channels(),
            massive_threshold=_edge(massive_bin),
            massive_values=int(values[massive_bin:].sum()),
            massive_tokens=massive_tokens,
            massive_token_share=massive_tokens / self.tokens,
            relative_threshold=_edge(relative_bin) if median > 0 else None,
            relative_values=int(values[relative_bin:].sum()),
            relative_tokens=relative_tokens,
            relative_token_share=relative_tokens / self.tokens,
            top_tokens=self._top_tokens(),
            histogram=_octaves(values),
        )

    def _top_channels(self) -> list[ChannelRow]:
        hits, largest = self.channel_hits.tolist(), self.channel_max.tolist()
        means = (self.channel_sum / self.tokens).tolist()
        order = sorted(range(len(hits)), key=lambda c: (hits[c], largest[c]), reverse=True)
        return [ChannelRow(c, largest[c], means[c], hits[c] / self.tokens) for c in order[: self.settings.top]]

    def _top_tokens(self) -> list[TokenRow]:
        places, values = self.top_places.tolist(), self.top_values.tolist()
        return [TokenRow(s, p, i, c, v) for (s, p, i, c), v in zip(places, values, strict=True)]


def _bins(size: Tensor) -> Tensor:
    """Bin of each |x|: the exponent and the first 7 bits of the mantissa, read off the float32 pattern."""
    return size.contiguous().view(torch.int32).flatten() >> SHIFT


def _bin_of(value: float) -> int:
    """The bin that holds a threshold; its lower edge is the threshold used. Never 0, the bin of exact zeros."""
    return max(1, int(_bins(torch.tensor([min(value, torch.finfo(torch.float32).max)]))))


def _edge(index: int) -> float:
    """Lower edge of a bin."""
    return float(torch.tensor([index << SHIFT], dtype=torch.int32).view(torch.float32))


def _width(index: int) -> float:
    """Width of a bin relative to its lower edge: 1/128 in the first bin of a power of two, 1/255 in the last."""
    return 1 / ((1 << MANTISSA_BITS) + index % (1 << MANTISSA_BITS))


def _quantiles(counts: Tensor, shares: Sequence[float]) -> list[float]:
    """Per share p the middle of the bin of the ceil(p n)-th smallest value; 0 for the bin of zeros, NaN for none."""
    below = counts.cumsum(0)
    n = int(below[-1])
    if not n:
        return [math.nan for _ in shares]
    found = []
    for share in shares:
        rank = max(1, math.ceil(share * n))
        index = int(torch.searchsorted(below, torch.tensor(rank)))
        found.append(_edge(index) * (1 + _width(index) / 2) if index else 0.0)
    return found


def _octaves(counts: Tensor) -> dict[str, list[float]]:
    """Counts of |x| by powers of two, from the first to the last that holds anything; zeros are left out."""
    by_octave = counts.clone()
    by_octave[0] = 0
    by_octave = by_octave.view(255, 1 << MANTISSA_BITS).sum(1)
    used = by_octave.nonzero().flatten().tolist()
    if not used:
        return {"edges": [], "counts": []}
    first, last = used[0], used[-1]
    edges = [_edge(i << MANTISSA_BITS) for i in range(first, last + 1)]
    return {"edges": [*edges, edges[-1] * 2], "counts": [float(c) for c in by_octave[first : last + 1]]}


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
